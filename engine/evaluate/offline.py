# SPDX-License-Identifier: Apache-2.0
"""VIRST as published: inference over a whole recorded video, non-causal. The yardstick for the stream.

T_seg frames are sampled uniformly from the video (section 3.2); the reasoner answers once; Algorithm 2 picks
K = max(1, floor(T_seg / 4)) of them as anchors; every other frame attends to the alpha anchors nearest in time, future
ones included, and to its P - 1 predecessors. Masks spread from the earliest anchor to the end and then backwards to the
start, as SAM 2's video predictor does (sam2/sam2_video_predictor.py, `propagate_in_video`, commit 2b90b9f). An anchor
frame keeps the mask of its prompt. As published, no memory write is gated: an absent object is remembered as absent,
and absence is the mask decoder's alone to tell, whatever the prompts' confidence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig, MemoryParameters
from virst_engine.fast.postprocess import empty_mask, mask_at_size
from virst_engine.fast.preprocess import Preprocess, check_image, resize_image
from virst_engine.slow.reasoner import Reasoner
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
    frames: Sequence[Frame],
    sentences: Sequence[str],
    config: EngineConfig,
    *,
    first_anchor_only: bool = False,
) -> Bool[np.ndarray, "goals frames height width"]:
    """One mask per goal and frame of a recorded video, at the camera's size.

    Args:
        frames: the whole video, at least one frame, all of one size.
        config: `reasoner.clip_frames` is T_seg, `memory` gives alpha, P - 1 and the pointers.
        first_anchor_only: ablation, the first frame of the clip is the only anchor (VIRST, table 5).

    Raises:
        VirstError: the reasoner cannot answer a sentence, or an image cannot be used.
    """
    features = _encode(stages, frames, config.model.device)
    sampled = uniform_frames(len(frames), config.reasoner.clip_frames)
    embeddings = _prompts(reasoner, _clip(frames, features, sampled, stages.sizes.video_size), sentences)
    positions = [0] if first_anchor_only else anchor_frames(len(sampled))

    predictions: dict[int, MaskPrediction] = {}
    anchors: NearTime = {}
    for position in positions:
        t = sampled[position]
        prompts = torch.from_numpy(embeddings[:, position]).to(features[t].top.device)
        predictions[t] = stages.mask_decoder(features[t], None, PromptTokens(prompts))
        anchors[t] = stages.memory_encoder(features[t], predictions[t])
    first = min(anchors)
    for order, backwards in ((range(first, len(frames)), False), (range(first, -1, -1), True)):
        recent: NearTime = {}
        for t in order:
            if t in anchors:
                continue
            memory = assemble_memory(t, anchors, recent, config.memory, stages.sizes, backwards)
            conditioned = stages.memory_attention(features[t], memory)
            predictions[t] = stages.mask_decoder(features[t], conditioned, None)
            recent[t] = stages.memory_encoder(features[t], predictions[t])
    masks = [_camera_masks(predictions[t], frame) for t, frame in enumerate(frames)]
    return np.stack(masks, axis=1)


def _encode(stages: Stages, frames: Sequence[Frame], device: str) -> list[ImageFeatures]:
    preprocess = Preprocess(stages.sizes.image_size, device)
    features = []
    for frame in frames:
        check_image(frame.image_rgb_u8)
        features.append(stages.image_encoder(preprocess(frame.image_rgb_u8)))
    return features


def _clip(frames: Sequence[Frame], features: Sequence[ImageFeatures], sampled: Sequence[int], video_size: int) -> Clip:
    return Clip(
        steps=np.array(sampled, dtype=np.int64),
        stamps_ns=np.array([frames[t].stamp_ns for t in sampled], dtype=np.int64),
        frames_rgb_u8=np.stack([resize_image(frames[t].image_rgb_u8, video_size) for t in sampled]),
        fusion=np.stack([features[t].fusion[0].cpu().numpy().astype(np.float16) for t in sampled]),
        camera=frames[0].camera,
    )


def _prompts(reasoner: Reasoner, clip: Clip, sentences: Sequence[str]) -> Float[np.ndarray, "goals t n c"]:
    answers = [
        reasoner.answer(ReasonerRequest(number, 0, f"goal_{number}", sentence, clip))
        for number, sentence in enumerate(sentences, start=1)
    ]
    return np.stack([[prompt.embeddings for prompt in answer.prompts] for answer in answers])


def _camera_masks(prediction: MaskPrediction, frame: Frame) -> Bool[np.ndarray, "goals height width"]:
    height, width = frame.image_rgb_u8.shape[:2]
    present = (prediction.object_score_logits > 0).cpu().numpy()
    logits = prediction.mask_logits.float().cpu().numpy()
    return np.stack(
        [
            mask_at_size(mask, height, width) if seen else empty_mask(height, width)
            for mask, seen in zip(logits, present, strict=True)
        ]
    )
