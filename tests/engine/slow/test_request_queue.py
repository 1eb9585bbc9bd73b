# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.engine.slow.messages import request_of
from virst_engine.slow.request_queue import RequestQueue, Waiting

# The type checker picks entries of collections at random.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def waiting_of(client: bytes, goal_id: str = "goal", request_id: int = 1, side: int = 4) -> Waiting:
    return Waiting(client, request_of("the red ball", request_id, goal_id, side=side), 0.0)


def order(queue: RequestQueue) -> list[tuple[bytes, str]]:
    taken = []
    while (waiting := queue.take()) is not None:
        taken.append((waiting.client, waiting.request.goal_id))
    return taken


def test_clients_take_turns_and_so_do_their_goals() -> None:
    queue = RequestQueue()
    for client, goal_id in [(b"a", "1"), (b"a", "2"), (b"a", "3"), (b"b", "1"), (b"b", "2"), (b"c", "1")]:
        assert queue.put(waiting_of(client, goal_id)) == []
    assert order(queue) == [(b"a", "1"), (b"b", "1"), (b"c", "1"), (b"a", "2"), (b"b", "2"), (b"a", "3")]
    assert len(queue) == 0


def test_the_newest_request_of_a_goal_has_the_place_of_the_one_before() -> None:
    queue = RequestQueue()
    for goal_id, request_id in [("1", 1), ("2", 2), ("1", 3)]:
        queue.put(waiting_of(b"a", goal_id, request_id))
    assert len(queue) == 2
    assert [waiting.request.request_id for waiting in queue] == [3, 2]


def test_what_nobody_wants_stays_and_its_client_keeps_its_turn() -> None:
    queue = RequestQueue()
    for client in (b"a", b"b"):
        queue.put(waiting_of(client))
    assert queue.take(lambda waiting: waiting.client == b"c") is None
    taken = queue.take(lambda waiting: waiting.client == b"b")
    assert taken is not None
    assert taken.client == b"b"
    assert order(queue) == [(b"a", "goal")]


def test_one_that_is_put_back_is_next_unless_a_newer_one_waits() -> None:
    queue = RequestQueue()
    for client, goal_id in [(b"a", "1"), (b"b", "1"), (b"b", "2")]:
        queue.put(waiting_of(client, goal_id))
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    queue.put_back(second)
    assert order(queue) == [(b"b", "1"), (b"b", "2")]

    newer = waiting_of(b"a", "1", request_id=2)
    queue.put(newer)
    queue.put_back(first)
    assert list(queue) == [newer]


def test_cancelling_is_about_one_goal_or_one_client() -> None:
    queue = RequestQueue()
    for client, goal_id in [(b"a", "1"), (b"a", "2"), (b"b", "1"), (b"b", "2")]:
        queue.put(waiting_of(client, goal_id))
    queue.cancel(b"a", "1")
    queue.cancel(b"b")
    queue.cancel(b"unknown")
    queue.cancel(b"a", "unknown")
    assert order(queue) == [(b"a", "2")]


def test_whoever_fills_the_queue_gives_way_and_not_who_comes_with_little() -> None:
    queue = RequestQueue(max_waiting=4)
    for number in range(4):
        assert queue.put(waiting_of(b"greedy", str(number))) == []
    newcomer = waiting_of(b"modest")
    assert [waiting.request.goal_id for waiting in queue.put(newcomer)] == ["3"]
    extra = waiting_of(b"greedy", "more")
    assert queue.put(extra) == [extra]
    assert newcomer in list(queue)


def test_bytes_are_bounded_as_well() -> None:
    small = waiting_of(b"modest", side=4)
    queue = RequestQueue(max_bytes=4 * small.nbytes)
    large = [waiting_of(b"greedy", goal_id, side=6) for goal_id in "abc"]  # 2.25 times as large each
    assert queue.put(large[0]) == []
    assert queue.put(small) == []
    assert queue.put(large[1]) == [large[1]]
    assert list(queue) == [large[0], small]
    too_large = waiting_of(b"huge", side=20)
    assert queue.put(too_large) == [too_large]


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done to it, the bounds hold, the counts are right, and no two requests of a goal wait."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(max_waiting=6, max_bytes=6000)
        self.taken: list[Waiting] = []
        self.number = 0

    @rule(client=st.sampled_from([b"a", b"b", b"c"]), goal=st.sampled_from("123"), side=st.integers(1, 12))
    def put(self, client: bytes, goal: str, side: int) -> None:
        self.number += 1
        new = waiting_of(client, goal, self.number, side)
        given_way = self.queue.put(new)
        assert (self.queue.get(client, goal) is new) == (new not in given_way)

    @rule()
    def take(self) -> None:
        waiting = self.queue.take()
        if waiting is not None:
            self.taken.append(waiting)

    @rule()
    def put_back(self) -> None:
        if self.taken:
            self.queue.put_back(self.taken.pop())

    @rule(client=st.sampled_from([b"a", b"b", b"c"]), goal=st.sampled_from(["", "1", "2"]))
    def cancel(self, client: bytes, goal: str) -> None:
        self.queue.cancel(client, goal)
        assert not [w for w in self.queue if w.client == client and goal in ("", w.request.goal_id)]

    @invariant()
    def counts_are_right(self) -> None:
        waiting = list(self.queue)
        assert len(self.queue) == len(waiting) == len({(w.client, w.request.goal_id) for w in waiting})
        assert self.queue._nbytes == sum(w.nbytes for w in waiting)
        assert all(goals for goals in self.queue._by_client.values())


AnyOrder.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
