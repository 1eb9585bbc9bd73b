# SPDX-License-Identifier: Apache-2.0
"""VIRST as published: inference over a whole recorded video, non-causal. The yardstick for the stream.

T_seg frames are sampled uniformly from the video (section 3.2); the reasoner answers once; Algorithm 2 picks
K = max(1, floor(T_seg / 4)) of them as anchors; every other frame attends to the alpha anchors nearest in time, future
ones included, and to its P - 1 predecessors. Masks spread from the earliest anchor to the end and then backwards to the
start, as SAM 2's video predictor does (sam2/sam2_video_predictor.py, `propagate_in_video`, commit 2b90b9f). An anchor
frame keeps the mask of its prompt. As published, no memory write is gated: an absent object is remembered as absent,
and absence is the mask decoder's alone to tell, whatever the prompts' confidence.

The features of a frame are computed when its turn comes and then dropped, so a long video takes no more memory than a
short one: those of the clip, the anchors, and the memory of the newest frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig, MemoryParameters
from virst_engine.errors import VideoError
from virst_engine.fast.postprocess import empty_mask, mask_at_size
from virst_engine.fast.preprocess import Preprocess, check_image, resize_image
from virst_engine.slow.reasoner import Reasoner
from virst_engine.timing import StageTimer
from virst_engine.types import (
    Clip,
    Frame,
    ImageFeatures,
    MaskPrediction,
    MemoryEntry,
    MemoryTensors,
    PromptTokens,
    ReasonerRequest,
    StageSizes,
)

NearTime = dict[int, MemoryEntry]  # frame index -> memory of every object in that frame
Lent = TypeVar("Lent", ImageFeatures, MaskPrediction, MemoryEntry)


class FrameSource(Protocol):
    """A recorded video: a list of frames, or something that reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Frame: ...


@dataclass(frozen=True)
class OfflineFrame:
    """One frame of the video, and the decoder's word on the object of each sentence (o = goals) in it."""

    number: int
    frame: Frame
    prediction: MaskPrediction
    timings_ms: dict[str, float]  # of each stage, in this frame


def anchor_frames(clip_frames: int) -> list[int]:
    """Positions in the clip that Algorithm 2 makes anchors: max(1, floor(T/4)), evenly spread, the first always."""
    count = max(1, clip_frames // 4)
    return sorted({int(position) for position in np.linspace(0, clip_frames - 1, count).round()})


def uniform_frames(video_frames: int, clip_frames: int) -> list[int]:
    """Frame indices of a clip spread evenly over the video, ends included; they repeat where the video is shorter."""
    return [int(index) for index in np.linspace(0, video_frames - 1, clip_frames).round()]


def nearest_anchors(frame: int, anchors: Sequence[int], count: int) -> list[int]:
    """Algorithm 2: the `count` anchors closest in time to `frame`, before or after; the earlier one wins a tie."""
    return sorted(anchors, key=lambda anchor: (abs(anchor - frame), anchor))[:count]


def assemble_memory(
    frame: int, anchors: NearTime, recent: NearTime, parameters: MemoryParameters, sizes: StageSizes, backwards: bool
) -> MemoryTensors:
    """The memory that one frame of a whole video attends to.

    Args:
        anchors: all anchors of the video, whatever their time.
        recent: every propagated frame so far; those within P - 1 steps behind (ahead, when backwards) are taken.
    """
    direction = 1 if backwards else -1
    some = next(iter(anchors.values()))
    objects, slots = some.spatial.shape[0], parameters.anchors_attended + parameters.recent_frames
    device = some.spatial.device
    spatial = some.spatial.new_zeros(objects, slots, *some.spatial.shape[1:])
    tpos = torch.zeros(objects, slots, dtype=torch.long, device=device)
    spatial_valid = torch.zeros(objects, slots, dtype=torch.bool, device=device)
    pointers = some.pointer.new_zeros(objects, parameters.pointers, some.pointer.shape[1])
    distance = some.pointer.new_zeros(objects, parameters.pointers)
    pointer_valid = torch.zeros(objects, parameters.pointers, dtype=torch.bool, device=device)

    chosen = nearest_anchors(frame, list(anchors), parameters.anchors_attended)
    # An anchor that was not chosen still counts as a recent frame when it is one (SAM 2: unselected_cond_outputs).
    behind = {**{t: entry for t, entry in anchors.items() if t not in chosen}, **recent}
    for slot, anchor in enumerate(chosen):
        spatial[:, slot], spatial_valid[:, slot] = anchors[anchor].spatial, True
        tpos[:, slot] = sizes.memory_frames - 1
    for back in range(1, parameters.recent_frames + 1):
        entry = behind.get(frame + direction * back)
        if entry is not None:
            slot = len(chosen) + back - 1
            spatial[:, slot], spatial_valid[:, slot], tpos[:, slot] = entry.spatial, True, back - 1

    # Pointers of future anchors are left out, though their spatial memory is not (only_obj_ptrs_in_the_past_for_eval).
    known = [(abs(frame - t), anchors[t].pointer) for t in chosen if (t - frame) * direction >= 0]
    for back in range(1, parameters.pointers):
        entry = behind.get(frame + direction * back)
        if entry is not None:
            known.append((back, entry.pointer))
    for row, (steps, pointer) in enumerate(known[: parameters.pointers]):
        pointers[:, row], distance[:, row], pointer_valid[:, row] = pointer, float(steps), True
    return MemoryTensors(spatial, tpos, spatial_valid, pointers, distance, pointer_valid)


def segment_whole_video(
    stages: Stages,
    reasoner: Reasoner,
    frames: FrameSource,
    sentences: Sequence[str],
    config: EngineConfig,
    *,
    first_anchor_only: bool = False,
) -> Bool[np.ndarray, "goals frames height width"]:
    """One mask per goal and frame of a recorded video, at the camera's size. All frames must have one size.

    Arguments and errors as of `propagate_whole_video`.
    """
    masks: dict[int, Bool[np.ndarray, "goals height width"]] = {}
    for seen in propagate_whole_video(stages, reasoner, frames, sentences, config, first_anchor_only=first_anchor_only):
        masks[seen.number] = camera_masks(seen)
    return np.stack([masks[number] for number in range(len(frames))], axis=1)


def camera_masks(seen: OfflineFrame) -> Bool[np.ndarray, "goals height width"]:
    """The mask of each sentence's object at the camera's size; empty where the decoder sees none."""
    height, width = seen.frame.image_rgb_u8.shape[:2]
    present = (seen.prediction.object_score_logits > 0).cpu().numpy()
    logits = seen.prediction.mask_logits.float().cpu().numpy()
    return np.stack(
        [
            mask_at_size(logits[goal], height, width) if present[goal] else empty_mask(height, width)
            for goal in range(len(present))
        ]
    )


@torch.inference_mode()
def propagate_whole_video(
    stages: Stages,
    reasoner: Reasoner,
    frames: FrameSource,
    sentences: Sequence[str],
    config: EngineConfig,
    *,
    first_anchor_only: bool = False,
) -> Iterator[OfflineFrame]:
    """Each frame once: from the earliest anchor to the end, then from there backwards to the start.

    What it yields is good until the next one is asked for.

    Args:
        frames: the whole video, at least one frame.
        config: `reasoner.clip_frames` is T_seg, `memory` gives alpha, P - 1 and the pointers.
        first_anchor_only: ablation, the first frame of the clip is the only anchor (VIRST, table 5).

    Raises:
        VirstError: the reasoner cannot answer a sentence, or an image cannot be used.
    """
    device = torch.device(config.model.device)
    preprocess = Preprocess(stages.sizes.image_size, device)

    def encode(frame: Frame) -> ImageFeatures:
        check_image(frame.image_rgb_u8)
        return stages.image_encoder(preprocess(frame.image_rgb_u8))

    sampled = uniform_frames(len(frames), config.reasoner.clip_frames)
    of_clip = {t: frames[t] for t in sorted(set(sampled))}
    kept = {t: _own(encode(frame)) for t, frame in of_clip.items()}
    embeddings, prompted = _prompts(reasoner, _clip(of_clip, kept, sampled, stages.sizes.video_size), sentences)
    positions = [0] if first_anchor_only else anchor_frames(len(prompted))

    anchored: dict[int, MaskPrediction] = {}
    anchors: NearTime = {}
    for position in positions:
        t = prompted[position]
        prompts = torch.from_numpy(embeddings[:, position]).to(device)
        anchored[t] = _own(stages.mask_decoder(kept[t], None, PromptTokens(prompts)))
        anchors[t] = _own(stages.memory_encoder(kept[t], anchored[t]))
    for t in anchored:
        del kept[t]
    first, reach = min(anchors), max(config.memory.recent_frames, config.memory.pointers)
    for order, backwards in ((range(first, len(frames)), False), (range(first - 1, -1, -1), True)):
        recent: NearTime = {}
        for t in order:
            frame = frames[t]
            if t in anchored:
                yield OfflineFrame(t, frame, anchored[t], {})
                continue
            timer = StageTimer(device)
            with timer.stage("image_encoder"):
                features = kept.pop(t) if t in kept else encode(frame)
            with timer.stage("memory_attention"):
                memory = assemble_memory(t, anchors, recent, config.memory, stages.sizes, backwards)
                conditioned = stages.memory_attention(features, memory)
            with timer.stage("mask_decoder"):
                prediction = stages.mask_decoder(features, conditioned, None)
            with timer.stage("memory_encoder"):
                recent[t] = _own(stages.memory_encoder(features, prediction))
            recent.pop(t + reach if backwards else t - reach, None)
            yield OfflineFrame(t, frame, prediction, timer.ms())


def _clip(
    frames: dict[int, Frame], features: dict[int, ImageFeatures], sampled: Sequence[int], video_size: int
) -> Clip:
    return Clip(
        steps=np.array(sampled, dtype=np.int64),
        stamps_ns=np.array([frames[t].stamp_ns for t in sampled], dtype=np.int64),
        frames_rgb_u8=np.stack([resize_image(frames[t].image_rgb_u8, video_size) for t in sampled]),
        fusion=np.stack([features[t].fusion[0].cpu().numpy().astype(np.float16) for t in sampled]),
        camera=frames[sampled[0]].camera,
    )


def _prompts(
    reasoner: Reasoner, clip: Clip, sentences: Sequence[str]
) -> tuple[Float[np.ndarray, "goals t n c"], list[int]]:
    """And the frames that they are for: those of the clip, or some of them, the same for all sentences.

    Raises VideoError where a reasoner chooses other frames for each sentence.
    """
    answers = [
        reasoner.answer(ReasonerRequest(number, 0, f"goal_{number}", sentence, clip))
        for number, sentence in enumerate(sentences, start=1)
    ]
    prompted = [[prompt.step for prompt in answer.prompts] for answer in answers]
    if any(frames != prompted[0] for frames in prompted):
        raise VideoError(
            "this reasoner chooses other frames for each sentence, which a whole video at once cannot follow; give one "
            "goal at a time, or leave --offline out"
        )
    return np.stack([[prompt.embeddings for prompt in answer.prompts] for answer in answers]), prompted[0]


def _own(lent: Lent) -> Lent:
    """A copy that outlives the stage's next call."""
    return type(lent)(**{name: value.clone() for name, value in vars(lent).items()})
