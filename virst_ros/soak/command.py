# SPDX-License-Identifier: Apache-2.0
"""The command `virst soak`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from virst_ros.soak.run import Progress

LINE_EVERY_S = 60.0  # where the progress is not on a terminal


def command(
    minutes: Annotated[float, typer.Option(min=0.1, help="Run at least so long.")] = 30.0,
    frames: Annotated[int, typer.Option(min=0, help="And until so many are processed, all cameras together.")] = 30_000,
    cameras: Annotated[int, typer.Option(min=1, max=16, help="Cameras of the one segmenter.")] = 2,
    rate: Annotated[float, typer.Option(min=0.5, max=100, help="Images per second of each camera.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is asked; times are the machine's own.")] = 0,
    growth: Annotated[
        float, typer.Option(min=0.0, help="Percent that resident memory may grow or shrink, after the first minute.")
    ] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Markdown table here.")] = None,
    logs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the logs of segmenter and reasoner here.")
    ] = None,
) -> None:
    """Run a segmenter for long under goals that change at random, and watch memory, goals, ids and stamps.

    The exit status is 1 when a bound is broken. Ctrl-C ends the run and still tells what was measured.
    """
    from virst_ros.soak.report import markdown
    from virst_ros.soak.run import SoakSettings, run_soak

    settings = SoakSettings(minutes, frames, cameras, rate, seed, growth, logs)
    line = ProgressLine(minutes * 60.0, frames)
    result = run_soak(settings, line.show)
    line.end()
    _write(json_file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    tables = markdown(result)
    _write(report, tables)
    typer.echo(tables)
    for broken in result["broken"]:
        typer.echo(f"virst soak: {broken}", err=True)
    if not result["complete"]:
        typer.echo("virst soak: the run has ended early", err=True)
    if result["broken"]:
        raise typer.Exit(1)
    if not result["complete"]:
        raise typer.Exit(130)  # as a shell says of Ctrl-C


class ProgressLine:
    """On stderr: one line that is written over on a terminal, one a minute in a file."""

    def __init__(self, wanted_s: float, wanted_frames: int, stream: Any = None) -> None:
        self._wanted_s, self._wanted_frames = wanted_s, wanted_frames
        self._stream = sys.stderr if stream is None else stream
        self._told_s = -LINE_EVERY_S

    def show(self, progress: "Progress") -> None:
        is_terminal = self._stream.isatty()
        if not is_terminal and progress.elapsed_s - self._told_s < LINE_EVERY_S:
            return
        self._told_s = progress.elapsed_s
        words = (
            f"{progress.elapsed_s / 60:.1f}/{self._wanted_s / 60:g} min, "
            f"{progress.frames}/{self._wanted_frames} frames, {progress.goals} goals set, "
            f"segmenter {progress.segmenter_mib:.0f} MiB, reasoner {progress.reasoner_mib:.0f} MiB, "
            f"{progress.violations} violations"
        )
        self._stream.write(f"\r\033[K{words}" if is_terminal else f"{words}\n")
        self._stream.flush()

    def end(self) -> None:
        if self._stream.isatty():
            self._stream.write("\n")


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
