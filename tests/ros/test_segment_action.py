# SPDX-License-Identifier: Apache-2.0
"""The action ~/segment over the real middleware: stages, results, time-outs, cancelling, preemption."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from action_msgs.msg import GoalStatus
from rclpy.parameter import Parameter
from virst_msgs.action import Segment
from virst_msgs.srv import ClearGoal, ListGoals

from tests.ros.rgbd_camera import RgbdCamera, stamp_of
from tests.ros.ros_graph import wait_until
from virst_engine.types import FrameResult, ObjectResult, ObjectState
from virst_ros.segment_action import stage_of
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


class ScriptedSession:
    """Wraps the fake session: what becomes of each goal's object is set by the test."""

    def __init__(self, session):
        self._session = session
        self.state, self.score, self.latency_s, self.message = ObjectState.SEARCHING, 0.0, math.nan, ""

    def __getattr__(self, name):
        return getattr(self._session, name)

    def step(self, frame):
        result = self._session.step(frame)
        is_seen = self.state is ObjectState.TRACKING
        objects = tuple(
            ObjectResult(
                found.object_id,
                found.goal_id,
                found.instance_id,
                self.state,
                found.mask & is_seen,
                self.score if is_seen else 0.0,
                math.inf,
                self.latency_s,
                self.message,
            )
            for found in result.objects
        )
        return FrameResult(result.stamp_ns, result.step, result.camera, objects, result.timings_ms)


class Setup:
    """A camera that films all the time, a node, and a client of its action."""

    def __init__(self, graph, engine):
        self.graph = graph
        self.session = engine.session = ScriptedSession(engine.session)
        self.camera = RgbdCamera(graph)
        self.node = graph.add(SegmenterNode, engine)
        wait_until(lambda: self.node.state == "active")
        wait_until(self.camera.image_publisher.get_subscription_count)
        self._timer = graph.node.create_timer(0.03, self.camera.send)
        self._client = graph.action_client(Segment, "/segmenter/segment")

    def send(self, goal="the block", **fields):
        feedback = []
        future = self._client.send_goal_async(
            Segment.Goal(goal=goal, **fields), feedback_callback=lambda message: feedback.append(message.feedback)
        )
        wait_until(future.done)
        handle = future.result()
        result = handle.get_result_async() if handle.accepted else None
        return SimpleNamespace(handle=handle, feedback=feedback, result=result)

    def outcome(self, sent):
        wait_until(sent.result.done)
        answer = sent.result.result()
        return answer.status, answer.result

    def stages(self, sent):
        stages = [feedback.stage for feedback in sent.feedback]
        return [stage for number, stage in enumerate(stages) if number == 0 or stages[number - 1] != stage]

    def goals(self):
        return self.graph.call(ListGoals, "/segmenter/list_goals", ListGoals.Request()).goals

    def close(self):
        self.graph.node.destroy_timer(self._timer)


@pytest.fixture
def setup(graph, engine):
    made = Setup(graph, engine)
    yield made
    made.close()


def test_the_stages_are_told_and_the_result_has_the_mask(setup):
    sent = setup.send(object_id="mine")
    wait_until(lambda: setup.stages(sent)[-1:] == ["reasoner"])
    setup.session.latency_s, setup.session.message = 0.4, "catching up"
    wait_until(lambda: setup.stages(sent)[-1:] == ["prompted"])
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    status, result = setup.outcome(sent)
    assert status == GoalStatus.STATUS_SUCCEEDED
    assert (result.success, result.message, result.error_code) == (True, "", Segment.Result.NONE)
    stages = setup.stages(sent)
    assert stages[-1] == "tracking"
    assert [stage for stage in ("queued", "reasoner", "prompted", "tracking") if stage in stages] == stages
    elapsed = [feedback.elapsed for feedback in sent.feedback]
    assert elapsed == sorted(elapsed)
    assert sent.feedback[-1].score == pytest.approx(0.8)
    assert (result.object.object_id, result.object.goal) == ("mine", "the block")
    assert result.object.score == pytest.approx(0.8)
    assert stamp_of(result.mask) in setup.camera.sent_ns, "the mask belongs to one frame of the camera"
    assert result.mask.encoding == "mono8"
    mask = np.frombuffer(result.mask.data, np.uint8).reshape(result.mask.height, result.mask.width)
    expected = np.zeros_like(mask)
    expected[setup.camera.block] = 255
    np.testing.assert_array_equal(mask, expected)
    assert [goal.goal_id for goal in setup.goals()] == [result.goal_id], "it is tracked on"


def test_the_goal_ends_with_the_result_when_that_is_wanted(setup):
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    status, result = setup.outcome(setup.send(clear_when_done=True))
    assert status == GoalStatus.STATUS_SUCCEEDED
    assert result.goal_id == ""
    assert not setup.goals()


def test_a_mask_below_min_score_is_not_good_enough(setup):
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.4
    sent = setup.send(min_score=0.5)
    wait_until(lambda: setup.stages(sent)[-1:] == ["tracking"])
    time.sleep(0.2)
    assert not sent.result.done()
    setup.session.score = 0.6
    status, result = setup.outcome(sent)
    assert status == GoalStatus.STATUS_SUCCEEDED
    assert result.object.score == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("state", "score", "error_code", "says"),
    [
        (ObjectState.SEARCHING, 0.0, Segment.Result.TIMEOUT, "no mask within 0.3 s: SEARCHING, so it is"),
        (ObjectState.NOT_FOUND, 0.0, Segment.Result.NOT_FOUND, "no mask within 0.3 s: so it is"),
        (ObjectState.TRACKING, 0.2, Segment.Result.TIMEOUT, "min_score 0.90; the newest has 0.20"),
    ],
)
def test_it_ends_in_time_with_the_reason(setup, state, score, error_code, says):
    setup.session.state, setup.session.score, setup.session.message = state, score, "so it is"
    status, result = setup.outcome(setup.send(timeout=0.3, min_score=0.9))
    assert status == GoalStatus.STATUS_ABORTED
    assert not result.success
    assert result.error_code == error_code
    assert says in result.message
    assert result.object.state == state.value, "as it was last seen"
    assert not result.mask.data
    assert not setup.goals(), "a goal that has failed does not stay"


def test_without_images_the_time_out_says_so(setup):
    setup.graph.node.destroy_timer(setup._timer)
    _, result = setup.outcome(setup.send(timeout=0.2))
    assert result.error_code == Segment.Result.TIMEOUT
    assert "no image was processed" in result.message


def test_the_nodes_own_time_out_counts_when_the_goal_has_none(setup):
    assert setup.node.set_parameters([Parameter("segment_timeout_s", value=0.2)])[0].successful
    _, result = setup.outcome(setup.send())
    assert "no mask within 0.2 s" in result.message


def test_cancelling_ends_the_goal_at_once(setup):
    sent = setup.send()
    wait_until(lambda: setup.stages(sent))
    canceling = sent.handle.cancel_goal_async()
    wait_until(canceling.done)
    assert len(canceling.result().goals_canceling) == 1
    status, result = setup.outcome(sent)
    assert status == GoalStatus.STATUS_CANCELED
    assert result.error_code == Segment.Result.CANCELED
    assert not setup.goals()
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    status, _ = setup.outcome(setup.send())
    assert status == GoalStatus.STATUS_SUCCEEDED, "the next goal is served"


def test_a_newer_goal_takes_the_place_of_the_older(setup):
    first = setup.send("the first")
    wait_until(lambda: setup.stages(first))
    second = setup.send("the second")
    status, result = setup.outcome(first)
    assert status == GoalStatus.STATUS_ABORTED
    assert result.error_code == Segment.Result.PREEMPTED
    assert [goal.goal for goal in setup.goals()] == ["the second"]
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    status, _ = setup.outcome(second)
    assert status == GoalStatus.STATUS_SUCCEEDED


def test_many_goals_at_once_all_end_and_the_last_one_wins(setup):
    futures = [setup._client.send_goal_async(Segment.Goal(goal=f"number {number}")) for number in range(8)]
    wait_until(lambda: all(future.done() for future in futures))
    results = [future.result().get_result_async() for future in futures]
    wait_until(lambda: sum(result.done() for result in results) == 7)
    (last,) = [number for number, result in enumerate(results) if not result.done()]
    assert [goal.goal for goal in setup.goals()] == [f"number {last}"]
    codes = {result.result().result.error_code for result in results if result.done()}
    assert codes == {Segment.Result.PREEMPTED}
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    wait_until(results[last].done)
    assert results[last].result().result.success


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"goal": "  "}, "a goal must be a sentence, got an empty one"),
        ({"camera": "back"}, "this segmenter sees camera 'camera'"),
        ({"timeout": -1.0}, "timeout must be within"),
        ({"timeout": math.nan}, "timeout must be within"),
        ({"min_score": 1.5}, "min_score must be within 0 and 1"),
        ({"min_score": math.nan}, "min_score must be within 0 and 1"),
    ],
)
def test_a_goal_that_cannot_be_is_told(setup, fields, says):
    status, result = setup.outcome(setup.send(**fields))
    assert status == GoalStatus.STATUS_ABORTED
    assert result.error_code == Segment.Result.BAD_GOAL
    assert says in result.message
    assert not setup.goals()


def test_a_goal_that_cannot_be_leaves_the_running_one_alone(setup):
    running = setup.send("the first")
    wait_until(lambda: setup.stages(running))
    for fields in ({"goal": ""}, {"timeout": -1.0}, {"min_score": math.nan}, {"camera": "back"}):
        _, result = setup.outcome(setup.send(**fields))
        assert result.error_code == Segment.Result.BAD_GOAL
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    status, _ = setup.outcome(running)
    assert status == GoalStatus.STATUS_SUCCEEDED


def test_clearing_the_goal_ends_the_action(setup):
    sent = setup.send()
    wait_until(lambda: setup.stages(sent)[-1:] == ["reasoner"])
    setup.graph.call(ClearGoal, "/segmenter/clear_goal", ClearGoal.Request())
    _, result = setup.outcome(sent)
    assert result.error_code == Segment.Result.STOPPED
    assert "was cleared" in result.message


def test_deactivating_ends_the_action_and_further_goals_are_told_why_not(setup):
    sent = setup.send()
    wait_until(lambda: setup.stages(sent)[-1:] == ["reasoner"])
    setup.node.trigger_deactivate()
    _, result = setup.outcome(sent)
    assert result.error_code == Segment.Result.STOPPED
    assert "deactivated" in result.message
    status, result = setup.outcome(setup.send())
    assert (status, result.error_code) == (GoalStatus.STATUS_ABORTED, Segment.Result.STOPPED)
    assert "inactive, not active: `ros2 lifecycle set /segmenter activate` first" in result.message
    setup.node.trigger_activate()
    setup.session.state, setup.session.score = ObjectState.TRACKING, 0.8
    status, _ = setup.outcome(setup.send())
    assert status == GoalStatus.STATUS_SUCCEEDED


def test_stages_follow_what_is_known_of_the_object():
    def found(state, latency_s):
        return ObjectResult("a", "a", 1, state, np.zeros((1, 1), bool), 0.0, math.inf, latency_s)

    assert stage_of(None) == "queued"
    assert stage_of(found(ObjectState.SEARCHING, math.nan)) == "reasoner"
    assert stage_of(found(ObjectState.SEARCHING, 0.2)) == "prompted"
    assert stage_of(found(ObjectState.NOT_FOUND, 0.2)) == "prompted"
    assert stage_of(found(ObjectState.TRACKING, 0.2)) == "tracking"
