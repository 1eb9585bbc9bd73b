# SPDX-License-Identifier: Apache-2.0
"""Recorded scenes whose every pixel is known: two squares that move, and three sentences about them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from virst_engine.data.clips import RecordedScene

SIDE, FRAMES = 64, 24
RED, BLUE = 1, 2  # labels of colours
BALL, BOX = 1, 2  # labels of shapes
ARM = 255


@dataclass(frozen=True)
class Said:
    text: str
    kind: str
    target_ids: tuple[int, ...]
    answer: str
    landmark_ids: tuple[int, ...] = ()

    @property
    def mirrored_text(self) -> str:
        return " ".join({"red": "blue", "blue": "red"}.get(word, word) for word in self.text.split())


THE_BALL = Said("the red ball", "attribute", (0,), "red ball")
THE_BOX = Said("the blue box", "motion", (1,), "blue box")
NOTHING = Said("the big can", "absent", (), "none")
ALL = Said("the red ball and the blue box", "plural", (0, 1), "two")


class FakeScene:
    """Object 0, a red square of 16 pixels, moves right by a pixel a frame; object 1, blue, of 12, leaves upwards.

    The first pixel of every frame holds the scene's and the frame's number. The arm covers the last column.
    """

    colours = (RED, BLUE)
    shapes = (BALL, BOX)

    def __init__(self, number: int, said: Sequence[Said] = (THE_BALL, THE_BOX, NOTHING)) -> None:
        self._said = said
        self.frames_rgb_u8 = np.full((FRAMES, SIDE, SIDE, 3), 90, np.uint8)
        self.instance_masks = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
        for t in range(FRAMES):
            frame, mask = self.frames_rgb_u8[t], self.instance_masks[t]
            for value, colour, area in (
                (1, (220, 30, 30), (slice(40, 56), slice(8 + t, 24 + t))),
                (2, (30, 30, 220), (slice(max(0, 20 - 2 * t), max(0, 32 - 2 * t)), slice(40, 52))),
            ):
                frame[area], mask[area] = colour, value
            mask[:, -1] = ARM
            frame[0, 0] = (number, t, 0)
        self.asked: list[tuple[int, int, tuple[str, ...], float]] = []

    def sentences(
        self,
        query_frame: int,
        count: int,
        rng: np.random.Generator,
        *,
        kinds: tuple[str, ...] = (),
        absent_share: float = 0.0,
    ) -> Sequence[Said]:
        self.asked.append((query_frame, count, kinds, absent_share))
        return [self._said[int(rng.integers(len(self._said)))] for _ in range(count)]


def two_scenes() -> list[RecordedScene]:
    return [FakeScene(0), FakeScene(1)]
