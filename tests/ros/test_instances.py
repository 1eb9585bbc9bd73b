# SPDX-License-Identifier: Apache-2.0
"""A goal that is split, over the real middleware: the real session on a fake network that knows places."""

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from virst_msgs.action import Segment
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray
from virst_msgs.srv import ClearGoal, ListGoals, RemoveObject, SetGoal

from tests.engine.local_stages import LocalStages, red_square
from tests.fakes import InstantClient, Video, small_config
from tests.ros.ros_graph import wait_until
from virst_engine import Session
from virst_ros import conversions, object_masks
from virst_ros.object_masks import topic_part
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros

VIDEO = Video([red_square(3, 2), red_square(9, 11)], scale=(2, 2))
LATCHED = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Setup:
    """A node with a real session, and a camera that sends a frame when told to and waits for its result."""

    def __init__(self, graph, engine, **parameters):
        self.graph, self._t = graph, 0
        engine.session = Session(small_config(max_objects=5, instance_steps=3), LocalStages(), InstantClient())
        engine.session.closed = False  # what the fake engine asks its sessions
        self.node = graph.add(SegmenterNode, engine, **parameters)
        wait_until(lambda: self.node.state == "active")
        self._images = graph.publisher(Image, "image", qos_profile_sensor_data)
        self.results = graph.collect(SegmentedObjectArray, "/segmenter/objects", LATCHED)
        self.masks = graph.collect(Image, "/segmenter/mask")
        self.targets = graph.collect(Image, "/segmenter/target_mask")
        outputs = self.node.cameras[0].outputs
        wait_until(lambda: self._images.get_subscription_count() and outputs.mask.wanted and outputs.target_mask.wanted)

    def send(self, frames=1):
        """The objects of the last of so many frames."""
        for _ in range(frames):
            frame = VIDEO.frame(self._t)
            self._t += 1
            header = Header(stamp=conversions.time_message(frame.stamp_ns), frame_id="camera")
            self._images.publish(conversions.image_message(header, frame.image_rgb_u8, "rgb8"))
            for messages in (self.results, self.masks, self.targets):
                wait_until(lambda messages=messages, header=header: self._newest(messages, header))
        return {found.object_id: found for found in self.results[-1].objects}

    @staticmethod
    def _newest(messages, header):
        return bool(messages) and messages[-1].header.stamp == header.stamp

    def call(self, kind, name, **fields):
        answer = self.graph.call(kind, f"/segmenter/{name}", kind.Request(**fields))
        assert getattr(answer, "success", True), answer.message
        return answer


def pixels(image):
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width)


def is_of(mask, *numbers):
    """Whether a mask is that of these squares: their edges are those of a coarse mask, enlarged."""
    expected = np.logical_or.reduce([truth(number) for number in numbers])
    return (mask & expected).sum() > 0.9 * (mask | expected).sum()


def inside(number):
    """Where a square is, without its edge."""
    return truth(number) & np.roll(truth(number), 2, (0, 1)) & np.roll(truth(number), -2, (0, 1))


def truth(number):
    small = VIDEO.truth(0, number)
    return np.kron(small, np.ones((2, 2), bool))


def test_instances_reach_every_output_and_go_one_by_one_or_with_their_goal(graph, engine):
    setup = Setup(graph, engine)
    answer = setup.call(SetGoal, "set_goal", goal="the red squares", object_id="reds", max_instances=4)
    assert list(answer.object_ids) == ["reds"]
    found = setup.send(10)
    assert list(found) == ["reds", "reds.1", "reds.2"]
    assert [each.part_of for each in found.values()] == ["", "reds", "reds"]
    assert {each.goal for each in found.values()} == {"the red squares"}
    values = {name: each.instance_id for name, each in found.items()}
    mask = pixels(setup.masks[-1])
    assert is_of(mask == values["reds.1"], 0)
    assert is_of(mask == values["reds.2"], 1)
    assert is_of(pixels(setup.targets[-1]) == 255, 0, 1)
    assert found["reds"].area_px == pytest.approx(found["reds.1"].area_px + found["reds.2"].area_px, rel=0.05)

    (goal,) = setup.call(ListGoals, "list_goals").goals
    assert list(goal.object_ids) == ["reds", "reds.1", "reds.2"]
    assert list(goal.instance_ids) == list(values.values())
    assert list(goal.states) == [SegmentedObject.TRACKING] * 3

    left = setup.call(RemoveObject, "remove_object", object_id="reds.1")
    assert list(left.object_ids) == ["reds", "reds.2"]
    assert list(left.object_indices) == [values["reds"], values["reds.2"]]
    assert list(setup.send(8)) == ["reds", "reds.2"]
    assert set(pixels(setup.masks[-1])[inside(0)].tolist()) == {values["reds"]}
    (goal,) = setup.call(ListGoals, "list_goals").goals
    assert list(goal.object_ids) == ["reds", "reds.2"]
    setup.call(ClearGoal, "clear_goal")
    assert setup.send() == {}
    assert not pixels(setup.masks[-1]).any()


def test_a_topic_of_its_own_comes_and_goes_with_each_object(graph, engine):
    setup = Setup(graph, engine, object_masks=True)
    names = ("reds", "reds_1", "reds_2")
    setup.call(SetGoal, "set_goal", goal="red", object_id="reds", max_instances=4)
    masks = {name: graph.collect(Image, f"/segmenter/objects/{name}/mask") for name in names}
    setup.send(6)
    for name in names:
        wait_until(lambda name=name: graph.node.count_publishers(f"/segmenter/objects/{name}/mask") == 1)
    expected = {"reds": (0, 1), "reds_1": (0,), "reds_2": (1,)}

    def all_came():
        setup.send()
        return all(masks.values())

    wait_until(all_came)
    for name, numbers in expected.items():
        assert masks[name][-1].encoding == "mono8"
        assert set(np.unique(pixels(masks[name][-1]))) == {0, 255}
        assert is_of(pixels(masks[name][-1]) > 0, *numbers)
    setup.call(RemoveObject, "remove_object", object_id="reds.2")
    setup.send(2)
    wait_until(lambda: graph.node.count_publishers("/segmenter/objects/reds_2/mask") == 0)
    assert graph.node.count_publishers("/segmenter/objects/reds_1/mask") == 1
    setup.node.trigger_deactivate()
    setup.node.trigger_cleanup()
    wait_until(lambda: graph.node.count_publishers("/segmenter/objects/reds/mask") == 0)


def test_topics_of_objects_are_limited_and_the_log_tells_their_names(graph, engine, monkeypatch):
    monkeypatch.setattr(object_masks, "MOST_TOPICS", 2)
    setup = Setup(graph, engine, object_masks=True)
    logged = graph.collect_log(setup.node)
    setup.call(SetGoal, "set_goal", goal="red", object_id="the reds", max_instances=4)
    assert len(setup.send(8)) == 3
    wait_until(lambda: any("the reds" in line.msg and "/objects/the_reds/mask" in line.msg for line in logged))
    wait_until(lambda: any("2 objects have a topic of their own already" in line.msg for line in logged))
    topics = [name for name, _ in setup.node.get_topic_names_and_types()]
    assert len([name for name in topics if name.startswith("/segmenter/objects/")]) == 2
    setup.send(3)
    assert sum("topic of their own" in line.msg for line in logged) == 1


def test_without_the_parameter_there_are_no_topics_of_objects(graph, engine):
    setup = Setup(graph, engine)
    setup.call(SetGoal, "set_goal", goal="red", object_id="reds", max_instances=4)
    setup.send(6)
    topics = [name for name, _ in setup.node.get_topic_names_and_types()]
    assert not [name for name in topics if name.startswith("/segmenter/objects/")]


def test_the_action_splits_its_goal_and_returns_the_union(graph, engine):
    setup = Setup(graph, engine)
    client = graph.action_client(Segment, "/segmenter/segment")
    sent = client.send_goal_async(Segment.Goal(goal="red", object_id="reds", max_instances=3))
    wait_until(sent.done)
    done = sent.result().get_result_async()

    def through():
        setup.send()
        return done.done()

    wait_until(through)
    result = done.result().result
    assert result.success, result.message
    assert (result.object.object_id, result.object.part_of) == ("reds", "")
    assert is_of(pixels(result.mask) == 255, 0, 1)
    assert list(setup.send(6)) == ["reds", "reds.1", "reds.2"]


@pytest.mark.parametrize(
    ("object_id", "name"),
    [
        ("balls.1", "balls_1"),
        ("the red ball!", "the_red_ball"),
        ("7up", "object_7up"),
        ("球", "object"),
        ("a__b//c", "a_b_c"),
        ("x" * 200, "x" * 64),
    ],
)
def test_names_of_topics_hold_letters_and_digits(object_id, name):
    assert topic_part(object_id) == name


def test_two_ids_that_give_one_name_get_two():
    assert topic_part("a b", ["a_b", "a_b_2"]) == "a_b_3"
