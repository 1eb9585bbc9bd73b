# SPDX-License-Identifier: Apache-2.0
"""What the node tells on /diagnostics: rates, drops, ages, reasoner, goals, memory, and why nothing arrives.

diagnostic_updater is not to be had from the Python package index, so the messages are made here.
"""

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from virst_engine import FrameResult, Goal, ObjectResult, ObjectState
from virst_engine.timing import LatencyWindow, device_memory_mib, resident_mib

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)
RATE_WINDOW_S = 5.0
RECENT_S = 10.0  # how long an event, such as a rejected frame or goal, keeps its status at WARN
AGES_KEPT = 512
FLOOD_HZ = 100.0  # no camera is that fast on purpose: two of them, or a bag that is played without a rate
NO_TIME = (
    "use_sim_time is set, but nobody publishes /clock: ages and times are wrong; start the simulation or `ros2 bag "
    "play --clock`, or set use_sim_time to false"
)
LOG_AGAIN_S = 10.0  # a trouble that comes and goes is not logged more often
MOST_KINDS = 1000  # of troubles that are remembered


_NUMBER = re.compile(r"(?<![\w.])[0-9]+([.][0-9]+)?(?!\w)")  # not that of a name or size: goal_1, rgb8, 640x480


class RateWindow:
    """Events per second over the last `RATE_WINDOW_S`, in constant memory."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=1024)

    def add(self, now_s: float) -> None:
        self._times_s.append(now_s)

    def rate_hz(self, now_s: float) -> float:
        recent = [t for t in self._times_s if now_s - t <= RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        return (len(recent) - 1) / max(recent[-1] - recent[0], now_s - recent[-1], 1e-6)


@dataclass(frozen=True)
class Surroundings:
    """What only the node can see, read at the moment of a report."""

    state: str  # label of the lifecycle state
    image_topic: str  # with all remappings applied
    image_publishers: int
    received: int
    dropped: int
    depth_topic: str  # empty: no depth is wanted
    no_image_after_s: float
    inference_traceback: str  # not empty: inference has stopped
    reasoner_problem: str  # empty: a reasoner listens
    unserved: str = ""  # why somebody subscribes to a topic in vain; empty: nobody does
    has_no_time: bool = False  # use_sim_time is set, and nothing has come on /clock
    left_out: int = 0  # of the dropped frames, those that were left out to keep tracking.deadline_ms


@dataclass(frozen=True)
class LoadedModel:
    """What is loaded; empty strings before configure."""

    name: str = ""
    weights: str = ""
    backend: str = ""
    device: str = ""


def _text(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _status(name: str, level: bytes, message: str, hardware_id: str, values: Mapping[str, object]) -> DiagnosticStatus:
    return DiagnosticStatus(
        name=name,
        level=level,
        message=message,
        hardware_id=hardware_id,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )


class Diagnostics:
    """Collects events from every thread of the node and turns them into diagnostic statuses.

    Args:
        name: the node's name with its namespace, of several cameras "<node>/<camera>"; statuses are called
            "<name>: input", ": output", ": reasoner", ": goals".
        now_s: a steady clock, seconds.
    """

    def __init__(self, name: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._now_s = now_s
        self._lock = threading.Lock()
        self.model = LoadedModel()
        self.configure_failure = ""
        # What is wrong now, by subject, without what has a line of the log already, and when each was last logged:
        self._troubles: dict[str, list[str]] = {}
        self._logged: dict[str, set[str]] = {}
        self._logged_s: dict[tuple[str, str], float] = {}
        self._levels: dict[str, bytes] = {}  # of the newest `statuses`, by subject
        self._goal_troubles: list[str] = []
        # By "input" or "output" and topic: the reason, and when the middleware told it. It tells it once.
        self._qos_problems: dict[str, dict[str, tuple[str, float]]] = {"input": {}, "output": {}}
        self.reset()

    def reset(self) -> None:
        """Forget all events: the node is activated. What does not fit in quality of service still does not."""
        with self._lock:
            self._start_s = self._now_s()
            self._images, self._masks = RateWindow(), RateWindow()
            self._image_s: float | None = None
            self._image_size = ""
            self._size_changes, self._size_change, self._size_change_s = 0, "", -math.inf
            self._stamps_back, self._stamp_back, self._stamp_back_s = 0, "", -math.inf
            self._stamp_jumps, self._stamp_jump, self._stamp_jump_s = 0, "", -math.inf
            self._picture_problem = ""
            self._camera_info_problem = ""
            self._depth = RateWindow()
            self._depth_s: float | None = None
            self._depth_problem = self._geometry_problem = ""
            self._depth_matches: deque[bool] = deque(maxlen=20)
            self._frames_with_depth = self._frames_without_depth = 0
            self._depth_gap_ns: int | None = None
            self._depth_slop_ns = 0
            self._bad_frames, self._bad_frame, self._bad_frame_s = 0, "", -math.inf
            self._published = 0
            self._lost, self._lost_reason, self._lost_s = 0, "", -math.inf
            self._ages_ms, self._overhead_ms = LatencyWindow(AGES_KEPT), LatencyWindow(AGES_KEPT)
            self._latencies_ms, self._answers = LatencyWindow(AGES_KEPT), 0
            self._latencies_s: dict[str, float] = {}  # goal id -> that of its newest answer, in the newest frame
            self._timings_ms: dict[str, float] = {}
            self._degradation = ""
            self._objects: tuple[ObjectResult, ...] = ()
            self._goals: tuple[Goal, ...] = ()
            self._bad_goals, self._bad_goal, self._bad_goal_s = 0, "", -math.inf
            self._refused, self._refused_reason, self._refused_s = 0, "", -math.inf

    def image_received(self) -> None:
        """A message came on the image topic, good or bad."""
        with self._lock:
            self._image_s = self._now_s()
            self._images.add(self._image_s)

    def image_decoded(self, size: str) -> None:
        """The newest message could be read; `size` is for people, for example "640x480 rgb8"."""
        with self._lock:
            before, self._image_size = self._image_size, size
            if before not in ("", size):
                self._size_changes += 1
                self._size_change_s = self._now_s()
                self._size_change = f"the image changed from {before} to {size}; masks follow it"

    def stamp_went_back(self, back_s: float) -> None:
        """An image carries an older time than the one before it: the session begins anew."""
        with self._lock:
            self._stamps_back += 1
            self._stamp_back_s = self._now_s()
            self._stamp_back = (
                f"time stamps went back by {back_s:.3f} s: tracking starts over; are there two publishers?"
            )

    def stamp_jumped(self, ahead_s: float) -> None:
        """An image carries a time that is much later than the time since the one before it allows."""
        with self._lock:
            self._stamp_jumps += 1
            self._stamp_jump_s = self._now_s()
            self._stamp_jump = (
                f"time stamps jumped forwards by {ahead_s:.3f} s: goals go on, but their answers are asked anew; was "
                "the clock of the camera set?"
            )

    def picture_checked(self, problem: str) -> None:
        """Why nothing can be seen in the newest image; empty when there is no such reason."""
        with self._lock:
            self._picture_problem = problem

    def camera_info_checked(self, problem: str) -> None:
        """Why the newest frame's mask goes out without its camera_info; empty when there is no such reason."""
        with self._lock:
            self._camera_info_problem = problem

    def depth_received(self, problem: str = "") -> None:
        with self._lock:
            self._depth_s = self._now_s()
            self._depth.add(self._depth_s)
            self._depth_problem = problem

    def depth_paired(self, found: bool, gap_ns: int | None, slop_ns: int) -> None:
        """Whether a frame has found its depth, how far the nearest one was, and how far it might have been."""
        with self._lock:
            self._depth_matches.append(found)
            self._frames_with_depth += found
            self._frames_without_depth += not found
            self._depth_gap_ns, self._depth_slop_ns = gap_ns, slop_ns

    def geometry_checked(self, problem: str) -> None:
        """Why the newest depth image gives no points; empty when it does."""
        with self._lock:
            self._geometry_problem = problem

    def frame_rejected(self, reason: str) -> None:
        with self._lock:
            self._bad_frames += 1
            self._bad_frame, self._bad_frame_s = reason, self._now_s()

    def goal_rejected(self, reason: str) -> None:
        with self._lock:
            self._bad_goals += 1
            self._bad_goal, self._bad_goal_s = reason, self._now_s()

    def request_refused(self, reason: str) -> None:
        """A request came too soon after others, and nothing was done for it."""
        with self._lock:
            self._refused += 1
            self._refused_reason, self._refused_s = reason, self._now_s()

    def qos_incompatible(self, subject: str, topic: str, reason: str) -> None:
        """An endpoint elsewhere does not fit this node's; `subject`: "input" or "output"."""
        with self._lock:
            self._qos_problems[subject][topic] = reason, self._now_s()

    def settle_qos(self, subject: str, is_settled: Callable[[str], bool]) -> None:
        """Forget what did not fit on the topics for which `is_settled`.

        Not for the first `RECENT_S`: the graph may know of an endpoint later than the middleware tells of it.
        """
        with self._lock:
            problems = self._qos_problems[subject].items()
            old = {topic: told_s for topic, (_, told_s) in problems if self._now_s() - told_s >= RECENT_S}
        settled = [topic for topic in old if is_settled(topic)]  # asks the graph: not under the lock
        with self._lock:
            for topic in settled:
                if self._qos_problems[subject].get(topic, ("", -1.0))[1] == old[topic]:
                    del self._qos_problems[subject][topic]

    def forget_qos(self, subject: str) -> None:
        """The endpoints of this node are gone."""
        with self._lock:
            self._qos_problems[subject] = {}

    def goals_changed(self, goals: Sequence[Goal]) -> None:
        with self._lock:
            self._goals = tuple(goals)

    def result_published(self, result: FrameResult, age_s: float, overhead_ms: float) -> None:
        """A mask went out. `overhead_ms`: from the image's callback to then, without waiting and the engine's step."""
        with self._lock:
            self._overhead_ms.add(overhead_ms)
            self._masks.add(self._now_s())
            self._published += 1
            self._ages_ms.add(age_s * 1e3)
            self._timings_ms = dict(result.timings_ms)
            self._degradation = result.degradation
            for found in result.objects:
                latency_s = found.reasoner_latency_s
                if not found.part_of and math.isfinite(latency_s) and self._latencies_s.get(found.goal_id) != latency_s:
                    self._latencies_ms.add(latency_s * 1e3)  # of an answer that was not there in the last frame
                    self._answers += 1
            self._objects = result.objects
            self._latencies_s = {each.goal_id: each.reasoner_latency_s for each in result.objects if not each.part_of}

    def result_lost(self, reason: str) -> None:
        """A frame was segmented, and nothing of it went out, or not all."""
        with self._lock:
            self._lost += 1
            self._lost_reason, self._lost_s = reason, self._now_s()

    def statuses(self, seen: Surroundings) -> list[DiagnosticStatus]:
        """One status per subject, as of now."""
        with self._lock:
            told = {
                "input": self._input(seen),
                "output": self._output(seen),
                "reasoner": self._reasoner(seen),
                "goals": self._goal_states(seen),
            }
            self._levels = {subject: status.level for subject, status in told.items()}
            return list(told.values())

    def process_status(self, node: str, state: str) -> DiagnosticStatus:
        """Of what all cameras share, the model and the process. `node`: its name; `state`: of its life."""
        with self._lock:
            return self._process(node, state)

    def news(self) -> tuple[list[str], list[str]]:
        """Lines for the log: troubles of the newest `statuses` that were not there before, and what has none any more.

        Numbers in them may change without a new line. What happens once and is logged then (rejected goals, quality of
        service) is left out. A subject is well again when its status is OK: one that is not followed now, or that has a
        worse problem, is not.
        """
        now_s, troubled, well = self._now_s(), [], []
        with self._lock:
            for subject, troubles in self._troubles.items():
                before, logged = self._logged.get(subject, set()), set()
                if not troubles and self._levels[subject] != OK:
                    continue
                for trouble in troubles:
                    kind = _NUMBER.sub("#", trouble)
                    is_new = kind not in before
                    if is_new and now_s - self._logged_s.get((subject, kind), -math.inf) < LOG_AGAIN_S:
                        continue  # it is told as soon as that time is over, if it is still there
                    if is_new:
                        self._logged_s[subject, kind] = now_s
                        troubled.append(f"{subject}: {trouble}")
                    logged.add(kind)
                if before and not troubles:
                    well.append(f"{subject}: well again")
                self._logged[subject] = logged
            if len(self._logged_s) > MOST_KINDS:
                self._logged_s.clear()
        return troubled, well

    def _input(self, seen: Surroundings) -> DiagnosticStatus:
        now_s = self._now_s()
        silent_s = now_s - (self._start_s if self._image_s is None else self._image_s)
        values: dict[str, object] = {
            "topic": seen.image_topic,
            "publishers": seen.image_publishers,
            "rate (Hz)": self._images.rate_hz(now_s),
            "image": self._image_size or "none yet",
            "received": seen.received,
            "dropped": seen.dropped,
            "bad frames": self._bad_frames,
            "last bad frame": self._bad_frame or "none",
            "changes of size or encoding": self._size_changes,
            "time stamps went back": self._stamps_back,
            "time stamps jumped forwards": self._stamp_jumps,
            "picture problem": self._picture_problem or "none",
            "camera_info problem": self._camera_info_problem or "none",
            "depth rate (Hz)": self._depth.rate_hz(now_s),
            "depth problem": self._depth_problem or self._geometry_problem or "none",
            "frames with depth": self._frames_with_depth,
            "frames without depth": self._frames_without_depth,
            "sync slop now (ms)": self._depth_slop_ns / 1e6,
        }
        incompatible = self._incompatible("input")
        values |= {f"incompatible QoS on {topic}": reason for topic, reason in incompatible.items()}
        level, message, self._troubles["input"] = OK, f"{seen.image_topic} arrives", []
        if seen.state != "active":
            level, message = STALE, f"not active ({seen.state}): no images are taken"
        elif silent_s > seen.no_image_after_s:
            level, message = ERROR, self._why_silent(seen, silent_s) + (f" | {NO_TIME}" if seen.has_no_time else "")
            self._troubles["input"] = [message]
        else:
            self._troubles["input"] = [*self._input_events(now_s), *self._input_troubles(seen, now_s)]
            warnings = [*self._troubles["input"], *incompatible.values()]
            if warnings:
                level, message = WARN, " | ".join(warnings)
        return _status(f"{self._name}: input", level, message, self.model.device, values)

    def _incompatible(self, subject: str) -> dict[str, str]:
        """Why, by topic."""
        return {topic: reason for topic, (reason, _) in self._qos_problems[subject].items()}

    def _input_events(self, now_s: float) -> list[str]:
        """What happened lately, although images arrive."""
        events = []
        if now_s - self._bad_frame_s < RECENT_S:
            events.append(f"{self._bad_frames} bad frames, skipped; last: {self._bad_frame}")
        if now_s - self._stamp_back_s < RECENT_S:
            events.append(self._stamp_back)
        if now_s - self._size_change_s < RECENT_S:
            events.append(self._size_change)
        return events

    def _input_troubles(self, seen: Surroundings, now_s: float) -> list[str]:
        """What is wrong now, although images arrive."""
        rate_hz = self._images.rate_hz(now_s)
        depth = self._why_no_depth(seen, now_s) or self._depth_problem or self._geometry_problem or self._why_unpaired()
        troubles = [
            NO_TIME if seen.has_no_time else "",
            f"images come at {rate_hz:.0f} Hz, most are skipped: is there more than one camera on the topic, or a bag "
            "that is played too fast?"
            if rate_hz > FLOOD_HZ
            else "",
            self._stamp_jump if now_s - self._stamp_jump_s < RECENT_S else "",
            self._picture_problem,
            self._camera_info_problem,
            depth,
        ]
        return [trouble for trouble in troubles if trouble]

    def _why_unpaired(self) -> str:
        missing = self._depth_matches.count(False)
        if missing <= len(self._depth_matches) / 2 or len(self._depth_matches) < 10 or self._depth_gap_ns is None:
            return ""
        return (
            f"{missing} of the last {len(self._depth_matches)} frames found no depth of their time (the nearest was "
            f"{self._depth_gap_ns / 1e6:.1f} ms away, {self._depth_slop_ns / 1e6:.1f} ms are allowed): have the driver "
            "stamp image and depth alike, or set sync.slop_s, which counts up to half of the time between two images"
        )

    def _why_no_depth(self, seen: Surroundings, now_s: float) -> str:
        silent_s = now_s - (self._start_s if self._depth_s is None else self._depth_s)
        if not seen.depth_topic or silent_s <= seen.no_image_after_s:
            return ""
        since = f"since {'activation, ' if self._depth_s is None else ''}{silent_s:.1f} s"
        return (
            f"no depth on {seen.depth_topic} {since}: remap `depth` to the camera's registered depth topic, "
            "or set use_depth to false"
        )

    def _why_silent(self, seen: Surroundings, silent_s: float) -> str:
        nothing = (
            f"no images on {seen.image_topic} since {'activation, ' if self._image_s is None else ''}{silent_s:.1f} s"
        )
        if seen.image_publishers == 0:
            return f"{nothing}: nobody publishes it; see `ros2 topic list` and remap `image` to the camera's topic"
        incompatible = self._incompatible("input")
        if seen.image_topic in incompatible:
            return f"{nothing}: {incompatible[seen.image_topic]}"
        happened = "announced by" if self._image_s is None else "has stopped arriving from"
        return (
            f"{nothing}: {happened} {seen.image_publishers} publisher(s). Check that the camera is sending. Images "
            "above half a megabyte are lost between processes with Fast DDS's defaults: set "
            "FASTDDS_DEFAULT_PROFILES_FILE (up to Jazzy: FASTRTPS_DEFAULT_PROFILES_FILE) to virst_ros's "
            "fastdds_profile.xml for the camera AND for this node"
        )

    def _output(self, seen: Surroundings) -> DiagnosticStatus:
        now_s = self._now_s()
        values: dict[str, object] = {
            "rate (Hz)": self._masks.rate_hz(now_s),
            "published": self._published,
            "lost results": self._lost,
            "last lost result": self._lost_reason or "none",
            "degradation": self._degradation or "none",
            "frames left out": seen.left_out,
        }
        values |= {f"age {name} (ms)": value for name, value in self._ages_ms.summary().items()}
        values |= {f"ROS overhead {name} (ms)": value for name, value in self._overhead_ms.summary().items()}
        values |= {f"{stage} (ms)": ms for stage, ms in self._timings_ms.items()}
        incompatible = self._incompatible("output")
        values |= {f"incompatible QoS on {topic}": reason for topic, reason in incompatible.items()}
        level, message, self._troubles["output"] = OK, "masks are published", []
        if seen.inference_traceback:
            values["traceback"] = seen.inference_traceback
            last_line = seen.inference_traceback.strip().splitlines()[-1]
            level = ERROR
            message = f"inference stopped: {last_line}; deactivate and activate the node to try again"
        elif seen.state != "active":
            level, message = STALE, f"not active ({seen.state}): no masks are published"
        elif now_s - self._lost_s < RECENT_S:
            level, message = WARN, f"{self._lost} results lost; last: {self._lost_reason}"
            self._troubles["output"] = [message]
        elif not self._masks.rate_hz(now_s):
            level, message = STALE, "no masks lately: see input"
        elif warnings := [text for text in (seen.unserved, self._degradation, *incompatible.values()) if text]:
            level, message = WARN, " | ".join(warnings)
            self._troubles["output"] = [seen.unserved] if seen.unserved else []  # the others are logged already
        return _status(f"{self._name}: output", level, message, self.model.device, values)

    def _reasoner(self, seen: Surroundings) -> DiagnosticStatus:
        values: dict[str, object] = {"answers": self._answers}
        values |= {f"latency {name} (ms)": value for name, value in self._latencies_ms.summary().items()}
        values |= {
            f"latency of {found.goal_id} (s)": f"{found.reasoner_latency_s:.3f}"
            for found in self._objects
            if math.isfinite(found.reasoner_latency_s)
        }
        self._troubles["reasoner"] = []
        if seen.state != "active":
            level, message = STALE, f"not active ({seen.state}): nothing is asked"
        elif seen.reasoner_problem:
            level, message = WARN, f"{seen.reasoner_problem} (masks go on from memory)"
            self._troubles["reasoner"] = [message]
        else:
            level, message = OK, "listening"
        return _status(f"{self._name}: reasoner", level, message, self.model.device, values)

    def _goal_states(self, seen: Surroundings) -> DiagnosticStatus:
        values: dict[str, object] = {
            "goals": len(self._goals),
            "rejected": self._bad_goals,
            "last rejected": self._bad_goal or "none",
            "requests refused by limits": self._refused,
        }
        found_by_goal = {found.goal_id: found for found in self._objects if not found.part_of}
        for goal in self._goals:
            values[f"{goal.goal_id}: {goal.sentence}"] = _goal_words(found_by_goal.get(goal.goal_id))
        level, message, self._troubles["goals"] = OK, f"{len(self._goals)} goal(s)", []
        if seen.state != "active":
            level, message = STALE, f"not active ({seen.state}): goals are not followed"
        elif self._now_s() - self._bad_goal_s < RECENT_S:
            level, message = WARN, f"rejected: {self._bad_goal}"
        elif self._now_s() - self._refused_s < RECENT_S:
            level, message = WARN, f"{self._refused} requests refused; last: {self._refused_reason}"
        else:
            # Answered, and still nothing to track: the reasoner has refused the sentence, or its answer was unusable.
            # A tracked object has a message only when the newest answer was of no use.
            refused = [
                found
                for found in self._objects
                if found.message
                and (
                    found.state is ObjectState.TRACKING
                    or (found.state is ObjectState.SEARCHING and math.isfinite(found.reasoner_latency_s))
                )
            ]
            if refused:
                level, message = WARN, f"{refused[0].goal_id}: {refused[0].message}"
            told = [f"{found.goal_id}: {found.message}" for found in refused]
            # Twice in a row: an object that is found says for a moment that it catches up, and that is no trouble.
            self._troubles["goals"] = [trouble for trouble in told if trouble in self._goal_troubles]
            self._goal_troubles = told
        return _status(f"{self._name}: goals", level, message, self.model.device, values)

    def _process(self, node: str, state: str) -> DiagnosticStatus:
        values = {
            "state": state,
            "model": self.model.name,
            "weights": self.model.weights,
            "backend": self.model.backend,
            "device": self.model.device,
            "resident memory (MiB)": resident_mib(),
        }
        on_gpu = device_memory_mib(self.model.device)
        if on_gpu is not None:
            values["GPU memory (MiB)"], values["GPU memory free (MiB)"] = on_gpu
        level, message = OK, f"{self.model.name} on {self.model.device}"
        if self.configure_failure:
            level, message = ERROR, self.configure_failure
        elif not self.model.name:
            level, message = STALE, "no model is loaded: configure the node"
        return _status(f"{node}: model", level, message, self.model.device, values)


def _goal_words(found: ObjectResult | None) -> str:
    if found is None:
        return "not seen in the newest frame yet"
    words = f"{found.state.name} score {found.score:.2f}"
    if math.isfinite(found.prompt_age_s):
        words += f" prompt age {found.prompt_age_s:.1f} s"
    return f"{words} ({found.message})" if found.message else words


def worst(statuses: Iterable[DiagnosticStatus]) -> bytes:
    """The level that needs most attention: ERROR, WARN, STALE, OK."""
    order = (OK, STALE, WARN, ERROR)
    return max((status.level for status in statuses), key=order.index, default=OK)
