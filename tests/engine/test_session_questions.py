# SPDX-License-Identifier: Apache-2.0
"""Questions to a session: who answers them when, what becomes of those without an answer, and that goals go on."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from tests.fakes import (
    DelayedClient,
    FakeReasoner,
    FakeStages,
    InstantClient,
    SilentClient,
    Video,
    moving_square,
    session_of,
    small_config,
)
from tests.fakes import run as run_video
from virst_engine.errors import BadGoal, Unanswered, VirstError, WireError
from virst_engine.session import Session
from virst_engine.slow.question_book import MOST_OPEN
from virst_engine.slow.reasoner import InProcessClient, NoReasoner
from virst_engine.types import Frame, FrameResult, ObjectState, ReasonerAnswer, ReasonerRequest

VIDEO = Video([moving_square()])
QUESTION = "the thing that can roll"


def run(session: Session, frames: Sequence[int], client: InstantClient | None = None) -> list[FrameResult]:
    return run_video(session, VIDEO, frames, client)


def why(answer: Future[str]) -> str:
    error = answer.exception(timeout=0)
    assert isinstance(error, Unanswered)
    return str(error)


def words_asked(client: InstantClient) -> list[tuple[str, int]]:
    """The questions that the reasoner got, each with the step of its newest frame."""
    return [(each.sentence, int(each.clip.steps[-1])) for each in client.reasoner.requests if each.wants_words]


def test_a_question_is_answered_about_the_next_frame() -> None:
    client = InstantClient()
    session = session_of(client, clip_frames=2)
    run(session, range(5))
    answer = session.ask(f"  {QUESTION} ")
    assert not answer.done()
    run(session, [5])
    assert answer.result(timeout=0) == f"{QUESTION}: 5"
    (request,) = client.reasoner.requests
    assert request.clip.steps.tolist()[-1] == 5
    assert len(request.clip.steps) == 2


def test_an_answer_that_takes_its_time_comes_with_a_later_frame() -> None:
    client = DelayedClient(delay_steps=3)
    session = session_of(client)
    run(session, range(2), client)
    answer = session.ask(QUESTION)
    run(session, range(2, 5), client)
    assert not answer.done()
    run(session, [5], client)
    assert answer.result(timeout=0) == f"{QUESTION}: 2"


def test_goals_are_as_without_questions() -> None:
    def masks(questions: int) -> tuple[list[np.ndarray], list[tuple[str, int]]]:
        client = DelayedClient(delay_steps=2)
        session = session_of(client, period_s=0.5)
        run(session, [0], client)
        session.set_goal("the red square", goal_id="question_1")
        found = []
        for t in range(1, 40):
            if t % 4 == 0:
                for number in range(questions):
                    session.ask(f"{QUESTION} {number}")
            (result,) = run(session, [t], client)
            found.append(result.objects[0].mask)
            assert result.objects[0].message in ("", "waiting for the reasoner's first answer")
        asked = [(r.sentence, int(r.clip.steps[-1])) for r in client.reasoner.requests if not r.wants_words]
        return found, asked

    quiet, asked = masks(0)
    noisy, asked_beside = masks(1)
    assert asked == asked_beside
    assert len(asked) > 5
    for one, other in zip(quiet, noisy, strict=True):
        assert np.array_equal(one, other)


def test_the_reasoner_has_one_question_at_a_time() -> None:
    client = DelayedClient(delay_steps=2)
    session = session_of(client)
    run(session, [0], client)
    answers = [session.ask(f"question {number}") for number in range(3)]
    run(session, range(1, 8), client)
    assert words_asked(client) == [("question 0", 1), ("question 1", 3), ("question 2", 5)]
    assert [answer.result(timeout=0) for answer in answers] == ["question 0: 1", "question 1: 3", "question 2: 5"]


def test_more_than_a_handful_of_questions_is_refused_until_one_is_answered() -> None:
    session = session_of(SilentClient())
    run(session, [0])
    answers = [session.ask(QUESTION) for _ in range(MOST_OPEN)]
    with pytest.raises(Unanswered, match="4 questions are open already; ask again"):
        session.ask(QUESTION)
    assert answers[2].cancel()
    session.ask(QUESTION)
    run(session, [1])
    assert not answers[0].cancel()  # the reasoner has got it


@pytest.mark.parametrize(
    ("question", "says"),
    [(" ", "got an empty one"), ("x" * 301, "300 characters, got 301"), ("a\nb", r"U\+000A")],
)
def test_what_is_no_question_is_refused_in_the_words_of_goals(question: str, says: str) -> None:
    session = session_of()
    run(session, [0])
    with pytest.raises(BadGoal, match=says):
        session.ask(question)


def test_before_the_first_frame_there_is_nothing_to_ask_about() -> None:
    session = session_of()
    with pytest.raises(Unanswered, match="no frame has been seen yet"):
        session.ask(QUESTION)
    run(session, [0])
    session.reset()
    with pytest.raises(Unanswered, match="no frame has been seen yet"):
        session.ask(QUESTION)


def test_a_model_without_a_reasoner_says_what_can_be_asked() -> None:
    session = Session(small_config(), FakeStages(), NoReasoner())
    session.step(VIDEO.frame(0))
    with pytest.raises(Unanswered, match=r"no reasoner.*ask tabletop-tiny"):
        session.ask(QUESTION)


def test_while_nobody_listens_a_question_fails_at_once_and_says_why() -> None:
    client = InstantClient(trouble="no reasoner answers; start it")
    session = session_of(client)
    run(session, [0])
    answer = session.ask(QUESTION)
    run(session, [1])
    assert why(answer) == "no reasoner answers; start it"
    assert client.reasoner.requests == []


def test_without_an_answer_a_question_is_given_up_and_its_request_cancelled() -> None:
    client = SilentClient()
    session = session_of(client, ttl_s=1.0)
    run(session, [0])
    first, second = session.ask("one"), session.ask("two")
    run(session, range(1, 11))
    assert not first.done()
    run(session, range(11, 13))
    for answer in (first, second):
        assert why(answer) == "no answer of the reasoner for 1 s: ask again, or raise reasoner.ttl_s"
    (request,) = client.reasoner.requests  # the other one never was the next
    assert client.cancelled == [request.goal_id]


def test_an_answer_that_comes_too_late_is_dropped() -> None:
    client = DelayedClient(delay_steps=15)
    session = session_of(client, ttl_s=1.0)
    run(session, [0], client)
    answer = session.ask("one")
    run(session, range(1, 14), client)
    assert "no answer" in why(answer)
    client.delay_steps = 0
    again = session.ask("two")
    run(session, range(14, 20), client)
    assert again.result(timeout=0) == "two: 14"


def test_a_question_that_was_lost_with_the_reasoner_is_asked_again_when_it_is_back() -> None:
    client = SilentClient()
    session = session_of(client)
    run(session, [0])
    answer = session.ask(QUESTION)
    run(session, [1])
    client.trouble = "killed"
    run(session, range(2, 5))
    assert not answer.done()
    client.trouble = ""
    run(session, range(5, 8))
    assert words_asked(client) == [(QUESTION, 1), (QUESTION, 5)]
    old, new = client.reasoner.requests
    assert (old.goal_id, old.request_id) != (new.goal_id, new.request_id)
    client.answers = [FakeReasoner().answer(old)]
    run(session, [8])
    assert answer.result(timeout=0) == f"{QUESTION}: 1"


def test_a_reset_and_a_clock_that_goes_back_end_questions() -> None:
    client = SilentClient()
    session = session_of(client)
    run(session, range(2))
    asked, waiting = session.ask("one"), session.ask("two")
    run(session, [2])
    session.reset()
    assert "reset" in why(asked)
    assert "reset" in why(waiting)
    run(session, [3])
    assert client.cancelled == [client.reasoner.requests[0].goal_id]
    answer = session.ask("three")
    run(session, [4])
    run(session, [0])
    assert "clock went back" in why(answer)


def test_closing_ends_questions_and_takes_no_more() -> None:
    session = session_of(SilentClient())
    run(session, [0])
    asked, cancelled = session.ask("one"), session.ask("two")
    assert cancelled.cancel()
    run(session, [1])
    waiting = session.ask("three")
    session.close()
    assert why(asked) == why(waiting) == "the session was closed"
    session.close()
    with pytest.raises(Unanswered, match="the session is closed"):
        session.ask(QUESTION)


def test_a_reasoner_that_refuses_or_answers_with_masks_is_told() -> None:
    class Odd(FakeReasoner):
        def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
            if "drawer" in request.sentence:
                raise BadGoal("this model does not know 'drawer'")
            return FakeReasoner(lambda _: (0.9, 0.1, 0.1)).answer(
                ReasonerRequest(request.request_id, request.epoch, request.goal_id, request.sentence, request.clip)
            )

    session = Session(small_config(), FakeStages(), InProcessClient(Odd()))
    run(session, [0])
    refused, masks = session.ask("the drawer"), session.ask("the ball")
    run(session, range(1, 3))
    assert why(refused) == "this model does not know 'drawer'"
    assert why(masks) == "the reasoner answered with masks, not with words"


def test_a_question_that_cannot_be_sent_is_explained() -> None:
    class Refusing(InstantClient):
        def submit(self, request: ReasonerRequest) -> None:
            raise WireError("the clip is too large")

    session = session_of(Refusing())
    run(session, [0])
    answers = [session.ask("one"), session.ask("two")]
    run(session, range(1, 3))
    assert [why(answer) for answer in answers] == ["the clip is too large"] * 2


def test_the_one_who_waits_may_ask_on_in_a_callback() -> None:
    """The session's lock is not held while an answer is handed over."""
    session = session_of()
    run(session, [0])
    more: list[Future[str]] = []
    session.ask("one").add_done_callback(lambda _: more.append(session.ask("two")))
    run(session, range(1, 3))
    assert more[0].result(timeout=0) == "two: 2"
    session.ask("three").add_done_callback(lambda _: session.set_goal("the red square"))
    session.reset()
    assert len(session.goals()) == 1


def test_questions_may_come_from_other_threads() -> None:
    session = session_of(max_objects=3)
    run(session, [0])
    told: list[str] = []
    failures: list[BaseException] = []

    def ask(name: str) -> None:
        try:
            told.extend(session.ask(f"{name} {number}").result(timeout=20) for number in range(20))
        except VirstError as error:
            failures.append(error)

    askers = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "c")]
    for asker in askers:
        asker.start()
    t = 0
    while any(asker.is_alive() for asker in askers) and t < 20_000:
        t += 1
        run(session, [t])
    for asker in askers:
        asker.join()
    assert not failures
    assert len(told) == 60


class TestSeveralCameras:
    @pytest.fixture
    def session(self) -> Session:
        return Session(small_config(), FakeStages(), {camera: InstantClient() for camera in ("left", "right")})

    @staticmethod
    def step(session: Session, camera: str, t: int) -> FrameResult:
        frame = VIDEO.frame(t)
        return session.step(Frame(frame.image_rgb_u8, frame.stamp_ns, camera))

    def test_a_question_is_about_the_camera_that_it_names(self, session: Session) -> None:
        for camera, t in (("left", 0), ("right", 0)):
            self.step(session, camera, t)
        left, right = session.ask("what", "left"), session.ask("what", camera="right")
        self.step(session, "right", 3)
        assert right.result(timeout=0) == "what: 3"
        assert not left.done()
        self.step(session, "left", 5)
        assert left.result(timeout=0) == "what: 5"

    def test_a_camera_has_to_be_named_and_seen(self, session: Session) -> None:
        self.step(session, "left", 0)
        with pytest.raises(BadGoal, match="say which camera the question is about; there are: left, right"):
            session.ask("what")
        with pytest.raises(BadGoal, match="there is no camera 'back'; there are: left, right"):
            session.ask("what", "back")
        with pytest.raises(Unanswered, match="no frame"):
            session.ask("what", "right")

    def test_one_camera_may_be_reset_alone(self, session: Session) -> None:
        for camera in ("left", "right"):
            self.step(session, camera, 0)
        left, right = session.ask("what", "left"), session.ask("what", "right")
        session.reset("left")
        assert "reset" in why(left)
        self.step(session, "right", 1)
        assert right.result(timeout=0) == "what: 1"


def test_of_a_single_camera_the_name_may_be_given() -> None:
    session = session_of()
    run(session, [0])
    answer = session.ask(QUESTION, camera="camera")
    (result,) = run(session, [1])
    assert answer.result(timeout=0) == f"{QUESTION}: 1"
    assert result.objects == ()
    session.set_goal("the red square")
    assert run(session, [2])[0].objects[0].state is ObjectState.TRACKING
