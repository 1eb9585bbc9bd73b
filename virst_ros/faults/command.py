# SPDX-License-Identifier: Apache-2.0
"""The command `virst faults`: try all faults against a real segmenter process, and say what it survives."""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virst_engine.errors import VirstError

if TYPE_CHECKING:
    from virst_ros.faults.fault import Fault


def faults(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Markdown table here.")] = None,
    only: Annotated[
        str, typer.Option(metavar="NAME,...", help="Try these faults; a name may end in * to mean several.")
    ] = "",
    list_faults: Annotated[bool, typer.Option("--list", help="Name the faults, and what is done; try none.")] = False,
    seed: Annotated[int, typer.Option(help="Of what faults choose at random.")] = 0,
    logs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the logs of all processes in this new folder.")
    ] = None,
) -> None:
    """Do to a segmenter what happens on robots, and say what it survives. Status 1 when it does not survive all.

    Ctrl-C ends it early, with the figures of what was tried.
    """
    # Here, so that the program's help needs no ROS.
    from virst_ros.faults.catalogue import FAULTS
    from virst_ros.faults.harness import Harness
    from virst_ros.faults.report import figures, slowest, table
    from virst_ros.faults.trial import try_fault

    chosen = choose(FAULTS, only)
    if list_faults:
        for fault in chosen:
            typer.echo(f"{fault.name:32s} {fault.what}")
        return
    begin_s, verdicts = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="virst_faults_") as temporary:
        folder = Path(temporary) if logs is None else logs.resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with Harness(folder, seed) as harness:
                for fault in chosen:
                    verdict = try_fault(harness, fault)
                    verdicts.append(verdict)
                    is_back = math.isfinite(verdict.recovery_s)
                    came_back = f"{verdict.recovery_s:5.2f} s" if is_back else f"{'none':>7s}"
                    typer.echo(f"{'survived' if verdict.survived else 'FAILED':8s} {came_back}  {fault.name}")
                    for problem in verdict.problems:
                        typer.echo(f"{'':19s}{problem}")
        except KeyboardInterrupt:
            typer.echo("virst faults: ended early", err=True)
        except (VirstError, OSError) as error:
            typer.echo(f"virst faults: {error}", err=True)
            raise typer.Exit(1) from error
    told = figures(verdicts, time.monotonic() - begin_s, seed)
    typer.echo(f"{told['survived']} of {told['tried']} survived, {slowest(told)}, in {told['seconds']:.0f} s")
    if json_file is not None:
        json_file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if report is not None:
        report.write_text(table(verdicts), encoding="utf-8")
    if told["survived"] < len(chosen):
        raise typer.Exit(1)


def choose(known: "Sequence[Fault]", only: str) -> "Sequence[Fault]":
    """Those named, in the order of the table. Raises BadParameter for a name that there is not."""
    patterns = [name.strip() for name in only.split(",") if name.strip()]
    for pattern in patterns:
        if not any(fnmatchcase(fault.name, pattern) for fault in known):
            raise typer.BadParameter(f"there is no fault {pattern!r}; see --list", param_hint="--only")
    if not patterns:
        return known
    return [fault for fault in known if any(fnmatchcase(fault.name, pattern) for pattern in patterns)]


def main() -> None:
    """Run it by itself: python -m virst_ros.faults."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command()(faults)
    app(prog_name="virst faults")
