# SPDX-License-Identifier: Apache-2.0
"""Sessions on a machine whose speed is scripted: what they leave out, what it does to masks, and how it comes back."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import BLUE, DelayedClient, FakeStages, InstantClient, Video, moving_square, small_config
from virst_engine.backends.base import Stages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import EngineConfig
from virst_engine.fast.deadline import FIRST_FRAMES, LATE_FRAMES, RETURN_AFTER_FRAMES
from virst_engine.model.config import sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.session import Session
from virst_engine.slow.reasoner import NoReasoner
from virst_engine.types import Frame, FrameResult, ImageFeatures, MaskPrompt, MemoryTensors, ObjectState
from virst_engine.weights import load_stages
from virst_ros.demo.recorded_run import RecordedRun, load_recording

SHOWN = {"ball": 1, "box": 3}  # of the recorded run: object ids and labels
SIZE = 128  # of the fake model's own input; the smaller one has 96


class Machine:
    """A clock that goes on when the stages of `TimedStages` work, at the machine's speed."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slowness = 1.0

    def __call__(self) -> float:
        return self.now_s

    def works(self, seconds: float) -> None:
        self.now_s += seconds * self.slowness


class TimedStages(FakeStages):
    """40 ms for an image of 128 px, less for a smaller one, and 5 ms for each memory that is read: 85 ms at most."""

    def __init__(self, machine: Machine, image_size: int = SIZE) -> None:
        super().__init__(image_size)
        self._machine = machine

    def at_image_size(self, image_size: int) -> "TimedStages | None":
        return TimedStages(self._machine, image_size)

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        self._machine.works(0.040 * pixels.shape[0] * (pixels.shape[-1] / SIZE) ** 2)
        return super().image_encoder(pixels)

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._machine.works(0.005 * memory.spatial.shape[1])
        return super().memory_attention(features, memory, frame_of)


class FixedStages(TimedStages):
    """As engines of fixed shapes are."""

    takes_fewer_memories = False

    def at_image_size(self, image_size: int) -> None:
        return None


def config_of(deadline_ms: float) -> EngineConfig:
    config = small_config()
    return replace(config, tracking=replace(config.tracking, deadline_ms=deadline_ms))


def session_of(
    machine: Machine,
    client: InstantClient | None = None,
    *,
    deadline_ms: float = 50.0,
    stages: FakeStages | None = None,
) -> Session:
    return Session(config_of(deadline_ms), stages or TimedStages(machine), client or InstantClient(), clock_s=machine)


def run(session: Session, video: Video, frames: Sequence[int]) -> list[FrameResult]:
    return [session.step(video.frame(t)) for t in frames]


def iou(result: FrameResult, video: Video, t: int, number: int = 0) -> float:
    mask, truth = result.objects[number].mask, video.truth(t, number)
    return float((mask & truth).sum() / (mask | truth).sum())


def test_late_frames_leave_out_memories_then_pixels_and_masks_go_on(caplog: pytest.LogCaptureFixture) -> None:
    video, machine = Video([moving_square()]), Machine()
    session = session_of(machine)
    session.set_goal("red")
    with caplog.at_level(logging.INFO, "virst_engine.session"):
        results = run(session, video, range(80))
    told = list(dict.fromkeys(result.degradation for result in results))
    assert [words.partition(" since ")[0] for words in told] == [
        "",
        "frames take 85 ms, tracking.deadline_ms is 50: remembers fewer frames",
        "frames take 55 ms, tracking.deadline_ms is 50: remembers fewer frames, sees images of 96 px instead of 128",
    ]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == told[1:]
    assert all(result.objects[0].state is ObjectState.TRACKING for result in results)
    assert min(iou(result, video, t) for t, result in enumerate(results)) > 0.9
    assert session.skipped == 0


def test_nothing_is_left_out_without_a_deadline() -> None:
    video, machine = Video([moving_square()]), Machine()
    machine.slowness = 100.0
    session = session_of(machine, deadline_ms=0.0)
    session.set_goal("red")
    results = run(session, video, range(60))
    assert not any(session.skips(video.frame(60)) for _ in range(4))
    assert {result.degradation for result in results} == {""}


def test_full_quality_comes_back_with_the_speed() -> None:
    video, machine = Video([moving_square()]), Machine()
    session, reference = session_of(machine), session_of(Machine(), deadline_ms=0.0)
    for one in (session, reference):
        one.set_goal("red")
    run(session, video, range(60))
    sizes = [buffer.shape[-1] for buffer in (session._streams[""].tracker.memory._spatial,)]
    assert sizes == [12]
    machine.slowness = 0.2
    back = run(session, video, range(60, 240))
    full = run(reference, video, range(240))
    assert back[0].degradation
    assert back[-1].degradation == ""
    changed = [t for t in range(1, len(back)) if back[t].degradation != back[t - 1].degradation]
    assert len(changed) == 2  # one level after the other
    assert changed[1] - changed[0] >= RETURN_AFTER_FRAMES
    for ours, others in zip(back[-20:], full[-20:], strict=True):
        assert np.array_equal(ours.objects[0].mask, others.objects[0].mask)
    # The first anchor is what it was, not what smaller images have left of it.
    anchor, original = (one._streams[""].tracker.memory._spatial[0, 0] for one in (session, reference))
    assert torch.equal(anchor, original)
    assert session._streams[""].tracker.memory._own_spatial is None


def test_a_deadline_can_be_set_and_taken_away_while_it_runs() -> None:
    video, machine = Video([moving_square()]), Machine()
    session = session_of(machine, deadline_ms=0.0)
    session.set_goal("red")
    run(session, video, range(40))
    session.reconfigure(config_of(50.0))
    assert run(session, video, range(40, 80))[-1].degradation
    session.reconfigure(config_of(0.0))
    assert {result.degradation for result in run(session, video, range(80, 100))} == {""}
    assert session._streams[""].tracker.memory._spatial.shape[-1] == SIZE // 8


def test_frames_are_skipped_before_they_are_encoded_when_nothing_else_helps() -> None:
    video, machine = Video([moving_square()]), Machine()
    machine.slowness = 3.0  # 37.5 ms at level 2 are 112.5 now: every third frame
    session = session_of(machine)
    session.set_goal("red")
    results = []
    for t in range(150):
        if not session.skips(video.frame(t)):
            results.append((t, session.step(video.frame(t))))
    stages = session._stages[0]
    assert isinstance(stages, FakeStages)
    taken = [t for t, _ in results]
    assert session.skipped == 150 - len(taken)
    assert {later - earlier for earlier, later in zip(taken[-10:], taken[-9:], strict=False)} == {3}
    assert "takes one frame of 3 since step" in results[-1][1].degradation
    assert min(iou(result, video, t) for t, result in results) > 0.9
    assert [result.step for _, result in results] == list(range(len(results)))


@pytest.mark.parametrize(("waited", "is_skipped"), [(True, True), (False, False), (None, False)])
def test_what_is_done_with_results_keeps_no_frame_from_being_skipped(waited: bool | None, is_skipped: bool) -> None:
    """It takes a fifth of a step: only who asks knows whether the next frame was there at its end."""
    video, machine = Video([moving_square()]), Machine()
    session = session_of(machine, stages=FixedStages(machine))
    session.set_goal("red")
    for t in range(60):
        if not session.skips(video.frame(t), waited=waited):
            before_s = machine()
            session.step(video.frame(t))
            machine.works(0.2 * (machine() - before_s))
    assert (session.skipped > 0) == is_skipped


class RealStages(TorchStages):
    """Those of a model of random weights, which keep the shapes that they have met. A second for each image."""

    def __init__(self, machine: Machine, sam2: Sam2) -> None:
        super().__init__(sam2)
        self._machine = machine
        self.met: set[tuple[int, ...]] = set()

    def at_image_size(self, image_size: int) -> "RealStages | None":
        smaller = super().at_image_size(image_size)
        if smaller is None:
            return None
        other = RealStages(self._machine, smaller._sam2)
        other.met = self.met
        return other

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        self.met.add(tuple(pixels.shape))
        self._machine.works(1.0)
        return super().image_encoder(pixels)

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.met.add((*memory.spatial.shape, *memory.pointers.shape))
        return super().memory_attention(features, memory, frame_of)


@pytest.mark.parametrize("cameras", [("",), ("left", "right")])
def test_what_late_frames_need_is_warm_before_there_are_any(cameras: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    machine = Machine()
    stages = RealStages(machine, Sam2(sam2_1("tiny", SIZE)))
    config = config_of(1.0)
    config = replace(config, tracking=replace(config.tracking, max_objects=2))
    session = Session(config, stages, {name: NoReasoner() for name in cameras}, clock_s=machine)
    trackers = [stream.tracker for stream in session._streams.values()]
    kept = [(tracker._stages, tracker.memory._spatial, tracker.ring._masks) for tracker in trackers]
    session.warm_up()
    assert {shape[-1] for shape in stages.met if len(shape) == 4} == {SIZE, 96}
    for tracker, (own, spatial, masks) in zip(trackers, kept, strict=True):
        assert tracker._stages is own
        assert tracker.memory._spatial is spatial
        assert tracker.ring._masks is masks
        assert tracker.ring.oldest_step() == -1
    warm = set(stages.met)
    pixels, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.bool_)
    mask[20:60, 20:60] = True
    for t in range(FIRST_FRAMES + 3 * LATE_FRAMES):
        frames = [Frame(pixels, 1_000_000_000 + t, name or "camera") for name in cameras]
        results = session.step_together(frames)
        if t == 0:
            session.add_object(MaskPrompt(mask), camera=cameras[-1])
    assert "96 px" in results[0].degradation
    assert stages.met <= warm


def test_without_a_deadline_only_what_is_used_is_warmed() -> None:
    stages = RealStages(Machine(), Sam2(sam2_1("tiny", SIZE)))
    Session(config_of(0.0), stages, NoReasoner()).warm_up()
    assert {shape[-1] for shape in stages.met if len(shape) == 4} == {SIZE}


def test_a_recording_loses_no_frame_for_nobody_asks() -> None:
    video, machine = Video([moving_square()]), Machine()
    machine.slowness = 3.0
    session = session_of(machine)
    results = run(session, video, range(80))
    assert session.skipped == 0
    assert results[-1].degradation.endswith("there is no more to leave out")


def test_stages_of_fixed_shapes_can_only_skip() -> None:
    video, machine = Video([moving_square()]), Machine()
    session = session_of(machine, stages=FixedStages(machine))
    session.set_goal("red")
    results = [session.step(video.frame(t)) for t in range(60) if not session.skips(video.frame(t))]
    assert results[-1].degradation.startswith("frames take 85 ms, tracking.deadline_ms is 50: takes one frame of 2")


def test_answers_that_come_late_are_used_across_a_change_of_size() -> None:
    """The frames that an answer is for were seen at another size; those since then are replayed."""
    video, machine = Video([moving_square(), moving_square(BLUE, row=9)]), Machine()
    delay = 12
    for first in range(FIRST_FRAMES + LATE_FRAMES - delay, FIRST_FRAMES + 3 * LATE_FRAMES, 3):
        client = DelayedClient(delay_steps=delay)
        session = session_of(machine, client)
        session.set_goal("red")
        results = []
        for t in range(80):
            if t == max(first, 0) + delay:
                session.set_goal("blue")
            client.tick()
            results.append(session.step(video.frame(t)))
        assert "96 px" in results[-1].degradation
        assert [found.state for found in results[-1].objects] == [ObjectState.TRACKING] * 2
        assert min(iou(results[t], video, t, number) for t in range(70, 80) for number in range(2)) > 0.9


def test_frames_with_a_replay_do_not_count() -> None:
    """Replays take longer than the deadline leaves room for; they are soon over."""
    video, machine = Video([moving_square()]), Machine()
    machine.slowness = 0.5  # 42.5 ms
    client = DelayedClient(delay_steps=20)
    session = session_of(machine, client)
    session._clock_s = machine
    session.set_goal("red")
    results = []
    for t in range(80):
        client.tick()
        results.append(session.step(video.frame(t)))
    assert results[-1].objects[0].state is ObjectState.TRACKING
    assert {result.degradation for result in results} == {""}


def test_all_cameras_change_together_and_each_is_skipped_by_its_own_count() -> None:
    video, machine = Video([moving_square()]), Machine()
    machine.slowness = 1.5
    stages = TimedStages(machine)
    session = Session(config_of(50.0), stages, {name: InstantClient() for name in ("left", "right")}, clock_s=machine)
    session.set_goal("red")
    taken = {"left": 0, "right": 0}
    results: list[FrameResult] = []
    for t in range(200):
        frames = [replace(video.frame(t), camera=name) for name in taken]
        frames = [frame for frame in frames if not session.skips(frame)]
        if frames:
            results = session.step_together(frames)
        for frame in frames:
            taken[frame.camera] += 1
    assert taken["left"] == taken["right"] < 150
    assert {stream.tracker.memory._spatial.shape[-1] for stream in session._streams.values()} == {12}
    assert all(result.objects[0].state is ObjectState.TRACKING for result in results)


def test_what_is_kept_does_not_grow_with_changes() -> None:
    video, machine = Video([moving_square()]), Machine()
    session = session_of(machine)
    session.set_goal("red")

    def kept_bytes() -> int:
        tracker = session._streams[""].tracker
        tensors = [*tracker.ring._buffers.values(), tracker.ring._masks, tracker.memory._spatial]
        return sum(x.numel() * x.element_size() for x in tensors) + (tracker.memory._own_spatial is not None)

    run(session, video, range(5))
    before, t = kept_bytes(), 5
    for _ in range(3):
        machine.slowness = 1.0
        run(session, video, range(t, t + 60))
        assert session._streams[""].tracker.memory._own_spatial is not None
        machine.slowness = 0.2
        run(session, video, range(t + 60, t + 240))
        t += 240
        assert kept_bytes() == before


class SteadyStages:
    """Real stages that take a second for a frame, whatever is left out."""

    def __init__(self, machine: Machine, stages: Stages) -> None:
        self._machine, self._real = machine, stages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        self._machine.works(1.0)
        return self._real.image_encoder(pixels)

    def at_image_size(self, image_size: int) -> "SteadyStages":
        smaller = self._real.at_image_size(image_size)
        assert smaller is not None
        return SteadyStages(self._machine, smaller)


WATCHED = range(34, 74)


def follow_recording(recording: RecordedRun, level: int, frames: int) -> list[FrameResult]:
    """What `tabletop-tiny` sees of `SHOWN`: at this level in the frames of `WATCHED`, back at full quality later."""
    config, machine = EngineConfig(), Machine()
    config = replace(config, tracking=replace(config.tracking, deadline_ms=50.0, max_objects=len(SHOWN)))
    results, is_reached = [], False
    with Session(config, SteadyStages(machine, load_stages(config.model)), NoReasoner(), clock_s=machine) as session:
        for t in range(frames):
            is_reached = is_reached or session._deadline.number == level
            machine.slowness = 0.1 if not is_reached and t >= 15 else 0.045 if t < WATCHED.stop else 0.005
            image = recording.images_rgb_u8[t % len(recording.images_rgb_u8)]
            results.append(session.step(Frame(image, round(1e9 * t / recording.rate_hz))))
            if t == 0:
                for name, label in SHOWN.items():
                    session.add_object(MaskPrompt(recording.instance_masks[0] == label), object_id=name)
    return results


def overlaps(some: FrameResult, others: FrameResult) -> list[float]:
    """IoU of each object in two results."""
    pairs = [(one.mask, other.mask) for one, other in zip(some.objects, others.objects, strict=True)]
    return [float((one & other).sum() / (one | other).sum()) for one, other in pairs]


@pytest.mark.slow
def test_real_masks_are_nearly_the_same_when_less_is_remembered_or_seen() -> None:
    recording = load_recording()
    full, less = follow_recording(recording, 0, 120), follow_recording(recording, 1, WATCHED.stop)
    smaller = follow_recording(recording, 2, 120)
    assert not any(result.degradation for result in full)
    for results, words, least_iou in ((less, "remembers fewer", 0.95), (smaller, "96 px", 0.75)):
        assert all(words in results[t].degradation for t in WATCHED)
        assert min(min(overlaps(full[t], results[t])) for t in WATCHED) > least_iou
    # Back at the model's own size: what smaller images had left in the memory of recent frames is gone soon.
    assert "px" not in smaller[-1].degradation
    assert min(overlaps(full[-1], smaller[-1])) > 0.95
