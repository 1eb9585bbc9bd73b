# SPDX-License-Identifier: Apache-2.0
"""One simulated scene as evaluations use it: its frames, questions balanced over kinds, and the truth."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import numpy as np
from jaxtyping import Bool, UInt8

from virst_engine.errors import SceneError
from virst_engine.evaluate.settings import FRAMES, GOAL_FRAME, RATE_HZ, EvaluationSettings
from virst_engine.sim.queries import Query
from virst_engine.sim.recording import Recording
from virst_engine.sim.spec import Family
from virst_engine.types import Frame

Split = Literal["train", "held-out", "all"]

WIDTH, HEIGHT = 320, 240  # of the camera
FIRST_STAMP_NS = 1_000_000_000
ABSENT_EVERY = 5  # every fifth question is about something that is not there
EARLY_FRAMES = 200  # of a long scene, in one of which its goals are set
MORE_TRIES = 4
STILL_ABSENT_EVERY = 3  # frames from one look to the next whether that is so


@dataclass(frozen=True)
class Question:
    """A sentence whose truth is known in the goal's frame."""

    kind: str
    sentence: str
    target_ids: tuple[int, ...]  # of the scene's objects; empty: nothing is meant
    absent_frames: int | None = None  # that nothing is meant holds for so many frames from the goal's on; None: for all
    answer: str = ""  # what is meant in words, like "red ball"; "none" where nothing is


@dataclass(frozen=True)
class Case:
    """One scene; `instance_mask` holds k + 1 for object k in every frame."""

    frames: tuple[Frame, ...]
    instance_mask: UInt8[np.ndarray, "t h w"]
    goal_frame: int
    objects: int
    questions: tuple[Question, ...]

    def truth_masks(self) -> Bool[np.ndarray, "questions scored h w"]:
        """Union of the targets' visible pixels, from the goal's frame to the last."""
        scored = self.instance_mask[self.goal_frame :]
        return np.stack([np.isin(scored, [k + 1 for k in question.target_ids]) for question in self.questions])

    def presence(self, target_ids: tuple[int, ...]) -> Bool[np.ndarray, " t"]:
        """In which frames of the whole recording a pixel of a target shows."""
        return np.asarray(np.isin(self.instance_mask, [k + 1 for k in target_ids]).any(axis=(1, 2)))

    def travels(self, target_ids: tuple[int, ...]) -> float:
        """How far a target gets from where it was first seen, at most, in image widths."""
        width = self.instance_mask.shape[2]
        farthest = 0.0
        for k in target_ids:
            seen = [np.argwhere(mask == k + 1) for mask in self.instance_mask]
            middles = [pixels.mean(axis=0) for pixels in seen if len(pixels)]
            farthest = max([farthest, *(float(np.linalg.norm(middle - middles[0])) for middle in middles)])
        return farthest / width

    def foreground(self) -> Bool[np.ndarray, "scored h w"]:
        """Every object's visible pixels in the same frames; the arm is none."""
        scored = self.instance_mask[self.goal_frame :]
        return (scored > 0) & (scored <= self.objects)


@lru_cache(maxsize=4)  # shuffled sentences ask for the neighbouring scene
def load_case(settings: EvaluationSettings, scene: int) -> Case:
    """Simulate and draw one scene and ask about it. The same settings and seed give the same case on every machine.

    Raises:
        SceneError: no such family, or no OpenGL to draw with.
    """
    from virst_engine.sim.mujoco_world import record
    from virst_engine.sim.scenes import generate_scene_and_motion

    duration_s = settings.frames / RATE_HZ
    spec, motion = generate_scene_and_motion(scene, cast(Family, settings.family), fps=RATE_HZ, duration_s=duration_s)
    recording = record(spec, fps=RATE_HZ, duration_s=duration_s, width=WIDTH, height=HEIGHT, trajectory=motion)
    assert recording.image_rgb_u8 is not None
    assert recording.instance_mask is not None
    frames = tuple(
        Frame(image, FIRST_STAMP_NS + round(float(time_s) * 1e9))
        for image, time_s in zip(recording.image_rgb_u8, recording.time_s, strict=True)
    )
    if settings.long_s:
        goal_frame, questions = ask_early(recording, settings, scene)
    else:
        goal_frame, questions = GOAL_FRAME, ask(recording, settings, scene)
    return Case(frames, recording.instance_mask, goal_frame, len(spec.objects), questions)


def ask_early(recording: Recording, settings: EvaluationSettings, scene: int) -> tuple[int, tuple[Question, ...]]:
    """The frame of the goals of a long scene, and at most `per_scene` temporal questions about it.

    It is the first one in which each of TempVRS's families has a clear sentence, or of the first EARLY_FRAMES the one
    in which most have. What is meant in it is the target for the rest of the scene, whether it shows or not.
    """
    from virst_engine.sim.queries import TEMPORAL_KINDS
    from virst_engine.sim.queries import ask as ask_each_kind

    rng = np.random.default_rng([scene, 4])
    split = settings.phrasings
    best: list[Query] = []
    for frame in range(GOAL_FRAME, min(GOAL_FRAME + EARLY_FRAMES, len(recording))):
        found = ask_each_kind(recording, frame, rng=rng, split=split)
        best = max(best, found, key=len)
        if len(best) == len(TEMPORAL_KINDS):
            break
    if not best:
        return GOAL_FRAME, ()
    goal_frame = best[0].query_frame
    for _ in range(MORE_TRIES):  # other sentences of the same kinds, until there are enough
        texts = {query.expression.text for query in best}
        more = ask_each_kind(recording, goal_frame, rng=rng, split=split)
        best += [query for query in more if query.expression.text not in texts]
    said = [query.expression for query in best[: settings.per_scene]]
    return goal_frame, tuple(Question(e.kind, e.text, e.target_ids, answer=e.answer) for e in said)


def ask(recording: Recording, settings: EvaluationSettings, scene: int) -> tuple[Question, ...]:
    """`per_scene` questions about the goal's frame: kinds take turns over the scenes, every fifth one is absent.

    A kind that the scene has no clear sentence for gives its turn to another one; a scene may have fewer questions.
    Nothing depends on the range of scenes, so any two evaluations ask the same about the same scene.
    """
    from virst_engine.sim.expressions import KINDS_FULL, KINDS_PLAIN, sample_expressions

    kinds = KINDS_FULL if settings.family == "full" else KINDS_PLAIN
    rng = np.random.default_rng([scene, 2])
    questions: dict[str, Question] = {}
    first = scene * settings.per_scene
    for number in range(first, first + settings.per_scene):
        wants_absent = number % ABSENT_EVERY == ABSENT_EVERY - 1
        turn = number - number // ABSENT_EVERY
        for kind in (kinds[turn % len(kinds)], *rng.permutation(kinds).tolist()):
            try:
                (found,) = sample_expressions(
                    recording,
                    rng,
                    1,
                    GOAL_FRAME,
                    cast(Split, settings.phrasings),
                    kinds=(kind,),
                    absent_share=1.0 if wants_absent else 0.0,
                )
            except SceneError:
                continue
            if found.text not in questions:
                frames = None if found.target_ids else _frames_absent(recording, found.text)
                questions[found.text] = Question(found.kind, found.text, found.target_ids, frames, found.answer)
                break
    return tuple(questions.values())


def _frames_absent(recording: Recording, sentence: str) -> int:
    """For how many frames from the goal's on a sentence clearly means nothing: "the can moving left" may do so later.

    The system goes on looking for what it has not found, so what it finds after that is not wrong.
    """
    from virst_engine.sim.expressions import find_meaning

    last = GOAL_FRAME
    for frame in (*range(GOAL_FRAME + 1, FRAMES - 1, STILL_ABSENT_EVERY), FRAMES - 1):
        meaning = find_meaning(recording, sentence, query_frame=frame)
        if meaning is None or meaning.target_ids:
            break
        last = frame
    return last - GOAL_FRAME + 1
