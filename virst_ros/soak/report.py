# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as Markdown."""

from collections.abc import Mapping
from typing import Any

from virst_ros.soak.checker import KINDS

MEANINGS = {
    "goals_lost": "goals that were set, and missing in `objects` or `list_goals`",
    "goals_not_set": "goals that were there without being set, or after they were cleared",
    "ids_reused": "ids that two living objects had, or that changed",
    "foreign_pixels": "masks with values of no tracked object",
    "unknown_stamps": "masks and `objects` with a stamp that no image had",
    "stamps_not_increasing": "masks and `objects` that were not newer than the one before",
    "exceptions": "errors in logs and diagnostics, wrong or missing answers, processes that ended",
}


def markdown(result: Mapping[str, Any]) -> str:
    """Tables with the bounds, and what was done."""
    most = result["most_growth_percent"]
    lines = ["| what | measured | bound |", "|---|---:|---:|"]
    for name, of in (("rss_growth_percent", "segmenter"), ("reasoner_rss_growth_percent", "reasoner")):
        lines.append(
            f"| resident memory of the {of}, growth after the first minute | {_percent(result[name])} | ±{most:g} % |"
        )
    lines += [f"| {MEANINGS[kind]} | {result[kind]} | 0 |" for kind in KINDS]
    lines += [
        "",
        f"{result['minutes']:g} minutes, {result['frames']} frames, {result['goals_set']} goals set, "
        f"{result['goals_cleared']} cleared, {result['instances_found']} instances found "
        f"({result['instance_ids_lost']} ids of instances vanished and were replaced), "
        f"{result['masks_compared']} masks compared with `objects`, {sum(result['requests'].values())} requests.",
        "",
        "| camera | images | frames | frames/s | age p50 | p95 | p99, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, camera in result["cameras"].items():
        ages = camera["age_ms"] or dict.fromkeys(("p50", "p95", "p99"), float("nan"))
        told = " | ".join(f"{ages[p]:.0f}" for p in ("p50", "p95", "p99"))
        lines.append(f"| {name} | {camera['images']} | {camera['frames']} | {camera['rate_hz']:.1f} | {told} |")
    if result["details"]:
        lines += ["", "What was wrong, the first of each:", "", *(f"- {detail}" for detail in result["details"][:20])]
    lines += ["", f"{result['device']}. `{result['command']}`"]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.2f} %"
