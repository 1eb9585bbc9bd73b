# SPDX-License-Identifier: Apache-2.0
"""Images from another process, with the Fast DDS profile that ships with the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from sensor_msgs.msg import Image

from tests.ros.ros_graph import wait_until
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros
COUNT = 40


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1280, 720)])
def test_large_best_effort_images_arrive_with_their_stamps(graph, engine, width, height):
    masks = graph.collect(Image, "/segmenter/mask", 100)
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active" and node._mask_publisher.get_subscription_count())
    command = [sys.executable, str(Path(__file__).with_name("camera_process.py")), str(width), str(height), str(COUNT)]
    environment = os.environ | {"ROS_DOMAIN_ID": str(graph.domain_id)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    # Best effort may lose some on a busy machine; without the profile no more than one of them arrives.
    wait_until(lambda: len(masks) >= COUNT // 2)
    assert {mask.header.stamp.nanosec for mask in masks} == {987_654_321}
    seconds = [mask.header.stamp.sec for mask in masks]
    assert seconds == sorted(set(seconds))
    assert {(mask.width, mask.height, mask.header.frame_id) for mask in masks} == {(width, height, "other_process")}
