# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: a table per group of rows, what the papers lead one to expect, and why it is so or not.

The last part is written by people: what stands between the two marks in a page survives when it is written again.
"""

from pathlib import Path
from typing import Any

from virst_engine.evaluate.compare_rows import (
    DELAYED,
    GROUPS,
    MOTION,
    MOVING,
    OFFLINE,
    PRESENT,
    REAPPEARING,
    STREAM,
    STREAM_WITHIN_POINTS,
    Row,
)
from virst_engine.evaluate.compare_summary import (
    FEWEST_SCENES,
    Figure,
    Verdict,
    run_figures,
    streaming_costs,
    streams_within,
    verdicts,
)
from virst_engine.evaluate.comparison import SEEDS, Comparison
from virst_engine.evaluate.provenance import code_version, command_line, device_description, versions
from virst_engine.evaluate.runner import MOVES
from virst_engine.evaluate.settings import RATE_HZ

BEGIN, END = "<!-- by hand: kept when this page is written again -->", "<!-- end of what is kept -->"
NOT_YET = "Not written yet."

WAY_WORDS = {
    OFFLINE: "whole video",
    STREAM: "stream, answers at once",
    DELAYED: "stream, answers as late as measured",
}


def write_page(comparison: Comparison, file: Path) -> str:
    """Write the page, keep what people wrote into it, and return it."""
    why = written_by_hand(file.read_text(encoding="utf-8")) if file.exists() else ""
    text = page(comparison, why)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return text


def written_by_hand(text: str) -> str:
    """What stands between the two marks; empty where there are none."""
    _, begin, rest = text.partition(BEGIN)
    kept, end, _ = rest.partition(END)
    return kept.strip() if begin and end and kept.strip() != NOT_YET else ""


def page(comparison: Comparison, why: str = "") -> str:
    """The page as Markdown; `why` is what people have to say about the figures."""
    lines = ["# Methods, anchors and ablations on simulated scenes", "", f"`{command_line()}`", "", *_how(comparison)]
    for group, title in GROUPS.items():
        rows = [row for row in comparison.rows if row.group == group]
        if rows:
            heading = title.replace("<", "\\<")  # or Markdown takes <TEP> for HTML, and shows nothing
            lines += ["", f"## {heading}", "", *_table(comparison, rows)]
    lines += ["", "## The papers' order, and what is required", "", *_claims(comparison)]
    lines += ["", "## Why", "", BEGIN, why or NOT_YET, END, ""]
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += [f"{device_description()}. Code {code_version()}. {found}.", ""]
    return "\n".join(lines)


def _how(comparison: Comparison) -> list[str]:
    seeds = map(comparison.scenes.of_seed, range(SEEDS))
    ranges = ", ".join(f"{scenes.start}:{scenes.stop}" for scenes in seeds)
    some = comparison.rows[0].settings
    length = f"{some.frames} frames ({some.frames / RATE_HZ:g} s)"
    return [
        f"Scenes of family {some.family}, {length} each, that no training has seen: {SEEDS} seeds of"
        f" {comparison.scenes.per_seed} scenes each ({ranges}), up to {some.per_scene} sentences a scene."
        " A seed here is a range of scenes: the weights are trained once, so that the spread tells of scenes and"
        " sentences, not of trainings.",
        "",
        "J&F in points, mean over sentences whose target is there, every frame from the goal's on against the truth of"
        " that same frame; ± the standard deviation of the seeds' means; in brackets the 95 % interval, bootstrap over"
        " all scenes. Differences are taken sentence by sentence between rows that saw the same scenes.",
        "",
        "Ways: *whole video* knows all frames and asks once (VIRST as published). *Stream* knows each frame and those"
        " before it, no frame is left out; its answers come at once, or as late as the method's reasoner was measured"
        f" to take here. *{MOTION}*: by {MOVES} image widths or more in the recording; *{REAPPEARING}*: it is out of"
        " sight for 0.4 s or more and shows again after the goal was set.",
        "",
        "R: ReVOS's robustness with masks as 0/1, and as 0/255 (VISA's, VRS-HQ's and VIRST's tool); compare within one"
        " convention only. Absent: sentences about nothing whose mask is empty in every frame, in percent.",
        "",
        "Rows without fusion switch it off in weights that were trained with it; the paper trains each anew. The guided"
        " anchor is chosen by the reasoner's own confidence that the target is in a frame, where the paper asks CLIP.",
    ]


def _table(comparison: Comparison, rows: list[Row]) -> list[str]:
    lines = [
        f"| row | way | J&F | {MOTION} | {REAPPEARING} | {MOVING} | stream - whole video | R 0/1 | R 0/255 | absent "
        "| n |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in rows:
        if row.name in comparison.skipped:
            lines.append(f"| {row.label} (`{row.name}`) | skipped | - | - | - | - | - | - | - | - | - |")
            notes += ["", f"`{row.name}` was skipped: {_one_line(comparison.skipped[row.name])}"]
            continue
        costs = streaming_costs(comparison, row.name)
        for way in row.ways:
            run = comparison.run_of(row.name, way)
            assert run is not None
            told = run_figures(comparison, run)
            cost = _signed(_figure(costs[way]["all_frames"])) if way in costs else "-"
            jf = told["JF"]
            cells = [
                f"{row.label} (`{row.name}`)",
                WAY_WORDS[way] + (f" ({told['reasoner_delay_ms']:.0f} ms)" if way == DELAYED else ""),
                f"**{_cell(_figure(jf[PRESENT]))}**",
                _short(_figure(jf[MOTION])),
                _short(_figure(jf[REAPPEARING])),
                _short(_figure(jf[MOVING])),
                cost,
                _with_sd(_figure(told["R"])),
                _with_sd(_figure(told["R_0_255"])),
                _with_sd(_figure(told["absent_right"])),
                str(jf[PRESENT]["n"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
            done, wanted = told["scenes"], len(comparison.scenes.in_turns)
            if told["failed"]:
                notes += ["", f"`{row.name}`, {WAY_WORDS[way]}, was given up: {_one_line(told['failed'])}"]
            elif done < wanted:
                notes += ["", f"`{row.name}`, {WAY_WORDS[way]}: {done} of {wanted} scenes so far."]
        for way, of_way in costs.items():
            settled = _figure(of_way["settled"])
            verdict = streams_within(_figure(of_way["all_frames"]))
            notes += [
                "",
                f"`{row.name}`, {WAY_WORDS[way]}: within {STREAM_WITHIN_POINTS:.0f} points of the whole video:"
                f" {verdict}. From one second after the goal on, when no first answer is waited for:"
                f" {_signed(settled)} ({streams_within(settled)}).",
            ]
    return lines + notes


def _claims(comparison: Comparison) -> list[str]:
    found = verdicts(comparison)
    if not found:
        return ["None of the rows of this page are compared by a paper."]
    lines = [
        "An order is reproduced, or reversed, where the 95 % interval of the difference leaves out 0, and else not"
        f" distinguishable, as is what fewer than {FEWEST_SCENES} scenes tell. A requirement is met by the mean.",
        "",
        "| source | order | sentences | in the paper | here | says |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [_claim(verdict) for verdict in found]


def _claim(verdict: Verdict) -> str:
    claim = verdict.claim
    source = f"required: {claim.points:.0f} points" if claim.is_required else claim.source
    paper = "-" if claim.papers is None else f"{claim.papers[0]} > {claim.papers[1]}"
    gap = _signed(verdict.difference)
    return (
        f"| {source} | `{claim.better}` > `{claim.worse}`, {WAY_WORDS[claim.way]} | {claim.subset}"
        f" (n = {verdict.difference.n}) | {paper} | {gap} | {verdict.says} |"
    )


def _figure(raw: dict[str, Any]) -> Figure:
    interval = None if raw["ci"] is None else (raw["ci"][0], raw["ci"][1])
    return Figure(raw["mean"], raw["sd"], interval, raw["n"])


def _with_sd(figure: Figure) -> str:
    if figure.mean is None:
        return "-"
    return f"{figure.mean:.1f}" + ("" if figure.sd is None else f" ± {figure.sd:.1f}")


def _cell(figure: Figure) -> str:
    if figure.interval is None:
        return "-"
    return f"{_with_sd(figure)} ({figure.interval[0]:.1f} .. {figure.interval[1]:.1f})"


def _short(figure: Figure) -> str:
    return "-" if figure.mean is None else f"{_cell(figure)}, n = {figure.n}"


def _signed(figure: Figure) -> str:
    if figure.mean is None or figure.interval is None:
        return "-"
    return f"{figure.mean:+.1f} ({figure.interval[0]:+.1f} .. {figure.interval[1]:+.1f})"


def _one_line(text: str) -> str:
    return " ".join(text.split())
