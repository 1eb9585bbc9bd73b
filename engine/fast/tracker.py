# SPDX-License-Identifier: Apache-2.0
"""One frame in, the masks of all objects out: a causal Temporal Dynamic Anchor Updater.

The method is VIRST's section 3.4 (equation 12, Algorithm 2). Published VIRST has the whole video and attends to future
anchors. Here an anchor arrives late, for a past frame. It is decoded on the cached features of that frame and no other.
Where it contradicts what was tracked, the frames since then are replayed from the cache on a shadow row of the memory
bank, a few per new frame, so that the stream goes on; when the shadow has caught up, it replaces the object's row at
once.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from virst_engine.backends.base import Stages
from virst_engine.config import MemoryParameters, TrackingParameters
from virst_engine.errors import BadPrompt
from virst_engine.fast.feature_ring import FeatureRing
from virst_engine.fast.memory_bank import MemoryBank
from virst_engine.fast.preprocess import Preprocess, check_image, resize_image
from virst_engine.fast.prompts import check_prompt, decode_boxes, decode_prompt
from virst_engine.timing import StageTimer
from virst_engine.types import (
    ClickPrompt,
    Frame,
    ImageFeatures,
    MaskPrediction,
    MaskPrompt,
    MemoryEntry,
    MemoryTensors,
    PromptTokens,
)

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", ImageFeatures, MemoryTensors)

WARM_OBJECTS = (1, 4, 8)  # numbers of objects for which backends have code of their own; then multiples of the last
BELIEVED_LOGIT = 10.0  # of a cached mask, which is kept as bits


@dataclass(frozen=True)
class Sighting:
    """One object in one frame, as the mask decoder sees it."""

    step: int
    mask_logits: Float[Tensor, "hm wm"]
    host_logits: Float[np.ndarray, "hm wm"]  # the same, in the host's memory
    iou: float  # predicted IoU
    presence: float  # probability that the object is visible
    is_present: bool  # visible, with at least one pixel
    is_remembered: bool  # good enough to be written to memory


@dataclass(frozen=True)
class TrackedFrame:
    """One processed frame. `features` but for `fusion` are views into the ring: copy what has to outlive it."""

    step: int
    stamp_ns: int
    square_rgb_u8: UInt8[np.ndarray, "size size 3"]  # the image as the encoder saw it
    features: ImageFeatures


@dataclass(frozen=True)
class DecodedAnchors:
    """The prompts of one answer, each decoded on the features of its own frame (b = k); oldest first."""

    steps: tuple[int, ...]
    is_cached: tuple[bool, ...]  # in the ring, so the frames since then can be replayed; else only pinned
    is_present: tuple[bool, ...]
    agreement: tuple[float | None, ...]  # IoU with the mask believed there; None: the object was not looked for there
    features: ImageFeatures
    prediction: MaskPrediction
    sightings: tuple[Sighting, ...]
    is_approved: bool = False  # a user's own prompt, not the reasoner's: its mask is remembered as 0 or 1


class Tracker:
    """Owns the stages' inputs and outputs between frames. One thread only.

    Row `slot` of the memory bank is the object of that slot, row `slots + slot` its shadow during a replay.
    """

    def __init__(
        self,
        stages: Stages,
        memory: MemoryParameters,
        tracking: TrackingParameters,
        *,
        device: torch.device | str = "cpu",
        pins: int = 1,
    ) -> None:
        """`pins`: how many frames `pin` keeps for each object."""
        self._stages, self._device = stages, torch.device(device)
        self.reconfigure(memory, tracking)
        self._slots = tracking.max_objects
        self._preprocess = Preprocess(stages.sizes.image_size, self._device)
        self._memory = MemoryBank(stages.sizes, memory, 2 * self._slots, device=self._device)
        self._ring = FeatureRing(
            memory.ring_steps,
            2 * self._slots,
            self._slots,
            stages.sizes.mask,
            self._device,
            pins=pins,
        )
        self._sightings: dict[int, Sighting] = {}  # row -> the newest one
        self._replays: dict[int, int] = {}  # slot -> last step that its shadow has seen
        self._step = -1

    def reconfigure(self, memory: MemoryParameters, tracking: TrackingParameters) -> None:
        """Take the live parameters of these from the next frame on; sizes of buffers stay as they were built."""
        self._min_write_iou, self._replay_steps = memory.min_write_iou, tracking.replay_steps
        self._agree_iou = tracking.agree_iou
        self._remembers_all = memory.rules == "sam2"

    @property
    def memory(self) -> MemoryBank:
        return self._memory

    @property
    def ring(self) -> FeatureRing:
        return self._ring

    @torch.inference_mode()
    def use_stages(self, stages: Stages) -> None:
        """Go on with the same model at another image size; what is remembered and cached is resampled to it."""
        self._stages = stages
        self._preprocess = Preprocess(stages.sizes.image_size, self._device)
        self._memory.resize(stages.sizes.grid)
        self._ring.resize(stages.sizes.mask)
        size = (stages.sizes.mask, stages.sizes.mask)
        for row, sighting in self._sightings.items():
            logits = F.interpolate(sighting.mask_logits[None, None], size=size, mode="bilinear", align_corners=False)
            self._sightings[row] = replace(sighting, mask_logits=logits[0, 0], host_logits=_on_host(logits[0, 0]))

    def step(self, frame: Frame, timer: StageTimer | None = None) -> TrackedFrame:
        """Segment every remembered object in a new frame and update its memory. `sighting` tells what was found.

        Raises BadFrame, before anything has changed.
        """
        return step_together([self], [frame], timer)[0]

    def sighting(self, slot: int) -> Sighting | None:
        """The object in the newest frame; None while nothing is remembered of it."""
        sighting = self._sightings.get(slot)
        return sighting if sighting is not None and sighting.step == self._step else None

    @torch.inference_mode()
    def decode_anchors(
        self,
        slot: int,
        steps: Sequence[int],
        prompts: Float[Tensor, "k n c"] | None,
        boxes: Float[np.ndarray, "k m 4"] | None = None,
    ) -> DecodedAnchors | None:
        """Decode the reasoner's prompts whose frames are still cached; None when none is. Nothing is remembered yet.

        Args:
            steps: each prompt's frame, ascending.
            prompts: embeddings that stand in place of points; or else:
            boxes: of a detector; in shares of the image's width and height.
        """
        kept = [i for i, step in enumerate(steps) if self._ring.has(step) or self._ring.has_pinned(slot, step)]
        if not kept:
            return None
        kept_steps = tuple(steps[i] for i in kept)
        features = self._ring.gather(kept_steps, slot)
        if prompts is not None:
            decoded = self._stages.mask_decoder(features, None, PromptTokens(prompts[kept].to(self._device)))
        elif boxes is not None:
            of_boxes = self._ring.gather([step for step in kept_steps for _ in range(boxes.shape[1])], slot)
            decoded = decode_boxes(self._stages, of_boxes, boxes[kept], self._device)
        else:
            raise AssertionError("an anchor needs a prompt")
        prediction = _own(decoded)
        sightings = self._look(_send(prediction), kept_steps)
        return DecodedAnchors(
            steps=kept_steps,
            is_cached=tuple(self._ring.has(step) for step in kept_steps),
            is_present=tuple(s.is_present for s in sightings),
            agreement=tuple(self._agreement(slot, s) for s in sightings),
            features=features,
            prediction=prediction,
            sightings=tuple(sightings),
        )

    @torch.inference_mode()
    def prompt(self, slot: int, step: int, prompt: ClickPrompt | MaskPrompt) -> Sighting:
        """Decode a user's prompt on the cached features of its own frame, and track what it shows from there.

        On the newest frame the object is there at once. On an older one the frames since then are replayed, and the
        object of before, if there is one, stays until the replay is through (`catch_up`). Points without a box correct
        the mask that is seen there. What was known stays, unless a box or a mask shows another thing than what was
        tracked: then it is all that is known. Where a click finds nothing, nothing changes.

        Raises:
            BadPrompt: the frame is gone, or the prompt does not fit its image; nothing has changed.
        """
        features, size = self._ring.features(step), self._ring.image_size(step)
        if features is None or size is None:
            raise BadPrompt(
                f"the frame of step {step} is not cached; those of steps {self._ring.oldest_step()} to {self._step} "
                "are: prompt a newer one, or raise memory.ring_steps"
            )
        check_prompt(prompt, size, self._stages.sizes.prompt_tokens)
        corrects = self._corrected(slot, step, prompt)
        as_sam2 = self._remembers_all
        prediction = _own(decode_prompt(self._stages, features, prompt, size, self._device, corrects, as_sam2=as_sam2))
        (sighting,) = self._look(_send(prediction), [step])
        believed, agreement = self._ring.belief(step, slot), self._agreement(slot, sighting)
        anchors = DecodedAnchors(
            (step,), (True,), (sighting.is_present,), (agreement,), features, prediction, (sighting,), is_approved=True
        )
        if not sighting.is_present and isinstance(prompt, ClickPrompt) and not self._remembers_all:
            return sighting  # nothing is there: not worth remembering
        was_seen = believed is not None and bool(believed.any())
        contradicts = was_seen and agreement is not None and agreement < self._agree_iou and not self._remembers_all
        is_other_thing = contradicts and sighting.is_present and corrects is None
        if step == self._step:
            if slot in self._replays:  # what the shadow knows is newer than what the object knew
                self._memory.copy_slot(self._slots + slot, slot)
                self._drop_replay(slot)
            if is_other_thing:
                self._memory.clear(slot)
            elif contradicts:  # what was taken for it is nothing, or only a part of it
                self._memory.forget_recent(slot)
            self._remember_anchors(slot, anchors, [0])
            self._sightings[slot] = sighting
            self._believe(step, slot, sighting)
        else:
            self._start_replay(slot, anchors, [0], keeps_earlier=not is_other_thing)
        return sighting

    @torch.inference_mode()
    def add_anchors(self, slot: int, anchors: DecodedAnchors, chosen: Sequence[int]) -> None:
        """Remember the chosen ones of `anchors` next to what is known of the object."""
        self._remember_anchors(slot, anchors, chosen)

    @torch.inference_mode()
    def start_over(self, slot: int, anchors: DecodedAnchors, chosen: Sequence[int]) -> None:
        """Begin a shadow that knows the chosen anchors only; `catch_up` brings it to the present and swaps it in.

        Until then the object is tracked as before. The shadow starts at the newest chosen anchor.
        """
        self._start_replay(slot, anchors, chosen, keeps_earlier=False)

    @torch.inference_mode()
    def jump(self, slot: int, anchors: DecodedAnchors, chosen: int) -> None:
        """Know the object by one anchor whose frame the ring has lost; the next frame attends to it as it is."""
        self.forget(slot)
        self._remember_anchors(slot, anchors, [chosen])

    def is_replaying(self, slot: int) -> bool:
        return slot in self._replays

    @torch.inference_mode()
    def catch_up(self) -> list[int]:
        """Replay at most `tracking.replay_steps` cached frames; the slots whose shadow took over in this frame.

        The shadow that is furthest behind moves first: shadows meet at the same frame and then move as one batch.
        """
        unmeasured = StageTimer()
        for _ in range(self._replay_steps):
            behind = min(self._replays.values(), default=self._step)
            if behind == self._step:
                break
            # A frame that was evicted meanwhile is skipped: memory attention does not need consecutive frames.
            step = max(behind + 1, self._ring.oldest_step())
            features = self._ring.features(step)
            if features is None:
                raise AssertionError(f"step {step} is neither evicted nor cached")
            slots = [slot for slot, seen in self._replays.items() if seen < step]
            self._propagate(step, features, [self._slots + slot for slot in slots], unmeasured)
            for slot in slots:
                self._replays[slot] = step

        done = [slot for slot, seen in self._replays.items() if seen == self._step]
        for slot in done:
            self._take_over(slot)
        return done

    @torch.inference_mode()
    def pin(self, slot: int, steps: Sequence[int]) -> None:
        """Keep the features of these frames, and what is believed there, for a late answer about the object.

        They replace those pinned before, and are kept until then, however late the answer. Frames gone already are not.
        """
        self._ring.pin(slot, steps)

    def forget(self, slot: int) -> None:
        """The object and its shadow were never there."""
        for row in (slot, self._slots + slot):
            self._memory.clear(row)
            self._ring.forget(row)
            self._sightings.pop(row, None)
        self._ring.release_pins(slot)
        self._replays.pop(slot, None)

    def restart(self) -> None:
        """Forget all objects and all cached frames. Steps go on: no step ever names two frames."""
        for slot in range(self._slots):
            self.forget(slot)
        self._ring.clear()

    def _start_replay(self, slot: int, anchors: DecodedAnchors, chosen: Sequence[int], *, keeps_earlier: bool) -> None:
        shadow, first = self._slots + slot, anchors.steps[chosen[0]]
        is_ahead = False  # of a replay that runs already and will come by
        if not keeps_earlier:
            self._drop_replay(slot)
        elif slot in self._replays:
            is_ahead = self._replays[slot] < first
        else:
            self._drop_replay(slot)
            self._memory.copy_slot(slot, shadow)
        if keeps_earlier and not is_ahead:
            self._memory.forget_recent_after(shadow, first)
            if not self._remembers_all:
                self._memory.forget_anchors_after(shadow, first)
        self._remember_anchors(shadow, anchors, chosen)
        for i in chosen:
            sighting = anchors.sightings[i]
            self._believe(sighting.step, shadow, sighting)
            self._sightings[shadow] = sighting
        if not is_ahead:
            self._replays[slot] = anchors.steps[chosen[-1]]

    def _corrected(self, slot: int, step: int, prompt: ClickPrompt | MaskPrompt) -> Float[Tensor, "hm wm"] | None:
        """The mask that is seen in that frame, which points without a box are to correct; None: none is."""
        if not isinstance(prompt, ClickPrompt) or prompt.box_px is not None or self._remembers_all:
            return None
        sighting, believed = self._sightings.get(slot), self._ring.belief(step, slot)
        if believed is None or not bool(believed.any()):
            return None
        if sighting is not None and sighting.step == step:
            return sighting.mask_logits
        return (believed.float() * 2 - 1) * BELIEVED_LOGIT

    def _drop_replay(self, slot: int) -> None:
        shadow = self._slots + slot
        self._memory.clear(shadow)
        self._ring.forget(shadow)
        self._sightings.pop(shadow, None)
        self._replays.pop(slot, None)

    def _propagate(self, step: int, features: ImageFeatures, rows: list[int], timer: StageTimer) -> None:
        """Memory -> mask -> memory, for the objects of these rows in one frame, live or replayed."""
        _propagate([_Work(self, step, features, rows)], timer)

    def _remember(self, step: int, rows: Sequence[int], sightings: Sequence[Sighting]) -> None:
        """Note what was seen; what of it goes into the memory bank is there already."""
        if logger.isEnabledFor(logging.DEBUG):
            for row, sighting in zip(rows, sightings, strict=True):
                if sighting.is_present and not sighting.is_remembered:
                    logger.debug(
                        "slot %d, step %d: predicted IoU %.2f is below memory.min_write_iou %.2f, not remembered",
                        row % self._slots, step, sighting.iou, self._min_write_iou,
                    )  # fmt: skip
        for row, sighting in zip(rows, sightings, strict=True):
            self._sightings[row] = sighting
            self._believe(step, row, sighting)

    def _look(self, sent: "_Sent", steps: Sequence[int]) -> list[Sighting]:
        numbers, host_logits = sent.wait()
        sightings = []
        for i, (iou, score, logit) in enumerate(zip(*numbers, strict=True)):
            is_present = score > 0 and logit > 0
            is_remembered = self._remembers_all or (is_present and iou >= self._min_write_iou)  # False for NaN
            presence = 1.0 / (1.0 + math.exp(-max(min(score, 60.0), -60.0)))
            sightings.append(
                Sighting(steps[i], sent.mask_logits[i], host_logits[i], iou, presence, is_present, is_remembered)
            )
        return sightings

    def _believe(self, step: int, row: int, sighting: Sighting) -> None:
        mask = sighting.mask_logits > 0
        self._ring.believe(step, row, mask if sighting.is_present else torch.zeros_like(mask))

    def _agreement(self, slot: int, sighting: Sighting) -> float | None:
        believed = self._ring.belief(sighting.step, slot)
        if believed is None:
            return None
        decoded = sighting.mask_logits > 0 if sighting.is_present else torch.zeros_like(believed)
        union = int((believed | decoded).sum())
        return int((believed & decoded).sum()) / union if union else 1.0

    def _remember_anchors(self, row: int, anchors: DecodedAnchors, chosen: Sequence[int]) -> None:
        approved = None
        if anchors.is_approved:
            approved = torch.ones(len(anchors.steps), dtype=torch.bool, device=self._device)
        entry: MemoryEntry = self._stages.memory_encoder(anchors.features, anchors.prediction, approved)
        for i in chosen:
            self._memory.remember_anchor(row, anchors.steps[i], entry, i, is_approved=anchors.is_approved)

    def _take_over(self, slot: int) -> None:
        shadow = self._slots + slot
        self._memory.copy_slot(shadow, slot)
        self._ring.copy_slot(shadow, slot)
        self._sightings[slot] = self._sightings.pop(shadow)
        self._drop_replay(slot)


@dataclass(frozen=True)
class _Work:
    """Objects of one tracker, and the frame in which they are to be found."""

    tracker: Tracker
    step: int
    features: ImageFeatures
    rows: Sequence[int]


@torch.inference_mode()
def step_together(
    trackers: Sequence[Tracker], frames: Sequence[Frame], timer: StageTimer | None = None
) -> list[TrackedFrame]:
    """`Tracker.step` for one new frame of each of several trackers that share their stages.

    Stages that take several frames at once get those of all trackers in one call, and all their objects in another.
    Masks are those of separate steps, up to rounding: sums of another batch size are added in another order.

    Raises BadFrame, before anything has changed.
    """
    stages, device = trackers[0]._stages, trackers[0]._device
    timer = timer or StageTimer(device)
    for frame in frames:
        check_image(frame.image_rgb_u8)
    with timer.stage("preprocess"):
        squares_rgb_u8 = [resize_image(frame.image_rgb_u8, stages.sizes.image_size) for frame in frames]
        pixels = [tracker._preprocess.normalise(x) for tracker, x in zip(trackers, squares_rgb_u8, strict=True)]
    tracked, works = [], []
    encoded = _encode(stages, pixels, timer)
    for tracker, frame, square_rgb_u8 in zip(trackers, frames, squares_rgb_u8, strict=True):
        found = next(encoded)
        tracker._step += 1
        # From here on the cached copy, as in a replay: its layout in memory decides on the last bits of what follows.
        features = tracker._ring.push(tracker._step, frame.stamp_ns, found, frame.image_rgb_u8.shape[:2])
        fusion = found.fusion if len(trackers) == 1 else found.fusion.clone()  # the next frame may overwrite it
        tracked.append(TrackedFrame(tracker._step, frame.stamp_ns, square_rgb_u8, replace(features, fusion=fusion)))
        rows = [slot for slot in range(tracker._slots) if not tracker._memory.is_empty(slot)]
        if rows:
            works.append(_Work(tracker, tracker._step, features, rows))
    if works and stages.takes_several_frames:
        _propagate(works, timer)
    else:
        for work in works:
            _propagate([work], timer)
    return tracked


@torch.inference_mode()
def warm_up(trackers: Sequence[Tracker], between: Callable[[], None] = lambda: None) -> None:
    """Run the stages once for each number of objects that has code of its own, of trackers that share them.

    Whatever is made at first use is made now: buffers, compiled code, caches of libraries. Nothing is remembered.
    `between` is called before each run, and may raise to end it all.
    """
    first = trackers[0]
    stages, slots = first._stages, first._slots
    side = stages.sizes.image_size
    frames = len(trackers) if stages.takes_several_frames else 1
    sizes = {slots, *(size for size in WARM_OBJECTS if size < slots)}
    if not stages.takes_fewer_memories:  # compiled: for numbers of objects, too
        sizes.update(range(WARM_OBJECTS[-1], slots, WARM_OBJECTS[-1]))
    for count in sorted({1, frames}):
        between()
        features = stages.image_encoder(torch.zeros((count, 3, side, side), device=first._device))
        one = ImageFeatures(**{name: value[:1].clone() for name, value in vars(features).items()})
        for tracker in trackers:
            tracker._ring.allocate(one)
        for objects in sorted(sizes):
            between()
            _run_stages([_Work(tracker, 0, one, range(objects)) for tracker in trackers[:count]])


def _encode(stages: Stages, pixels: Sequence[Tensor], timer: StageTimer) -> Iterator[ImageFeatures]:
    """The features of each image (b = 1), to be used up before the next are asked for."""
    if len(pixels) > 1 and stages.takes_several_frames:
        with timer.stage("image_encoder"):
            encoded = stages.image_encoder(torch.cat(list(pixels)))
        for i in range(len(pixels)):
            yield ImageFeatures(**{name: value[i : i + 1] for name, value in vars(encoded).items()})
        return
    for image in pixels:
        with timer.stage("image_encoder"):
            encoded = stages.image_encoder(image)
        yield encoded


def _run_stages(works: Sequence[_Work]) -> None:
    """All stages but the image encoder, on what is remembered, whatever it is, as if every memory were there."""
    stages = works[0].tracker._stages
    features, conditioned = _condition(works, is_full=True)
    stages.memory_encoder(features, stages.mask_decoder(features, conditioned, None))


def _propagate(works: Sequence[_Work], timer: StageTimer) -> None:
    """Memory -> mask -> memory, for all objects of all works in one call of each stage."""
    first = works[0].tracker
    stages = first._stages
    with timer.stage("memory_attention"):
        features, conditioned = _condition(works)
    with timer.stage("mask_decoder"):
        prediction = stages.mask_decoder(features, conditioned, None)
        sent = _send(prediction)
    entry = None
    if first._device.type == "cuda":  # queued before `_look` waits for the masks, so that the GPU goes on meanwhile
        with timer.stage("memory_encoder"):
            entry = stages.memory_encoder(features, prediction)
    with timer.stage("mask_decoder"):
        steps = [work.step for work in works for _ in work.rows]
        sightings = first._look(sent, steps)

    if any(s.is_remembered for s in sightings):
        with timer.stage("memory_encoder"):
            if entry is None:
                entry = stages.memory_encoder(features, prediction)
            rows = [(work, row) for work in works for row in work.rows]
            for i, ((work, row), sighting) in enumerate(zip(rows, sightings, strict=True)):
                if sighting.is_remembered:  # a hidden object must not overwrite what we remember of it
                    work.tracker._memory.remember_recent(row, work.step, entry, i)
    for work, end in zip(works, itertools.accumulate(len(work.rows) for work in works), strict=True):
        work.tracker._remember(work.step, work.rows, sightings[end - len(work.rows) : end])


def _condition(works: Sequence[_Work], *, is_full: bool = False) -> tuple[ImageFeatures, Float[Tensor, "o c h w"]]:
    """Memory attention; and the features to go on with: one frame for all objects, or a frame for each.

    `is_full`: empty memories count, too.
    """
    stages = works[0].tracker._stages
    memory = _joined([work.tracker._memory.read(work.step, work.rows) for work in works])
    if is_full:
        valid = {name: torch.ones_like(getattr(memory, name)) for name in ("spatial_valid", "pointer_valid")}
        memory = replace(memory, **valid)
    if len(works) == 1:
        return works[0].features, stages.memory_attention(works[0].features, memory)
    features = _joined([work.features for work in works])
    frame_of = torch.repeat_interleave(torch.tensor([len(work.rows) for work in works])).to(memory.spatial.device)
    conditioned = stages.memory_attention(features, memory, frame_of)
    return ImageFeatures(**{name: value[frame_of] for name, value in vars(features).items()}), conditioned


def _joined(parts: Sequence[Batch]) -> Batch:
    """Dataclasses of tensors, one below the other."""
    if len(parts) == 1:
        return parts[0]
    names = vars(parts[0])
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class _Sent:
    """What the decoder found, on its way to the host: all objects in two copies, which nobody waits for yet."""

    mask_logits: Float[Tensor, "o hm wm"]  # on the device
    numbers: Float[Tensor, "3 o"]  # predicted IoU, object score, largest logit
    host_logits: Float[Tensor, "o hm wm"]
    arrived: torch.cuda.Event | None  # of a GPU

    def wait(self) -> tuple[list[list[float]], Float[np.ndarray, "o hm wm"]]:
        """The numbers as lists, and the logits. The only time in a step that the host waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist(), self.host_logits.numpy()


def _send(prediction: MaskPrediction) -> _Sent:
    mask_logits = prediction.mask_logits.clone()  # the decoder's next call may overwrite it
    largest = mask_logits.flatten(1).amax(dim=1)
    numbers = torch.stack((prediction.iou, prediction.object_score_logits, largest)).float()
    # From a GPU, copies that nobody waits for go to page-locked memory, which torch provides.
    sent = numbers.to("cpu", non_blocking=True), mask_logits.float().to("cpu", non_blocking=True)
    arrived = None
    if mask_logits.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record()
    return _Sent(mask_logits, *sent, arrived)


def _on_host(logits: Float[Tensor, "hm wm"]) -> Float[np.ndarray, "hm wm"]:
    return logits.float().cpu().numpy()


def _own(prediction: MaskPrediction) -> MaskPrediction:
    """A copy that outlives the decoder's next call."""
    return MaskPrediction(**{name: value.clone() for name, value in vars(prediction).items()})
