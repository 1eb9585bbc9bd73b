# SPDX-License-Identifier: Apache-2.0
"""Starts reasoner, segmenter and cameras, lets goals change, watches all the time, and says what came of it."""

import importlib.metadata
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray

from virst_engine.errors import VirstError
from virst_engine.evaluate.provenance import command_line, device_description, versions
from virst_engine.timing import percentiles
from virst_ros import conversions
from virst_ros.demo.child_processes import ChildFailed, ChildProcesses
from virst_ros.demo.recorded_run import load_recording
from virst_ros.demo.ros_domain import free_ros_domain
from virst_ros.fast_dds import use_profile
from virst_ros.soak.asker import Asker
from virst_ros.soak.cameras import Film, ReplayCamera, SteadyClock
from virst_ros.soak.checker import KINDS, Checker, Seen
from virst_ros.soak.logs import LogWatch
from virst_ros.soak.memory import WARM_UP_S, MemorySamples
from virst_ros.spinning import spin_until_shutdown

START_S = 120.0  # for loading models on a slow machine
BETWEEN_REQUESTS_S = 0.4  # on average
HOLD_TIMES = 25  # twice some ten seconds, in which the reasoner answers for all objects
CAMERA_NAMES = ("left", "right", "wrist", "back")
SEGMENTER = "/segmenter"


@dataclass(frozen=True)
class SoakSettings:
    minutes: float
    frames: int  # that have to be processed, all cameras together; the run lasts until both are reached
    cameras: int
    rate_hz: float  # of each camera
    seed: int
    most_growth_percent: float  # of resident memory, up or down
    logs: Path | None  # folder to keep the logs in


@dataclass(frozen=True)
class Progress:
    """For people, while it runs."""

    elapsed_s: float
    frames: int
    goals: int  # set so far
    segmenter_mib: float
    reasoner_mib: float
    violations: int


class _Listener:
    """What comes from the segmenter, handed to the checker on the executor's thread."""

    def __init__(self, node: Any, checker: Checker, clock: SteadyClock, prefixes: Mapping[str, str]) -> None:
        self._checker, self._clock = checker, clock
        self.newest_ns = dict.fromkeys(prefixes, 0)
        self.newest: dict[str, list[Seen]] = {camera: [] for camera in prefixes}
        self.ages_ms = {camera: array("f") for camera in prefixes}
        self.dropped = dict.fromkeys(prefixes, 0)
        self.told: dict[str, Any] = {}  # newest status by name
        self.is_judging = False  # while the node starts, diagnostics may say that nothing comes yet
        qos = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
        for camera, prefix in prefixes.items():
            node.create_subscription(
                Image, f"{SEGMENTER}/{prefix}mask", lambda message, of=camera: self._on_mask(of, message), qos
            )
            node.create_subscription(
                SegmentedObjectArray,
                f"{SEGMENTER}/{prefix}objects",
                lambda message, of=camera: self._on_objects(of, message),
                qos,
            )
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)

    def _on_mask(self, camera: str, message: Image) -> None:
        pixels = np.frombuffer(message.data, np.uint8)
        values = np.flatnonzero(np.bincount(pixels, minlength=256)).tolist()
        self._checker.mask_came(camera, conversions.stamp_ns(message.header.stamp), values)

    def _on_objects(self, camera: str, message: SegmentedObjectArray) -> None:
        received_ns, stamp_ns = self._clock.now_ns(), conversions.stamp_ns(message.header.stamp)
        objects = [
            Seen(each.goal_id, each.object_id, each.instance_id, each.state == SegmentedObject.TRACKING, each.part_of)
            for each in message.objects
        ]
        self.newest[camera] = objects
        self._checker.objects_came(camera, stamp_ns, objects, received_ns)
        self.newest_ns[camera] = stamp_ns
        self.ages_ms[camera].append(message.timings.age_ms)
        self.dropped[camera] = message.timings.frames_dropped

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            before = self.told.get(status.name)
            self.told[status.name] = status
            was_error = before is not None and before.level == DiagnosticStatus.ERROR
            if self.is_judging and status.level == DiagnosticStatus.ERROR and not was_error:
                self._checker.failed("diagnostics", f"{status.name}: {status.message}")


def run_soak(settings: SoakSettings, on_progress: Callable[[Progress], None]) -> dict[str, Any]:
    """Run until both the time and the frames are reached, or a signal comes; the figures.

    Raises:
        VirstError: a process cannot be started, or no masks come at all.
    """
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    use_profile()
    with (
        free_ros_domain() as domain_id,
        tempfile.TemporaryDirectory(prefix="virst_soak_") as folder,
        _signals() as stopping,
        ChildProcesses(Path(folder) if settings.logs is None else settings.logs) as children,
    ):
        return _Soak(settings, children, domain_id, f"ipc://{folder}/reasoner", stopping, on_progress).run()


class _Soak:
    def __init__(
        self,
        settings: SoakSettings,
        children: ChildProcesses,
        domain_id: int,
        endpoint: str,
        stopping: threading.Event,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._settings, self._children, self._domain_id = settings, children, domain_id
        self._endpoint, self._stopping, self._on_progress = endpoint, stopping, on_progress
        names = camera_names(settings.cameras)
        self._named = len(names) > 1
        self._prefixes = {name: f"{name}/" if self._named else "" for name in names}
        self._checker, self._clock = Checker(names), SteadyClock()
        self._crash = ""

    def run(self) -> dict[str, Any]:
        processes = self._start_processes()
        logs = [LogWatch(self._children.log_folder / f"{name}.log") for name in processes]
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=self._domain_id)  # without handlers of signals: those are ours
        try:
            node = rclpy.create_node("soak", context=context)
            listener = _Listener(node, self._checker, self._clock, self._prefixes)
            cameras = self._make_cameras(node)
            asker = self._make_asker(node, cameras, listener)
            executor = SingleThreadedExecutor(context=context)
            executor.add_node(node)
            spinning = threading.Thread(target=spin_until_shutdown, args=(executor,))
            spinning.start()
            for camera in cameras.values():
                camera.start()
            try:
                self._wait_for_masks(listener, asker)
                memory = MemorySamples({name: process.pid for name, process in processes.items()})
                begun = dict(self._checker.objects)
                listener.is_judging = True
                begin_s = time.monotonic()
                self._go_on(asker, logs, memory, begin_s)
                elapsed_s = time.monotonic() - begin_s
                if not self._crash:
                    asker.finish()
                listener.is_judging = False
            finally:
                for camera in cameras.values():
                    camera.stop()
                executor.shutdown()
                spinning.join()
            node.destroy_node()
        finally:
            context.try_shutdown()
        self._children.end()
        for log in logs:  # how they end counts too
            self._look_at(log)
        return self._figures(elapsed_s, begun, listener, asker, memory)

    def _start_processes(self) -> dict[str, Any]:
        environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(self._domain_id),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "RCUTILS_COLORIZED_OUTPUT": "0",
        }
        given = ["-p", f"reasoner.endpoint:={self._endpoint}"]
        if self._named:
            given += ["-p", f"cameras:=[{','.join(self._prefixes)}]"]
        commands = {
            "reasoner": [
                *program("virst-reasoner", "virst_engine.slow.zmq_server"),
                "--endpoint",
                self._endpoint,
            ],
            "segmenter": [*program("segmenter", "virst_ros.segmenter_node"), "--ros-args", *given],
        }
        return {name: self._children.start(name, command, environment) for name, command in commands.items()}

    def _make_cameras(self, node: Any) -> dict[str, ReplayCamera]:
        film = Film(load_recording())
        apart = len(film.run) // len(self._prefixes)
        return {
            name: ReplayCamera(
                node,
                film,
                self._clock,
                prefix,
                self._settings.rate_hz,
                number * apart,
                lambda stamp_ns, of=name: self._checker.image_sent(of, stamp_ns),
            )
            for number, (name, prefix) in enumerate(self._prefixes.items())
        }

    def _make_asker(self, node: Any, cameras: Mapping[str, ReplayCamera], listener: _Listener) -> Asker:
        from virst_engine import EngineConfig

        return Asker(
            node,
            SEGMENTER,
            self._checker,
            dict(cameras),
            self._clock,
            lambda camera: listener.newest_ns[camera],
            lambda: [seen for objects in list(listener.newest.values()) for seen in objects if seen.part_of],
            self._named,
            EngineConfig().tracking.max_objects,
            HOLD_TIMES if self._settings.minutes * 60.0 > 2 * WARM_UP_S else 2,
            self._settings.seed,
        )

    def _wait_for_masks(self, listener: _Listener, asker: Asker) -> None:
        deadline_s = time.monotonic() + START_S
        while not (asker.is_ready() and all(self._checker.masks[camera] for camera in self._prefixes)):
            self._children.check()
            if self._stopping.wait(0.1):
                raise VirstError("stopped before the first mask")
            if time.monotonic() > deadline_s:
                words = "; ".join(f"{status.name}: {status.message}" for status in listener.told.values())
                silent = [camera for camera in self._prefixes if not self._checker.masks[camera]]
                raise VirstError(f"no masks of {', '.join(silent)} within {START_S:g} s. Diagnostics say: {words}")

    def _go_on(self, asker: Asker, logs: list[LogWatch], memory: MemorySamples, begin_s: float) -> None:
        """Ask, and look at what nobody sends us, until it is enough."""
        wanted_s, next_ask_s, next_look_s = self._settings.minutes * 60.0, begin_s, begin_s
        draw = np.random.default_rng(self._settings.seed)
        while not self._stopping.is_set():
            now_s = time.monotonic()
            if now_s - begin_s >= wanted_s and self._frames >= self._settings.frames:
                return
            if now_s >= next_look_s:
                next_look_s = now_s + 1.0
                for log in logs:
                    self._look_at(log)
                self._tell(memory, now_s - begin_s)
            memory.sample(now_s - begin_s)
            try:
                self._children.check()
            except ChildFailed as error:
                self._crash = str(error)
                self._checker.failed("a process ended", self._crash)
                return
            if now_s >= next_ask_s:
                asker.act()
                next_ask_s = time.monotonic() + float(draw.exponential(BETWEEN_REQUESTS_S))
            self._stopping.wait(0.02)

    def _look_at(self, log: LogWatch) -> None:
        for line in log.failures():
            self._checker.failed("log", line)

    @property
    def _frames(self) -> int:
        return sum(self._checker.objects.values())

    def _tell(self, memory: MemorySamples, elapsed_s: float) -> None:
        newest = {name: values[-1] for name, values in memory.mib.items()}
        self._on_progress(
            Progress(
                elapsed_s,
                self._frames,
                self._checker.goals_set,
                newest.get("segmenter", math.nan),
                newest.get("reasoner", math.nan),
                sum(self._checker.counts().values()),
            )
        )

    def _figures(
        self, elapsed_s: float, begun: Mapping[str, int], listener: _Listener, asker: Asker, memory: MemorySamples
    ) -> dict[str, Any]:
        settings, checker, counts = self._settings, self._checker, self._checker.counts()
        per_camera = {
            camera: {
                "images": checker.images[camera],
                "frames": checker.objects[camera],
                "rate_hz": round((checker.objects[camera] - begun.get(camera, 0)) / max(elapsed_s, 1e-9), 2),
                "dropped": listener.dropped[camera],
                "age_ms": percentiles(listener.ages_ms[camera]),
            }
            for camera in self._prefixes
        }
        growth = {name: _number(memory.growth_percent(name)) for name in ("segmenter", "reasoner")}
        result = {
            "rss_growth_percent": growth["segmenter"],
            "reasoner_rss_growth_percent": growth["reasoner"],
            **{kind: counts[kind] for kind in KINDS},
            "frames": self._frames,
            "minutes": round(elapsed_s / 60.0, 2),
            "complete": bool(
                not self._crash and elapsed_s >= settings.minutes * 60.0 and self._frames >= settings.frames
            ),
            "goals_set": checker.goals_set,
            "goals_cleared": checker.goals_cleared,
            "instances_found": checker.instances_found,
            "instance_ids_lost": checker.instance_ids_lost,
            "masks": sum(checker.masks.values()),
            "masks_compared": checker.masks_compared,
            "cameras": per_camera,
            "exceptions_by_kind": dict(checker.exceptions_by_kind),
            "details": checker.details,
            "requests": dict(asker.asked),
            "refused": dict(asker.refused.most_common(30)),
            "rss": memory.thinned(),
            "seed": settings.seed,
            "rate_hz": settings.rate_hz,
            "most_growth_percent": settings.most_growth_percent,
            "rmw": rclpy.get_rmw_implementation_identifier(),
            "versions": {**versions(), **_ros_versions()},
            "device": device_description(),
            "command": command_line(),
        }
        return {**result, "broken": broken_bounds(result)}


def broken_bounds(result: Mapping[str, Any]) -> list[str]:
    """Each bound that a run has broken, in words."""
    broken = [f"{kind} is {result[kind]}, not 0" for kind in KINDS if result[kind]]
    for name in ("rss_growth_percent", "reasoner_rss_growth_percent"):
        growth, most = result[name], result["most_growth_percent"]
        if growth is None:
            broken.append(f"{name} is unknown: the run was too short, or there is no /proc")
        elif abs(growth) > most:
            broken.append(f"{name} is {growth:+.2f}, not within +-{most:g}")
    if not result["frames"]:
        broken.append("no frame was processed")
    return broken


def camera_names(count: int) -> tuple[str, ...]:
    return tuple(CAMERA_NAMES[n] if n < len(CAMERA_NAMES) else f"camera_{n + 1}" for n in range(count))


def program(script: str, module: str) -> list[str]:
    """The installed console script, or else the module that it runs, with this Python."""
    beside = Path(sys.executable).with_name(script)
    found = str(beside) if beside.is_file() else shutil.which(script)
    return [found] if found else [sys.executable, "-m", module]


def _ros_versions() -> dict[str, str]:
    """Of a sourced ROS 2 its name, of wheels the version of rclpy."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return {"ros-rclpy": importlib.metadata.version("ros-rclpy")}
    return {"ros": os.environ.get("ROS_DISTRO", "unknown")}


def _number(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set by Ctrl-C, SIGTERM or SIGHUP, so that what was measured is still written. A second one ends it at once."""
    stopping = threading.Event()

    def stop(number: int, _: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt(signal.Signals(number).name)
        stopping.set()

    earlier = {}
    with suppress(ValueError):  # not in the main thread: somebody else's signals
        earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stopping
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
