# SPDX-License-Identifier: Apache-2.0
"""Cameras that play the recorded run of the simulated tabletop, which costs next to nothing."""

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from virst_ros import conversions
from virst_ros.demo.recorded_run import RecordedRun

PLAYED_KEPT = 256  # stamps whose picture is known


class SteadyClock:
    """Nanoseconds since the epoch, as of the start, that never jump."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        return self._offset_ns + time.monotonic_ns()


class Film:
    """The pictures of a run as data of messages, shared by the cameras that play it."""

    def __init__(self, run: RecordedRun) -> None:
        self.run = run
        self.height, self.width = run.images_rgb_u8.shape[1:3]
        self.data = [array("B", image.tobytes()) for image in run.images_rgb_u8]


class ReplayCamera:
    """Publishes images and calibrations from a thread of its own, from `start` to `stop`.

    Args:
        prefix: of its topics, "" or "<name>/".
        first: the picture to begin with, so that two cameras do not see the same.
        on_send: told each stamp (ns) before its image goes out.
    """

    def __init__(
        self,
        node: Any,
        film: Film,
        clock: SteadyClock,
        prefix: str,
        rate_hz: float,
        first: int,
        on_send: Callable[[int], None],
    ) -> None:
        self._film, self._clock, self._on_send = film, clock, on_send
        self._period_s, self._next = 1.0 / rate_hz, first
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        self._images = node.create_publisher(Image, f"/{prefix}image", qos)
        self._infos = node.create_publisher(CameraInfo, f"/{prefix}camera_info", qos)
        frame_id = f"{prefix}optical".replace("/", "_")
        self._image = Image(
            height=film.height, width=film.width, encoding="rgb8", step=3 * film.width, data=film.data[0]
        )
        self._image.header.frame_id = frame_id
        # Not sim_camera_node's: that needs the simulator.
        pinhole = film.run.spec.camera.intrinsics(film.width, film.height)
        k = [pinhole.fx, 0.0, pinhole.cx - 0.5, 0.0, pinhole.fy, pinhole.cy - 0.5, 0.0, 0.0, 1.0]
        self._info = CameraInfo(width=film.width, height=film.height, distortion_model="plumb_bob", d=[0.0] * 5, k=k)
        self._played: OrderedDict[int, int] = OrderedDict()
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def truth(self, stamp_ns: int) -> np.ndarray | None:
        """Instance ids of the simulated objects in that image, uint8 (height, width); None when it is long ago."""
        with self._lock:
            picture = self._played.get(stamp_ns)
        return None if picture is None else self._film.run.instance_masks[picture]

    def _play(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            picture, stamp_ns = self._next % len(self._film.data), self._clock.now_ns()
            with self._lock:
                self._played[stamp_ns] = picture
                while len(self._played) > PLAYED_KEPT:
                    self._played.popitem(last=False)
            self._image.header.stamp = conversions.time_message(stamp_ns)
            self._image.data = self._film.data[picture]
            self._info.header = self._image.header
            self._on_send(stamp_ns)
            self._infos.publish(self._info)
            self._images.publish(self._image)
            self._next += 1
            # On a machine that is too busy images are left out; they are never sent in a heap.
            due_s = max(due_s + self._period_s, time.monotonic())
