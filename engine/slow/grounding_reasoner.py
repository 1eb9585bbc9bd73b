# SPDX-License-Identifier: Apache-2.0
"""The method `grounding`: an object detector that takes words turns the sentence into boxes, on the newest frame.

A detector sees one frame and no time, so it looks at the newest one alone: an older frame would cost as much again, and
tell of the past what memory knows already. Its score decides by a threshold whether the object is there: from it on the
reasoner is sure (confidence 1), below it falls to 0 with the score. The best box travels in any case: where the object
is tracked already and the box agrees, a doubt takes nothing away (anchors.py).

Detectors match a noun phrase to a region ("red cup", "a cup with a lid"). They do not understand relations, order, time
or negation: of "the cup left of the laptop" they find cups, and often the laptop.
"""

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from virst_engine.errors import BadGoal
from virst_engine.slow.reasoner import refuse_words
from virst_engine.types import Prompt, ReasonerAnswer, ReasonerRequest

IDENTITY = "grounding"  # what the segmenter asks for: boxes mean the same to any weights
SMALLEST_BOX = 1e-3  # share of the image; thinner ones are widened to it
EVERYTHING = np.array([[0.0, 0.0, 1.0, 1.0]], np.float32)


@dataclass(frozen=True)
class Detections:
    """What a detector finds of one phrase in one image, the best first."""

    boxes: Float[np.ndarray, "k 4"]  # float32; left, top, right, bottom in shares of the image's width and height
    scores: Float[np.ndarray, " k"]  # float32, 0..1


@runtime_checkable  # the type checker of the tests asks for it
class Detector(Protocol):
    """Words and an image become boxes."""

    threshold: float  # the score from which this kind of detector usually means what it says

    def detect(self, image_rgb_u8: UInt8[np.ndarray, "height width 3"], phrase: str) -> Detections:
        """Weak ones too. Raises BadGoal for words that it cannot read."""
        ...


class GroundingReasoner:
    """`Reasoner` on a detector.

    `answer` raises BadGoal for a sentence that the detector cannot read, VirstError for a question.
    """

    def __init__(self, detector: Detector, *, threshold: float = 0.0, most_boxes: int = 1) -> None:
        """
        Args:
            threshold: score from which an object is there, 0..1; 0: the detector's usual one.
            most_boxes: of one answer, all of them from the threshold on; the object is what they show together.
        """
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"the threshold of the detector must be from 0 to below 1, got {threshold}")
        if most_boxes < 1:
            raise ValueError(f"an answer needs at least one box, got {most_boxes}")
        self._detector, self._most_boxes = detector, most_boxes
        self._threshold = threshold or detector.threshold

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        refuse_words(request, "a detector (reasoner.method grounding)")
        start = time.perf_counter()
        clip = request.clip
        found = self._detector.detect(clip.frames_rgb_u8[-1], phrase_of(request.sentence))
        best = float(found.scores[0]) if len(found.scores) else 0.0
        boxes = found.boxes[:1]
        if best >= self._threshold:
            boxes = found.boxes[found.scores >= self._threshold][: self._most_boxes]
        prompt = Prompt.of_boxes(
            int(clip.steps[-1]),
            int(clip.stamps_ns[-1]),
            _proper(boxes) if len(boxes) else EVERYTHING,
            confidence=1.0 if best >= self._threshold else 0.5 * best / self._threshold,
        )
        total_ms = (time.perf_counter() - start) * 1e3
        return ReasonerAnswer(
            request.request_id, request.epoch, request.goal_id, (prompt,), "", {"detect": total_ms, "total": total_ms}
        )


def phrase_of(sentence: str) -> str:
    """The sentence as detectors were trained on it: lower case, no full stop, no white space around.

    Raises BadGoal where nothing is left.
    """
    phrase = " ".join(sentence.lower().replace(".", " ").split())
    if not phrase:
        raise BadGoal(f"{sentence[:40]!r} names nothing that a detector could find; say a noun, like 'red cup'")
    return phrase


def _proper(boxes: Float[np.ndarray, "k 4"]) -> Float[np.ndarray, "k 4"]:
    """Within the image, and at least a little wide and high: detectors point beyond its edges."""
    low = np.clip(boxes[:, :2], 0.0, 1.0 - SMALLEST_BOX)
    high = np.clip(boxes[:, 2:], low + SMALLEST_BOX, 1.0)
    return np.concatenate((low, high), axis=1).astype(np.float32)
