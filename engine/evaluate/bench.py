# SPDX-License-Identifier: Apache-2.0
"""How fast the shipped model is here: per stage, per number of objects and cameras, paced, and over many frames."""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig, ModelParameters
from virst_engine.errors import VirstError
from virst_engine.evaluate.cases import Case, load_case
from virst_engine.evaluate.modes import FirstAnswerOnly
from virst_engine.evaluate.provenance import command_line, device_description, versions
from virst_engine.evaluate.settings import FIRST_EVALUATION_SEED, EvaluationSettings
from virst_engine.session import Session
from virst_engine.slow.reasoner import InProcessClient, Reasoner, ReasonerClient
from virst_engine.timing import percentiles, resident_mib
from virst_engine.types import Frame, ObjectState, ReasonerAnswer, ReasonerRequest

logger = logging.getLogger(__name__)

OBJECT_COUNTS = (1, 4, 8)
# What is set beside one object of one camera: cameras, objects of each.
SCALES = {"8 objects": (1, 8), "2 cameras": (2, 1), "4 cameras": (4, 1)}
WARM_UP_FRAMES = 30  # window of the first clip, and caches
SETTLED_FRAMES = 500  # from here on memory must stay flat
FLATNESS_FRAMES = 1000  # at the end and after SETTLED_FRAMES, whose times are compared
REASONER_START_S = 60.0
FIRST_ANSWER_S = 60.0
SETTLE_S = 0.5  # after the first answer


@dataclass(frozen=True)
class BenchSettings:
    """What `virst bench` measures. Frames and sentences come from one simulated scene, played back and forth."""

    model: ModelParameters = field(default_factory=ModelParameters)
    scene: int = FIRST_EVALUATION_SEED
    frames: int = 300  # of each speed measurement
    rate_hz: float = 30.0  # of the paced run
    paced_s: float = 10.0  # of each of its halves
    memory_frames: int = 2000

    def __post_init__(self) -> None:
        if self.frames < 10 or self.memory_frames < SETTLED_FRAMES + 100 or self.rate_hz <= 0 or self.paced_s <= 0:
            raise ValueError(
                f"a benchmark needs frames >= 10, memory_frames >= {SETTLED_FRAMES + 100}, rate_hz and paced_s > 0"
            )


class Playback:
    """An endless video of one scene, forwards and backwards in turn, with the stamps that are asked for."""

    def __init__(self, case: Case) -> None:
        count = len(case.frames)
        self._images = [case.frames[t].image_rgb_u8 for t in (*range(count), *range(count - 2, 0, -1))]
        self.sentences = tuple(question.sentence for question in case.questions if question.target_ids)
        if not self.sentences:
            raise VirstError("the benchmark's scene has no sentence with a target; choose another --scene")

    def frame(self, number: int, stamp_ns: int) -> Frame:
        return Frame(self._images[number % len(self._images)], stamp_ns)

    def set_goals(self, session: Session, count: int) -> None:
        for number in range(count):
            session.set_goal(self.sentences[number % len(self.sentences)], max_instances=1)


def run_bench(
    settings: BenchSettings,
    stages: Stages,
    reasoner: Reasoner,
    case: Case,
    *,
    on_step: Callable[[str], None] = lambda what: None,
    with_process: bool = True,
) -> dict[str, Any]:
    """All measurements, as they go into the JSON file. Times are milliseconds.

    Args:
        on_step: called with a few words before each measurement.
        with_process: also the paced run, which starts the reasoner as a process of its own.

    Raises:
        VirstError: the reasoner process does not come up.
    """
    started_s = time.perf_counter()
    playback, config = Playback(case), EngineConfig(model=settings.model)
    engine = {}
    for objects in OBJECT_COUNTS:
        on_step(f"engine alone, {objects} objects")
        engine[str(objects)] = engine_speed(stages, reasoner, config, playback, objects, settings.frames)
    on_step("objects and cameras beside one of each")
    scale = scaling(stages, reasoner, config, playback, settings.frames)
    on_step(f"memory over {settings.memory_frames} frames")
    memory = resident_memory(stages, reasoner, config, playback, settings.memory_frames)
    result: dict[str, Any] = {"engine": engine, "scale": scale, "memory": memory}
    if with_process:
        with reasoner_process(settings.model) as endpoint:
            for name, period_s in (("idle", 3600.0), ("busy", 0.0)):
                on_step(f"paced at {settings.rate_hz:g} Hz, reasoner {name}")
                paced_config = replace(config, reasoner=replace(config.reasoner, endpoint=endpoint, period_s=period_s))
                result[f"paced_reasoner_{name}"] = paced_run(
                    stages, paced_config, playback, settings.rate_hz, settings.paced_s
                )
        idle, busy = (result[f"paced_reasoner_{name}"]["age_ms"]["p99"] for name in ("idle", "busy"))
        result["age_p99_busy_over_idle"] = round(busy / idle, 3)
    return {
        **result,
        "settings": asdict(settings),
        "versions": versions(),
        "device": device_description(settings.model.device),
        "command": command_line(),
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def engine_speed(
    stages: Stages, reasoner: Reasoner, config: EngineConfig, playback: Playback, objects: int, frames: int
) -> dict[str, Any]:
    """The session without its reasoner: it is asked once per goal before the clock starts."""
    config = replace(config, tracking=replace(config.tracking, confirm_answers=1))  # there is no second answer
    with Session(config, stages, FirstAnswerOnly(InProcessClient(reasoner))) as session:
        steps = _Steps(session, playback)
        steps.run(WARM_UP_FRAMES)
        playback.set_goals(session, objects)
        steps.run(5)
        begin = len(steps.ms)
        steps.run(frames)
        ms, stage_ms, tracked = steps.ms[begin:], steps.stage_ms[begin:], steps.tracked[begin:]
    names = list(dict.fromkeys(name for timings in stage_ms for name in timings))
    return {
        "fps": round(1e3 / float(np.mean(ms)), 2),
        "frame_ms": percentiles(ms),
        "stage_ms": {name: percentiles([timings.get(name, 0.0) for timings in stage_ms]) for name in names},
        "objects": objects,
        "objects_tracked": round(float(np.mean(tracked)), 2),  # objects that are not seen cost less
        "frames": frames,
    }


def scaling(
    stages: Stages, reasoner: Reasoner, config: EngineConfig, playback: Playback, frames: int
) -> dict[str, dict[str, Any]]:
    """What a step of several objects or cameras costs beside one of each, frame by frame in turn: a noisy machine
    slows all of them alike. A step of several cameras has a new frame of each."""
    config = replace(config, tracking=replace(config.tracking, confirm_answers=1))
    with ExitStack() as stack:

        def steps_of(cameras: int, objects: int) -> "_Steps":
            names = [f"camera_{number}" for number in range(cameras)]
            clients = {name: FirstAnswerOnly(InProcessClient(reasoner)) for name in names}
            session = stack.enter_context(Session(config, stages, clients))
            steps = _Steps(session, playback, cameras=names)
            steps.run(WARM_UP_FRAMES)
            playback.set_goals(session, objects)
            steps.run(5)
            steps.forget()
            return steps

        one = steps_of(1, 1)
        others = {name: steps_of(*counts) for name, counts in SCALES.items()}
        for _ in range(frames):
            for steps in (one, *others.values()):
                steps.run(1)
    result = {}
    for name, steps in others.items():
        quartiles = np.percentile(np.array(steps.ms) / np.array(one.ms), (25, 50, 75))
        result[name] = {
            "step_ms": percentiles(steps.ms),
            "over_one": round(float(quartiles[1]), 3),
            "quartiles": [round(float(quartiles[0]), 3), round(float(quartiles[2]), 3)],
            "objects_tracked": round(float(np.mean(steps.tracked)), 2),
        }
    return result


def resident_memory(
    stages: Stages, reasoner: Reasoner, config: EngineConfig, playback: Playback, frames: int
) -> dict[str, Any]:
    """Resident memory of this process while goals come and go and are refreshed every second of video.

    And whether the last frames cost what the early ones did, reasoner included: it runs in this process.
    """
    resident_mb: list[float] = []
    ms = np.zeros(frames // 50 * 50)
    with Session(config, stages, InProcessClient(reasoner)) as session:
        steps = _Steps(session, playback)
        for block in range(frames // 50):
            if block % 4 == 0:
                for goal in session.goals():
                    session.clear_goal(goal.goal_id)
                playback.set_goals(session, 2)
            steps.run(50)
            ms[50 * block : 50 * block + 50] = steps.ms
            steps.forget()
            resident_mb.append(resident_mib())
    settled = np.array(resident_mb[SETTLED_FRAMES // 50 - 1 :])
    return {
        "frames": len(resident_mb) * 50,
        "settled_mib": round(float(settled[0]), 1),
        "last_mib": round(float(settled[-1]), 1),
        "largest_change_percent": round(100 * float(np.abs(settled / settled[0] - 1).max()), 2),
        **flatness(ms),
    }


def flatness(ms: Sequence[float] | Float[np.ndarray, " frames"]) -> dict[str, Any]:
    """Mean times of the frames from 500 to 1,500 and of the last 1,000, and their ratio: 1 is flat.

    Of fewer than 2,500 frames, the second tenth and the last one: the first frames are still filling caches.
    """
    times = np.asarray(ms)
    if times.size >= SETTLED_FRAMES + 2 * FLATNESS_FRAMES:
        begin, count = SETTLED_FRAMES, FLATNESS_FRAMES
    else:
        count = max(1, times.size // 10)
        begin = min(count, times.size - 1)
    early, late = times[begin : begin + count], times[-count:]
    return {
        "early_ms": round(float(early.mean()), 3),
        "late_ms": round(float(late.mean()), 3),
        "late_over_early": round(float(late.mean() / early.mean()), 3),
        "late_over_early_p50": round(float(np.median(late) / np.median(early)), 3),
    }


def paced_run(
    stages: Stages, config: EngineConfig, playback: Playback, rate_hz: float, seconds: float
) -> dict[str, Any]:
    """One goal and frames at a steady rate, the newest wins: the age of each mask when it is ready.

    The clock starts half a second after the reasoner's first answer. Raises VirstError when none comes.
    """
    from virst_engine.slow.zmq_client import ZmqReasonerClient

    client = _TimedClient(ZmqReasonerClient(config.reasoner.endpoint, curve_keys=config.reasoner.curve_keys))
    age_ms: list[float] = []
    tracked = 0
    with Session(config, stages, client) as session:
        _wait_for_reasoner(client.status)
        begin_s, number, goal_after, answered_s = time.monotonic(), -1, round(2.2 * rate_hz), float("inf")
        while (now_s := time.monotonic()) < answered_s + SETTLE_S + seconds:
            if number > goal_after and now_s - begin_s > FIRST_ANSWER_S and not client.latency_ms:
                raise VirstError(f"the reasoner did not answer its first request within {FIRST_ANSWER_S:g} s")
            due = int((now_s - begin_s) * rate_hz)
            if due <= number:
                time.sleep(max(0.0, begin_s + (number + 1) / rate_hz - now_s))
                continue
            number = due
            if number >= goal_after and not session.goals():
                playback.set_goals(session, 1)
            captured_s = begin_s + number / rate_hz
            result = session.step(playback.frame(number, round(captured_s * 1e9)))
            finished_s = time.monotonic()
            if captured_s > answered_s + SETTLE_S:
                age_ms.append(1e3 * (finished_s - captured_s))
                tracked += sum(found.state is ObjectState.TRACKING for found in result.objects)
            if client.latency_ms and answered_s == float("inf"):
                answered_s = finished_s
    return {
        "fps": round(len(age_ms) / seconds, 2),
        "age_ms": percentiles(age_ms),
        "reasoner_latency_ms": percentiles(client.latency_ms),
        "answers": len(client.latency_ms),
        "tracked_percent": round(100 * tracked / len(age_ms), 1),
        "rate_hz": rate_hz,
        "frames": len(age_ms),
    }


@contextmanager
def reasoner_process(model: ModelParameters) -> Iterator[str]:
    """Its endpoint, while it runs. Its own messages are shown when it ends early.

    Raises:
        VirstError: it could not start.
    """
    with tempfile.TemporaryDirectory(prefix="virst_bench_") as folder:
        endpoint, log = f"ipc://{folder}/reasoner", Path(folder) / "log"
        command = [sys.executable, "-m", "virst_engine.slow.zmq_server", "--endpoint", endpoint]
        command += ["--model", model.name, "--weights", model.weights, "--device", model.device]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            time.sleep(0.2)
            if process.poll() is not None:
                raise VirstError(f"the reasoner process ended at once: {log.read_text()[-2000:]}")
            yield endpoint
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def markdown(result: dict[str, Any]) -> str:
    """The tables that people read."""
    engine = result["engine"]
    stages = list(dict.fromkeys(name for row in engine.values() for name in row["stage_ms"]))
    lines = [
        f"# Benchmark: {result['settings']['model']['name']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['device']}; {result['seconds']:.0f} s.",
        "",
        "| engine alone, ms p50 / p95 | " + " | ".join(f"{count} objects" for count in engine) + " |",
        "|---|" + "---|" * len(engine),
        "| frames per second | " + " | ".join(f"{row['fps']:.1f}" for row in engine.values()) + " |",
        "| whole frame | " + " | ".join(_cell(row["frame_ms"]) for row in engine.values()) + " |",
    ]
    for name in stages:
        lines.append(f"| {name} | " + " | ".join(_cell(row["stage_ms"].get(name)) for row in engine.values()) + " |")
    lines.append("| objects seen | " + " | ".join(f"{row['objects_tracked']:.1f}" for row in engine.values()) + " |")
    lines += [
        "",
        "| one step, in turn with one of one object and camera | ms p50 / p95 | times one, median (quartiles) |",
        "|---|---|---|",
    ]
    for name, row in result["scale"].items():
        low, high = row["quartiles"]
        lines.append(f"| {name} | {_cell(row['step_ms'])} | {row['over_one']:.2f} ({low:.2f} to {high:.2f}) |")
    paced = {name: result.get(f"paced_reasoner_{name}") for name in ("idle", "busy")}
    if paced["idle"]:
        lines += [
            "",
            f"Paced at {paced['idle']['rate_hz']:g} Hz, one goal, reasoner in its own process:",
            "",
            "| reasoner | frames/s | age ms p50 / p95 / p99 | reasoner latency ms p50 | answers |",
            "|---|---|---|---|---|",
        ]
        for name, row in paced.items():
            assert row is not None
            age, latency = row["age_ms"], row["reasoner_latency_ms"]
            lines.append(
                f"| {name} | {row['fps']:.1f} | {age['p50']:.1f} / {age['p95']:.1f} / {age['p99']:.1f} |"
                f" {'-' if latency is None else format(latency['p50'], '.0f')} | {row['answers']} |"
            )
        lines += ["", f"Age p99, busy over idle: {result['age_p99_busy_over_idle']:.2f}."]
    memory = result["memory"]
    lines += [
        "",
        f"Resident memory over {memory['frames']} frames: {memory['settled_mib']:.0f} MiB after {SETTLED_FRAMES},"
        f" {memory['last_mib']:.0f} MiB at the end, at most {memory['largest_change_percent']:.2f} % away."
        f" A frame there, reasoner included: {memory['early_ms']:.1f} ms early, {memory['late_ms']:.1f} ms late,"
        f" ratio {memory['late_over_early']:.3f}.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


class _TimedClient:
    """A `ReasonerClient` that notes how long each answer took, until the session fetched it."""

    def __init__(self, client: ReasonerClient) -> None:
        self._client = client
        self._asked_s: dict[int, float] = {}
        self.latency_ms: list[float] = []
        self.cancel, self.status, self.close = client.cancel, client.status, client.close

    def submit(self, request: ReasonerRequest) -> None:
        self._asked_s[request.request_id] = time.monotonic()
        self._client.submit(request)

    def poll(self) -> list[ReasonerAnswer]:
        answers = self._client.poll()
        for answer in answers:
            self.latency_ms.append(1e3 * (time.monotonic() - self._asked_s.pop(answer.request_id)))
        return answers


class _Steps:
    """Feeds a session frame after frame and keeps the times."""

    def __init__(
        self, session: Session, playback: Playback, rate_hz: float = 30.0, cameras: Sequence[str] = ("camera",)
    ) -> None:
        self._session, self._playback, self._period_ns = session, playback, round(1e9 / rate_hz)
        self._cameras = cameras
        self._number = 0
        self.forget()

    def forget(self) -> None:
        self.ms: list[float] = []
        self.stage_ms: list[dict[str, float]] = []
        self.tracked: list[int] = []

    def run(self, frames: int) -> None:
        for _ in range(frames):
            frame = self._playback.frame(self._number, 1_000_000_000 + self._number * self._period_ns)
            at_once = [replace(frame, camera=camera) for camera in self._cameras]
            begin_s = time.perf_counter()
            results = self._session.step_together(at_once)
            self.ms.append(1e3 * (time.perf_counter() - begin_s))
            self.stage_ms.append(results[0].timings_ms)
            found = [each for result in results for each in result.objects]
            self.tracked.append(sum(each.state is ObjectState.TRACKING for each in found))
            self._number += 1


def _wait_for_reasoner(status: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + REASONER_START_S
    while trouble := status():
        if time.monotonic() > deadline_s:
            raise VirstError(f"the reasoner process did not answer within {REASONER_START_S:g} s: {trouble}")
        time.sleep(0.1)


def _cell(row: dict[str, float] | None) -> str:
    return "-" if row is None else f"{row['p50']:.2f} / {row['p95']:.2f}"


def default_case(settings: BenchSettings) -> Case:
    """The simulated scene of the settings, with a few sentences."""
    return load_case(EvaluationSettings(per_scene=8), settings.scene)
