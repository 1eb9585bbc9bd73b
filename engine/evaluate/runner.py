# SPDX-License-Identifier: Apache-2.0
"""Run an evaluation: every scene of a range, on several processes, scored against the simulator's truth."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from virst_engine.errors import SceneError
from virst_engine.evaluate.cases import Case, load_case
from virst_engine.evaluate.metrics import mean_score, score_frames
from virst_engine.evaluate.modes import System, load_system, run_mode
from virst_engine.evaluate.provenance import command_line, device_description, versions
from virst_engine.evaluate.settings import SETTLED_FRAMES, EvaluationSettings
from virst_engine.evaluate.summary import ExpressionScore, summarise
from virst_engine.evaluate.workers import in_processes
from virst_engine.session import Session
from virst_engine.slow.reasoner import InProcessClient, Reasoner
from virst_engine.types import ReasonerAnswer, ReasonerRequest

logger = logging.getLogger(__name__)

GONE_FRAMES = 4  # of a target that is out of sight for 0.4 s or more
MOVES = 0.15  # image widths; a target that is only hidden in part seems to move by less
STRETCHES = 10  # of the scored frames, whose figures are told one by one
PICTURE_FRAMES = 4  # frames of the scored stretch whose masks are kept for the example pictures

LoadSystem = Callable[[EvaluationSettings], System]
LoadCase = Callable[[EvaluationSettings, int], Case]


@dataclass(frozen=True)
class Answered:
    """One expression's score, with enough of its masks to draw it."""

    score: ExpressionScore
    target_ids: tuple[int, ...]
    picture_frames: tuple[int, ...]  # indices into the recording
    picture_masks: UInt8[np.ndarray, "frames bytes"]  # predicted masks of those frames, np.packbits of the flat mask


@dataclass(frozen=True)
class Evaluation:
    """`result` is what goes into the JSON file; `answered` is in order of scenes."""

    result: dict[str, Any]
    answered: tuple[Answered, ...]


def evaluate(
    settings: EvaluationSettings,
    *,
    workers: int = 1,
    on_scene: Callable[[int], None] = lambda scene: None,
    system_of: LoadSystem = load_system,
    case_of: LoadCase = load_case,
) -> Evaluation:
    """Score every scene of the settings. The figures do not depend on the number of workers.

    Args:
        workers: processes; 1 runs in this one.
        on_scene: called with the seed when a scene is done, in any order.
        system_of, case_of: what is evaluated on what; module-level functions, for they travel to the workers.

    Raises:
        VirstError: the weights or the simulator cannot be used.
    """
    started_s = time.perf_counter()
    by_scene: dict[int, list[Answered]] = {}
    for scene, answered in _all_scenes(settings, workers, system_of, case_of):
        by_scene[scene] = answered
        on_scene(scene)
    answered = [each for scene in settings.scenes for each in by_scene[scene]]
    result = {
        **summarise([each.score for each in answered]),
        "settings": settings.described(),
        "versions": versions(),
        "device": device_description(settings.device),
        "command": command_line(),
        "seconds": round(time.perf_counter() - started_s, 1),
    }
    return Evaluation(result, tuple(answered))


def evaluate_scene(system: System, settings: EvaluationSettings, scene: int, case_of: LoadCase) -> list[Answered]:
    """Score the expressions of one scene."""
    case = case_of(settings, scene)
    if not case.questions:
        return []
    sentences = [question.sentence for question in case.questions]
    if settings.shuffle_sentences:
        sentences = _other_sentences(settings, scene, case, case_of)
    masks = run_mode(system, settings, case.frames, case.goal_frame, sentences, seed=scene)
    truths = case.truth_masks()
    foreground = case.foreground()
    pictured = np.linspace(0, masks.shape[1] - 1, PICTURE_FRAMES).round().astype(int)
    answered = []
    for question, sentence, predicted, truth in zip(case.questions, sentences, masks, truths, strict=True):
        is_empty = ~predicted[: question.absent_frames].any(axis=(1, 2))
        per_frame = score_frames(predicted, truth, foreground)
        stretches = np.array_split(per_frame, min(STRETCHES, len(per_frame)))
        score = ExpressionScore(
            scene=scene,
            kind=question.kind,
            sentence=sentence,
            absent=not question.target_ids,
            score=mean_score(per_frame),
            absent_frames=len(is_empty),
            empty_frames=int(is_empty.sum()),
            empty_at_end=bool(is_empty[-1]),
            presence_right=float((predicted.any(axis=(1, 2)) == truth.any(axis=(1, 2))).mean()),
            settled_jf=mean_score(per_frame[min(SETTLED_FRAMES, len(per_frame) - 1) :]).jf,
            course=tuple(mean_score(stretch).jf for stretch in stretches),
            moves=case.travels(question.target_ids) >= MOVES,
            reappears=reappears(case.presence(question.target_ids), case.goal_frame),
        )
        answered.append(
            Answered(
                score,
                question.target_ids,
                tuple(int(t) + case.goal_frame for t in pictured),
                np.packbits(predicted[pictured].reshape(len(pictured), -1), axis=1),
            )
        )
    return answered


def reappears(is_present: Bool[np.ndarray, " t"], goal_frame: int) -> bool:
    """Whether a target that has shown is out of sight for GONE_FRAMES and shows again after the goal's frame."""
    (shows,) = np.nonzero(is_present)
    gone = np.diff(shows) - 1
    return bool(((gone >= GONE_FRAMES) & (shows[1:] > goal_frame)).any())


def measure_times(system: System, case: Case) -> tuple[float, float]:
    """(frame time, reasoner delay) in seconds, medians on this machine with one goal: what realtime mode needs.

    Any sentence will do, so a scene without questions is asked for one of ours.
    """
    sentence = case.questions[0].sentence if case.questions else "the red ball"
    timed = _TimedReasoner(system.reasoner)
    frame_s: list[float] = []
    with Session(system.config, system.stages, InProcessClient(timed)) as session:
        for number, frame in enumerate(case.frames):
            if number == case.goal_frame:
                session.set_goal(sentence, max_instances=1)
            asked = len(timed.seconds)
            started_s = time.perf_counter()
            session.step(frame)
            elapsed_s = time.perf_counter() - started_s
            if number > case.goal_frame and len(timed.seconds) == asked:
                frame_s.append(elapsed_s)
    return float(np.median(frame_s)), float(np.median(timed.seconds))


class _TimedReasoner:
    def __init__(self, reasoner: Reasoner) -> None:
        self._reasoner = reasoner
        self.seconds: list[float] = []

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        started_s = time.perf_counter()
        answer = self._reasoner.answer(request)
        self.seconds.append(time.perf_counter() - started_s)
        return answer


def _other_sentences(settings: EvaluationSettings, scene: int, case: Case, case_of: LoadCase) -> list[str]:
    """The sentences of the next scene that has any, one for each question of this one."""
    following = [*range(scene + 1, settings.last_scene), *range(settings.first_scene, scene)]
    for other in following:
        sentences = [question.sentence for question in case_of(settings, other).questions]
        if sentences:
            return [sentences[number % len(sentences)] for number in range(len(case.questions))]
    raise SceneError("shuffled sentences need a second scene with expressions; give a longer range of scenes")


def _all_scenes(
    settings: EvaluationSettings, workers: int, system_of: LoadSystem, case_of: LoadCase
) -> Iterator[tuple[int, list[Answered]]]:
    if workers <= 1:
        system = system_of(settings)
        for scene in settings.scenes:
            yield scene, evaluate_scene(system, settings, scene, case_of)
        return
    yield from in_processes(_work, {scene: (settings, system_of, case_of, scene) for scene in settings.scenes}, workers)


_systems: dict[EvaluationSettings, System] = {}  # of this worker process


def _work(settings: EvaluationSettings, system_of: LoadSystem, case_of: LoadCase, scene: int) -> list[Answered]:
    # Loaded here and not in the pool's initializer, whose exceptions never reach the caller.
    if settings not in _systems:
        _systems[settings] = system_of(settings)
    return evaluate_scene(_systems[settings], settings, scene, case_of)
