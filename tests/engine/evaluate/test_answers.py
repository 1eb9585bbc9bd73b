# SPDX-License-Identifier: Apache-2.0
"""Shares of right answers, on fake scenes and a reasoner that says what it is told to."""

import json
import sys

import numpy as np
import pytest

from tests.fakes import FakeReasoner, FakeStages, Video, moving_square, small_config
from virst_engine.errors import BadGoal
from virst_engine.evaluate import answers
from virst_engine.evaluate.answers import Spoken, measure, table
from virst_engine.evaluate.cases import Case, Question
from virst_engine.evaluate.modes import System
from virst_engine.evaluate.settings import EvaluationSettings
from virst_engine.types import ReasonerAnswer, ReasonerRequest

TWO = EvaluationSettings(first_scene=10, last_scene=12)
SAID = {"the red ball": "red ball", "what can roll": "blue box", "the egg": "none"}
QUESTIONS = (
    Question("attribute", "the red ball", (0,), answer="red ball"),
    Question("reasoning", "what can roll", (0,), answer="red ball"),
    Question("absent", "the egg", (), answer="none"),
    Question("absent", "the unreadable", (), answer="none"),
)


class Speaker(FakeReasoner):
    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.requests.append(request)
        if request.sentence not in SAID:
            raise BadGoal("this model does not know 'unreadable'")
        words = SAID[request.sentence]
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (), words=words)


def fake_case(settings: EvaluationSettings, scene: int) -> Case:
    frames = tuple(Video([moving_square()]).frame(t) for t in range(10))
    return Case(frames, np.zeros((10, 32, 32), np.uint8), 4, 1, QUESTIONS if scene == 10 else QUESTIONS[:1])


def test_right_answers_are_counted_by_kind() -> None:
    speaker, seen = Speaker(), []
    system = System(FakeStages(), speaker, small_config(clip_frames=3, clip_spacing_s=0.1))
    spoken = measure(TWO, on_scene=seen.append, system_of=lambda _: system, case_of=fake_case)
    assert seen == [10, 11]
    assert [(each.scene, each.question, each.answer, each.is_right) for each in spoken] == [
        (10, "the red ball", "red ball", True),
        (10, "what can roll", "blue box", False),
        (10, "the egg", "none", True),
        (10, "the unreadable", "", False),
        (11, "the red ball", "red ball", True),
    ]
    assert all(request.wants_words for request in speaker.requests)
    assert {int(request.clip.steps[-1]) for request in speaker.requests} == {4}  # the goal's frame
    shown = table(spoken)
    assert "| absent | 50.0 | 2 |" in shown
    assert "| attribute | 100.0 | 2 |" in shown
    assert "| all | 60.0 | 5 |" in shown
    assert "Always 'red ball': 60.0 %. Named in the question: 40.0 %." in shown


def test_no_question_gives_no_share() -> None:
    assert "| all | - | 0 |" in table([])


def test_the_program_prints_the_table_and_writes_every_answer(tmp_path, monkeypatch, capsys) -> None:
    one = Spoken(1_000_000, "attribute", "the red ball", "red ball", "red box")
    monkeypatch.setattr(answers, "measure", lambda settings: [one])
    monkeypatch.setattr(sys, "argv", ["answers", "--scenes", "5:7", "--json", str(tmp_path / "answers.json")])
    answers.main()
    assert "| all | 0.0 | 1 |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "answers.json").read_text())
    assert (row["truth"], row["answer"], row["right"]) == ("red ball", "red box", False)
    monkeypatch.setattr(sys, "argv", ["answers", "--scenes", "7:5"])
    with pytest.raises(SystemExit) as ended:
        answers.main()
    assert ended.value.code == 2
