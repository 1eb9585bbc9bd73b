# SPDX-License-Identifier: Apache-2.0
"""A picture of a comparison: what each frame costs, and the memory that a process holds, over the length of a video."""

from pathlib import Path
from typing import Any

from virst_engine.errors import VirstError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by the colour-blind, too


def draw_curves(result: dict[str, Any], picture: Path) -> None:
    """Write a PNG of `result["curves"]` as `run_peers` returns it.

    Raises VirstError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise VirstError("a plot needs matplotlib: pip install matplotlib, or leave out --plot") from error

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    times, memories = figure.subplots(1, 2)
    highest = {times: 0.0, memories: 0.0}
    time = "cpu_ms" if all("cpu_ms" in curve for curve in result["curves"].values()) else "frame_ms"
    for colour, (name, curve) in zip(COLOURS * 2, result["curves"].items(), strict=False):
        label = f"virst_ros ({name})" if name in result["ratios"] else name
        growth = f"{label}: {result['memory'][name]['mb_per_1000_frames']:+.1f} MB per 1,000 frames"
        for axes, key, text in ((times, time, label), (memories, "memory_mib", growth)):
            axes.plot(curve["frame"], curve[key], color=colour, label=text, linewidth=1.4)
            highest[axes] = max(highest[axes], *curve[key])
    times.set_ylabel("ms of CPU time per frame" if time == "cpu_ms" else "ms per frame")
    memories.set_ylabel("memory, MiB")
    for axes in (times, memories):
        axes.set_xlabel("frame")
        axes.set_ylim(0, 1.08 * highest[axes])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    objects = next(iter(result["memory"].values()))["objects"]
    times.set_title(f"{result['model']}, {result['image_size']} px, {objects} object{'s' if objects > 1 else ''}")
    memories.set_title("each in a process of its own")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, format="png", dpi=150)
