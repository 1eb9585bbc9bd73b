# SPDX-License-Identifier: Apache-2.0
"""Scores of expressions -> the figures of an evaluation (JSON) and a page that people read (Markdown)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from virst_engine.evaluate.metrics import SequenceScore, bootstrap_interval


@dataclass(frozen=True)
class ExpressionScore:
    """What one sentence about one scene was answered with."""

    scene: int  # seed
    kind: str
    sentence: str  # as the system was given it
    absent: bool  # nothing in the scene is meant
    score: SequenceScore
    absent_frames: int  # scored frames; where nothing is meant, those in which that is still so
    empty_frames: int  # of these, with an empty predicted mask
    empty_at_end: bool  # ... the last of them is one
    presence_right: float = 1.0  # share of all scored frames whose mask is empty where no target shows, and only there
    settled_jf: float = 0.0  # J&F of the frames from `settings.SETTLED_FRAMES` after the goal's on
    course: tuple[float, ...] = ()  # J&F of equal stretches of the scored frames, in order
    moves: bool = False  # a target travels a good part of the image in the recording
    reappears: bool = False  # a target is out of sight for a while and shows again in a scored frame


def summarise(scores: Sequence[ExpressionScore]) -> dict[str, Any]:
    """The figures of an evaluation, 0..100.

    `overall` and `by_kind` are means over expressions whose target exists (each the mean over its scored frames), with
    a 95 % bootstrap interval of J&F over scenes; a kind is never weighted. `absent` tells of the others: `right` is the
    share of goals whose mask is empty in every scored frame, `right_at_end` of those where it is empty in the last one
    (the settled answer), `right_frames` the share of frames. A sentence that begins to mean something later, when
    objects have moved, is scored until then; `shortened` counts these. `R` is ReVOS's robustness with masks as 0/1;
    `R_0_255` is the same as VISA, VRS-HQ and VIRST compute it. `reappearing` are the means over targets that are out of
    sight for a while and show again; `presence_right` is the share of frames whose mask is empty where no target shows,
    and only there; `course` J&F in equal stretches of the scored frames, in order.
    """
    present = [s for s in scores if not s.absent]
    absent = [s for s in scores if s.absent]
    frames_absent = sum(s.absent_frames for s in absent)
    return {
        "overall": _means(present),
        "by_kind": {kind: _means([s for s in present if s.kind == kind]) for kind in sorted({s.kind for s in present})},
        "absent": {
            "right": _percent([s.empty_frames == s.absent_frames for s in absent]),
            "right_at_end": _percent([s.empty_at_end for s in absent]),
            "right_frames": _round(100 * sum(s.empty_frames for s in absent) / frames_absent) if absent else None,
            "shortened": sum(s.absent_frames < s.score.frames for s in absent),
            "n": len(absent),
        },
        "reappearing": _means([s for s in present if s.reappears]),
        "presence_right": _percent([s.presence_right for s in present]),
        "course": [
            _percent([s.course[stretch] for s in present if len(s.course) > stretch])
            for stretch in range(max((len(s.course) for s in present), default=0))
        ],
        "R": _percent([s.score.r_01 for s in present]),
        "R_0_255": _percent([s.score.r_0255 for s in present]),
    }


def markdown(result: dict[str, Any]) -> str:
    """The page for one evaluation's JSON: settings, one row per kind, absence, robustness and how to read them."""
    settings = result["settings"]
    lines = [
        f"# Evaluation: {settings['family']}, {settings['mode']}, {settings['phrasings']} phrasings",
        "",
        f"`{result['command']}`",
        "",
        f"{settings['scenes_count']} scenes (seeds {settings['scenes']}) of {settings['frames']} frames,"
        f" {result['seconds']:.0f} s,"
        f" {result['device']}.",
        "",
        "| kind | J | F | J&F | 95 % interval | n |",
        "|---|---|---|---|---|---|",
    ]
    rows = [*result["by_kind"].items(), ("**overall**", result["overall"])]
    for kind, row in rows:
        interval = "-" if row["ci"] is None else f"{row['ci'][0]:.1f} .. {row['ci'][1]:.1f}"
        lines.append(
            f"| {kind} | {_cell(row['J'])} | {_cell(row['F'])} | {_cell(row['JF'])} | {interval} | {row['n']} |"
        )
    absent = result["absent"]
    lines += [
        "",
        f"Targets that do not exist (n = {absent['n']}): mask empty in every frame {_cell(absent['right'])} %,"
        f" in the last one {_cell(absent['right_at_end'])} %; {_cell(absent['right_frames'])} % of frames."
        f" {absent['shortened']} of them are scored until objects have moved so that they mean something.",
        "",
        f"Robustness R: {_cell(result['R'])} with masks as 0/1, {_cell(result['R_0_255'])} with"
        " masks as 0/255; compare within one convention only.",
        "",
        f"Targets that are out of sight for 0.4 s or more and show again (n = {result['reappearing']['n']}): J&F"
        f" {_cell(result['reappearing']['JF'])}. Whether a target shows is right in"
        f" {_cell(result['presence_right'])} % of frames. J&F over the scored time, in equal stretches:"
        f" {', '.join(_cell(value) for value in result['course']) or '-'}.",
        "",
        "J, F: DAVIS 2017, every frame from the goal's to the last; mean over frames, then over expressions. Intervals:"
        " bootstrap over scenes.",
        "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        "",
    ]
    if result.get("pictures"):
        lines += ["## Examples: best, median and worst of each kind", ""]
        lines += ["Upper row: what was published; lower row: the truth.", ""]
        for picture in result["pictures"]:
            lines += [
                f'**{picture["kind"]}, {picture["rank"]}**: "{picture["sentence"]}" (scene {picture["scene"]},'
                f" J&F {picture['JF']:.1f})",
                "",
                f"![{picture['kind']} {picture['rank']}]({picture['file']})",
                "",
            ]
    return "\n".join(lines)


def _means(scores: Sequence[ExpressionScore]) -> dict[str, Any]:
    jf = np.array([s.score.jf for s in scores], dtype=np.float64)
    interval = bootstrap_interval(jf, np.array([s.scene for s in scores], dtype=np.int64)) if len(scores) else None
    return {
        "J": _percent([s.score.j for s in scores]),
        "F": _percent([s.score.f for s in scores]),
        "JF": _percent([s.score.jf for s in scores]),
        "n": len(scores),
        "ci": None if interval is None else [_round(100 * end) for end in interval],
    }


def _percent(fractions: Sequence[float]) -> float | None:
    return _round(100 * float(np.mean(fractions))) if len(fractions) else None


def _round(value: float) -> float:
    return round(value, 2)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
