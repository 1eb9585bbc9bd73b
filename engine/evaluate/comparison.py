# SPDX-License-Identifier: Apache-2.0
"""A comparison: the rows, the scenes that all of them see, and the scores that there are so far."""

from dataclasses import dataclass, field

from virst_engine.evaluate.compare_rows import Row
from virst_engine.evaluate.settings import FIRST_EVALUATION_SEED, EvaluationSettings
from virst_engine.evaluate.summary import ExpressionScore

FIRST_COMPARED_SEED = FIRST_EVALUATION_SEED + 100_000  # the rows were written with scenes of the first ones in sight
SEEDS = 3  # disjoint ranges of scenes; the weights are trained once
LARGEST_SEED_SCENES = 1000


@dataclass(frozen=True)
class ComparedScenes:
    """Which scenes: `per_seed` of each of `SEEDS` ranges. ValueError for more than a range holds."""

    per_seed: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.per_seed <= LARGEST_SEED_SCENES:
            raise ValueError(f"scenes per seed must be 1..{LARGEST_SEED_SCENES}, got {self.per_seed}")

    def of_seed(self, seed: int) -> range:
        first = FIRST_COMPARED_SEED + seed * LARGEST_SEED_SCENES
        return range(first, first + self.per_seed)

    @property
    def in_turns(self) -> list[int]:
        """All of them, the seeds in turns: what a part of a run has done is of all."""
        return [self.of_seed(seed)[number] for number in range(self.per_seed) for seed in range(SEEDS)]


@dataclass
class Run:
    """One way of one or several rows: the settings that it is run with, and what came out so far."""

    key: str
    settings: EvaluationSettings
    scores: dict[int, list[ExpressionScore]] = field(default_factory=dict)  # by scene
    failed: str = ""  # why it was given up

    def missing(self, scenes: list[int]) -> list[int]:
        return [] if self.failed else [scene for scene in scenes if scene not in self.scores]


@dataclass
class Comparison:
    """The rows with their runs. `skipped`: row -> why it was not run."""

    rows: tuple[Row, ...]
    scenes: ComparedScenes
    runs: dict[str, Run]
    key_of: dict[tuple[str, str], str]  # (row, way) -> run
    skipped: dict[str, str]

    def run_of(self, row: str, way: str) -> Run | None:
        key = self.key_of.get((row, way))
        return None if key is None else self.runs[key]
