# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest

from virst_engine.errors import BadGoal
from virst_engine.slow.reasoner import DelayedClient, InProcessClient, are_frames_of
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

SECOND_NS = 1_000_000_000


class EchoReasoner:
    def __init__(self):
        self.asked = []

    def answer(self, request):
        self.asked.append(request.request_id)
        if request.sentence == "?":
            raise BadGoal("no word of it is known")
        prompt = Prompt(int(request.clip.steps[-1]), int(request.clip.stamps_ns[-1]), np.zeros((1, 2), np.float32))
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (prompt,))


def ask(client, request_id, at_s, goal_id="goal", sentence="the red ball"):
    clip = Clip(
        steps=np.array([request_id]),
        stamps_ns=np.array([round(at_s * SECOND_NS)]),
        frames_rgb_u8=np.zeros((1, 2, 2, 3), np.uint8),
        fusion=np.zeros((1, 1, 1, 1), np.float16),
    )
    client.submit(ReasonerRequest(request_id, 0, goal_id, sentence, clip))


def polled_at(client, at_s):
    client.advance(round(at_s * SECOND_NS))
    return [answer.request_id for answer in client.poll()]


@pytest.mark.parametrize(
    ("steps", "fits"),
    [
        ([1, 1, 2, 3], True), ([1, 2, 3], True), ([3], True), ([], True), ([1, 1, 3], True),
        ([2, 1], False), ([1, 2, 2], False), ([4], False), ([1, 1, 1], False),
    ],
)  # fmt: skip
def test_prompts_are_of_the_clips_frames_in_their_order(steps, fits):
    prompts = [Prompt(step, 10 * step, np.zeros((1, 2), np.float32)) for step in steps]
    clip = [(1, 10), (1, 10), (2, 20), (3, 30)]
    assert are_frames_of(prompts, clip) is fits
    assert not are_frames_of([replace(prompt, stamp_ns=5) for prompt in prompts], clip) or not prompts


def test_the_in_process_client_answers_at_once_and_once():
    client = InProcessClient(EchoReasoner())
    ask(client, 1, 0.0)
    ask(client, 2, 0.0, goal_id="other")
    assert [answer.request_id for answer in client.poll()] == [1, 2]
    assert client.poll() == []
    assert client.status() == ""


@pytest.mark.parametrize("make", [InProcessClient, lambda reasoner: DelayedClient(reasoner, 0.0)])
def test_a_refused_goal_is_an_answer_with_the_reason(make):
    client = make(EchoReasoner())
    ask(client, 1, 0.0, sentence="?")
    (answer,) = client.poll()
    assert (answer.prompts, answer.error) == ((), "no word of it is known")


def test_the_delayed_answer_comes_when_frame_time_says_so():
    client = DelayedClient(EchoReasoner(), 0.5)
    ask(client, 1, 10.0)
    assert client.poll() == []
    assert polled_at(client, 10.4) == []
    assert polled_at(client, 10.5) == [1]


def test_stamps_of_later_requests_move_frame_time_on():
    client = DelayedClient(EchoReasoner(), 0.5)
    ask(client, 1, 0.0)
    ask(client, 2, 0.6, goal_id="other")
    assert [answer.request_id for answer in client.poll()] == [1]


def test_a_busy_reasoner_takes_goals_one_after_the_other_and_only_their_newest_request():
    reasoner = EchoReasoner()
    client = DelayedClient(reasoner, 1.0)
    ask(client, 1, 0.0, goal_id="a")
    ask(client, 2, 0.1, goal_id="b")
    ask(client, 3, 0.2, goal_id="c")
    ask(client, 4, 0.3, goal_id="b")  # replaces 2, in its place
    assert polled_at(client, 1.0) == [1]
    assert polled_at(client, 1.9) == []
    assert polled_at(client, 3.5) == [4, 3]
    assert reasoner.asked == [1, 4, 3]


def test_a_cancelled_request_is_never_computed():
    reasoner = EchoReasoner()
    client = DelayedClient(reasoner, 1.0)
    ask(client, 1, 0.0, goal_id="a")
    ask(client, 2, 0.0, goal_id="b")
    client.cancel("b")
    assert polled_at(client, 9.0) == [1]
    assert reasoner.asked == [1]


@pytest.mark.parametrize("delay_s", [-0.1, float("nan")])
def test_a_negative_delay_is_rejected(delay_s):
    with pytest.raises(ValueError, match="delay_s must be >= 0"):
        DelayedClient(EchoReasoner(), delay_s)
