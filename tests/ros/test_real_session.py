# SPDX-License-Identifier: Apache-2.0
"""The node with the real session: bad goals, damaged weights, and a reasoner that is absent, hangs, dies or lies."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from array import array
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

import zmq
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from virst_msgs.msg import Point2D, SegmentedObject, SegmentedObjectArray
from virst_msgs.srv import AddObjects, ClearGoal, RemoveObject, SetGoal

from tests.fakes import FakeStages, Video, moving_square
from tests.ros.ros_graph import wait_until
from virst_engine.session import Session
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_ros.diagnostics import LoadedModel
from virst_ros.loading import LoadedEngine, add_prompted
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros
ROOT = Path(__file__).parents[2]


def load_with_fake_stages(config, cameras=()):
    clients = {
        camera: ZmqReasonerClient(config.reasoner.endpoint, heartbeat_s=0.1, silent_after_s=0.5)
        for camera in cameras or ("",)
    }
    session = Session(config, FakeStages(), clients)
    # No goal is refused beforehand: here the reasoner itself has to say what it cannot read.
    model = LoadedModel("fake", "", "FakeStages", "cpu")
    return LoadedEngine(session, clients, model, lambda sentence: None, partial(add_prompted, session))


class Live:
    """A camera that films a red square until the test ends, and the node that watches it."""

    def __init__(self, graph, folder):
        self.graph = graph
        self.endpoint = f"ipc://{folder}/reasoner"
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        self.objects = graph.collect(SegmentedObjectArray, "/segmenter/objects", 10)
        self.masks = graph.collect(Image, "/segmenter/mask")
        self._video = Video([moving_square()], period_s=0.05)
        self._numbers = itertools.count()
        self.numbers = {}  # by stamp: which frame of the video it was
        self._publisher = graph.publisher(Image, "image", qos_profile_sensor_data)
        self._timer = graph.node.create_timer(0.05, self._film)
        self.node = graph.add(
            SegmenterNode,
            load_with_fake_stages,
            diagnostics_period_s=0.1,
            reasoner__endpoint=self.endpoint,
            reasoner__clip_frames=2,
            reasoner__clip_spacing_s=0.05,
            reasoner__period_s=0.2,
            reasoner__retry_s=0.1,
            reasoner__ttl_s=1.0,
        )
        wait_until(lambda: self.masks)

    def _film(self):
        number = next(self._numbers)
        frame = self._video.frame(number)
        height, width = frame.image_rgb_u8.shape[:2]
        message = Image(height=height, width=width, encoding="rgb8", step=width * 3)
        message.data = array("B", frame.image_rgb_u8.tobytes())
        message.header.stamp = self.graph.node.get_clock().now().to_msg()
        self.numbers[message.header.stamp.sec, message.header.stamp.nanosec] = number
        self._publisher.publish(message)

    def stop(self):
        self.graph.node.destroy_timer(self._timer)

    def set_goal(self, goal="the red square"):
        return self.graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal=goal))

    def newest(self):
        """The only object in the newest frame; None before there is one."""
        return self.objects[-1].objects[0] if self.objects and self.objects[-1].objects else None

    def wait_for_state(self, state):
        return wait_until(lambda: self.newest() is not None and self.newest().state == state and self.newest())

    def wait_for_status(self, subject, level, *texts):
        def fits():
            statuses = {status.name: status for status in self.diagnostics[-1].status} if self.diagnostics else {}
            status = statuses.get(f"segmenter: {subject}")
            return status and status.level == level and all(text in status.message for text in texts)

        wait_until(fits)

    def assert_masks_go_on(self):
        """Ten more frames with the object in them."""
        del self.masks[:]
        wait_until(lambda: len(self.masks) >= 10)
        assert all(np.frombuffer(mask.data, np.uint8).any() for mask in self.masks[:10])


class ReasonerProcess:
    def __init__(self, endpoint):
        self._command = [sys.executable, "-m", "tests.ros.reasoner_process", endpoint]
        self._running = []

    def start(self):
        process = subprocess.Popen(self._command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self._running.append(process)
        return process

    def end_all(self):
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def live(graph, tmp_path):
    made = Live(graph, tmp_path)
    yield made
    made.stop()


@pytest.fixture
def reasoner(live):
    made = ReasonerProcess(live.endpoint)
    yield made
    made.end_all()


def test_what_the_deadline_leaves_out_is_on_diagnostics_and_masks_go_on(live, reasoner):
    reasoner.start()
    assert live.set_goal().success
    live.wait_for_state(SegmentedObject.TRACKING)
    live.wait_for_status("output", DiagnosticStatus.OK)
    assert live.node.set_parameters([Parameter("tracking.deadline_ms", value=0.001)])[0].successful
    live.wait_for_status(
        "output", DiagnosticStatus.WARN, "tracking.deadline_ms is 0.001: remembers fewer frames", "no more to leave out"
    )
    output = next(status for status in live.diagnostics[-1].status if status.name == "segmenter: output")
    told = {pair.key: pair.value for pair in output.values}
    assert told["degradation"] == output.message
    assert told["frames left out"] == "0"  # the camera is slow: frames do not wait for each other
    live.assert_masks_go_on()
    assert live.node.set_parameters([Parameter("tracking.deadline_ms", value=0.0)])[0].successful
    live.wait_for_status("output", DiagnosticStatus.OK)


class TestReasoner:
    def test_absent_at_the_start_then_found(self, live, reasoner):
        live.wait_for_status("reasoner", DiagnosticStatus.WARN, "no reasoner answers at", "start virst-reasoner")
        assert live.set_goal().success
        assert "start virst-reasoner" in live.wait_for_state(SegmentedObject.SEARCHING).message
        reasoner.start()
        assert live.wait_for_state(SegmentedObject.TRACKING).reasoner_latency >= 0.0
        live.wait_for_status("reasoner", DiagnosticStatus.OK)

    def test_killed_and_started_again(self, live, reasoner):
        process = reasoner.start()
        assert live.set_goal().success
        live.wait_for_state(SegmentedObject.TRACKING)
        process.kill()
        process.wait()
        live.wait_for_status("reasoner", DiagnosticStatus.WARN, "no reasoner answers at", "masks go on from memory")
        live.assert_masks_go_on()
        reasoner.start()
        live.wait_for_status("reasoner", DiagnosticStatus.OK)
        live.assert_masks_go_on()

    def test_hanging(self, live, reasoner):
        process = reasoner.start()
        assert live.set_goal().success
        live.wait_for_state(SegmentedObject.TRACKING)
        process.send_signal(signal.SIGSTOP)
        live.wait_for_status("reasoner", DiagnosticStatus.WARN, "hangs", "restart virst-reasoner")
        live.assert_masks_go_on()
        process.send_signal(signal.SIGCONT)
        live.wait_for_status("reasoner", DiagnosticStatus.OK)

    def test_garbage(self, live):
        """Whatever comes is answered with noise, by something that speaks ZeroMQ but not our protocol."""
        stop = threading.Event()

        def babble():
            with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
                socket.linger = 0
                socket.bind(live.endpoint)
                while not stop.is_set():
                    if socket.poll(50):
                        client = socket.recv_multipart()[0]
                        for noise in ([b"\xff" * 100], [b""], [b"a", b"b", b"c"], [os.urandom(5000)] * 3):
                            socket.send_multipart([client, *noise])

        babbler = threading.Thread(target=babble)
        babbler.start()
        try:
            assert live.set_goal().success
            live.wait_for_status("reasoner", DiagnosticStatus.WARN, "sends what we do not understand")
            assert live.wait_for_state(SegmentedObject.SEARCHING).message
            del live.masks[:]
            wait_until(lambda: len(live.masks) > 10)
        finally:
            stop.set()
            babbler.join()


class TestGoals:
    @pytest.mark.parametrize(
        ("goal", "says"),
        [
            ("", "got an empty one"),
            ("   \t ", "got an empty one"),
            ("red " * 10_000, "300 characters, got 39999"),
            ("red\nsquare", "U+000A"),
        ],
        ids=["empty", "blank", "very long", "control character"],
    )
    def test_impossible_goals(self, live, goal, says):
        answer = live.set_goal(goal)
        assert not answer.success
        assert says in answer.message
        live.wait_for_status("goals", DiagnosticStatus.WARN, says)
        del live.masks[:]
        wait_until(lambda: live.masks)

    def test_a_goal_that_the_reasoner_cannot_read(self, live, reasoner):
        reasoner.start()
        assert live.set_goal("赤い四角").success
        wait_until(lambda: live.newest() is not None and "say it in English" in live.newest().message)
        live.wait_for_status("goals", DiagnosticStatus.WARN, "say it in English")
        assert live.graph.call(ClearGoal, "/segmenter/clear_goal", ClearGoal.Request()).success
        assert live.set_goal("the red square").success
        live.wait_for_state(SegmentedObject.TRACKING)
        live.wait_for_status("goals", DiagnosticStatus.OK)

    def test_an_unknown_goal_id(self, live):
        answer = live.graph.call(ClearGoal, "/segmenter/clear_goal", ClearGoal.Request(goal_id="nobody"))
        assert not answer.success
        assert "nobody" in answer.message
        live.wait_for_status("goals", DiagnosticStatus.WARN, "nobody")


@pytest.fixture
def good_bytes(tmp_path):
    """A weights file of random numbers whose model knows three words."""
    from virst_engine.model.config import tabletop_tiny
    from virst_engine.model.virst import Virst
    from virst_engine.weights import save_model

    save_model(Virst(tabletop_tiny(("the", "red", "ball"))), tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


@pytest.mark.usefixtures("good_bytes")
class TestWords:
    """With a real weights file, sentences are checked against its vocabulary before anybody is asked."""

    @pytest.mark.parametrize(
        ("goal", "says"),
        [
            ("赤いボール", "does not know '赤いボール'"),
            ("der rote Ball", "does not know 'der', 'rote'"),
            ("🔴", "no word at all"),
            ("red " * 70, "at most 40 words, got 70"),
            ("x" * 200_147, "300 characters, got 200147"),
            ("x" * 290, "does not know 'xxxx"),
        ],
        ids=["Japanese", "German", "emoji", "long", "endless", "long word"],
    )
    def test_unreadable_goals_are_refused_at_once(self, graph, tmp_path, goal, says):
        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        node = graph.add(
            SegmenterNode,
            model__weights=str(tmp_path / "good.safetensors"),
            reasoner__endpoint=f"ipc://{tmp_path}/reasoner",
            diagnostics_period_s=0.1,
        )
        wait_until(lambda: node.state == "active")
        answer = graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal=goal))
        assert not answer.success
        assert says in answer.message
        assert len(answer.message) < 300
        wait_until(lambda: [status for each in diagnostics for status in each.status if says in status.message])
        assert graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal="The red ball!")).success


class TestWeights:
    """The real loading of weights, with a model of random numbers."""

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (None, "missing"),
            (lambda good: b"", "no readable safetensors file"),
            (lambda good: b"not weights" * 1000, "no readable safetensors file"),
            (lambda good: good[: len(good) // 2], "file"),
        ],
        ids=["missing", "empty", "something else", "half"],
    )
    def test_configuring_fails_with_the_file_named_and_can_be_tried_again(
        self, graph, tmp_path, good_bytes, damage, says
    ):
        path = tmp_path / "chosen.safetensors"
        if damage is not None:
            path.write_bytes(damage(good_bytes))
        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        node = graph.add(
            SegmenterNode,
            model__weights=str(path),
            reasoner__endpoint=f"ipc://{tmp_path}/reasoner",
            diagnostics_period_s=0.1,
        )

        def failure():
            messages = [status.message for each in diagnostics for status in each.status if status.level == b"\x02"]
            return [text for text in messages if str(path) in text]

        text = wait_until(failure)[0]
        assert says in text
        assert "virst train" in text
        assert node.state == "unconfigured"
        path.write_bytes(good_bytes)
        node.trigger_configure()
        node.trigger_activate()
        assert node.state == "active"

    def test_a_reasoner_of_other_weights_is_told_and_one_of_the_same_is_not(self, graph, tmp_path, good_bytes):
        mine, other = tmp_path / "mine.safetensors", tmp_path / "other.safetensors"
        mine.write_bytes(good_bytes)
        other.write_bytes(good_bytes[:-1] + bytes([good_bytes[-1] ^ 1]))  # the lowest bits of one number
        endpoint = f"ipc://{tmp_path}/reasoner"
        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        graph.add(SegmenterNode, model__weights=str(mine), reasoner__endpoint=endpoint, diagnostics_period_s=0.1)

        def reasoner_status():
            return next(status for status in diagnostics[-1].status if status.name == "segmenter: reasoner")

        for weights, says in ((other, "runs other weights (tabletop-tiny "), (mine, "listening")):
            command = [sys.executable, "-m", "virst_engine.slow.zmq_server", "--endpoint", endpoint]
            with subprocess.Popen([*command, "--weights", str(weights), "--threads", "1", "--nice", "0"]) as process:
                wait_until(lambda says=says: diagnostics and says in reasoner_status().message, timeout_s=60.0)
                process.terminate()
            del diagnostics[:]


class TestPointing:
    """add_objects and remove_object with the real session; nobody answers sentences here."""

    def point(self, live, object_id="it", row=8, **changes):
        """Point at the moving square of the frame of the newest mask; `row` is a row of pixels that it covers."""
        stamp = live.masks[-1].header.stamp
        x = 2 * (1 + live.numbers[stamp.sec, stamp.nanosec] % 10) + 4
        request = AddObjects.Request(
            point_object_ids=[object_id], point_coords=[Point2D(x=float(x), y=float(row))], **changes
        )
        request.request_header.stamp = stamp
        return live.graph.call(AddObjects, "/segmenter/add_objects", request)

    def test_what_was_pointed_at_in_an_earlier_frame_is_tracked(self, live):
        answer = self.point(live, "mine")
        assert answer.success, answer.message
        assert list(answer.object_ids) == ["mine"]
        found = live.wait_for_state(SegmentedObject.TRACKING)
        assert (found.object_id, found.goal, found.instance_id) == ("mine", "", answer.object_indices[0])
        live.assert_masks_go_on()

    def test_pointing_again_keeps_the_identity(self, live):
        first = self.point(live)
        live.wait_for_state(SegmentedObject.TRACKING)
        again = self.point(live)
        assert again.success, again.message
        assert list(again.object_indices) == list(first.object_indices)
        live.wait_for_state(SegmentedObject.TRACKING)

    def test_a_frame_that_is_gone_and_a_point_outside_are_told(self, live):
        request = AddObjects.Request(point_object_ids=["a"], point_coords=[Point2D(x=5.0, y=5.0)])
        request.request_header.stamp.sec = 1
        answer = live.graph.call(AddObjects, "/segmenter/add_objects", request)
        assert not answer.success
        assert answer.message
        assert "outside the image" in self.point(live, row=500).message
        assert live.newest() is None

    def test_removing_ends_it(self, live):
        assert self.point(live).success
        live.wait_for_state(SegmentedObject.TRACKING)
        removed = live.graph.call(RemoveObject, "/segmenter/remove_object", RemoveObject.Request(object_id="it"))
        assert removed.success
        assert not removed.object_ids
        wait_until(lambda: live.newest() is None)
