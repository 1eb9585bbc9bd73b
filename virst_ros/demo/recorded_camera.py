# SPDX-License-Identifier: Apache-2.0
"""A camera that plays the recorded run of the package, for machines without OpenGL. Topics as sim_camera's."""

import json
import sys
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header, String

from virst_engine.errors import VirstError
from virst_ros import conversions
from virst_ros.demo.recorded_run import RecordedRun, load_recording
from virst_ros.sim_camera_node import CameraParameters, camera_info
from virst_ros.spinning import spin_until_shutdown


class RecordedCamera(Node):
    """Plays a run again and again, at its own rate or at the parameter rate_hz."""

    def __init__(self, run: RecordedRun, **node_arguments: Any) -> None:
        super().__init__("camera", **node_arguments)
        rate_hz = float(self.declare_parameter("rate_hz", run.rate_hz).value)
        images = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        truth = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self._image = self.create_publisher(Image, "~/color/image_raw", images)
        self._info = self.create_publisher(CameraInfo, "~/color/camera_info", images)
        self._mask = self.create_publisher(Image, "~/truth/mask", truth)
        self._numbers = self.create_publisher(String, "~/truth/frame", truth)
        height, width = run.images_rgb_u8.shape[1:3]
        self._run = run
        self._settings = CameraParameters(width=width, height=height, rate_hz=rate_hz)
        self._played = 0
        self.create_timer(1.0 / rate_hz, self._play)

    def _play(self) -> None:
        run, t = self._run, self._played % len(self._run)
        stamp_ns = self.get_clock().now().nanoseconds
        header = Header(stamp=conversions.time_message(stamp_ns), frame_id=self._settings.frame_id)
        self._image.publish(conversions.image_message(header, run.images_rgb_u8[t], "rgb8"))
        self._info.publish(camera_info(header, run.spec.camera, self._settings))
        self._mask.publish(conversions.image_message(header, run.instance_masks[t], "mono8"))
        numbers = {name: np.round(values[t].astype(float), 5).tolist() for name, values in run.numbers.items()}
        truth = {"stamp_ns": stamp_ns, "time_s": self._played / self._settings.rate_hz, **numbers}
        self._numbers.publish(String(data=json.dumps(truth)))
        self._played += 1


def main() -> int:
    """Play until told to stop. The exit status is 1 when the recording cannot be read."""
    try:
        run = load_recording()
    except VirstError as error:
        print(f"recorded_camera: {error}", file=sys.stderr)
        return 1
    rclpy.init()
    node = RecordedCamera(run)
    try:
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        spin_until_shutdown(executor)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
