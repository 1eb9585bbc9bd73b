# SPDX-License-Identifier: Apache-2.0
"""A segmenter process under test, and everything that is heard of it: masks, objects, diagnostics, its log."""

import math
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray

from virst_ros import conversions
from virst_ros.faults.fault import SeenMask
from virst_ros.faults.scripted_camera import ScriptedCamera, overlap

KEPT = 5000
LINE = 400  # characters of a log line that a report shows


@dataclass(frozen=True)
class _Told:
    received_s: float
    status: str
    text: str


@dataclass(frozen=True)
class _Sighting:
    """The goal's object in one message on `objects`."""

    received_s: float
    is_tracked: bool
    prompt_age_s: float


class Segmenter:
    """One name of a segmenter; processes may come and go under it. Callbacks come from the executor's thread.

    Args:
        view: of a segmenter of several cameras, the one whose masks are heard; empty: it has one camera.
        told_of: the camera whose diagnostics are heard; empty: those of the view.
    """

    def __init__(self, node: Any, name: str, camera: ScriptedCamera, view: str = "", told_of: str = "") -> None:
        self.name, self._camera = name, camera
        self._told_of = told_of or view or name
        topics = f"/{name}/{view}" if view else f"/{name}"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = Path()
        self.goal_id = ""  # whose masks are judged
        self._instance_id = 0
        self._masks: list[SeenMask] = []
        self._told: list[_Told] = []
        self._sightings: list[_Sighting] = []
        self.goal_problem = self.reasoner_problem = ""  # as told last
        self.reasoner_is_well_s = -math.inf  # when it became so, or -inf
        self._lock = threading.Lock()
        every = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
        node.create_subscription(Image, f"{topics}/mask", self._on_mask, every)
        node.create_subscription(SegmentedObjectArray, f"{topics}/objects", self._on_objects, every)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, every)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def judge(self, goal_id: str, instance_id: int) -> None:
        """From now on masks are compared with the truth in this value."""
        with self._lock:
            self.goal_id, self._instance_id = goal_id, instance_id

    # What was heard

    def masks_since(self, since_s: float) -> list[SeenMask]:
        with self._lock:
            return [mask for mask in self._masks if mask.received_s >= since_s]

    def refreshed_s(self, since_s: float) -> float | None:
        """When an answer arrived that was made of frames after `since_s`; None: none did."""
        with self._lock:
            for seen in self._sightings:
                if seen.received_s > since_s and seen.is_tracked and seen.prompt_age_s < seen.received_s - since_s:
                    return seen.received_s
        return None

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0

    def log_line(self, pattern: str, offset: int = 0) -> str:
        """The first line after `offset` that matches; empty when there is none."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(offset)
            text = file.read().decode(errors="replace")
        found = next((line for line in text.splitlines() if re.search(pattern, line)), "")
        return found[:LINE]

    def log_has(self, what: str) -> bool:
        return bool(self.log_line(re.escape(what)))

    def told(self, pattern: str, since_s: float) -> str:
        """The first diagnostic message or value since then that matches; empty when there is none."""
        with self._lock:
            told = list(self._told)
        for each in told:
            if each.received_s >= since_s and re.search(pattern, each.text):
                # A message tells all troubles of its subject; the report wants the one that is looked for.
                parts = each.text.split(" | ")
                part = next((part for part in parts if re.search(pattern, part)), each.text)
                return f"{each.status}: {part}"[:LINE]
        return ""

    # Callbacks

    def _on_mask(self, message: Image) -> None:
        received_s, stamp_ns = time.monotonic(), conversions.stamp_ns(message.header.stamp)
        truth, iou = self._camera.truth(stamp_ns), math.nan
        if truth is not None and self._instance_id:
            ids = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)[:, : message.width]
            iou = overlap(ids == self._instance_id, truth)
        seen = SeenMask(
            received_s, stamp_ns, message.header.frame_id, (message.width, message.height), truth is not None, iou
        )
        with self._lock:
            _keep(self._masks, seen)

    def _on_objects(self, message: SegmentedObjectArray) -> None:
        received_s = time.monotonic()
        with self._lock:
            for found in message.objects:
                if found.goal_id == self.goal_id:
                    self.goal_problem = found.message
                    is_tracked = found.state == SegmentedObject.TRACKING
                    _keep(self._sightings, _Sighting(received_s, is_tracked, found.prompt_age))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        received_s = time.monotonic()
        with self._lock:
            for status in message.status:
                node, _, subject = status.name.partition(": ")
                if node.rpartition("/")[2] != self._told_of:
                    continue
                is_warning = status.level in (DiagnosticStatus.WARN, DiagnosticStatus.ERROR)
                if status.level != DiagnosticStatus.OK:
                    _keep(self._told, _Told(received_s, subject, status.message))
                for pair in status.values:
                    _keep(self._told, _Told(received_s, subject, f"{pair.key}: {pair.value}"))
                if subject.endswith("reasoner"):
                    was_well, self.reasoner_problem = not self.reasoner_problem, status.message if is_warning else ""
                    if self.reasoner_problem:
                        self.reasoner_is_well_s = -math.inf
                    elif not was_well or self.reasoner_is_well_s == -math.inf:
                        self.reasoner_is_well_s = received_s


def _keep(items: list[Any], item: Any) -> None:
    items.append(item)
    if len(items) > KEPT:
        del items[: KEPT // 2]


def wait_until(condition: Callable[[], Any], timeout_s: float, period_s: float = 0.02) -> Any:
    """The first true value of `condition`, or its last value when time is over."""
    end_s = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end_s:
        time.sleep(period_s)
    return value
