# SPDX-License-Identifier: Apache-2.0
"""A camera with depth that plays the recorded run of the demo, and sends whatever a fault makes of it."""

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from virst_ros import conversions
from virst_ros.demo.recorded_run import RecordedRun

RATE_HZ = 10.0
FRAME_ID = "camera_color_optical_frame"
TABLE_MM, OBJECT_MM = 900, 860  # depth: a wall, and the object a little in front of it
TRUTHS_KEPT = 4000
TOPICS = {"image": "/image", "camera_info": "/camera_info", "depth": "/depth"}


@dataclass
class Shot:
    """One frame before it is sent; a fault changes it. A message that is None is not sent."""

    rgb: np.ndarray  # h w 3
    truth: np.ndarray  # h w, bool: the object
    image: Image | None
    info: CameraInfo | None
    depth: Image | None

    def show(self, pixels: np.ndarray, encoding: str = "rgb8") -> None:
        """Send other pixels, in another encoding."""
        assert self.image is not None
        self.image = conversions.image_message(self.image.header, pixels, encoding)

    def describe(self, **fields: Any) -> None:
        """Send other fields of the image message with the data that it has; "size" cuts the data to so many bytes."""
        assert self.image is not None
        size = fields.pop("size", None)
        if size is not None:
            self.image.data = array("B", bytes(self.image.data[:size]))
        for name, value in fields.items():
            setattr(self.image, name, value)

    def stamp(self, stamp_ns: int) -> None:
        for message in (self.image, self.info, self.depth):
            if message is not None:
                message.header.stamp = conversions.time_message(stamp_ns)


class ScriptedCamera:
    """Plays from a thread of its own, in real time whatever the rate, forwards and backwards.

    Args:
        object_number: the object whose truth is kept, as in the run's specification.
        prefix: of its topics, "" or "/<camera>".
    """

    def __init__(
        self, node: Any, run: RecordedRun, object_number: int, rate_hz: float = RATE_HZ, prefix: str = ""
    ) -> None:
        self._prefix = prefix
        self._node, self._run, self._object_number = node, run, object_number
        self.normal_rate_hz = self.rate_hz = rate_hz
        self._changes: list[Callable[[Shot], None]] = []
        self._truths: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._publishers: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._begin_s = time.monotonic()
        self.plug_in()
        self._thread = threading.Thread(target=self._play, name="camera", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @contextmanager
    def changed(self, change: Callable[[Shot], None], rate_hz: float | None = None) -> Iterator[None]:
        """Meanwhile every frame goes through `change`."""
        with self._lock:
            self._changes.append(change)
            self.rate_hz = rate_hz or self.normal_rate_hz
        try:
            yield
        finally:
            with self._lock:
                self._changes.remove(change)
                self.rate_hz = self.normal_rate_hz

    def unplug(self) -> None:
        """Its publishers are gone, as when the driver's process has ended."""
        with self._lock:
            for publisher in self._publishers.values():
                self._node.destroy_publisher(publisher)
            self._publishers = {}

    def plug_in(self) -> None:
        with self._lock:
            qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
            for name, kind in (("camera_info", CameraInfo), ("depth", Image), ("image", Image)):
                self._publishers[name] = self._node.create_publisher(kind, self._prefix + TOPICS[name], qos)

    def truth(self, stamp_ns: int) -> np.ndarray | None:
        """The object in the image of that stamp (bool); None: no such image was sent."""
        return self._truths.get(stamp_ns)

    def _play(self) -> None:
        next_s = time.monotonic()
        while not self._stopping.is_set():
            shot = self._shot()
            with self._lock:
                for change in self._changes:
                    change(shot)
                self._send(shot)
                period_s = 1.0 / self.rate_hz
            next_s = max(next_s + period_s, time.monotonic() - period_s)  # after a pause, no burst
            self._stopping.wait(max(0.0, next_s - time.monotonic()))

    def _shot(self) -> Shot:
        last = len(self._run) - 1
        position = int((time.monotonic() - self._begin_s) * self._run.rate_hz) % (2 * last)
        position = min(position, 2 * last - position)
        rgb, truth = self._run.images_rgb_u8[position], self._run.instance_masks[position] == self._object_number + 1
        height, width = truth.shape
        depth_mm = np.where(truth, OBJECT_MM, TABLE_MM).astype(np.uint16)
        stamp = self._node.get_clock().now().to_msg()
        k = [float(width), 0.0, width / 2, 0.0, float(width), height / 2, 0.0, 0.0, 1.0]
        p = [*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0]

        def header() -> Header:
            return Header(stamp=stamp, frame_id=FRAME_ID)

        return Shot(
            rgb,
            truth,
            conversions.image_message(header(), rgb, "rgb8"),
            CameraInfo(header=header(), width=width, height=height, k=k, p=p, distortion_model="plumb_bob"),
            conversions.image_message(header(), depth_mm, "16UC1"),
        )

    def _send(self, shot: Shot) -> None:
        if not self._publishers:
            return
        if shot.image is not None:
            self.remember(shot.image, shot.truth)
        for name, message in (("camera_info", shot.info), ("depth", shot.depth), ("image", shot.image)):
            if message is not None:
                self._publishers[name].publish(message)

    def remember(self, image: Image, truth: np.ndarray) -> None:
        """Note that an image was sent, also by another publisher."""
        self._truths[conversions.stamp_ns(image.header.stamp)] = truth
        while len(self._truths) > TRUTHS_KEPT:
            self._truths.popitem(last=False)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """IoU of two bool masks of one view, the truth resized; nan where the truth is empty."""
    if mask.shape != truth.shape:
        height, width = mask.shape
        truth = cv2.resize(truth.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    if not truth.any():
        return float("nan")
    return float((mask & truth).sum() / (mask | truth).sum())
