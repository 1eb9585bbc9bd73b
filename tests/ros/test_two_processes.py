# SPDX-License-Identifier: Apache-2.0
"""Nodes as processes: large images with the Fast DDS profile of the package, signals, exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image

from tests.ros.ros_graph import wait_until
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros
COUNT = 40


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1280, 720)])
def test_large_best_effort_images_arrive_with_their_stamps(graph, engine, width, height):
    masks = graph.collect(Image, "/segmenter/mask", 100)
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active" and node.cameras[0].outputs.mask.wanted)
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


def run(module, graph, *arguments, **environment):
    command = [sys.executable, "-m", module, "--ros-args", *arguments]
    variables = os.environ | {"ROS_DOMAIN_ID": str(graph.domain_id)} | environment
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_segmenter_cleanly(graph, number):
    diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
    with run("virst_ros.segmenter_node", graph, "-p", "model.weights:=/nowhere.safetensors") as process:
        wait_until(lambda: diagnostics)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0, told
    assert "no file /nowhere.safetensors" in told
    assert "Traceback" not in told


def test_a_start_value_out_of_range_is_told_and_ends_the_segmenter(graph):
    with run("virst_ros.segmenter_node", graph, "-p", "memory.ring_steps:=0") as process:
        _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "memory.ring_steps" in told
    assert "Traceback" not in told


def test_a_missing_profile_is_warned_of(graph):
    diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
    with run("virst_ros.segmenter_node", graph, "-p", "autostart:=false", FASTDDS_DEFAULT_PROFILES_FILE="") as process:
        wait_until(lambda: diagnostics)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert "FASTDDS_DEFAULT_PROFILES_FILE (up to Jazzy: FASTRTPS_DEFAULT_PROFILES_FILE) is not set" in told


def test_a_parameter_file_that_is_not_there_is_told_and_ends_the_segmenter(graph):
    with run("virst_ros.segmenter_node", graph, "--params-file", "/nowhere/parameters.yaml") as process:
        _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "/nowhere/parameters.yaml" in told
    assert "Traceback" not in told
