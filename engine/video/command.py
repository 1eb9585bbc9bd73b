# SPDX-License-Identifier: Apache-2.0
"""`virst segment`: loads, runs, writes, and sums up what was found."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig
from virst_engine.errors import VideoError
from virst_engine.slow.reasoner import Reasoner
from virst_engine.types import ObjectState
from virst_engine.video.offline import AnchorStrategy
from virst_engine.video.recordings import RecordedVideo, open_recording
from virst_engine.video.results import SegmentWriter
from virst_engine.video.segment import Segmented, measure_delay, segment_offline, segment_stream


@dataclass(frozen=True)
class SegmentSettings:
    """One run. ValueError for what contradicts itself."""

    video: Path
    goals: tuple[str, ...]
    out: Path
    config: EngineConfig
    is_offline: bool = False
    anchors: str = "dynamic"  # offline only: AnchorStrategy
    is_realtime: bool = False
    delay_s: float | None = None  # None: measured, when it is needed
    topic: str = ""
    rate_hz: float = 0.0
    detector: str = ""  # folder, for the method grounding; empty: the one that is shipped with the model
    threshold: float = 0.0
    overlay: bool = True
    replace: bool = False

    def __post_init__(self) -> None:
        if not self.goals:
            raise ValueError("there is no goal; give at least one sentence")
        if self.is_offline and self.is_realtime:
            raise ValueError("the whole-video mode asks once: no answer can be late")
        if self.is_offline and self.config.reasoner.method == "grounding":
            raise ValueError("--offline needs a method that understands a whole video: virst, visa or tempvrs")
        if self.config.reasoner.chooses_frames and self.anchors != "dynamic":
            raise ValueError(f"{self.config.reasoner.method} chooses its anchors itself: leave out --anchors")
        AnchorStrategy(self.anchors)
        if self.detector and self.config.reasoner.method != "grounding":
            raise ValueError("--detector is for --method grounding")


def run_segment(settings: SegmentSettings, *, on_step: Callable[[int, int | None, str], None]) -> list[str]:
    """Write the results of a video; a line per goal that says what was found.

    Args:
        on_step: called before each frame with frames done, frames expected (None: unknown) and what happens next.

    Raises:
        VirstError: the video, the weights or a sentence cannot be used, or the results cannot be written.
    """
    from virst_engine.weights import load_goal_check, load_grounding, load_reasoner, load_stages

    recording = open_recording(settings.video, rate_hz=settings.rate_hz, topic=settings.topic)
    config = settings.config
    method = config.reasoner.method
    check = load_goal_check(config.model, method, config.reasoner.weights)
    for sentence in settings.goals:
        check(sentence)
    on_step(0, None, "loading the model")
    reasoner: Reasoner
    if method == "grounding":
        reasoner = load_grounding(settings.detector, config.model, threshold=settings.threshold)
    else:
        reasoner = load_reasoner(
            config.model,
            method,
            config.reasoner.weights,
            memory_budget_gib=config.reasoner.memory_budget_gib,
            weight_bits=config.reasoner.weight_bits,
        )
    stages = load_stages(config.model, config.engine, config.memory)
    description: dict[str, Any] = {
        "video": str(settings.video),
        "model": config.model.name,
        "method": method,
        "mode": "offline" if settings.is_offline else "stream",
        "start_presence": config.start_presence,
        "weight_bits": config.reasoner.weight_bits,
    }
    total = recording.expected_frames
    if settings.is_offline:
        on_step(0, None, "reading the video")
        total = len(recording)
        description["anchors"] = settings.anchors
        strategy = AnchorStrategy(settings.anchors)
        found = segment_offline(stages, reasoner, recording, settings.goals, config, strategy=strategy)
    else:
        delay_s = _delay_s(settings, stages, reasoner, recording)
        description["answers_delay_ms"] = round(1e3 * delay_s, 3)
        found = segment_stream(stages, reasoner, recording, settings.goals, config, delay_s=delay_s)
    return _write(settings, recording, found, description, total, on_step)


def _write(
    settings: SegmentSettings,
    recording: RecordedVideo,
    found: Iterator[Segmented],
    description: dict[str, Any],
    total: int | None,
    on_step: Callable[[int, int | None, str], None],
) -> list[str]:
    tallies: dict[str, _Tally] = {}
    frames, begin_s = 0, time.perf_counter()
    with SegmentWriter(
        settings.out,
        rate_hz=recording.rate_hz,
        description=description,
        overlay=settings.overlay,
        replace=settings.replace,
    ) as writer:
        on_step(0, total, "segmenting")
        for seen in found:
            writer.add(seen.number, seen.frame, seen.result, seen.goals)
            for goal in seen.goals:
                tallies.setdefault(goal.goal_id, _Tally(goal.sentence))
            for each in seen.result.objects:
                tallies[each.goal_id].add(seen.number, bool(each.mask.any()), each.score, each.state, each.message)
            frames += 1
            on_step(frames, total, "segmenting")
        if not frames:
            raise VideoError(f"{settings.video} has no frames; give another one")
        spent_s = time.perf_counter() - begin_s
        description["frames_per_second"] = round(frames / spent_s, 2)
    return [*(tally.line(frames) for tally in tallies.values()), f"{frames} frames in {spent_s:.1f} s"]


def _delay_s(settings: SegmentSettings, stages: Stages, reasoner: Reasoner, recording: RecordedVideo) -> float:
    if not settings.is_realtime:
        return 0.0
    if settings.delay_s is not None:
        return settings.delay_s
    first = next(iter(recording), None)
    if first is None:
        raise VideoError(f"{settings.video} has no frames; give another one")
    return measure_delay(stages, reasoner, first, settings.goals[0], settings.config)


@dataclass
class _Tally:
    """What is told of a goal at the end."""

    sentence: str
    seen: int = 0
    first: int | None = None
    score: float = 0.0
    state: ObjectState = ObjectState.SEARCHING
    message: str = ""

    def add(self, number: int, is_seen: bool, score: float, state: ObjectState, message: str) -> None:
        self.state, self.message = state, message
        if is_seen:
            self.seen += 1
            self.score += score
            self.first = number if self.first is None else min(self.first, number)

    def line(self, frames: int) -> str:
        if self.first is None:
            return f"{self.sentence!r}: not found ({self.message or self.state.name.lower()})"
        mean = self.score / self.seen
        return (
            f"{self.sentence!r}: in {self.seen} of {frames} frames, first in frame {self.first}, mean score {mean:.2f}"
        )
