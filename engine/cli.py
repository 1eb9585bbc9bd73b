# SPDX-License-Identifier: Apache-2.0
"""The program `virst`: train, evaluate, bench, scenes, weights. Each command imports only what it runs."""

import enum
import logging
import sys
from typing import Annotated

import typer

from virst_engine.errors import VirstError

app = typer.Typer(
    name="virst",
    help="Say it in a sentence, get its mask, live: VIRST for robots.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
scenes_app = typer.Typer(no_args_is_help=True, help="Simulated tabletop scenes: write clips to disk, look at them.")
weights_app = typer.Typer(no_args_is_help=True, help="Trained weights.")
app.add_typer(scenes_app, name="scenes")
app.add_typer(weights_app, name="weights")


class Family(str, enum.Enum):
    plain = "plain"
    full = "full"


class Mode(str, enum.Enum):
    offline = "offline"
    stream = "stream"
    realtime = "realtime"


class Phrasings(str, enum.Enum):
    train = "train"
    held_out = "held-out"
    all = "all"


def parse_range(text: str) -> range:
    """`FIRST:LAST` -> range(FIRST, LAST); one number N is N:N+1.

    Raises:
        typer.BadParameter: not two numbers, or nothing between them.
    """
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last) if colon else int(first) + 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not FIRST:LAST, for example 1000000:1000200") from None
    if not seeds or seeds.start < 0:
        raise typer.BadParameter(f"{text!r} holds no scene: FIRST must be >= 0 and less than LAST")
    return seeds


@app.callback()
def _configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of what happens inside.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a model in the paper's stages; `virst train --help` lists the options."""
    from virst_engine.train.command import train_app

    train_app(context.args, prog_name="virst train", standalone_mode=False)


@app.command()
def version() -> None:
    """Print the version of this package and of the packages that it is built on."""
    from virst_engine.evaluate.provenance import versions

    for name, number in versions().items():
        typer.echo(f"{name} {number}")


def main() -> None:
    """Run the program; what this package raises on purpose ends as one line on stderr and exit code 2."""
    try:
        app()
    except VirstError as error:
        typer.echo(f"virst: {type(error).__name__}: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
