# SPDX-License-Identifier: Apache-2.0
"""How often answers in words are right: questions about simulated scenes that no training has seen.

    python -m virst_engine.evaluate.answers                        # 20 scenes, half a minute or more
    python -m virst_engine.evaluate.answers --family full --scenes 1000000:1000100 --json answers.json

A question is a sentence of the evaluation (cases.py), asked when the first window is full. An answer is right when it
is word for word what the simulator says of the targets: "red ball", "three boxes", "none". What can be reached without
seeing the video is printed beside: always the commonest answer, and the words of the question where they hold it.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from virst_engine.errors import VirstError
from virst_engine.evaluate.cases import Case, load_case
from virst_engine.evaluate.modes import System, load_system
from virst_engine.evaluate.settings import FAMILIES, FIRST_EVALUATION_SEED, PHRASINGS, EvaluationSettings
from virst_engine.session import Session
from virst_engine.slow.reasoner import InProcessClient
from virst_engine.types import ReasonerAnswer, ReasonerRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spoken:
    """One question and what was said."""

    scene: int
    kind: str
    question: str
    truth: str
    answer: str  # empty: there was none

    @property
    def is_right(self) -> bool:
        return self.answer == self.truth

    @property
    def is_named(self) -> bool:
        """The question has every word of the true answer in it."""
        return set(self.truth.split()) <= set(self.question.lower().split())


class _Noting:
    """A `Reasoner` that keeps the newest request."""

    newest: ReasonerRequest | None = None

    def __init__(self, system: System) -> None:
        self._reasoner = system.reasoner

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.newest = request
        return self._reasoner.answer(request)


def ask_about(system: System, case: Case, scene: int) -> list[Spoken]:
    """All questions of the case, about the clip that ends at its goal's frame."""
    if not case.questions:
        return []
    noting = _Noting(system)
    with Session(system.config, system.stages, InProcessClient(noting)) as session:
        for frame in case.frames[: case.goal_frame]:
            session.step(frame)
        session.ask(case.questions[0].sentence)
        session.step(case.frames[case.goal_frame])
    assert noting.newest is not None
    spoken = []
    for question in case.questions:
        try:
            words = system.reasoner.answer(replace(noting.newest, sentence=question.sentence)).words
        except VirstError as error:
            logger.info("%s: %s", question.sentence, error)
            words = ""
        spoken.append(Spoken(scene, question.kind, question.sentence, question.answer, words))
    return spoken


def measure(
    settings: EvaluationSettings,
    *,
    on_scene: Callable[[int], None] = lambda scene: None,
    system_of: Callable[[EvaluationSettings], System] = load_system,
    case_of: Callable[[EvaluationSettings, int], Case] = load_case,
) -> list[Spoken]:
    """The answers to the questions of every scene of the settings.

    Raises:
        VirstError: the weights or the simulator cannot be used.
    """
    system = system_of(settings)
    spoken: list[Spoken] = []
    for scene in settings.scenes:
        spoken += ask_about(system, case_of(settings, scene), scene)
        on_scene(scene)
    return spoken


def table(spoken: Sequence[Spoken]) -> str:
    """The shares of right answers in Markdown, by kind and overall."""
    kinds = {kind: [each for each in spoken if each.kind == kind] for kind in sorted({each.kind for each in spoken})}
    lines = ["| kind | right % | n |", "|---|---:|---:|"]
    for kind, rows in (*kinds.items(), ("all", list(spoken))):
        lines.append(f"| {kind} | {_share(sum(each.is_right for each in rows), len(rows))} | {len(rows)} |")
    commonest = Counter(each.truth for each in spoken).most_common(1)
    said, times = commonest[0] if commonest else ("", 0)
    lines += ["", f"Always {said!r}: {_share(times, len(spoken))} %. Named in the question: "]
    lines[-1] += f"{_share(sum(each.is_named for each in spoken), len(spoken))} %."
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m virst_engine.evaluate.answers", description=(__doc__ or "").split("\n")[0]
    )
    first = FIRST_EVALUATION_SEED
    parser.add_argument("--family", choices=FAMILIES, default="plain", help="kind of scenes")
    parser.add_argument("--scenes", metavar="FIRST:LAST", default=f"{first}:{first + 20}", help="LAST not included")
    parser.add_argument("--phrasings", choices=PHRASINGS, default="train", help="sentences as in training, or held out")
    parser.add_argument("--weights", default="", help="safetensors file; empty = the shipped one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer here")
    options = parser.parse_args()
    try:
        begin, end = (int(number) for number in options.scenes.split(":"))
        settings = EvaluationSettings(
            family=options.family,
            first_scene=begin,
            last_scene=end,
            phrasings=options.phrasings,
            weights=options.weights,
        )
        spoken = measure(settings)
    except (VirstError, ValueError) as error:
        parser.error(str(error))
    print(table(spoken))
    if options.json:
        rows = [asdict(each) | {"right": each.is_right} for each in spoken]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
