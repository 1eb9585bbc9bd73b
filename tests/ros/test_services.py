# SPDX-License-Identifier: Apache-2.0
"""enable, reset, ask, add_objects and remove_object over the real middleware. Goals are tested with the node."""

import itertools
import threading
import time
from array import array
from concurrent.futures import Future

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image
from std_srvs.srv import SetBool, Trigger
from virst_msgs.msg import BoundingBox2D, Point2D
from virst_msgs.srv import AddObjects, Ask, ListGoals, RemoveObject, SetGoal

from tests.fakes import FakeStages, Video, moving_square, small_config
from tests.ros.rgbd_camera import RgbdCamera
from tests.ros.ros_graph import wait_until, words
from virst_engine import ObjectState, Session
from virst_engine.errors import BadGoal, BadPrompt, Unanswered
from virst_engine.slow.reasoner import NoReasoner
from virst_ros.loading import add_prompted
from virst_ros.prompts import MOST_POINTS, PromptedObject, prompted_objects
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


@pytest.fixture
def camera(graph):
    return RgbdCamera(graph)


@pytest.fixture
def node(graph, engine, camera):
    node = graph.add(SegmenterNode, engine, diagnostics_period_s=0.05)
    wait_until(lambda: node.state == "active")
    wait_until(camera.image_publisher.get_subscription_count)
    return node


def call(graph, kind, name, **fields):
    return graph.call(kind, f"/segmenter/{name}", kind.Request(**fields))


def with_words(node, engine, ask):
    """Load an engine that answers questions so."""
    engine.ask = ask
    node.trigger_deactivate()
    node.trigger_cleanup()
    node.trigger_configure()
    node.trigger_activate()


def asked(graph, question):
    """The future of the response."""
    client = graph.node.create_client(Ask, "/segmenter/ask")
    assert client.wait_for_service(20.0)
    return client.call_async(Ask.Request(question=question))


def from_elsewhere(call, argument):
    """On a thread of its own, as answers come."""
    thread = threading.Thread(target=call, args=(argument,))
    thread.start()
    thread.join()


def box(x, y, wide, high, theta=0.0):
    made = BoundingBox2D(size_x=float(wide), size_y=float(high))
    made.center.position.x, made.center.position.y, made.center.theta = float(x), float(y), theta
    return made


class TestEnable:
    def test_disabled_takes_no_images_and_enabled_goes_on_with_its_goals(self, graph, node, camera, engine):
        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        assert call(graph, SetGoal, "set_goal", goal="the block").success
        answer = call(graph, SetBool, "enable", data=False)
        assert answer.success
        assert "not taken any more" in answer.message
        wait_until(lambda: camera.image_publisher.get_subscription_count() == 0)
        stepped = len(engine.session.stepped_stamps)
        camera.send()
        time.sleep(0.2)
        assert len(engine.session.stepped_stamps) == stepped

        def told():
            status = next(each for each in diagnostics[-1].status if each.name == "segmenter: input")
            return status.level == DiagnosticStatus.STALE and "paused by ~/enable" in status.message

        wait_until(told)
        assert len(call(graph, ListGoals, "list_goals").goals) == 1
        resets = engine.session.resets
        assert call(graph, SetBool, "enable", data=True).success
        assert engine.session.resets == resets + 1, "what was seen before the pause does not belong to what comes"
        wait_until(camera.image_publisher.get_subscription_count)
        stamp_ns = camera.send()
        wait_until(lambda: stamp_ns in engine.session.stepped_stamps)

    def test_asking_twice_changes_nothing(self, graph, node, engine):
        resets = engine.session.resets
        answer = call(graph, SetBool, "enable", data=True)
        assert (answer.success, answer.message) == (True, "images are taken already")
        assert engine.session.resets == resets

    def test_images_are_taken_after_a_new_activation(self, graph, node, camera):
        assert call(graph, SetBool, "enable", data=False).success
        node.trigger_deactivate()
        node.trigger_activate()
        wait_until(camera.image_publisher.get_subscription_count)


def test_reset_forgets_what_was_seen_and_keeps_goals(graph, node, engine):
    assert call(graph, SetGoal, "set_goal", goal="the block").success
    resets = engine.session.resets
    assert call(graph, Trigger, "reset").success
    assert engine.session.resets == resets + 1
    assert len(call(graph, ListGoals, "list_goals").goals) == 1


class TestAsk:
    def test_a_method_without_words_says_so(self, graph, node):
        answer = call(graph, Ask, "ask", question="is the drawer open?")
        assert not answer.success
        assert not answer.answer
        assert "the model fake answers with masks, not with words" in answer.message

    def test_a_method_with_words_answers(self, graph, node, engine):
        with_words(node, engine, lambda question, camera: words(f"you asked: {question}"))
        answer = call(graph, Ask, "ask", question="is it?")
        assert (answer.success, answer.message, answer.answer) == (True, "", "you asked: is it?")

    def test_while_a_question_is_open_other_requests_are_served(self, graph, node, engine):
        answers = [Future(), Future()]
        of_question = {"first": answers[0], "second": answers[1]}
        with_words(node, engine, lambda question, camera: of_question[question])
        first, second = asked(graph, "first"), asked(graph, "second")
        assert call(graph, SetGoal, "set_goal", goal="the block").success
        assert len(call(graph, ListGoals, "list_goals").goals) == 1
        assert not first.done()
        assert not second.done()
        from_elsewhere(answers[1].set_result, "two")
        wait_until(second.done)
        assert (second.result().success, second.result().answer) == (True, "two")
        assert not first.done()
        from_elsewhere(answers[0].set_exception, Unanswered("the model has no word for it"))
        wait_until(first.done)
        assert (first.result().success, first.result().message) == (False, "the model has no word for it")

    def test_a_question_that_no_image_takes_up_is_answered_with_why(self, graph, node, engine):
        answers = []
        with_words(node, engine, lambda question, camera: answers.append(Future()) or answers[-1])
        assert node.set_parameters([Parameter("reasoner.ttl_s", value=0.2)])[0].successful
        begin_s = time.monotonic()
        answer = call(graph, Ask, "ask", question="is it?")
        assert 1.2 <= time.monotonic() - begin_s < 10.0
        assert not answer.success
        assert "no image was processed since; see /diagnostics" in answer.message
        assert answers[0].cancelled()
        answers.clear()
        waiting = asked(graph, "and now?")
        wait_until(lambda: answers)
        answers[0].set_running_or_notify_cancel()  # a frame has taken it up, and nothing came of it
        wait_until(waiting.done)
        assert waiting.result().message == "no answer within 1.2 s; see /diagnostics"

    def test_deactivating_ends_a_question(self, graph, node, engine):
        answer = Future()
        with_words(node, engine, lambda question, camera: answer)
        waiting = asked(graph, "is it?")
        wait_until(lambda: node._requests._questions._open)
        node.trigger_deactivate()
        wait_until(waiting.done)
        assert (waiting.result().success, waiting.result().message) == (False, "the segmenter was deactivated")
        assert answer.cancelled()

    @pytest.mark.parametrize(
        ("question", "says"),
        [("xyzzy", "does not know 'xyzzy'"), (" ", "got an empty one"), ("x" * 301, "300 characters, got 301")],
    )
    def test_what_cannot_be_read_is_refused_at_once(self, graph, node, engine, question, says):
        with_words(node, engine, lambda question, camera: words("never"))
        answer = call(graph, Ask, "ask", question=question)
        assert (answer.success, answer.answer) == (False, "")
        assert says in answer.message

    def test_what_an_engine_raises_is_the_answer(self, graph, node, engine):
        def ask(question, camera):
            raise Unanswered("4 questions are open already")

        with_words(node, engine, ask)
        assert call(graph, Ask, "ask", question="is it?").message == "4 questions are open already"

    def test_a_question_about_another_camera_is_refused(self, graph, node):
        assert "this segmenter sees camera 'camera'" in call(graph, Ask, "ask", question="?", camera="back").message


class TestObjects:
    def test_an_engine_without_prompts_says_so(self, graph, node):
        answer = call(graph, AddObjects, "add_objects", bbox_object_ids=["a"], bbox_coords=[box(5, 5, 2, 2)])
        assert not answer.success
        assert "takes sentences only" in answer.message

    def test_boxes_points_and_masks_reach_the_engine(self, graph, engine, camera):
        got = []
        numbers = itertools.count(1)

        def add(prompted, stamp_ns, camera):
            got.append((prompted, stamp_ns))
            engine.session.set_goal("-", object_id=prompted.object_id)
            return engine.session.goals()[next(numbers) - 1]

        engine.add_object = add
        node = graph.add(SegmenterNode, engine)
        wait_until(lambda: node.state == "active")
        mask = Image(height=2, width=3, encoding="mono8", step=3, data=array("B", [0, 0, 255, 0, 1, 0]))
        request = AddObjects.Request(
            bbox_object_ids=["cup"],
            bbox_coords=[box(10, 20, 4, 6)],
            point_object_ids=["can", "cup"],
            point_coords=[Point2D(x=1.0, y=2.0), Point2D(x=11.0, y=21.0)],
            point_labels=[1, 0],
            mask_object_ids=["plate"],
            masks=[mask],
        )
        request.request_header.stamp.sec, request.request_header.stamp.nanosec = 5, 7
        answer = graph.call(AddObjects, "/segmenter/add_objects", request)
        assert answer.success, answer.message
        assert list(answer.object_ids) == ["cup", "can", "plate"]
        assert list(answer.object_indices) == [1, 2, 3]
        assert {stamp_ns for _, stamp_ns in got} == {5_000_000_007}
        cup, can, plate = (prompted for prompted, _ in got)
        assert (cup.box_px, cup.points_px, cup.labels) == ((8.0, 17.0, 12.0, 23.0), [(11.0, 21.0)], [0])
        assert (can.box_px, can.points_px, can.labels) == (None, [(1.0, 2.0)], [1])
        np.testing.assert_array_equal(plate.mask, [[False, False, True], [False, True, False]])

    def test_a_box_is_tracked_by_the_engine_and_can_be_given_again(self):
        """The real session on the fake network: pointed at, tracked, corrected under the same name, removed."""
        video, session = Video([moving_square()], scale=(2, 2)), Session(small_config(), FakeStages(), NoReasoner())
        session.step(video.frame(0))
        cup = PromptedObject("cup", box_px=(4.0, 8.0, 20.0, 24.0))
        goal = add_prompted(session, cup, 0)
        (found,) = session.step(video.frame(1)).objects
        assert (found.object_id, found.state) == ("cup", ObjectState.TRACKING)
        again = add_prompted(
            session, PromptedObject("cup", points_px=[(16.0, 16.0)], labels=[1]), video.frame(1).stamp_ns
        )
        assert again == goal
        assert [g.object_id for g in session.goals()] == ["cup"]
        with pytest.raises(BadPrompt, match="is not cached"):
            add_prompted(session, cup, 5)
        with pytest.raises(BadPrompt, match="outside the image"):
            add_prompted(session, PromptedObject("can", points_px=[(200.0, 2.0)], labels=[1]), 0)

    def test_when_one_object_cannot_be_added_none_is(self, graph, engine):
        def add(prompted, stamp_ns, camera):
            if prompted.object_id == "bad":
                raise BadGoal("the frame is gone")
            return engine.session.set_goal("-", object_id=prompted.object_id)

        engine.add_object = add
        node = graph.add(SegmenterNode, engine)
        wait_until(lambda: node.state == "active")
        assert call(graph, SetGoal, "set_goal", goal="one", object_id="before").success
        boxes = {"bbox_object_ids": ["good", "bad"], "bbox_coords": [box(5, 5, 2, 2)] * 2}
        answer = call(graph, AddObjects, "add_objects", **boxes)
        assert not answer.success
        assert answer.message == "the frame is gone"
        assert not answer.object_ids
        assert [goal.object_ids[0] for goal in call(graph, ListGoals, "list_goals").goals] == ["before"]

    def test_one_object_is_removed_whatever_made_it(self, graph, node):
        assert call(graph, SetGoal, "set_goal", goal="one", object_id="a").success
        second = call(graph, SetGoal, "set_goal", goal="two", object_id="b")
        answer = call(graph, RemoveObject, "remove_object", object_id="a")
        assert answer.success
        assert list(answer.object_ids) == ["b"]
        assert list(answer.object_indices) == [2]
        assert [goal.goal_id for goal in call(graph, ListGoals, "list_goals").goals] == [second.goal_id]

    def test_an_unknown_object_is_told(self, graph, node):
        answer = call(graph, RemoveObject, "remove_object", object_id="nobody")
        assert not answer.success
        assert "no object 'nobody' is tracked" in answer.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "nothing was pointed at"),
        ({"bbox_object_ids": ["a"]}, "bbox_object_ids and bbox_coords must have the same length, got 1 and 0"),
        ({"point_object_ids": ["a"], "point_coords": [Point2D()], "point_labels": [1, 1]}, "point_labels must have"),
        ({"mask_object_ids": ["a"]}, "mask_object_ids and masks"),
        ({"bbox_object_ids": [" "], "bbox_coords": [box(1, 1, 1, 1)]}, "an object id is empty"),
        ({"bbox_object_ids": ["a"], "bbox_coords": [box(1, 1, 0, 1)]}, "size above 0"),
        ({"bbox_object_ids": ["a"], "bbox_coords": [box(float("nan"), 1, 1, 1)]}, "size above 0"),
        ({"bbox_object_ids": ["a"], "bbox_coords": [box(1, 1, 1, 1, theta=0.1)]}, "theta must be 0"),
        ({"bbox_object_ids": ["a", "a"], "bbox_coords": [box(1, 1, 1, 1)] * 2}, "two boxes"),
        ({"point_object_ids": ["a"], "point_coords": [Point2D()], "point_labels": [2]}, "label 2"),
        ({"point_object_ids": ["a"], "point_coords": [Point2D(x=float("inf"))]}, "give pixels"),
        ({"mask_object_ids": ["a"], "masks": [Image(encoding="rgb8")]}, "only mono8"),
        (
            {"point_object_ids": ["a"] * (MOST_POINTS + 1), "point_coords": [Point2D()] * (MOST_POINTS + 1)},
            f"at most {MOST_POINTS}",
        ),
        ({"bbox_object_ids": ["x" * 128], "bbox_coords": [box(1, 1, 0, 1)]}, "size above 0"),
        ({"bbox_object_ids": ["x" * 10_000], "bbox_coords": [box(1, 1, 1, 1)]}, "has 10000 characters, at most 128"),
    ],
)
def test_what_points_at_nothing_is_named(fields, says):
    with pytest.raises(BadGoal) as told:
        prompted_objects(AddObjects.Request(**fields))
    assert says in str(told.value)
    assert len(str(told.value)) < 300


def test_points_without_labels_are_all_on_the_object():
    request = AddObjects.Request(point_object_ids=["a", "a"], point_coords=[Point2D(x=1.0), Point2D(y=2.0)])
    stamp_ns, (prompted,) = prompted_objects(request)
    assert stamp_ns == 0
    assert (prompted.points_px, prompted.labels) == ([(1.0, 0.0), (0.0, 2.0)], [1, 1])


@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        (SetBool, "enable", {"data": False}),
        (Trigger, "reset", {}),
        (Ask, "ask", {"question": "?"}),
        (AddObjects, "add_objects", {}),
        (RemoveObject, "remove_object", {"object_id": "a"}),
    ],
)
def test_every_service_is_refused_when_the_node_is_not_active(graph, engine, kind, name, fields):
    graph.add(SegmenterNode, engine, autostart=False)
    answer = call(graph, kind, name, **fields)
    assert not answer.success
    assert "the segmenter is unconfigured, not active" in answer.message
