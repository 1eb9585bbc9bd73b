# SPDX-License-Identifier: Apache-2.0
"""VIRST as published: inference over a whole recorded video, non-causal. The yardstick for the stream.

T_seg frames are sampled uniformly from the video (section 3.2); the reasoner answers once; Algorithm 2 picks
K = max(1, floor(T_seg / 4)) of them as anchors, or an `AnchorStrategy` picks others; every other frame attends to the
alpha anchors nearest in time, future ones included, and to its P - 1 predecessors. Masks spread from the earliest
anchor to the end and then backwards to the start, as SAM 2's video predictor does (sam2/sam2_video_predictor.py,
`propagate_in_video`, commit 2b90b9f). An anchor frame keeps the mask of its prompt. As published, no memory write is
gated: an absent object is remembered as absent, and absence is the mask decoder's alone to tell, whatever the prompts'
confidence.

Sentences may have different anchors (`guided`, and methods that name the frames themselves). Each sets out from its own
first one, so that it gets the same masks as if it were asked alone. (SAM 2's objects set out together, at the earliest
prompt of any.)

The features of a frame are computed when its turn comes and then dropped, so a long video takes no more memory than a
short one: those of the clip, the anchors, and the memory of the newest frames. Frames between the first anchors of two
sentences are met in both directions, and the masks of the earlier one wait for the other's, on the host: 0.3 MB a frame
and object at 1024 px.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig, MemoryParameters
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
    Prompt,
    PromptTokens,
    ReasonerRequest,
    StageSizes,
)

NearTime = dict[int, MemoryEntry]  # frame index -> memory of every object in that frame
Lent = TypeVar("Lent", ImageFeatures, MaskPrediction, MemoryEntry)


ANCHOR_STRATEGIES = ("dynamic", "first-frame", "guided", "random-3", "uniform-3")
FIXED_ANCHORS = 3  # of random-3 and uniform-3


@dataclass(frozen=True)
class AnchorStrategy:
    """Which of the clip's frames become anchors: VIRST's own choice, and the baselines of its table 5.

    dynamic: `count` frames, evenly spread, the first always; 0 = max(1, T // 4), Algorithm 2.
    first-frame: the first alone, as when a user marks the object there.
    guided: the one frame that a score of image and sentence prefers. The paper takes CLIP's; here it is the reasoner's
    own confidence that the target is in the frame. Of equal ones the earliest.
    random-3, uniform-3: three frames, drawn with `seed` or evenly spread.

    Of a method that names the frames itself, `dynamic` takes all.
    Raises ValueError for another name, and a negative count.
    """

    name: str = "dynamic"
    count: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ANCHOR_STRATEGIES:
            raise ValueError(f"anchors must be one of {', '.join(ANCHOR_STRATEGIES)}, got {self.name!r}")
        if self.count < 0 or (self.count and self.name != "dynamic"):
            raise ValueError(f"the number of anchors is for dynamic ones, and not negative; got {self.count}")

    def choose(self, prompts: Sequence[Prompt], *, has_chosen: bool = False) -> list[Prompt]:
        """The prompts of the anchors, oldest first; none of none. `has_chosen`: the method names the frames itself."""
        if not prompts:
            return []
        if self.name == "first-frame":
            positions = [0]
        elif self.name == "guided":
            positions = [int(np.argmax([prompt.confidence for prompt in prompts]))]
        elif self.name == "random-3":
            drawn = np.random.default_rng(self.seed).permutation(len(prompts))[:FIXED_ANCHORS]
            positions = sorted(int(position) for position in drawn)
        elif self.name == "uniform-3":
            positions = spread(len(prompts), FIXED_ANCHORS)
        elif has_chosen:
            positions = list(range(len(prompts)))
        else:
            positions = spread(len(prompts), self.count) if self.count else anchor_frames(len(prompts))
        return [prompts[position] for position in positions]


DYNAMIC = AnchorStrategy()


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
    return spread(clip_frames, max(1, clip_frames // 4))


def spread(frames: int, count: int) -> list[int]:
    """At most `count` of so many positions, evenly spread, the first always, no position twice."""
    return sorted({int(position) for position in np.linspace(0, frames - 1, count).round()})


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
    strategy: AnchorStrategy = DYNAMIC,
) -> Bool[np.ndarray, "goals frames height width"]:
    """One mask per goal and frame of a recorded video, at the camera's size. All frames must have one size.

    Arguments and errors as of `propagate_whole_video`.
    """
    masks: dict[int, Bool[np.ndarray, "goals height width"]] = {}
    for seen in propagate_whole_video(stages, reasoner, frames, sentences, config, strategy=strategy):
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
    strategy: AnchorStrategy = DYNAMIC,
) -> Iterator[OfflineFrame]:
    """Each frame once: from the latest sentence's first anchor to the end, then from there backwards to the start.

    What it yields is good until the next one is asked for.

    Args:
        frames: the whole video, at least one frame.
        config: `reasoner.frames_asked` is T_seg, `memory` gives alpha, P - 1 and the pointers.
        strategy: which frames are anchors.

    Raises:
        VirstError: the reasoner cannot answer a sentence, or an image cannot be used.
    """
    device = torch.device(config.model.device)
    preprocess = Preprocess(stages.sizes.image_size, device)

    def encode(frame: Frame) -> ImageFeatures:
        check_image(frame.image_rgb_u8)
        return stages.image_encoder(preprocess(frame.image_rgb_u8))

    sampled = uniform_frames(len(frames), config.reasoner.frames_asked)
    of_clip = {t: frames[t] for t in sorted(set(sampled))}
    kept = {t: _own(encode(frame)) for t, frame in of_clip.items()}
    answers = _prompts(reasoner, _clip(of_clip, kept, sampled, stages.sizes.video_size), sentences)
    has_chosen = config.reasoner.chooses_frames
    chosen = [strategy.choose(prompts, has_chosen=has_chosen) for prompts in answers]
    together = _those_with_the_same_anchors(chosen)
    companies = [_Company(stages, config.memory, [chosen[g] for g in goals], kept, device) for goals in together]
    order_of_goals = torch.tensor([goal for goals in together for goal in goals], device=device).argsort()

    anchored_everywhere = set.intersection(*(set(company.anchored) for company in companies))
    for t in anchored_everywhere:
        del kept[t]
    starts = [company.first for company in companies if company.first is not None]
    first, last = min(starts, default=0), max(starts, default=0)
    reach = max(config.memory.recent_frames, config.memory.pointers)
    waiting: dict[int, _Part] = {}  # frames that some sentence has met, and others not yet
    for order, backwards in ((range(first, len(frames)), False), (range(last - 1, -1, -1), True)):
        for company in companies:
            company.recent.clear()
        for t in order:
            frame = frames[t]
            timer = StageTimer(device)
            moving = [company for company in companies if company.goes_through(t, last, backwards=backwards)]
            features: ImageFeatures | None = None
            if any(company.reads(t) for company in moving):
                with timer.stage("image_encoder"):
                    features = kept[t] if t in kept else encode(frame)
            part = waiting.pop(t, _Part())
            for company in moving:
                part.predictions[company] = company.step(t, features, backwards, timer)
                company.recent.pop(t + reach if backwards else t - reach, None)
                if len(companies) > 1:
                    part.predictions[company] = _own(part.predictions[company])
            part.add(timer)
            if len(part.predictions) < len(companies):
                part.move("cpu")
                waiting[t] = part
                continue
            kept.pop(t, None)
            part.move(device)
            predictions = [part.predictions[company] for company in companies]
            merged = predictions[0] if len(companies) == 1 else _in_order(predictions, order_of_goals)
            yield OfflineFrame(t, frame, merged, part.timings_ms)


class _Company:
    """Sentences whose objects have the same anchors: what is remembered of them, and their masks frame by frame.

    `anchors`: the prompts of each sentence's anchors. Without any the objects are nowhere.
    """

    def __init__(
        self,
        stages: Stages,
        parameters: MemoryParameters,
        anchors: Sequence[Sequence[Prompt]],
        features: dict[int, ImageFeatures],
        device: torch.device,
    ) -> None:
        self._stages, self._parameters, self._objects, self._device = stages, parameters, len(anchors), device
        self.anchored: dict[int, MaskPrediction] = {}
        self._anchors: NearTime = {}
        self.recent: NearTime = {}
        for prompts in zip(*anchors, strict=True):
            t = prompts[0].step
            tokens = torch.from_numpy(np.stack([prompt.embeddings for prompt in prompts])).to(device)
            self.anchored[t] = _own(stages.mask_decoder(features[t], None, PromptTokens(tokens)))
            self._anchors[t] = _own(stages.memory_encoder(features[t], self.anchored[t]))

    @property
    def first(self) -> int | None:
        """The frame from which masks spread; None: there is nothing to spread."""
        return min(self.anchored, default=None)

    def goes_through(self, t: int, last: int, *, backwards: bool) -> bool:
        """Whether these masks come to frame t in this direction; those that are nowhere wait for the `last`."""
        first = last if self.first is None else self.first
        return t < first if backwards else t >= first

    def reads(self, t: int) -> bool:
        """Whether frame t needs its features."""
        return bool(self._anchors) and t not in self.anchored

    def step(self, t: int, features: ImageFeatures | None, backwards: bool, timer: StageTimer) -> MaskPrediction:
        if t in self.anchored:
            return self.anchored[t]
        if not self._anchors:
            return self._nowhere()
        assert features is not None
        stages = self._stages
        with timer.stage("memory_attention"):
            memory = assemble_memory(t, self._anchors, self.recent, self._parameters, stages.sizes, backwards)
            conditioned = stages.memory_attention(features, memory)
        with timer.stage("mask_decoder"):
            prediction = stages.mask_decoder(features, conditioned, None)
        with timer.stage("memory_encoder"):
            self.recent[t] = _own(stages.memory_encoder(features, prediction))
        return prediction

    def _nowhere(self) -> MaskPrediction:
        side, channels = self._stages.sizes.mask, self._stages.sizes.channels
        return MaskPrediction(
            mask_logits=torch.full((self._objects, side, side), -1.0, device=self._device),
            iou=torch.zeros(self._objects, device=self._device),
            object_score_logits=torch.full((self._objects,), -1.0, device=self._device),
            pointer=torch.zeros(self._objects, channels, device=self._device),
        )


@dataclass
class _Part:
    """What is known of a frame that not every sentence has met yet."""

    predictions: dict[_Company, MaskPrediction] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)

    def move(self, device: torch.device | str) -> None:
        for company, found in self.predictions.items():
            moved = {name: value.to(device) for name, value in vars(found).items()}
            self.predictions[company] = MaskPrediction(**moved)

    def add(self, timer: StageTimer) -> None:
        for stage, ms in timer.ms().items():
            self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + ms


def _those_with_the_same_anchors(chosen: Sequence[Sequence[Prompt]]) -> list[list[int]]:
    """Groups of sentences, each in the order of the sentences."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for goal, prompts in enumerate(chosen):
        groups.setdefault(tuple(prompt.step for prompt in prompts), []).append(goal)
    return list(groups.values())


def _in_order(predictions: Sequence[MaskPrediction], order: Int[torch.Tensor, " goals"]) -> MaskPrediction:
    """The groups' predictions as one, in the order of the sentences."""
    names = vars(predictions[0])
    return MaskPrediction(**{name: torch.cat([vars(each)[name] for each in predictions])[order] for name in names})


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


def _prompts(reasoner: Reasoner, clip: Clip, sentences: Sequence[str]) -> list[tuple[Prompt, ...]]:
    return [
        reasoner.answer(ReasonerRequest(number, 0, f"goal_{number}", sentence, clip)).prompts
        for number, sentence in enumerate(sentences, start=1)
    ]


def _own(lent: Lent) -> Lent:
    """A copy that outlives the stage's next call."""
    return type(lent)(**{name: value.clone() for name, value in vars(lent).items()})
