# SPDX-License-Identifier: Apache-2.0
"""A picture of a comparison: J&F of every row with its interval, a panel per group of rows, ways told by colour."""

from pathlib import Path

from virst_engine.errors import VirstError
from virst_engine.evaluate.bench_plot import COLOURS
from virst_engine.evaluate.compare_page import WAY_WORDS
from virst_engine.evaluate.compare_rows import GROUPS, PRESENT
from virst_engine.evaluate.compare_summary import run_figures
from virst_engine.evaluate.comparison import Comparison

BAR, GAP = 0.26, 0.5  # of the space of a way, and between rows


def draw_comparison(comparison: Comparison, picture: Path) -> None:
    """Write a PNG. Raises VirstError when matplotlib is not installed, or there is no figure to draw yet."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise VirstError("a plot needs matplotlib: pip install matplotlib, or leave out --plot") from error

    panels = {title: bars(comparison, group) for group, title in GROUPS.items()}
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        raise VirstError("no row has a figure yet; nothing to plot")
    heights = [BAR * (sum(map(len, found.values())) + GAP * len(found)) + 0.6 for found in panels.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}, sharex=True)[:, 0]
    colours = dict(zip(WAY_WORDS, COLOURS, strict=False))
    used: set[str] = set()
    for panel, (title, found) in zip(axes, panels.items(), strict=True):
        place, ticks = 0.0, []
        for label, ways in found.items():
            middle = place + (len(ways) - 1) / 2
            ticks.append((middle, label))
            for way, (mean, low, high) in ways.items():
                name = WAY_WORDS[way] if way not in used else None
                used.add(way)
                spread = [[mean - low], [high - mean]]
                panel.errorbar(mean, place, xerr=spread, fmt="o", color=colours[way], capsize=3, label=name)
                place += 1
            place += GAP
        panel.set_yticks([middle for middle, _ in ticks], [label for _, label in ticks], fontsize=8)
        panel.set_ylim(place - GAP, -1)  # the first row on top
        panel.set_title(title, fontsize=9, loc="left")
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("J&F, 95 % interval over scenes")
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=len(used))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, format="png", dpi=150)


def bars(comparison: Comparison, group: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Label of a row -> way -> mean and interval, of what there is."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in comparison.rows:
        if row.group != group or row.name in comparison.skipped:
            continue
        for way in row.ways:
            run = comparison.run_of(row.name, way)
            assert run is not None
            jf = run_figures(comparison, run)["JF"][PRESENT]
            if jf["mean"] is not None:
                found.setdefault(row.label, {})[way] = (jf["mean"], *jf["ci"])
    return found
