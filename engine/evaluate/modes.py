# SPDX-License-Identifier: Apache-2.0
"""Three ways to run the system over a recorded scene: the whole video, a stream, a stream in real time."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig
from virst_engine.evaluate.settings import EvaluationSettings
from virst_engine.session import Session
from virst_engine.slow.reasoner import DelayedClient, InProcessClient, Reasoner, ReasonerClient
from virst_engine.types import Frame, ReasonerAnswer, ReasonerRequest
from virst_engine.video.offline import segment_whole_video


@dataclass(frozen=True)
class System:
    """What is evaluated."""

    stages: Stages
    reasoner: Reasoner
    config: EngineConfig


def load_system(settings: EvaluationSettings) -> System:
    """The model that the settings name, with their ablations. Raises WeightsError."""
    from virst_engine.weights import load_grounding, load_reasoner, load_stages

    config = settings.engine_config()
    reasoner: Reasoner
    if settings.method == "grounding":
        reasoner = load_grounding(settings.detector, config.model)
    else:
        reasoner = load_reasoner(
            config.model,
            settings.method,
            settings.reasoner_weights,
            initial_fusion=not settings.no_initial_fusion,
            second_fusion=not settings.no_second_fusion,
            top_k=settings.top_k,
        )
    return System(load_stages(config.model, config.engine, config.memory), reasoner, config)


def run_mode(
    system: System,
    settings: EvaluationSettings,
    frames: Sequence[Frame],
    goal_frame: int,
    sentences: Sequence[str],
    *,
    seed: int = 0,
) -> Bool[np.ndarray, "goals scored height width"]:
    """The masks that the system gives for each sentence from the goal's frame to the last, at the camera's size.

    `seed`: of random anchors.
    """
    if settings.mode == "offline":
        strategy = settings.anchor_strategy(seed)
        masks = segment_whole_video(system.stages, system.reasoner, frames, sentences, system.config, strategy=strategy)
        return masks[:, goal_frame:]
    if settings.mode == "stream":
        group = system.config.tracking.max_objects
        return np.concatenate(
            [
                _stream(system, settings, frames, goal_frame, sentences[start : start + group])
                for start in range(0, len(sentences), group)
            ]
        )
    # Goals share a reasoner and a processor: each is run alone, as the two measured times were.
    return np.concatenate([_realtime(system, settings, frames, goal_frame, sentence) for sentence in sentences])


def processed_frames(stamps_s: Sequence[float], frame_time_s: float) -> list[tuple[int, float]]:
    """Which frames a one-slot inbox lets through, newest wins, when each keeps the engine busy for `frame_time_s`.

    (number of the frame, when its turn begins), in order.
    """
    taken: list[tuple[int, float]] = []
    free_s, following = float("-inf"), 0
    while following < len(stamps_s):
        start_s = max(free_s, stamps_s[following])
        newest = bisect_right(stamps_s, start_s) - 1
        taken.append((newest, start_s))
        free_s, following = start_s + frame_time_s, newest + 1
    return taken


class FirstAnswerOnly:
    """Ablation of refreshing: each goal's first request is answered, later ones are lost.

    With `newest_anchor_only`, the answer holds no prompt but that of the frame in which the goal was set.
    """

    def __init__(self, client: ReasonerClient, *, newest_anchor_only: bool = False) -> None:
        self._client, self._newest_anchor_only = client, newest_anchor_only
        self._asked: set[str] = set()

    def submit(self, request: ReasonerRequest) -> None:
        if request.goal_id not in self._asked:
            self._asked.add(request.goal_id)
            self._client.submit(request)

    def poll(self) -> list[ReasonerAnswer]:
        answers = self._client.poll()
        if self._newest_anchor_only:
            answers = [replace(answer, prompts=answer.prompts[-1:]) for answer in answers]
        return answers

    def cancel(self, goal_id: str) -> None:
        self._client.cancel(goal_id)

    def status(self) -> str:
        return self._client.status()

    def close(self) -> None:
        self._client.close()


def _ablated(client: ReasonerClient, settings: EvaluationSettings) -> ReasonerClient:
    if settings.no_refresh or settings.first_anchor_only:
        return FirstAnswerOnly(client, newest_anchor_only=settings.first_anchor_only)
    return client


def _stream(
    system: System, settings: EvaluationSettings, frames: Sequence[Frame], goal_frame: int, sentences: Sequence[str]
) -> Bool[np.ndarray, "goals scored height width"]:
    client = _ablated(InProcessClient(system.reasoner), settings)
    masks = []
    with Session(system.config, system.stages, client) as session:
        for number, frame in enumerate(frames):
            if number == goal_frame:
                for sentence in sentences:
                    session.set_goal(sentence, max_instances=1)  # truth is the union
            result = session.step(frame)
            if number >= goal_frame:
                masks.append(np.stack([found.mask for found in result.objects]))
    return np.stack(masks, axis=1)


def _realtime(
    system: System, settings: EvaluationSettings, frames: Sequence[Frame], goal_frame: int, sentence: str
) -> Bool[np.ndarray, "1 scored height width"]:
    delayed = DelayedClient(system.reasoner, settings.reasoner_delay_s)
    client = _ablated(delayed, settings)
    starts_s = dict(processed_frames([frame.stamp_ns / 1e9 for frame in frames], settings.frame_time_s))
    finished: list[tuple[float, Bool[np.ndarray, "height width"]]] = [
        (0.0, np.zeros(frames[0].image_rgb_u8.shape[:2], bool))
    ]
    masks = []
    with Session(system.config, system.stages, client) as session:
        for number, frame in enumerate(frames):
            if number >= goal_frame and not session.goals():
                session.set_goal(sentence, max_instances=1)  # truth is the union
            if number in starts_s:
                delayed.advance(round(starts_s[number] * 1e9))
                result = session.step(frame)
                if result.objects:
                    finished.append((starts_s[number] + settings.frame_time_s, result.objects[0].mask))
            if number < goal_frame:
                continue
            if number in starts_s:  # a mask belongs to its own frame, however late it is
                masks.append(finished[-1][1])
            else:  # a frame that was dropped is judged by the newest mask that was there
                masks.append(next(mask for end_s, mask in reversed(finished) if end_s <= frame.stamp_ns / 1e9))
    return np.stack(masks)[None]
