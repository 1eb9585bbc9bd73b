# SPDX-License-Identifier: Apache-2.0
"""The scores of a comparison -> figures of its rows, differences between them, and what they say of the papers' order.

Figures are 0..100. `sd` is the standard deviation of the means of the seeds, which are disjoint ranges of scenes: the
weights are trained once. Intervals are 95 %, bootstrap over all scenes. A difference is of the same sentences about the
same scenes, pair by pair, so its interval is narrower than those of the two rows would suggest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from virst_engine.evaluate.compare_rows import (
    CLAIMS,
    DELAYED,
    MOTION,
    MOVING,
    OFFLINE,
    PRESENT,
    REAPPEARING,
    STREAM,
    STREAM_WITHIN_POINTS,
    SUBSETS,
    Claim,
)
from virst_engine.evaluate.comparison import SEEDS, Comparison, Run
from virst_engine.evaluate.metrics import bootstrap_interval
from virst_engine.evaluate.summary import ExpressionScore

FEWEST_SCENES = 10  # a bootstrap over fewer is surer than it may be: no order is told from them
REPRODUCED, REVERSED, UNCLEAR, NOT_RUN = "reproduced", "reversed", "not distinguishable", "not run"
MET, MISSED = "met", "missed"

Choose = Callable[[ExpressionScore], bool]
Value = Callable[[ExpressionScore], float]

IN_SUBSET: dict[str, Choose] = {
    PRESENT: lambda score: True,
    MOTION: lambda score: score.moves,
    REAPPEARING: lambda score: score.reappears,
    MOVING: lambda score: score.moves or score.reappears,
}


@dataclass(frozen=True)
class Figure:
    """A mean over sentences, 0..100, how far it varies over seeds, and its interval; None where there is too little."""

    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    n: int
    scenes: int = 0  # that the sentences are about


@dataclass(frozen=True)
class Verdict:
    """What the figures say of a claim. `difference` is better minus worse."""

    claim: Claim
    difference: Figure
    says: str


def figures(comparison: Comparison) -> dict[str, Any]:
    """What goes into the JSON file and the plot: figures of each row and way, what streaming costs, the verdicts."""
    rows: dict[str, Any] = {}
    for row in comparison.rows:
        if row.name in comparison.skipped:
            continue
        ways = {}
        for way in row.ways:
            run = comparison.run_of(row.name, way)
            assert run is not None
            ways[way] = run_figures(comparison, run)
        rows[row.name] = {"ways": ways, "streaming": streaming_costs(comparison, row.name)}
    return {
        "rows": rows,
        "claims": [
            {
                "source": verdict.claim.source,
                "better": verdict.claim.better,
                "worse": verdict.claim.worse,
                "way": verdict.claim.way,
                "subset": verdict.claim.subset,
                "required_points": verdict.claim.points or None,
                "difference": _plain(verdict.difference),
                "says": verdict.says,
            }
            for verdict in verdicts(comparison)
        ],
    }


def run_figures(comparison: Comparison, run: Run) -> dict[str, Any]:
    """The figures of one run over the scenes that it has."""
    present = [score for score in _all_scores(comparison, run) if not score.absent]
    absent = [score for score in _all_scores(comparison, run) if score.absent]
    kinds = sorted({score.kind for score in present})
    figure = _figure_maker(comparison)
    return {
        "scenes": len([scene for scene in comparison.scenes.in_turns if scene in run.scores]),
        "failed": run.failed,
        "reasoner_delay_ms": round(1e3 * run.settings.reasoner_delay_s, 1),
        "J": _plain(figure(present, lambda score: score.score.j)),
        "F": _plain(figure(present, lambda score: score.score.f)),
        "JF": {
            subset: _plain(figure([score for score in present if IN_SUBSET[subset](score)], _jf)) for subset in SUBSETS
        },
        "by_kind": {kind: _plain(figure([score for score in present if score.kind == kind], _jf)) for kind in kinds},
        "settled_JF": _plain(figure(present, lambda score: score.settled_jf)),
        "R": _plain(figure(present, lambda score: score.score.r_01)),
        "R_0_255": _plain(figure(present, lambda score: score.score.r_0255)),
        "absent_right": _plain(figure(absent, lambda score: float(score.empty_frames == score.absent_frames))),
    }


def streaming_costs(comparison: Comparison, row: str) -> dict[str, Any]:
    """J&F of each way of streaming minus that of the whole video known: all frames, and those from a second on."""
    offline = comparison.run_of(row, OFFLINE)
    costs: dict[str, Any] = {}
    for way in (STREAM, DELAYED):
        run = comparison.run_of(row, way)
        if run is None or offline is None:
            continue
        costs[way] = {
            "all_frames": _plain(difference(comparison, run, offline)),
            "settled": _plain(difference(comparison, run, offline, value=lambda score: score.settled_jf)),
        }
    return costs


def verdicts(comparison: Comparison, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """What the figures say of the claims whose rows are among those of the comparison."""
    names = {row.name for row in comparison.rows}
    found = []
    for claim in claims:
        if not {claim.better, claim.worse} <= names:
            continue
        better, worse = comparison.run_of(claim.better, claim.way), comparison.run_of(claim.worse, claim.way)
        if better is None or worse is None:
            found.append(Verdict(claim, Figure(None, None, None, 0), NOT_RUN))
            continue
        gap = difference(comparison, better, worse, choose=IN_SUBSET[claim.subset])
        found.append(Verdict(claim, gap, verdict_of(gap, claim)))
    return found


def verdict_of(gap: Figure, claim: Claim) -> str:
    """An order is reproduced or reversed where the interval of the difference leaves out 0; a requirement is met by
    the mean."""
    if gap.mean is None or gap.interval is None:
        return NOT_RUN
    low, high = gap.interval
    order = UNCLEAR
    if gap.scenes >= FEWEST_SCENES and not low <= 0 <= high:
        order = REPRODUCED if low > 0 else REVERSED
    if not claim.is_required:
        return order
    return f"{MET if gap.mean >= claim.points else MISSED}; {order}"


def streams_within(cost: Figure) -> str:
    """Whether streaming costs no more than is allowed."""
    if cost.mean is None:
        return NOT_RUN
    return MET if cost.mean >= -STREAM_WITHIN_POINTS else MISSED


def difference(
    comparison: Comparison, one: Run, other: Run, *, choose: Choose = IN_SUBSET[PRESENT], value: Value | None = None
) -> Figure:
    """One run's mean minus the other's, over the sentences about something that both have answered."""
    value = value or _jf
    pairs = [
        (a, b)
        for scene in comparison.scenes.in_turns
        if scene in one.scores and scene in other.scores
        for a, b in zip(one.scores[scene], other.scores[scene], strict=True)
        if not a.absent and choose(a)
    ]
    scenes = [a.scene for a, _ in pairs]
    return _figure(comparison, scenes, [value(a) - value(b) for a, b in pairs])


def _jf(score: ExpressionScore) -> float:
    return score.score.jf


def _all_scores(comparison: Comparison, run: Run) -> list[ExpressionScore]:
    return [score for scene in comparison.scenes.in_turns for score in run.scores.get(scene, [])]


def _figure_maker(comparison: Comparison) -> Callable[[Sequence[ExpressionScore], Value], Figure]:
    return lambda scores, value: _figure(comparison, [each.scene for each in scores], [value(each) for each in scores])


def _figure(comparison: Comparison, scenes: Sequence[int], values: Sequence[float]) -> Figure:
    if not values:
        return Figure(None, None, None, 0)
    of_scene, all_values = np.array(scenes, dtype=np.int64), np.array(values, dtype=np.float64)
    of_seeds = [np.isin(of_scene, np.array(comparison.scenes.of_seed(seed))) for seed in range(SEEDS)]
    means = [float(all_values[of_seed].mean()) for of_seed in of_seeds if of_seed.any()]
    low, high = bootstrap_interval(all_values, of_scene)
    return Figure(
        mean=round(100 * float(all_values.mean()), 2),
        sd=round(100 * float(np.std(means, ddof=1)), 2) if len(means) > 1 else None,
        interval=(round(100 * low, 2), round(100 * high, 2)),
        n=len(values),
        scenes=len(set(scenes)),
    )


def _plain(figure: Figure) -> dict[str, Any]:
    interval = None if figure.interval is None else list(figure.interval)
    return {"mean": figure.mean, "sd": figure.sd, "ci": interval, "n": figure.n}
