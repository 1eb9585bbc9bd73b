# SPDX-License-Identifier: Apache-2.0
"""Queries about a recording with their truth over all of it: what a sentence means in its frame, and when that shows.

TempVRS's three families are the kinds `order`, `event` and `count` of the grammar (papers: temporal order, temporal
event, temporal count). A sentence is about the seconds before its frame; what it means then is the target for good.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from virst_engine.errors import SceneError
from virst_engine.sim.expressions import Expression, sample_expressions
from virst_engine.sim.recording import Recording, stretches

TRIES = 16  # frames of a stretch in which a clear sentence of one kind is looked for
TEMPORAL_KINDS = ("order", "event", "count")


@dataclass(frozen=True)
class Query:
    """A sentence as it is understood in `query_frame`, and the frames of the whole recording that show its target."""

    query_frame: int
    expression: Expression
    present: tuple[tuple[int, int], ...]  # (first, last) of each stretch of frames with a pixel of a target

    def to_json(self) -> dict[str, Any]:
        return {
            "query_frame": self.query_frame,
            "sentence": self.expression.text,
            "kind": self.expression.kind,
            "target_ids": list(self.expression.target_ids),
            "answer": self.expression.answer,
            "present": [list(stretch) for stretch in self.present],
        }


def ask(
    recording: Recording,
    query_frame: int,
    kinds: Sequence[str] = TEMPORAL_KINDS,
    *,
    rng: np.random.Generator,
    split: str = "train",
) -> list[Query]:
    """One query of each kind that has a clear sentence about something there in this frame; other kinds are left out.

    Raises:
        SceneError: no such frame, or the recording has no images.
    """
    found = []
    for kind in kinds:
        try:
            (expression,) = sample_expressions(recording, rng, 1, query_frame, split, kinds=(kind,), absent_share=0.0)
        except SceneError:
            if not 0 <= query_frame < len(recording):
                raise
            continue
        present = tuple(stretches(recording.presence(expression.target_ids)))
        found.append(Query(query_frame, expression, present))
    return found


def ask_all_along(
    recording: Recording, count: int, kinds: Sequence[str], *, rng: np.random.Generator, first_frame: int
) -> list[Query]:
    """At most `count` queries, evenly spread over the recording, the kinds in turns.

    A stretch in which the kind whose turn it is has no clear sentence is asked about by another kind, or not at all.
    """
    parts = np.array_split(np.arange(first_frame, len(recording)), count)
    found: list[Query] = []
    for number, part in enumerate(parts):
        if not len(part):
            continue
        turns = [kinds[(number + turn) % len(kinds)] for turn in range(len(kinds))]
        frames = rng.permutation(part).tolist()[:TRIES]
        clear = (query for kind in turns for frame in frames for query in ask(recording, frame, (kind,), rng=rng))
        found += itertools.islice(clear, 1)
    return found
