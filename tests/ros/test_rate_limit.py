# SPDX-License-Identifier: Apache-2.0
"""Token buckets at known times, and what a caller of the node's services meets who asks too often."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virst_ros.rate_limit import RateLimiter


class Clock:
    now_s = 50.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limiter(clock):
    return RateLimiter(clock)


def test_a_burst_is_taken_at_once_and_then_the_rate(limiter, clock):
    assert [limiter.wait_s("a", 2.0, 3) for _ in range(3)] == [0.0] * 3
    assert limiter.wait_s("a", 2.0, 3) == pytest.approx(0.5)
    clock.now_s += 0.25
    assert limiter.wait_s("a", 2.0, 3) == pytest.approx(0.25), "half of the next one has gathered"
    clock.now_s += 0.25
    assert limiter.wait_s("a", 2.0, 3) == 0.0
    assert limiter.wait_s("a", 2.0, 3) == pytest.approx(0.5)


def test_a_pause_gathers_no_more_than_a_burst(limiter, clock):
    limiter.wait_s("a", 2.0, 3)
    clock.now_s += 3600.0
    taken = [limiter.wait_s("a", 2.0, 3) == 0.0 for _ in range(5)]
    assert taken == [True, True, True, False, False]


def test_names_do_not_take_from_each_other(limiter):
    assert limiter.wait_s("a", 1.0, 1) == 0.0
    assert limiter.wait_s("a", 1.0, 1) > 0
    assert limiter.wait_s("b", 1.0, 1) == 0.0


def test_a_new_limit_counts_from_the_next_request_on(limiter, clock):
    assert limiter.wait_s("a", 1.0, 100) == 0.0
    assert limiter.wait_s("a", 1.0, 1) == 0.0, "what has gathered is cut to the new burst"
    assert limiter.wait_s("a", 1.0, 1) == pytest.approx(1.0)
    assert limiter.wait_s("a", 100.0, 1) == pytest.approx(0.01)


def test_a_clock_that_goes_back_gives_nothing_and_takes_nothing(limiter, clock):
    assert limiter.wait_s("a", 1.0, 1) == 0.0
    clock.now_s -= 10.0
    assert limiter.wait_s("a", 1.0, 1) == pytest.approx(1.0)


@pytest.mark.parametrize(("per_s", "burst"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_limits_that_would_never_take_anything_are_our_own_mistake(limiter, per_s, burst):
    with pytest.raises(ValueError, match="a rate limit needs"):
        limiter.wait_s("a", per_s, burst)


@given(
    gaps_s=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60),
    per_s=st.floats(0.1, 50.0),
    burst=st.integers(1, 20),
)
def test_however_it_is_asked_no_more_is_taken_than_burst_and_rate_allow(gaps_s, per_s, burst):
    clock = Clock()
    limiter = RateLimiter(clock)
    begin_s, taken = clock.now_s, 0
    for gap_s in gaps_s:
        clock.now_s += gap_s
        wait_s = limiter.wait_s("a", per_s, burst)
        taken += wait_s == 0.0
        assert 0.0 <= wait_s <= 1.0 / per_s + 1e-6
        assert taken <= burst + (clock.now_s - begin_s) * per_s + 1e-6


def test_threads_share_a_bucket(clock):
    limiter, taken = RateLimiter(clock), []

    def ask():
        for _ in range(200):
            taken.append(limiter.wait_s("a", 1.0, 50) == 0.0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 50


@pytest.mark.ros
class TestOnTheNode:
    """Over the real middleware."""

    @pytest.fixture
    def node(self, graph, engine):
        from tests.ros.ros_graph import wait_until
        from virst_ros.segmenter_node import SegmenterNode

        node = graph.add(SegmenterNode, engine, diagnostics_period_s=0.05, limits__requests_per_s=0.1, limits__burst=3)
        wait_until(lambda: node.state == "active")
        return node

    def set_goal(self, graph, **fields):
        from virst_msgs.srv import SetGoal

        return graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(**fields))

    def test_a_service_that_is_asked_too_often_says_when_to_try_again(self, graph, node, engine):
        from std_srvs.srv import Trigger

        assert all(self.set_goal(graph, goal=f"goal {n}").success for n in range(3))
        answer = self.set_goal(graph, goal="one more")
        assert not answer.success
        assert "nothing was done: set_goal is asked more than 0.1 times per second: try again in " in answer.message
        assert "limits.requests_per_s" in answer.message
        assert len(engine.session.goals()) == 3
        assert graph.call(Trigger, "/segmenter/reset", Trigger.Request()).success, "each service has its own share"

    def test_refusals_are_counted_in_diagnostics_and_told_in_the_log_once(self, graph, node):
        from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus

        from tests.ros.ros_graph import wait_until

        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        logged = graph.collect_log(node)
        for _ in range(8):
            self.set_goal(graph, goal="the block")

        def told():
            goals = [each for each in diagnostics[-1].status if each.name == "segmenter: goals"] if diagnostics else []
            return any(
                status.level == DiagnosticStatus.WARN
                and {pair.key: pair.value for pair in status.values}["requests refused by limits"] == "5"
                and "5 requests refused; last: set_goal is asked more" in status.message
                for status in goals
            )

        wait_until(told)
        wait_until(lambda: any("is asked more than" in line.msg for line in logged))
        assert sum("is asked more than" in line.msg for line in logged) == 1

    def test_a_list_is_answered_however_often_it_is_asked_for_and_its_goals_are_right(self, graph, node, monkeypatch):
        from virst_msgs.srv import ListGoals

        made = []
        messages = node.goals.messages
        monkeypatch.setattr(node.goals, "messages", lambda: made.append(1) or messages())

        def listed():
            return [goal.goal for goal in graph.call(ListGoals, "/segmenter/list_goals", ListGoals.Request()).goals]

        assert self.set_goal(graph, goal="one").success
        assert [listed() for _ in range(40)] == [["one"]] * 40
        assert len(made) <= 31 + 1 * 40, "ten times the burst are made anew, and what the rate allows meanwhile"
        before = len(made)
        assert [listed() for _ in range(5)] == [["one"]] * 5
        assert len(made) - before <= 5
        assert self.set_goal(graph, goal="two").success
        assert listed() == ["one", "two"]

    def test_the_action_has_its_share_too(self, graph, node):
        from virst_msgs.action import Segment

        from tests.ros.ros_graph import wait_until

        client = graph.action_client(Segment, "/segmenter/segment")
        accepted = []
        for _ in range(4):
            sent = client.send_goal_async(Segment.Goal(goal="the block"))
            wait_until(sent.done)
            accepted.append(sent.result().accepted)
        assert accepted == [True, True, True, False]

    def test_the_limit_may_change_while_the_node_runs(self, graph, node):
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        while self.set_goal(graph, goal="the block").success:
            pass
        change = Parameter("limits.requests_per_s", value=10_000.0).to_parameter_msg()
        request = SetParameters.Request(parameters=[change])
        assert graph.call(SetParameters, "/segmenter/set_parameters", request).results[0].successful
        assert self.set_goal(graph, goal="the block").success
