# SPDX-License-Identifier: Apache-2.0
"""Detections and labels in vision_msgs: with stand-ins everywhere, over middleware where the package is installed."""

from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from std_msgs.msg import Header
from virst_msgs.srv import SetGoal

from tests.ros.rgbd_camera import RgbdCamera, stamp_of
from tests.ros.ros_graph import wait_until
from virst_engine.types import Frame, FrameResult, Goal, ObjectResult, ObjectState
from virst_ros import vision_outputs
from virst_ros.outputs import SegmentedFrame
from virst_ros.parameters import AUTO, OFF, ON, NodeParameters
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


# Messages with the fields of vision_msgs 4.1; one that it does not have cannot be set.


@dataclass(slots=True)
class Point2D:
    x: float = 0.0
    y: float = 0.0


@dataclass(slots=True)
class Pose2D:
    position: Point2D = field(default_factory=Point2D)
    theta: float = 0.0


@dataclass(slots=True)
class BoundingBox2D:
    center: Pose2D = field(default_factory=Pose2D)
    size_x: float = 0.0
    size_y: float = 0.0


@dataclass(slots=True)
class ObjectHypothesis:
    class_id: str = ""
    score: float = 0.0


@dataclass(slots=True)
class ObjectHypothesisWithPose:
    hypothesis: ObjectHypothesis = field(default_factory=ObjectHypothesis)
    pose: Any = None


@dataclass(slots=True)
class Detection2D:
    header: Any = None
    results: Any = None
    bbox: Any = None
    id: str = ""


@dataclass(slots=True)
class Detection2DArray:
    header: Any = None
    detections: Any = None


@dataclass(slots=True)
class VisionClass:
    class_id: int = 0
    class_name: str = ""


@dataclass(slots=True)
class LabelInfo:
    header: Any = None
    class_map: Any = None
    threshold: float = 0.0


KINDS = (BoundingBox2D, ObjectHypothesisWithPose, Detection2D, Detection2DArray, VisionClass, LabelInfo)
STAND_INS = SimpleNamespace(**{kind.__name__: kind for kind in KINDS})


def shown():
    mask = np.zeros((20, 30), bool)
    mask[4:8, 10:20] = True
    seen = ObjectResult("cup", "goal_1", 3, ObjectState.TRACKING, mask, 0.75, 0.0, 0.0)
    lost = ObjectResult("can", "goal_2", 4, ObjectState.LOST, np.zeros_like(mask), 0.0, 0.0, 0.0)
    # The second was pointed at: it has no sentence.
    goals = (Goal("goal_1", "cup", "the red cup", "", 3), Goal("goal_2", "can", "", "", 4))
    frame = Frame(np.zeros((20, 30, 3), np.uint8), 5)
    return SegmentedFrame(
        Header(frame_id="here"), frame, FrameResult(5, 1, "camera", (seen, lost), {}), goals, seen, 1, 0
    )


def test_a_goal_that_was_cleared_during_the_frame_is_called_what_it_was():
    whole = shown()
    objects = [replace(found, sentence=whole.sentences[found.goal_id]) for found in whole.result.objects]
    part = replace(objects[0], object_id="cup.1", part_of="cup")
    cleared = replace(whole, result=replace(whole.result, objects=(*objects, part)), goals=())
    assert cleared.sentences == whole.sentences == {"goal_1": "the red cup", "goal_2": ""}
    assert cleared.captions == whole.captions == {"goal_1": "the red cup", "goal_2": "can"}


def test_a_detection_has_the_box_the_sentence_the_score_and_the_objects_name():
    message = vision_outputs.detections(STAND_INS, shown())
    assert message.header == shown().header
    (found,) = message.detections
    assert found.header == shown().header
    assert found.id == "cup"
    assert (found.bbox.center.position.x, found.bbox.center.position.y) == (15.0, 6.0)
    assert (found.bbox.size_x, found.bbox.size_y) == (10.0, 4.0)
    hypothesis = found.results[0].hypothesis
    assert (hypothesis.class_id, hypothesis.score) == ("the red cup", 0.75)


def test_labels_name_every_goal_also_those_that_are_not_seen():
    message = vision_outputs.label_info(STAND_INS, shown())
    assert [(each.class_id, each.class_name) for each in message.class_map] == [(3, "the red cup"), (4, "can")]


def test_instances_have_detections_and_labels_of_their_own():
    frame = shown()
    (seen, lost) = frame.result.objects
    part = replace(seen, object_id="cup.1", instance_id=9, part_of="cup")
    frame.result = replace(frame.result, objects=(seen, part, lost))
    found = vision_outputs.detections(STAND_INS, frame).detections
    assert [(each.id, each.results[0].hypothesis.class_id) for each in found] == [
        ("cup", "the red cup"),
        ("cup.1", "the red cup 1"),
    ]
    labels = vision_outputs.label_info(STAND_INS, frame).class_map
    assert [(each.class_id, each.class_name) for each in labels] == [
        (3, "the red cup"),
        (4, "can"),
        (9, "the red cup 1"),
    ]


def test_the_stand_ins_have_the_fields_of_the_real_messages():
    real = pytest.importorskip("vision_msgs.msg", reason="vision_msgs is not in ROS 2's wheels")
    for kind in (*KINDS, Point2D, Pose2D, ObjectHypothesis):
        names = {f.name for f in fields(kind)}
        assert names == set(getattr(real, kind.__name__).get_fields_and_field_types()), kind.__name__


@pytest.mark.parametrize(("wanted", "says"), [(ON, "the package vision_msgs is not installed"), (AUTO, ""), (OFF, "")])
def test_a_missing_package_is_told_only_to_those_who_ask_for_it(monkeypatch, wanted, says):
    monkeypatch.setattr(vision_outputs, "load_vision_msgs", lambda: None)
    told = vision_outputs.why_no_detections(NodeParameters(detections=wanted))
    assert says in told
    assert bool(told) is bool(says)


def test_without_the_package_the_node_runs_all_the_same(graph, engine, monkeypatch):
    monkeypatch.setattr(vision_outputs, "load_vision_msgs", lambda: None)
    node = graph.add(SegmenterNode, engine, detections=ON)
    wait_until(lambda: node.state == "active")
    assert graph.node.count_publishers("/segmenter/detections") == 0


def test_detections_and_labels_over_middleware(graph, engine):
    vision_msgs = pytest.importorskip("vision_msgs.msg", reason="vision_msgs is not in ROS 2's wheels")
    from rclpy.qos import DurabilityPolicy, QoSProfile

    camera = RgbdCamera(graph)
    detections = graph.collect(vision_msgs.Detection2DArray, "/segmenter/detections")
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active" and node.cameras[0].vision_outputs.detections.wanted)
    wait_until(camera.image_publisher.get_subscription_count)
    assert graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal="the block", object_id="block")).success
    stamp_ns = camera.send()
    message = wait_until(lambda: [each for each in detections if stamp_of(each) == stamp_ns])[0]
    (found,) = message.detections
    rows, columns = camera.block
    assert (found.bbox.size_x, found.bbox.size_y) == (columns.stop - columns.start, rows.stop - rows.start)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    labels = graph.collect(vision_msgs.LabelInfo, "/segmenter/label_info", latched)
    assert wait_until(lambda: labels)[0].class_map[0].class_name == "the block", "also for those who join later"
