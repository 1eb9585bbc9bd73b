# SPDX-License-Identifier: Apache-2.0
"""The simulated camera over the real middleware: stamps, formats, truth, new scenes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
if importlib.util.find_spec("mujoco") is None:  # not imported here: virst_engine.sim chooses its OpenGL first
    pytest.skip("no mujoco", allow_module_level=True)

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

from tests.ros.ros_graph import wait_until
from virst_engine.errors import SceneError
from virst_engine.sim.mujoco_world import Simulator, close_all
from virst_engine.sim.scenes import generate_scene
from virst_ros import conversions
from virst_ros.parameters import node_specs
from virst_ros.sim_camera_node import CameraParameters, SimCameraNode, SteadyRate


class TestSteadyRate:
    """With a clock that moves only when told: periods of half a second are exact in binary."""

    @pytest.fixture(autouse=True)
    def clock(self):
        self.now_s = 100.0

        def sleep(seconds):
            self.now_s += seconds

        self.rate = SteadyRate(2.0, now_s=lambda: self.now_s, sleep=sleep)

    def test_deadlines_do_not_drift(self):
        due = []
        for work_s in (0.125, 0.25, 0.375, 0.0):
            due.append(self.rate.wait())
            self.now_s += work_s
        assert due == [0.0, 0.5, 1.0, 1.5]
        assert self.now_s == 101.5
        assert self.rate.overruns == 0

    def test_a_little_late_is_caught_up(self):
        self.rate.wait()
        self.now_s += 0.625
        assert self.rate.wait() == 0.5
        assert self.rate.wait() == 1.0
        assert (self.now_s, self.rate.overruns) == (101.0, 0)

    def test_missed_deadlines_are_left_out_and_counted(self):
        self.rate.wait()
        self.now_s += 1.75
        assert self.rate.wait() == 1.5
        assert self.rate.overruns == 2
        assert self.rate.wait() == 2.0


def test_every_parameter_is_documented_with_its_default():
    text = (Path(__file__).parents[2] / "docs" / "sim_camera.md").read_text(encoding="utf-8")
    for spec in node_specs(CameraParameters):
        assert f"| `{spec.name}` | {spec.default} |" in text


@pytest.fixture(scope="module")
def _needs_opengl():
    try:
        with Simulator(generate_scene(1_000_000, "plain"), 64, 48) as simulator:
            simulator.render()
    except SceneError as error:
        pytest.skip(str(error))
    finally:
        close_all()  # the node draws from another thread


def rows(message, dtype, channels=1):
    array = np.frombuffer(message.data, dtype).reshape(message.height, message.width, channels)
    return array if channels > 1 else array[..., 0]


def by_stamp(messages):
    return {conversions.stamp_ns(message.header.stamp): message for message in messages}


@pytest.mark.usefixtures("_needs_opengl")
class TestNode:
    @pytest.fixture
    def topics(self, graph):
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        return {
            "image": graph.collect(Image, "/camera/color/image_raw", qos_profile_sensor_data),
            "depth": graph.collect(Image, "/camera/depth/image_raw", qos_profile_sensor_data),
            "info": graph.collect(CameraInfo, "/camera/color/camera_info"),
            "mask": graph.collect(Image, "/camera/truth/mask"),
            "frame": graph.collect(String, "/camera/truth/frame"),
            "scene": graph.collect(String, "/camera/truth/scene", latched),
            "sentences": graph.collect(String, "/camera/truth/sentences", latched),
            "diagnostics": graph.collect(DiagnosticArray, "/diagnostics"),
        }

    def test_all_views_of_a_frame_share_its_stamp(self, graph, topics):
        graph.add(SimCameraNode, seed=1_000_003)

        def complete():
            views = [by_stamp(topics[name]) for name in ("image", "depth", "info", "mask")]
            return set.intersection(*map(set, views)) and views

        image, depth, info, mask = wait_until(complete)
        stamp = max(image.keys() & depth.keys() & info.keys() & mask.keys())
        image, depth, info, mask = (view[stamp] for view in (image, depth, info, mask))
        assert {view.header.frame_id for view in (image, depth, info, mask)} == {"camera_color_optical_frame"}
        assert {(view.width, view.height) for view in (image, depth, info, mask)} == {(320, 240)}
        assert (image.encoding, depth.encoding, mask.encoding) == ("rgb8", "32FC1", "mono8")
        assert rows(image, np.uint8, 3).std() > 10.0, "something is to be seen"
        assert 0.1 < np.nanmedian(rows(depth, np.float32)) < 3.0
        assert info.k[0] > 100.0
        assert (info.k[2], info.k[5]) == (159.5, 119.5), "the middle, counted from the centre of the first pixel"

        things = json.loads(topics["scene"][-1].data)["objects"]
        ids = set(np.unique(rows(mask, np.uint8)).tolist())
        assert ids - {0, 255} <= {thing["id"] for thing in things}
        truth = {t["stamp_ns"]: t for t in (json.loads(message.data) for message in topics["frame"])}[stamp]
        assert len(truth["visible_fraction"]) == len(things)
        assert truth["seed"] == 1_000_003
        assert all((f > 0.01) <= (k + 1 in ids) for k, f in enumerate(truth["visible_fraction"]))

    def test_sentences_say_what_is_true_now(self, graph, topics):
        graph.add(SimCameraNode, family="demo")
        told = wait_until(lambda: topics["sentences"])
        things = {thing["id"]: thing for thing in json.loads(topics["scene"][-1].data)["objects"]}
        sentences = json.loads(told[0].data)["sentences"]
        assert sentences
        for sentence in sentences:
            assert sentence["text"]
            assert set(sentence["target_ids"]) <= set(things)
            assert bool(sentence["target_ids"]) == (sentence["kind"] != "absent")
        # Phrasings are drawn ("the ball that is red"), but those that only name a thing have these words in common.
        red_ball = next(key for key, thing in things.items() if (thing["colour"], thing["shape"]) == ("red", "ball"))
        names = [each for each in sentences if each["kind"] == "attribute"]
        named_so = [each["target_ids"] for each in names if {"red", "ball"} <= set(each["text"].split())]
        assert named_so == [[red_ball]]

    def test_a_new_scene_can_be_asked_for(self, graph, topics):
        node = graph.add(SimCameraNode, seed=1_000_000, width=64, height=48)
        wait_until(lambda: topics["scene"])
        assert graph.call(Trigger, "/camera/new_scene", Trigger.Request()).success
        wait_until(lambda: json.loads(topics["scene"][-1].data)["seed"] == 1_000_001)
        assert node.set_parameters([Parameter("family", value="full")])[0].successful
        wait_until(lambda: json.loads(topics["scene"][-1].data)["family"] == "full")
        assert not node.set_parameters([Parameter("family", value="other")])[0].successful
        seen = len(topics["image"])
        wait_until(lambda: len(topics["image"]) > seen)

    def test_its_rate_is_on_diagnostics(self, graph, topics):
        graph.add(SimCameraNode, width=64, height=48)

        def filming():
            statuses = [status for array in topics["diagnostics"] for status in array.status]
            return [status for status in statuses if status.level == DiagnosticStatus.OK]

        status = wait_until(filming)[-1]
        assert status.name == "camera: simulated camera"
        assert {"rate (Hz)", "overruns", "frames"} <= {pair.key for pair in status.values}
