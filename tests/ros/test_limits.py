# SPDX-License-Identifier: Apache-2.0
"""How much one caller may ask of the node at once. How often: test_rate_limit.py."""

from array import array

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image
from virst_msgs.msg import BoundingBox2D, Point2D
from virst_msgs.srv import AddObjects, Ask, ClearGoal, ListGoals, RemoveObject, SetGoal

from tests.ros.rgbd_camera import RgbdCamera
from tests.ros.ros_graph import wait_until, words
from virst_engine.errors import BadGoal
from virst_ros.parameters import LimitParameters
from virst_ros.prompts import LONGEST_ID, prompted_objects
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros
MEGABYTE = "x" * 1_000_000


def boxes(count):
    box = BoundingBox2D(size_x=2.0, size_y=2.0)
    return AddObjects.Request(bbox_object_ids=[f"object {n}" for n in range(count)], bbox_coords=[box] * count)


def masks(count, side):
    image = Image(height=side, width=side, encoding="mono8", step=side, data=array("B", bytes(side * side)))
    return AddObjects.Request(mask_object_ids=[f"object {n}" for n in range(count)], masks=[image] * count)


def test_objects_of_one_call():
    limits = LimitParameters(objects_per_request=3)
    assert len(prompted_objects(boxes(3), limits)[1]) == 3
    with pytest.raises(BadGoal, match=r"4 objects in one call, at most 3 are taken.*limits.objects_per_request"):
        prompted_objects(boxes(4), limits)
    several_points_of_one = AddObjects.Request(point_object_ids=["a"] * 10, point_coords=[Point2D()] * 10)
    assert len(prompted_objects(several_points_of_one, limits)[1]) == 1


def test_pixels_of_all_masks_of_one_call():
    limits = LimitParameters(image_megapixels=0.01)
    assert len(prompted_objects(masks(1, 100), limits)[1]) == 1
    with pytest.raises(BadGoal, match=r"20000 pixels together, at most 0.01 million.*limits.image_megapixels"):
        prompted_objects(masks(2, 100), limits)


def test_masks_that_only_claim_to_be_large_are_refused_too():
    request = masks(1, 4)
    request.masks[0].height = request.masks[0].width = 2**32 - 1
    with pytest.raises(BadGoal, match="pixels together"):
        prompted_objects(request)


@pytest.mark.parametrize("kind", ["bbox", "point", "mask"])
def test_length_of_an_object_id(kind):
    def request(name):
        if kind == "bbox":
            return AddObjects.Request(bbox_object_ids=[name], bbox_coords=boxes(1).bbox_coords)
        if kind == "point":
            return AddObjects.Request(point_object_ids=[name], point_coords=[Point2D()])
        return AddObjects.Request(mask_object_ids=[name], masks=masks(1, 4).masks)

    assert prompted_objects(request("x" * LONGEST_ID))[1][0].object_id == "x" * LONGEST_ID
    with pytest.raises(BadGoal, match=f"has {LONGEST_ID + 1} characters, at most {LONGEST_ID}"):
        prompted_objects(request("x" * (LONGEST_ID + 1)))


class TestOnTheNode:
    @pytest.fixture
    def node(self, graph, engine):
        engine.ask = lambda question, camera: words("yes")
        node = graph.add(
            SegmenterNode,
            engine,
            diagnostics_period_s=0.05,
            use_depth=True,
            limits__image_megapixels=0.004,
            limits__objects_per_request=2,
        )
        wait_until(lambda: node.state == "active")
        return node

    @pytest.mark.parametrize(
        ("kind", "name", "fields"),
        [
            (SetGoal, "set_goal", {"goal": "the block", "object_id": MEGABYTE}),
            (SetGoal, "set_goal", {"goal": "the block", "camera": MEGABYTE}),
            (ClearGoal, "clear_goal", {"goal_id": MEGABYTE}),
            (RemoveObject, "remove_object", {"object_id": MEGABYTE}),
            (Ask, "ask", {"question": MEGABYTE}),
            (Ask, "ask", {"question": "is it?", "camera": MEGABYTE}),
            (AddObjects, "add_objects", {"camera": MEGABYTE}),
        ],
    )
    def test_a_megabyte_of_text_is_refused_in_few_words(self, graph, node, kind, name, fields, monkeypatch):
        # The fake session takes any id; the real one's book of goals says what is too long, and that in few words.
        from virst_engine.config import GoalParameters
        from virst_engine.slow.goals import GoalBook

        book = GoalBook(GoalParameters(), 8)
        original = node.goals._engine().session.set_goal

        def set_goal(sentence, **ids):
            book.prepare(sentence, **ids)
            return original(sentence, **ids)

        monkeypatch.setattr(node.goals._engine().session, "set_goal", set_goal)
        monkeypatch.setattr(node.goals._engine().session, "clear_goal", book.clear)
        answer = graph.call(kind, f"/segmenter/{name}", kind.Request(**fields))
        assert not answer.success
        assert 0 < len(answer.message) < 400
        assert not graph.call(ListGoals, "/segmenter/list_goals", ListGoals.Request()).goals

    def test_objects_of_one_call_follow_the_parameter(self, graph, engine, node):
        from rclpy.parameter import Parameter

        # The fake engine takes sentences only, and says so as soon as a request is within limits.
        assert "3 objects in one call" in graph.call(AddObjects, "/segmenter/add_objects", boxes(3)).message
        assert node.set_parameters([Parameter("limits.objects_per_request", value=3)])[0].successful
        assert "takes sentences only" in graph.call(AddObjects, "/segmenter/add_objects", boxes(3)).message

    def test_images_and_depth_above_the_limit_are_rejected_and_told(self, graph, engine, node):
        small, large = RgbdCamera(graph), RgbdCamera(graph, width=96, height=64)
        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        wait_until(small.connected)
        stamp_ns = small.send()
        wait_until(lambda: stamp_ns in engine.session.stepped_stamps)
        refused_ns = large.send()

        def told(words):
            return any(
                words in pair.value for message in diagnostics for status in message.status for pair in status.values
            )

        wait_until(lambda: told("the image is 96x64, more than 0.004 million pixels"))
        wait_until(lambda: told("the depth image is 96x64, more than 0.004 million pixels"))
        assert refused_ns not in engine.session.stepped_stamps
