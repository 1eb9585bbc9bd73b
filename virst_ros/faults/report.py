# SPDX-License-Identifier: Apache-2.0
"""What a run of faults tells: figures for programs, a table for people."""

import math
from collections.abc import Sequence
from typing import Any

from virst_ros.faults.fault import Verdict

NOTHING = "nothing: there is nothing that it could know"


def figures(verdicts: Sequence[Verdict], seconds: float, seed: int) -> dict[str, Any]:
    """What --json writes. The slowest recovery is null where one has not come: it has no length."""
    recoveries = [verdict.recovery_s for verdict in verdicts if math.isfinite(verdict.recovery_s)]
    never = [verdict.name for verdict in verdicts if verdict.never_recovered]
    return {
        "tried": len(verdicts),
        "survived": sum(verdict.survived for verdict in verdicts),
        "slowest_recovery_s": round(max(recoveries), 2) if recoveries and not never else None,
        "never_recovered": never,
        "seconds": round(seconds, 1),
        "seed": seed,
        "faults": [verdict.to_json() for verdict in verdicts],
    }


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: one row per fault."""
    lines = [
        "| fault | what is done | what the segmenter says | masks meanwhile | goals | recovery (s) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for verdict in verdicts:
        recovery = f"{verdict.recovery_s:.1f}" if math.isfinite(verdict.recovery_s) else "none by design"
        if verdict.never_recovered:
            recovery = "**never**"
        said = verdict.diagnostics or _without_prefix(verdict.log_line) or verdict.answer or NOTHING
        if verdict.problems:
            said = f"**not survived:** {'; '.join(verdict.problems)}"
        cells = (f"`{verdict.name}`", verdict.what, said, verdict.masks, verdict.goals, recovery)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    never = [f"`{verdict.name}`" for verdict in verdicts if verdict.never_recovered]
    if never:
        lines += ["", f"Without recovery: {', '.join(never)}. There is no slowest recovery of this run."]
    return "\n".join(lines) + "\n"


def slowest(told: dict[str, Any]) -> str:
    """The slowest recovery of `figures` in words."""
    if told["never_recovered"]:
        return f"no recovery from {', '.join(told['never_recovered'])}"
    return (
        "no recovery needed"
        if told["slowest_recovery_s"] is None
        else (f"slowest recovery {told['slowest_recovery_s']} s")
    )


def _without_prefix(line: str) -> str:
    """A ROS log line without level, time and node."""
    return line.rpartition("]: ")[2]


def _cell(text: str) -> str:
    short = text if len(text) <= 200 else text[:197] + "..."
    return short.replace("|", "\\|").replace("\n", " ")
