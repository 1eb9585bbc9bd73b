# SPDX-License-Identifier: Apache-2.0
"""One node with several cameras, over the real middleware: a real session on the fake network."""

import threading
from array import array
from functools import partial

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import SetBool
from virst_msgs.action import Segment
from virst_msgs.msg import BoundingBox2D, SegmentedObjectArray
from virst_msgs.srv import AddObjects, ClearGoal, ListGoals, SetGoal

from tests.fakes import BLUE, RED, SIDE, FakeStages, InstantClient, Video, moving_square, small_config
from tests.ros.ros_graph import wait_until
from virst_engine.session import Session
from virst_ros.diagnostics import LoadedModel
from virst_ros.loading import LoadedEngine, add_prompted
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros
VIDEOS = {
    "left": Video([moving_square(RED), moving_square(BLUE, row=8)]),
    "right": Video([moving_square(RED, row=6)]),
}


class Filming:
    """Cameras that publish until the test ends, each its own video and stamps."""

    def __init__(self, graph, cameras):
        self._graph = graph
        self.publishers = {name: graph.publisher(Image, f"{name}/image", qos_profile_sensor_data) for name in cameras}
        self.infos = {
            name: graph.publisher(CameraInfo, f"{name}/camera_info", qos_profile_sensor_data) for name in cameras
        }
        self.sent = {name: {} for name in cameras}  # stamp -> number of the frame
        self.cameras = set(cameras)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._film)

    def start(self):
        for publisher in self.publishers.values():
            wait_until(publisher.get_subscription_count)
        self._thread.start()

    def stop(self):
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _film(self):
        t = 0
        while not self._ended.wait(0.05):
            for name in sorted(self.cameras):
                self._send(name, t)
            t += 1

    def _send(self, name, t):
        pixels = VIDEOS[name].frame(t).image_rgb_u8
        message = Image(height=SIDE, width=SIDE, encoding="rgb8", step=SIDE * 3, data=array("B", pixels.tobytes()))
        message.header.frame_id = f"{name}_optical_frame"
        message.header.stamp = self._graph.node.get_clock().now().to_msg()
        self.sent[name][(message.header.stamp.sec, message.header.stamp.nanosec)] = t
        info = CameraInfo(header=message.header, width=SIDE, height=SIDE)
        self.infos[name].publish(info)
        self.publishers[name].publish(message)


class Rig:
    """The node, its cameras, and what comes out."""

    def __init__(self, graph):
        self.graph, self.stages = graph, FakeStages()
        self.filming = Filming(graph, VIDEOS)
        self.masks = {name: graph.collect(Image, f"/segmenter/{name}/mask", 50) for name in VIDEOS}
        self.objects = {name: graph.collect(SegmentedObjectArray, f"/segmenter/{name}/objects", 50) for name in VIDEOS}
        self.infos = {name: graph.collect(CameraInfo, f"/segmenter/{name}/camera_info", 50) for name in VIDEOS}
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        self.node = graph.add(SegmenterNode, self._load, cameras=list(VIDEOS), diagnostics_period_s=0.05)
        wait_until(lambda: self.node.state == "active")
        for camera in self.node.cameras:
            wait_until(lambda camera=camera: camera.outputs.mask.wanted and camera.outputs.objects.wanted)
        self.filming.start()

    def _load(self, config, cameras):
        clients = {camera: InstantClient() for camera in cameras}
        session = Session(small_config(), self.stages, clients)
        model = LoadedModel("fake", "", "FakeStages", "cpu")
        return LoadedEngine(session, clients, model, lambda sentence: None, partial(add_prompted, session))

    def call(self, kind, name, **fields):
        return self.graph.call(kind, f"/segmenter/{name}", kind.Request(**fields))

    def newest(self, name, condition=lambda message: True):
        """The next objects of a camera that fit."""
        seen = len(self.objects[name])
        return wait_until(lambda: next((m for m in self.objects[name][seen:] if condition(m)), None))


@pytest.fixture
def rig(graph):
    made = Rig(graph)
    yield made
    made.filming.stop()


def is_tracked(message):
    return bool(message.objects) and all(found.state == found.TRACKING and found.area_px for found in message.objects)


def test_every_camera_gets_the_masks_of_its_own_images(rig):
    assert rig.call(SetGoal, "set_goal", goal="red", object_id="ball").success
    for name, video in VIDEOS.items():
        found = rig.newest(name, is_tracked)
        assert [each.object_id for each in found.objects] == ["ball"]
        mask = wait_until(lambda name=name: next((m for m in reversed(rig.masks[name]) if any(m.data)), None))
        assert mask.header.frame_id == f"{name}_optical_frame"
        t = rig.filming.sent[name][(mask.header.stamp.sec, mask.header.stamp.nanosec)]
        seen = np.frombuffer(mask.data, np.uint8).reshape(SIDE, SIDE) == found.objects[0].instance_id
        truth = video.truth(t)
        assert (seen & truth).sum() / (seen | truth).sum() > 0.8
        wait_until(lambda name=name: rig.infos[name])


def test_a_goal_of_one_camera_is_not_looked_for_in_the_other(rig):
    first = rig.call(SetGoal, "set_goal", goal="blue", camera="left")
    assert first.success
    rig.newest("left", is_tracked)
    assert rig.newest("right").objects == []
    refused = rig.call(SetGoal, "set_goal", goal="blue", camera="top")
    assert not refused.success
    assert "sees cameras left, right" in refused.message
    (goal,) = rig.call(ListGoals, "list_goals").goals
    assert (goal.camera, list(goal.states)) == ("left", [1])
    assert rig.call(ClearGoal, "clear_goal", goal_id=first.goal_id).success
    rig.newest("left", lambda message: not message.objects)


def test_an_object_is_pointed_out_in_the_image_of_one_camera(rig):
    rig.newest("right")
    box = BoundingBox2D(size_x=8.0, size_y=8.0)
    stamp, t = next(reversed(rig.filming.sent["right"].items()))
    rows, columns = np.nonzero(VIDEOS["right"].truth(t))
    box.center.position.x, box.center.position.y = float(columns.mean()), float(rows.mean())
    refused = rig.call(AddObjects, "add_objects", bbox_object_ids=["b"], bbox_coords=[box])
    assert not refused.success
    assert "say in which camera's image it is" in refused.message
    request = AddObjects.Request(bbox_object_ids=["b"], bbox_coords=[box], camera="right")
    request.request_header.stamp.sec, request.request_header.stamp.nanosec = stamp
    added = wait_until(lambda: (a := rig.graph.call(AddObjects, "/segmenter/add_objects", request)).success and a)
    assert list(added.object_ids) == ["b"]
    assert [found.object_id for found in rig.newest("right", is_tracked).objects] == ["b"]
    assert rig.newest("left").objects == []


def test_the_action_ends_with_the_mask_of_a_camera_that_sees_it(rig):
    client = rig.graph.action_client(Segment, "/segmenter/segment")
    asked = client.send_goal_async(Segment.Goal(goal="blue", timeout=20.0))
    wait_until(asked.done)
    outcome = asked.result().get_result_async()
    wait_until(outcome.done)
    assert outcome.result().status == GoalStatus.STATUS_SUCCEEDED
    assert outcome.result().result.mask.header.frame_id == "left_optical_frame"


def test_a_camera_that_stops_is_named_and_holds_up_nobody(rig):
    assert rig.call(SetGoal, "set_goal", goal="red").success
    for name in VIDEOS:
        rig.newest(name, is_tracked)
    rig.filming.cameras.discard("left")

    def told():
        for message in reversed(rig.diagnostics):
            status = next((s for s in message.status if s.name == "segmenter/left: input"), None)
            return status.message if status is not None and "has stopped arriving" in status.message else None
        return None

    assert "/left/image" in wait_until(told)
    rig.newest("right", is_tracked)
    names = {status.name for status in rig.diagnostics[-1].status}
    subjects = ("input", "output", "reasoner", "goals")
    assert names == {"segmenter: model", *(f"segmenter/{c}: {s}" for c in VIDEOS for s in subjects)}


def test_images_of_all_cameras_are_paused_and_taken_again(rig):
    assert rig.call(SetGoal, "set_goal", goal="red").success
    for name in VIDEOS:
        rig.newest(name, is_tracked)
    assert rig.call(SetBool, "enable", data=False).success
    for publisher in rig.filming.publishers.values():
        wait_until(lambda publisher=publisher: not publisher.get_subscription_count())
    assert rig.call(SetBool, "enable", data=True).success
    for name in VIDEOS:
        rig.newest(name, is_tracked)
