# SPDX-License-Identifier: Apache-2.0
"""Questions in words to the shipped model, over the real middleware, with everything as it is on a robot."""

import itertools
import os
import signal
import subprocess
import sys
import time
from array import array

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray
from virst_msgs.srv import Ask, ListGoals, SetGoal

from tests.ros.ros_graph import wait_until
from virst_engine.sim.expressions import VOCABULARY
from virst_ros.demo.recorded_run import load_recording
from virst_ros.segmenter_node import SegmenterNode

pytestmark = [pytest.mark.ros, pytest.mark.slow]
PERIOD_S = 0.1
TTL_S = 8.0  # of a question; other requests are to be served in much less


class Robot:
    """The recorded scene as a camera's images, and a segmenter with the shipped weights."""

    def __init__(self, graph, folder):
        self.graph, self.endpoint = graph, f"ipc://{folder}/reasoner"
        recording = load_recording()
        self._images = recording.images_rgb_u8[:: round(recording.rate_hz * PERIOD_S)]
        self.things = {(thing.colour, thing.shape) for thing in recording.spec.objects}
        self._numbers = itertools.count()
        self._publisher = graph.publisher(Image, "image", qos_profile_sensor_data)
        self.masks = graph.collect(Image, "/segmenter/mask")
        self.objects = graph.collect(SegmentedObjectArray, "/segmenter/objects", 10)
        self.node = graph.add(SegmenterNode, reasoner__endpoint=self.endpoint, reasoner__ttl_s=TTL_S)
        wait_until(lambda: self.node.state == "active", timeout_s=60.0)
        self._timer = graph.node.create_timer(PERIOD_S, self._film)
        wait_until(lambda: len(self.masks) > 22, timeout_s=60.0)  # a clip is full

    def _film(self):
        image = self._images[min(next(self._numbers), len(self._images) - 1)]
        height, width = image.shape[:2]
        message = Image(height=height, width=width, encoding="rgb8", step=width * 3)
        message.data = array("B", image.tobytes())
        message.header.stamp = self.graph.node.get_clock().now().to_msg()
        self._publisher.publish(message)

    def stop_filming(self):
        if self._timer is not None:
            self.graph.node.destroy_timer(self._timer)
            self._timer = None

    def ask(self, question):
        return self.graph.call(Ask, "/segmenter/ask", Ask.Request(question=question))

    def start_asking(self, question):
        client = self.graph.node.create_client(Ask, "/segmenter/ask")
        assert client.wait_for_service(20.0)
        return client.call_async(Ask.Request(question=question))


@pytest.fixture
def robot(graph, tmp_path):
    made = Robot(graph, tmp_path)
    yield made
    made.stop_filming()


@pytest.fixture
def reasoner(robot):
    command = [sys.executable, "-m", "virst_engine.slow.zmq_server", "--endpoint", robot.endpoint]
    process = subprocess.Popen([*command, "--threads", "1", "--nice", "0"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_until(lambda: robot.ask("the red ball").success, timeout_s=60.0)
    yield process
    process.kill()
    process.wait()


def test_without_a_reasoner_the_answer_says_what_to_start(robot):
    begin_s = time.monotonic()
    answer = robot.ask("the red ball")
    assert time.monotonic() - begin_s < TTL_S / 2
    assert (answer.success, answer.answer) == (False, "")
    assert "no reasoner answers at" in answer.message
    assert "start virst-reasoner" in answer.message
    assert "does not know 'drawer'" in robot.ask("is the drawer there").message


def test_the_shipped_model_says_what_is_there_and_what_is_not(robot, reasoner):
    for colour, shape in sorted(robot.things):
        answer = robot.ask(f"the {colour} {shape}")
        assert answer.success, answer.message
        assert set(answer.answer.split()) <= {*VOCABULARY}
    there = next(iter(sorted(robot.things)))
    assert robot.ask(f"the {there[0]} {there[1]}").answer == f"{there[0]} {there[1]}"
    colours = {colour for colour, _ in robot.things}
    absent = next(colour for colour in ("white", "black", "purple", "orange", "yellow") if colour not in colours)
    assert robot.ask(f"the {absent} egg").answer == "none"


def test_while_the_reasoner_thinks_about_a_question_everybody_else_is_served(robot, reasoner):
    colour, shape = min(robot.things)
    reasoner.send_signal(signal.SIGSTOP)
    asked = robot.start_asking(f"the {colour} {shape}")
    time.sleep(0.3)
    before, begin_s = len(robot.masks), time.monotonic()
    assert robot.graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal=f"the {colour} {shape}")).success
    assert len(robot.graph.call(ListGoals, "/segmenter/list_goals", ListGoals.Request()).goals) == 1
    assert time.monotonic() - begin_s < TTL_S / 2
    wait_until(lambda: len(robot.masks) > before + 3)
    assert not asked.done()
    reasoner.send_signal(signal.SIGCONT)
    wait_until(asked.done)
    assert asked.result().success, asked.result().message
    assert asked.result().answer
    wait_until(lambda: robot.objects[-1].objects and robot.objects[-1].objects[0].state == SegmentedObject.TRACKING)


def test_when_no_image_comes_any_more_the_answer_says_so(robot, reasoner):
    robot.stop_filming()
    time.sleep(0.5)  # the last one is through
    begin_s = time.monotonic()
    answer = robot.ask("the red ball")
    assert TTL_S < time.monotonic() - begin_s < 3 * TTL_S
    assert not answer.success
    assert "no image was processed since" in answer.message
