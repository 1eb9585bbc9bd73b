# SPDX-License-Identifier: Apache-2.0
"""Who answers which request, on a clock that the test moves: no sockets, no waiting."""

from dataclasses import replace

import pytest

from tests.engine.slow.messages import answer_to, request_of
from virst_engine.errors import WireError
from virst_engine.slow import pool as rules
from virst_engine.slow import wire
from virst_engine.slow.pool import BEAT_S, FIRST_PATIENCE_S, GONE_S, LEAST_PATIENCE_S, REFUSED_S, SILENT_S, Pool
from virst_engine.types import ReasonerAnswer, ReasonerRequest

PROMISE_S = 2.0  # by then the request of a dead or hung reasoner is with another one
ROBOT = b"robot"


class Fleet:
    """A pool with robots and reasoners around it, and the time."""

    def __init__(self) -> None:
        self.pool = Pool("the pool", first_ticket=1000)
        self.now_s = 50.0
        self.beating: dict[bytes, str] = {}  # reasoners that send heartbeats, and their models
        self.greeting: dict[bytes, str] = {}
        self.at: dict[bytes, list[ReasonerRequest]] = {}  # requests by the reasoner that got them, not answered yet
        self.answers: dict[bytes, list[ReasonerAnswer]] = {}
        self.heartbeats: dict[bytes, wire.Heartbeat] = {}
        self.refusals: list[str] = []

    def deliver(self) -> None:
        while self.pool.letters:
            letter = self.pool.letters.popleft()
            wire.encode(letter.message)  # raises for what could not be sent
            match letter.message:
                case ReasonerRequest():
                    assert letter.to_member
                    self.at.setdefault(letter.peer, []).append(letter.message)
                case ReasonerAnswer():
                    assert not letter.to_member
                    self.answers.setdefault(letter.peer, []).append(letter.message)
                case wire.Heartbeat():
                    self.heartbeats[letter.peer] = letter.message
                case wire.Refusal():
                    self.refusals.append(letter.message.error)
                case other:
                    assert other == wire.Hello()
                    assert letter.to_member

    def join(self, *names: bytes, model: str = "m") -> None:
        for name in names:
            self.beating[name] = model
            self.beat(name)

    def beat(self, name: bytes) -> None:
        busy_s = 0.5 if self.at.get(name) else 0.0
        self.pool.reasoner_says(name, wire.Heartbeat(self.beating[name], busy_s, 0, name.decode()), self.now_s)
        self.deliver()

    def greet(self, *robots: bytes, model: str = "m") -> None:
        for robot in robots:
            self.greeting[robot] = model
            self.pool.robot_says(robot, wire.Hello(model), self.now_s)
        self.deliver()

    def ask(self, request_id: int = 1, goal_id: str = "goal", robot: bytes = ROBOT) -> ReasonerRequest:
        if robot not in self.greeting:
            self.greet(robot)
        request = request_of(f"sentence {request_id}", request_id, goal_id)
        self.pool.robot_says(robot, request, self.now_s)
        self.deliver()
        return request

    def answer(self, name: bytes, error: str = "") -> None:
        self.pool.reasoner_says(name, answer_to(self.at[name].pop(0), error), self.now_s)
        self.deliver()

    def wait(self, seconds: float) -> None:
        """Time passes; everybody who is well says so."""
        for _ in range(round(seconds / BEAT_S)):
            self.now_s += BEAT_S
            for name in self.beating:
                self.beat(name)
            for robot, model in self.greeting.items():
                self.pool.robot_says(robot, wire.Hello(model), self.now_s)
            self.pool.tick(self.now_s)
            self.deliver()

    def stop_beating(self, name: bytes) -> None:
        del self.beating[name]

    def lose(self, name: bytes) -> None:
        self.stop_beating(name)
        self.pool.lose(name, "is gone", self.now_s)
        self.deliver()

    def where(self, request: ReasonerRequest) -> list[bytes]:
        return [name for name, given in self.at.items() for each in given if each.sentence == request.sentence]

    def ids(self, robot: bytes = ROBOT) -> list[int]:
        return [answer.request_id for answer in self.answers.get(robot, [])]


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_a_request_comes_back_answered_under_its_own_id(fleet: Fleet) -> None:
    fleet.join(b"a")
    request = fleet.ask(7)
    (given,) = fleet.at[b"a"]
    assert given == replace(request, request_id=1000)  # a ticket, not the robot's id: two robots may use the same one
    assert given.clip is request.clip
    fleet.answer(b"a")
    (answer,) = fleet.answers[ROBOT]
    assert (answer.request_id, answer.goal_id, answer.epoch) == (7, "goal", 0)
    assert len(answer.prompts) == 3
    assert answer.timings_ms["pool"] == 0.0


def test_a_question_goes_its_way_beside_the_goals(fleet: Fleet) -> None:
    fleet.join(b"a")
    fleet.ask(1, goal_id="g")
    question = request_of("what can roll", 2, "\x1fquestion_1", wants_words=True)
    fleet.pool.robot_says(ROBOT, question, fleet.now_s)
    fleet.deliver()
    fleet.ask(3, goal_id="g")  # of the goal, while its first request is computed
    fleet.answer(b"a")
    assert fleet.at[b"a"] == [replace(question, request_id=1001)]
    fleet.answer(b"a")
    fleet.answer(b"a")
    told = [(answer.request_id, len(answer.prompts), answer.words) for answer in fleet.answers[ROBOT]]
    assert told == [(1, 3, ""), (2, 0, "what can roll: yes"), (3, 3, "")]


def test_a_question_that_is_cancelled_is_not_computed_and_goals_are(fleet: Fleet) -> None:
    fleet.ask(1, goal_id="g")
    fleet.pool.robot_says(ROBOT, request_of("what", 2, "\x1fquestion_1", wants_words=True), fleet.now_s)
    fleet.pool.robot_says(ROBOT, wire.Cancel("\x1fquestion_1"), fleet.now_s)
    fleet.join(b"a")
    fleet.answer(b"a")
    assert fleet.at[b"a"] == []
    assert fleet.ids() == [1]


def test_a_question_is_handed_over_like_a_goal(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.greet(ROBOT)
    fleet.pool.robot_says(ROBOT, request_of("what", 2, "\x1fquestion_1", wants_words=True), fleet.now_s)
    fleet.deliver()
    fleet.lose(b"a")
    fleet.answer(b"b")
    assert [answer.words for answer in fleet.answers[ROBOT]] == ["what: yes"]


def test_robots_with_the_same_ids_get_their_own_answers(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.ask(1, robot=b"r1")
    fleet.ask(1, robot=b"r2")
    (of_r2,) = fleet.at[b"b"]
    fleet.pool.reasoner_says(b"b", answer_to(of_r2, error="why"), fleet.now_s)
    fleet.answer(b"a")
    assert [answer.error for answer in fleet.answers[b"r1"]] == [""]
    assert [answer.error for answer in fleet.answers[b"r2"]] == ["why"]


def test_every_reasoner_has_one_request_and_the_others_wait(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    for number in range(4):
        fleet.ask(number, goal_id=str(number))
    assert sorted(map(len, fleet.at.values())) == [1, 1]
    assert len(fleet.pool._queue) == 2
    fleet.wait(0.5)
    fleet.answer(b"b")
    assert [given.goal_id for given in fleet.at[b"b"]] == ["2"]
    fleet.answer(b"b")
    assert fleet.answers[ROBOT][-1].timings_ms["pool"] == 500.0


def test_among_the_idle_the_one_with_the_fastest_answers_is_first(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    for name, seconds in ((b"a", 0.9), (b"b", 0.2)):  # both are tried: neither has answered yet
        request = fleet.ask()
        assert fleet.where(request) == [name]
        fleet.now_s += seconds
        fleet.answer(name)
        fleet.wait(BEAT_S)
    for _ in range(3):
        fleet.ask()
        fleet.now_s += 0.2
        fleet.answer(b"b")
    fleet.ask(1, goal_id="1")
    fleet.ask(2, goal_id="2")  # and only when it is busy the other one
    assert len(fleet.at[b"a"]) == len(fleet.at[b"b"]) == 1


def test_one_that_is_busy_with_what_an_earlier_pool_gave_it_gets_nothing(fleet: Fleet) -> None:
    fleet.pool.reasoner_says(b"a", wire.Heartbeat("m", 3.0, 0), fleet.now_s)
    request = fleet.ask()
    assert fleet.where(request) == []
    fleet.join(b"a")
    assert fleet.where(request) == [b"a"]


def test_only_reasoners_with_the_robots_weights_answer_it(fleet: Fleet) -> None:
    fleet.join(b"other", model="other")
    fleet.greet(ROBOT, model="m")
    assert fleet.heartbeats[ROBOT] == wire.Heartbeat("other", 0.0, 0, "the pool", reasoners=0)
    request = fleet.ask()
    assert fleet.where(request) == []
    fleet.join(b"right")
    assert fleet.where(request) == [b"right"]
    fleet.greet(ROBOT, model="m")
    assert fleet.heartbeats[ROBOT] == wire.Heartbeat("m", 0.0, 0, "the pool", reasoners=1)
    fleet.greet(b"any", model="")
    assert fleet.heartbeats[b"any"] == wire.Heartbeat("m, other", 0.0, 0, "the pool", reasoners=2)
    assert fleet.where(fleet.ask(2, robot=b"any")) == [b"other"]


def test_robots_are_told_that_nobody_has_joined_and_wait(fleet: Fleet) -> None:
    request = fleet.ask()
    assert fleet.heartbeats[ROBOT] == wire.Heartbeat("", 0.0, 0, "the pool", reasoners=0)
    fleet.wait(60)
    fleet.join(b"a")
    assert fleet.where(request) == [b"a"]


def test_robots_are_told_how_long_their_oldest_request_has_been_computed(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.ask(1, goal_id="1")
    fleet.wait(1)
    fleet.ask(2, goal_id="2")
    fleet.wait(1)
    fleet.greet(ROBOT, b"another")
    assert fleet.heartbeats[ROBOT].busy_s == 2.0
    assert fleet.heartbeats[b"another"].busy_s == 0.0


def test_the_request_of_a_dead_one_goes_to_another_at_once(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    request = fleet.ask()
    assert fleet.where(request) == [b"a"]
    fleet.lose(b"a")
    assert fleet.where(request) == [b"a", b"b"]
    fleet.answer(b"b")
    assert fleet.ids() == [1]
    assert fleet.pool.handed_over == 1


def test_it_waits_for_the_next_one_in_front_of_all_others(fleet: Fleet) -> None:
    fleet.join(b"a")
    request = fleet.ask(1)
    fleet.ask(2, robot=b"another")
    fleet.lose(b"a")
    fleet.join(b"b")
    assert fleet.where(request) == [b"a", b"b"]


def test_the_request_of_a_silent_one_goes_to_another_within_the_promise(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.wait(5)
    request = fleet.ask()
    fleet.stop_beating(b"a")
    start_s = fleet.now_s
    while fleet.where(request) == [b"a"]:
        fleet.wait(BEAT_S)
    assert fleet.now_s - start_s <= SILENT_S + 2 * BEAT_S < PROMISE_S
    assert fleet.where(request) == [b"a", b"b"]
    fleet.greet(ROBOT)
    assert fleet.heartbeats[ROBOT].reasoners == 1
    fleet.answer(b"b")
    assert fleet.ids() == [1]
    fleet.beating[b"a"] = "m"  # it comes back, with the answer that nobody waits for any more
    fleet.answer(b"a")
    fleet.wait(BEAT_S)
    assert fleet.ids() == [1]
    second = fleet.ask(2)
    third = fleet.ask(3, goal_id="3")
    assert {*fleet.where(second), *fleet.where(third)} == {b"a", b"b"}


def test_the_first_of_two_answers_counts(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.ask()
    fleet.stop_beating(b"a")
    fleet.wait(2)
    fleet.beating[b"a"] = "m"
    fleet.answer(b"a")
    fleet.answer(b"b")
    assert fleet.ids() == [1]
    fleet.wait(BEAT_S)
    fleet.ask(2, goal_id="2")
    fleet.ask(3, goal_id="3")
    assert [len(given) for given in fleet.at.values()] == [1, 1]  # both work again


def test_a_silent_one_that_is_alone_may_still_answer(fleet: Fleet) -> None:
    fleet.join(b"a")
    fleet.ask()
    fleet.stop_beating(b"a")
    fleet.wait(3)
    fleet.beating[b"a"] = "m"
    fleet.wait(BEAT_S)
    fleet.answer(b"a")
    fleet.wait(BEAT_S)
    assert fleet.ids() == [1]
    assert fleet.at[b"a"] == []  # the copy that waited for another one is gone


def test_one_that_is_silent_for_long_is_forgotten_and_may_join_again(fleet: Fleet) -> None:
    fleet.join(b"a")
    fleet.stop_beating(b"a")
    fleet.wait(GONE_S + 1)
    assert fleet.pool._members == {}
    fleet.join(b"a")
    assert fleet.where(fleet.ask()) == [b"a"]


def test_a_computation_that_takes_much_longer_than_usual_is_doubled(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    for name in (b"a", b"b"):
        fleet.ask()
        fleet.wait(0.5)
        fleet.answer(name)
        fleet.wait(BEAT_S)
    request = fleet.ask()
    ((first, _),) = [(name, given) for name, given in fleet.at.items() if given]
    fleet.wait(4 * 0.5 - BEAT_S)
    assert fleet.where(request) == [first]
    fleet.wait(2 * BEAT_S)
    assert sorted(fleet.where(request)) == [b"a", b"b"]
    fleet.wait(2)
    (second,) = {b"a", b"b"} - {first}
    fleet.answer(second)
    fleet.wait(BEAT_S)
    later = fleet.ask(2)
    assert fleet.where(later) == [second]  # the stuck one gets nothing, though its heart beats
    fleet.answer(first)
    fleet.wait(BEAT_S)
    assert fleet.where(fleet.ask(3, goal_id="3")) == [first]
    assert fleet.ids() == [1, 1, 1]


def test_a_fast_one_may_be_a_little_slow_and_the_first_answer_very_slow(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    request = fleet.ask()
    fleet.wait(FIRST_PATIENCE_S - 1)
    assert fleet.where(request) == [b"a"]
    fleet.answer(b"a")
    for _ in range(rules.REMEMBERED_ANSWERS):  # fast ones, until the first is forgotten
        fleet.ask()
        fleet.answer(next(name for name, given in fleet.at.items() if given))
        fleet.wait(BEAT_S)
    request = fleet.ask()
    fleet.wait(LEAST_PATIENCE_S - BEAT_S)
    assert len(fleet.where(request)) == 1


def test_two_stuck_ones_are_enough_for_one_goal(fleet: Fleet) -> None:
    fleet.join(b"a", b"b", b"c")
    stuck = fleet.ask()
    fleet.wait(2 * FIRST_PATIENCE_S + 2)
    assert len(fleet.where(stuck)) == 2
    (free,) = {b"a", b"b", b"c"} - set(fleet.where(stuck))
    assert fleet.where(fleet.ask(2)) == []  # the same goal
    assert fleet.where(fleet.ask(3, goal_id="another")) == [free]


def test_the_newest_request_of_a_goal_wins_and_one_reasoner_works_on_it(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.ask(1)
    second, third = fleet.ask(2), fleet.ask(3)
    fleet.wait(1)
    assert fleet.where(third) == []
    fleet.answer(b"a")
    assert fleet.where(second) == []
    assert len(fleet.where(third)) == 1
    assert fleet.ids() == [1]


def test_the_newest_request_replaces_the_one_that_a_dead_reasoner_had(fleet: Fleet) -> None:
    fleet.join(b"a")
    first, second = fleet.ask(1), fleet.ask(2)
    fleet.lose(b"a")
    fleet.join(b"b")
    assert fleet.where(first) == [b"a"]
    assert fleet.where(second) == [b"b"]
    fleet.answer(b"b")
    assert fleet.ids() == [2]
    assert len(fleet.pool._queue) == 0


def test_a_cancelled_goal_is_not_answered_and_may_be_set_anew_at_once(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.ask(1)
    waiting = fleet.ask(2)
    fleet.pool.robot_says(ROBOT, wire.Cancel("goal"), fleet.now_s)
    anew = fleet.ask(3)
    assert fleet.where(waiting) == []
    assert fleet.where(anew) == [b"b"]  # though a is still at the old one
    fleet.answer(b"a")
    fleet.answer(b"b")
    assert fleet.ids() == [3]


def test_a_cancelled_request_dies_with_its_reasoner(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    request = fleet.ask()
    fleet.pool.robot_says(ROBOT, wire.Cancel("goal"), fleet.now_s)
    fleet.lose(b"a")
    assert fleet.where(request) == [b"a"]


def test_robots_take_turns_however_many_goals_they_have(fleet: Fleet) -> None:
    fleet.join(b"a")
    for number in range(6):
        fleet.ask(number, goal_id=str(number), robot=b"greedy")
    fleet.ask(100, robot=b"modest")
    served = []
    for _ in range(7):
        fleet.answer(b"a")
        fleet.wait(BEAT_S)
        served.append(len(fleet.ids(b"modest")))
    assert served[2] == 1  # after the request that ran already, and one of the greedy one
    assert len(fleet.ids(b"greedy")) == 6


def test_an_overloaded_pool_refuses_those_who_fill_it(fleet: Fleet) -> None:
    for number in range(300):
        fleet.ask(number, goal_id=str(number), robot=b"greedy")
    fleet.ask(1, robot=b"modest")
    refused = fleet.answers[b"greedy"]
    assert len(refused) == 300 - 256 + 1
    assert "the pool is overloaded, 256 requests wait" in refused[0].error
    assert b"modest" not in fleet.answers


def test_a_goal_that_kills_reasoners_is_refused_before_it_kills_them_all(fleet: Fleet) -> None:
    fleet.join(b"a", b"b", b"c", b"d")
    fleet.ask(1)
    fleet.lose(b"a")
    fleet.lose(b"b")
    assert not fleet.at.get(b"c")
    (refused,) = fleet.answers[ROBOT]
    assert refused.request_id == 1
    assert "2 reasoners were lost while they worked on this goal; it is tried again in 30 s" in refused.error
    fleet.ask(2)
    assert fleet.ids() == [1, 2]
    innocent = fleet.ask(3, goal_id="innocent")
    assert fleet.where(innocent) == [b"c"]
    fleet.answer(b"c")

    fleet.wait(REFUSED_S + 1)
    again = fleet.ask(4)
    ((name, _),) = [(name, given) for name, given in fleet.at.items() if given and name in fleet.beating]
    assert name in fleet.where(again)
    fleet.lose(name)
    assert fleet.ids() == [1, 2, 3, 4]  # one life more, and refused again
    assert len(fleet.pool._members) == 1


def test_a_goal_that_was_answered_has_a_clean_slate(fleet: Fleet) -> None:
    fleet.join(b"a", b"b", b"c", b"d")
    fleet.ask(1)
    fleet.lose(b"a")
    fleet.answer(b"b")
    request = fleet.ask(2)
    fleet.lose(next(name for name in fleet.where(request) if name in fleet.beating))
    fleet.answer(next(name for name in fleet.where(request) if name in fleet.beating))
    assert [answer.error for answer in fleet.answers[ROBOT]] == ["", ""]


def test_the_newest_request_is_the_one_that_is_refused(fleet: Fleet) -> None:
    fleet.join(b"a")
    fleet.ask(1)
    fleet.ask(2)
    fleet.lose(b"a")
    fleet.join(b"b")
    fleet.ask(3)
    fleet.lose(b"b")
    assert fleet.ids() == [3]
    assert len(fleet.pool._queue) == 0


def test_reasoners_that_stop_in_an_orderly_way_do_not_count(fleet: Fleet) -> None:
    fleet.join(b"a", b"b", b"c", b"d")
    request = fleet.ask()
    for name in (b"a", b"b", b"c"):
        fleet.stop_beating(name)
        fleet.pool.reasoner_says(name, wire.Leave(), fleet.now_s)
        fleet.deliver()
    assert fleet.where(request) == [b"a", b"b", b"c", b"d"]
    fleet.answer(b"d")
    assert fleet.ids() == [1]


@pytest.mark.parametrize(
    "answer",
    [
        ReasonerAnswer(1000, 0, "another", (), "error"),
        ReasonerAnswer(1000, 9, "goal", (), "error"),
        replace(answer_to(request_of()), request_id=1000, prompts=answer_to(request_of()).prompts[::-1]),
        ReasonerAnswer(1000, 0, "goal", (), words="words for a goal"),
        wire.Cancel("goal"),
        wire.Hello(),
        wire.Refusal("no"),
        request_of(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_one_that_talks_nonsense_loses_its_request_and_is_left_out_for_a_while(
    fleet: Fleet, answer: wire.Message
) -> None:
    fleet.join(b"a")
    request = fleet.ask()
    with pytest.raises(WireError) as caught:
        fleet.pool.reasoner_says(b"a", answer, fleet.now_s)
    fleet.pool.ban(b"a", str(caught.value), fleet.now_s)
    fleet.join(b"b")
    assert fleet.where(request) == [b"a", b"b"]
    fleet.at[b"a"].clear()
    fleet.wait(5)
    later = fleet.ask(2, goal_id="2")
    assert fleet.where(later) == []
    fleet.wait(6)
    assert fleet.where(later) == [b"a"]


@pytest.mark.parametrize(
    "message", [wire.Heartbeat("m", 0.0, 0), wire.Leave(), wire.Refusal("no"), answer_to(request_of())]
)
def test_robots_cannot_speak_as_reasoners(fleet: Fleet, message: wire.Message) -> None:
    fleet.join(b"a")
    fleet.greet(ROBOT)
    with pytest.raises(WireError, match="a client does not send"):
        fleet.pool.robot_says(ROBOT, message, fleet.now_s)
    fleet.ask()
    with pytest.raises(WireError, match="a client does not send"):
        fleet.pool.robot_says(b"a", answer_to(request_of(request_id=1000)), fleet.now_s)  # not even under its name
    assert fleet.ids() == []


def test_an_answer_of_one_that_was_not_asked_is_dropped(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    fleet.ask()
    for name in (b"b", b"never joined"):
        fleet.pool.reasoner_says(name, answer_to(request_of(request_id=1000)), fleet.now_s)
    fleet.deliver()
    assert fleet.ids() == []


def test_a_robot_must_say_hello_first(fleet: Fleet) -> None:
    with pytest.raises(WireError, match="before hello"):
        fleet.pool.robot_says(ROBOT, request_of(), fleet.now_s)


def test_robots_that_are_silent_are_forgotten_with_their_requests(fleet: Fleet) -> None:
    fleet.join(b"a")
    fleet.ask(1)
    waiting = fleet.ask(2, goal_id="2")
    del fleet.greeting[ROBOT]
    fleet.wait(GONE_S + 1)
    fleet.answer(b"a")
    fleet.wait(BEAT_S)
    assert fleet.where(waiting) == []
    assert fleet.pool._clients == {}
    assert fleet.pool._goals == {}
    assert fleet.ids() == []


def test_a_farewell_forgets_at_once(fleet: Fleet) -> None:
    fleet.join(b"a")
    fleet.ask(1)
    waiting = fleet.ask(2, goal_id="2")
    fleet.pool.robot_says(ROBOT, wire.Cancel(""), fleet.now_s)
    fleet.answer(b"a")
    assert fleet.where(waiting) == []
    assert fleet.pool._clients == {}


def test_the_numbers_of_robots_and_reasoners_are_bounded(fleet: Fleet) -> None:
    for number in range(rules.MAX_CLIENTS + 3):
        fleet.greet(f"robot {number}".encode())
    assert len(fleet.pool._clients) == rules.MAX_CLIENTS
    assert fleet.refusals == [f"the pool serves {rules.MAX_CLIENTS} robots already; start another pool"] * 3
    for number in range(rules.MAX_MEMBERS + 3):
        fleet.join(f"reasoner {number}".encode())
    assert len(fleet.pool._members) == rules.MAX_MEMBERS


def test_nothing_is_kept_of_goals_that_come_and_go(fleet: Fleet) -> None:
    fleet.join(b"a")
    for number in range(50):
        fleet.ask(number, goal_id=str(number))
        fleet.answer(b"a")
        fleet.wait(BEAT_S)
    fleet.wait(BEAT_S)
    assert fleet.pool._goals == {}
    assert len(fleet.pool._queue) == 0


def test_the_pools_own_sleep_is_not_the_silence_of_others(fleet: Fleet) -> None:
    fleet.join(b"a", b"b")
    request = fleet.ask()
    fleet.wait(1)
    fleet.now_s += 60  # stopped, or starved by others
    fleet.pool.tick(fleet.now_s)
    fleet.deliver()
    assert len(fleet.pool._members) == 2
    assert len(fleet.pool._clients) == 1
    assert fleet.where(request) == [b"a"]
    fleet.stop_beating(b"a")  # but silence after it is
    fleet.wait(PROMISE_S)
    assert fleet.where(request) == [b"a", b"b"]
