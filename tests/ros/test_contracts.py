# SPDX-License-Identifier: Apache-2.0
"""What FoundationPose, nvblox, Contact-GraspNet and MoveIt would do with the node's outputs, over the real middleware.

The same consumers run for a minute against the real engine with: virst-contracts --sim --seconds 60
"""

import copy
import time
from array import array

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

import rclpy
from std_msgs.msg import Header
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray
from virst_msgs.srv import SetGoal

from tests.ros.rgbd_camera import FRAME_ID, RgbdCamera
from tests.ros.ros_graph import Spinning, wait_until
from virst_engine.depth import Cloud
from virst_ros import contracts, conversions
from virst_ros.depth_conversions import cloud_message
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros
SECONDS = 5.0


def test_every_consumer_accepts_everything(graph, engine):
    camera = RgbdCamera(graph, width=128, height=96)
    node = graph.add(SegmenterNode, engine, use_depth=True)
    wait_until(lambda: node.state == "active" and camera.connected())
    assert graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal="the block")).success
    consumers = rclpy.create_node("consumers", context=graph.context)
    topics = {"image": "/image", "depth": "/depth", "camera_info": "/camera_info"}
    watch = contracts.Watch(consumers, topics | contracts.output_topics("/segmenter"))
    spinning = Spinning(consumers)
    try:
        wait_until(lambda: camera.connected(subscribers=2))
        for output in ("mask", "target_mask", "camera_info", "objects", "points_without_object"):
            wait_until(lambda output=output: getattr(node.cameras[0].outputs, output).wanted)
        timer = graph.node.create_timer(0.04, camera.send)
        time.sleep(SECONDS)
        graph.node.destroy_timer(timer)
        time.sleep(0.5)
        figures = watch.finish()
    finally:
        spinning.stop()
    assert [row["consumer"] for row in figures] == ["FoundationPose", "nvblox", "Contact-GraspNet", "MoveIt"]
    for row in figures:
        assert row["rejected"] == 0, row
        assert row["accepted"] >= 30, row
    assert contracts.failures(figures, 0.5) == []


class Messages:
    """A complete set of messages of one frame, right in every respect."""

    def __init__(self, number=1):
        self.header = Header(frame_id=FRAME_ID, stamp=conversions.time_message(number * 1_000_000_000))
        ids, target = np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.uint8)
        ids[1:3, 1:3], target[1:3, 1:3] = 7, 255
        rgb = np.zeros((6, 8, 3), np.uint8)
        depth_m = np.ones((6, 8), np.float32)
        self.by_topic = {
            "image": conversions.image_message(self.header, rgb, "rgb8"),
            "depth": conversions.image_message(self.header, depth_m, "32FC1"),
            "camera_info": self._info(),
            "mask": conversions.image_message(self.header, ids, "mono8"),
            "target_mask": conversions.image_message(self.header, target, "mono8"),
            "info": self._info(),
            "objects": SegmentedObjectArray(
                header=self.header, objects=[SegmentedObject(instance_id=7, state=SegmentedObject.TRACKING, area_px=4)]
            ),
            "points_without_object": self.cloud([[0.0, 0.0, 1.0]]),
        }

    def _info(self):
        from sensor_msgs.msg import CameraInfo

        return CameraInfo(header=self.header, width=8, height=6, k=[10.0, 0.0, 3.5, 0.0, 10.0, 2.5, 0.0, 0.0, 1.0])

    def cloud(self, points):
        points = np.array(points, np.float32)
        cloud = Cloud(points, np.zeros((len(points), 3), np.uint8), np.zeros(len(points), np.uint8))
        return cloud_message(self.header, cloud, labelled=False)


def made(name):
    consumer = {
        "FoundationPose": lambda: contracts.foundationpose(lambda: 10_000_000_000),
        "nvblox": contracts.nvblox,
        "Contact-GraspNet": contracts.contact_graspnet,
        "MoveIt": contracts.moveit,
    }[name]()
    assert consumer.name == name
    return consumer


def feed(consumer, messages):
    for topic in consumer.topics:
        consumer.put(topic, messages.by_topic[topic])


@pytest.mark.parametrize("name", ["FoundationPose", "nvblox", "Contact-GraspNet", "MoveIt"])
def test_a_right_set_is_accepted_in_any_order(name):
    consumer = made(name)
    feed(consumer, Messages(10))
    consumer.topics = tuple(reversed(consumer.topics))
    feed(consumer, Messages(11))
    assert (consumer.accepted, consumer.rejected) == (2, 0), consumer.reasons


def larger(image):
    header = image.header
    return conversions.image_message(header, np.zeros((12, 16), np.uint8), image.encoding)


def padded(image):
    rows = np.pad(np.frombuffer(image.data, np.uint8).reshape(image.height, image.width), ((0, 0), (0, 4)))
    image = copy.copy(image)
    image.step, image.data = image.width + 4, array("B", rows.tobytes())
    return image


def with_(message, **fields):
    changed = copy.deepcopy(message)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def nothing_in(image):
    return conversions.image_message(image.header, np.zeros((image.height, image.width), np.uint8), image.encoding)


def of_depth(image, depth_m):
    """That depth in the target, 1 m elsewhere."""
    metres = np.ones((image.height, image.width), np.float32)
    metres[1:3, 1:3] = depth_m
    return conversions.image_message(image.header, metres, "32FC1")


def elsewhere(message):
    changed = copy.deepcopy(message)
    changed.header.frame_id = "elsewhere"
    return changed


@pytest.mark.parametrize(
    ("name", "topic", "spoil", "says"),
    [
        ("FoundationPose", "target_mask", lambda m, _: with_(m, encoding="8UC1"), "8UC1, not mono8"),
        ("FoundationPose", "target_mask", lambda m, _: padded(m), "rows are padded"),
        ("FoundationPose", "target_mask", lambda m, _: larger(m), "differ in size"),
        ("FoundationPose", "target_mask", lambda _, all_: all_["mask"], "values besides 0 and 255: [7]"),
        ("FoundationPose", "target_mask", lambda m, _: elsewhere(m), "frames differ"),
        ("FoundationPose", "target_mask", lambda m, _: nothing_in(m), "all zero, although the target is seen"),
        ("FoundationPose", "depth", lambda m, _: with_(m, data=array("B", bytes(6 * 8 * 4))), "no depth of 0.1 m"),
        ("FoundationPose", "depth", lambda m, _: of_depth(m, 0.05), "no depth of 0.1 m or more in the mask"),
        ("FoundationPose", "depth", lambda m, _: with_(m, encoding="8UC1"), "'8UC1' is not supported"),
        ("nvblox", "mask", lambda m, _: with_(m, encoding="rgb8"), "rgb8, not mono8"),
        ("nvblox", "info", lambda m, _: with_(m, width=9), "its camera_info 9x6"),
        ("nvblox", "info", lambda m, _: with_(m, k=[0.0] * 9), "not calibrated"),
        ("Contact-GraspNet", "mask", lambda m, _: larger(m), "segmap is (12, 16), depth (6, 8)"),
        ("Contact-GraspNet", "objects", lambda m, _: with_(m, objects=[]), "ids [7] that `objects` does not have"),
        ("Contact-GraspNet", "mask", lambda m, _: nothing_in(m), "segmap is empty, although the objects [7] are seen"),
        ("Contact-GraspNet", "depth", lambda m, _: with_(m, data=array("B", bytes(6 * 8 * 4))), "no depth in the segm"),
        ("Contact-GraspNet", "depth", lambda m, _: with_(m, encoding="8UC1"), "'8UC1' is not supported"),
        ("MoveIt", "points_without_object", lambda m, _: with_(m, header=Header(stamp=m.header.stamp)), "frame_id ''"),
        ("MoveIt", "points_without_object", lambda m, _: with_(m, fields=m.fields[:2]), "no field z"),
        ("MoveIt", "points_without_object", lambda m, _: with_(m, width=5), "do not fit"),
        # The target is seen in columns and rows 1 and 2: this point is in it.
        ("MoveIt", "points_without_object", lambda *_: Messages(10).cloud([[-0.2, -0.1, 1.0]]), "target are left"),
        ("MoveIt", "points_without_object", lambda *_: Messages(10).cloud([[np.nan, 0.0, 1.0]]), "not finite"),
    ],
)
def test_what_a_consumer_could_not_use_is_rejected_with_the_reason(name, topic, spoil, says):
    consumer, messages = made(name), Messages(10)
    messages.by_topic[topic] = spoil(messages.by_topic[topic], messages.by_topic)
    feed(consumer, messages)
    assert (consumer.accepted, consumer.rejected) == (0, 1)
    (reason,) = consumer.reasons
    assert says in reason


def test_masks_that_come_too_late_are_rejected():
    consumer = made("FoundationPose")
    old = contracts.foundationpose(lambda: 12_000_000_000)
    feed(old, Messages(10))
    assert "older than 1 s" in next(iter(old.reasons))

    feed(consumer, Messages(1 + 9))
    for number in range(11, 11 + 14):  # 14 frames on, the synchroniser has forgotten the first two
        for topic in consumer.topics[1:]:
            consumer.put(topic, Messages(number).by_topic[topic])
    for number in range(11, 11 + 14):
        consumer.put("target_mask", Messages(number).by_topic["target_mask"])
    consumer.finish()
    assert consumer.accepted == 1 + 12
    assert consumer.reasons == {
        "target_mask without image and depth and camera_info and objects of its stamp among the last 12": 2,
    }


def test_a_mask_with_a_stamp_of_its_own_is_rejected():
    consumer = made("nvblox")
    feed(consumer, Messages(10))
    for number in range(11, 23):
        messages = Messages(number)
        messages.by_topic["mask"] = with_(messages.by_topic["mask"], header=Header(frame_id=FRAME_ID))
        messages.by_topic["mask"].header.stamp = conversions.time_message(number * 1_000_000_000 + 1)
        feed(consumer, messages)
    consumer.finish()
    assert (consumer.accepted, consumer.rejected) == (1, 11), "of the last one the image might still come"


def test_what_comes_before_all_topics_have_begun_is_not_judged():
    consumer = made("nvblox")
    for number in range(1, 20):
        consumer.put("mask", Messages(number).by_topic["mask"])
    feed(consumer, Messages(20))
    for number in range(21, 40):
        feed(consumer, Messages(number))
    consumer.finish()
    assert (consumer.accepted, consumer.rejected) == (20, 0)


def unseen(messages):
    """The same frame from a segmenter that has not found its object, and says so."""
    for topic in ("mask", "target_mask"):
        messages.by_topic[topic] = nothing_in(messages.by_topic[topic])
    messages.by_topic["objects"].objects[0].state = SegmentedObject.SEARCHING
    messages.by_topic["objects"].objects[0].area_px = 0
    return messages


NAMES = ("FoundationPose", "nvblox", "Contact-GraspNet", "MoveIt")


@pytest.mark.parametrize(("found", "passes"), [(10, True), (5, True), (4, False), (0, False)])
def test_a_segmenter_that_seldom_finds_its_object_fails(found, passes):
    consumers = [made(name) for name in NAMES]
    for number in range(10):
        messages = Messages(10 + number)
        for consumer in consumers:
            feed(consumer, messages if number < found else unseen(messages))
    rows = [
        {
            "consumer": each.name,
            "accepted": each.accepted,
            "with_object": each.with_object,
            "rejected": each.rejected,
        }
        for each in consumers
    ]
    for row in rows:
        assert (row["accepted"], row["with_object"], row["rejected"]) == (10, found, 0), row
    problems = contracts.failures(rows, 0.5)
    assert len(problems) == (0 if passes else len(NAMES))
    assert all(f"the object is in {found} of 10" in problem for problem in problems)
    assert contracts.failures(rows, 0.0) == [], "of running cameras nobody knows what they see"


def test_what_is_rejected_or_never_comes_fails():
    row = {"consumer": "nvblox", "accepted": 10, "with_object": 10, "rejected": 0}
    assert contracts.failures([row], 0.5) == []
    assert contracts.failures([row | {"rejected": 1}], 0.5) == ["nvblox: 1 rejected, 10 accepted"]
    assert contracts.failures([row | {"accepted": 0}], 0.5) == ["nvblox: 0 rejected, 0 accepted"]
