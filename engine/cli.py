# SPDX-License-Identifier: Apache-2.0
"""The program `virst`: segment, train, evaluate, compare, bench, export, build, scenes, weights.

A command imports only what it runs.

Other packages add commands by entry points of the group `virst_engine.commands`: name = module:function, a function as
typer takes it. So `virst soak` and `virst faults` can live in virst_ros, and this package without ROS.
"""

import enum
import functools
import importlib.metadata
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from virst_engine.config import MemoryParameters, ModelParameters, ReasonerParameters, TrackingParameters
from virst_engine.errors import VirstError

COMMANDS_GROUP = "virst_engine.commands"
CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class CommandGroup(typer.core.TyperGroup):
    """The commands of this file, and those that entry points declare. The latter are imported when they are asked for,
    or listed; own ones win."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*own, *sorted(declared_commands().keys() - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in declared_commands():
            return own
        return _make_command(cmd_name, _load(declared_commands()[cmd_name]))


@functools.cache
def declared_commands() -> dict[str, importlib.metadata.EntryPoint]:
    """Commands of other packages by name; reads what is installed, imports nothing."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=COMMANDS_GROUP)}


def _load(entry: importlib.metadata.EntryPoint) -> Callable[..., Any]:
    """The command's function; what is missing for it is told when it is run, and in its help."""
    try:
        function: Callable[..., Any] = entry.load()
    except ImportError as error:
        why = _why_missing(entry, error)

        def unavailable() -> None:
            raise VirstError(why)

        unavailable.__doc__ = f"Cannot run here: {why}"
        return unavailable

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except ImportError as error:
            raise VirstError(_why_missing(entry, error)) from error

    return command


def _why_missing(entry: importlib.metadata.EntryPoint, error: ImportError) -> str:
    return (
        f"`virst {entry.name}` needs more than this Python has ({error}): source the ROS 2 workspace with virst_msgs "
        "(install/setup.bash, or scripts/env of a checkout), or install the missing package"
    )


def _make_command(name: str, function: Callable[..., Any]) -> Any:
    made = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    made.command(name, context_settings=CONTEXT_SETTINGS)(function)
    return typer.main.get_command(made)


app = typer.Typer(
    name="virst",
    cls=CommandGroup,
    help="Say it in a sentence, get its mask, live: VIRST for robots.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
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


class Method(str, enum.Enum):
    virst = "virst"
    visa = "visa"
    tempvrs = "tempvrs"
    grounding = "grounding"


class Anchors(str, enum.Enum):
    dynamic = "dynamic"
    first_frame = "first-frame"
    guided = "guided"
    random_3 = "random-3"
    uniform_3 = "uniform-3"


class Answers(str, enum.Enum):
    instant = "instant"
    realtime = "realtime"


class Backend(str, enum.Enum):
    auto = "auto"
    torch = "torch"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"


class Preset(str, enum.Enum):
    paper = "paper"
    released = "released"


class Precision(str, enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


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


@app.command()
def segment(
    video: Annotated[
        Path, typer.Argument(metavar="VIDEO", help="Video file, folder of images, rosbag2 folder or MCAP file.")
    ],
    goal: Annotated[list[str], typer.Option(metavar="SENTENCE", help="What to find; may be given several times.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results; made if it is not there.")],
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Look at the whole video first, as VIRST is published; else as a robot does."),
    ] = False,
    anchors: Annotated[
        Anchors,
        typer.Option(help="--offline: which frames are anchors; dynamic is VIRST's way."),
    ] = Anchors.dynamic,
    answers: Annotated[
        Answers,
        typer.Option(help="instant: with the frame that asks; realtime: as late as the reasoner takes here."),
    ] = Answers.instant,
    delay_ms: Annotated[
        float | None, typer.Option(min=0, help="realtime: how late answers are; measured if left out.")
    ] = None,
    topic: Annotated[str, typer.Option(help="Of a bag with several topics of images.")] = "",
    rate: Annotated[
        float, typer.Option(min=0, help="Frames per second of a folder, and of a video without times; 0 = 30.")
    ] = 0.0,
    model: Annotated[str, typer.Option(help="Model that segments and understands.")] = "tabletop-tiny",
    weights: Annotated[
        str, typer.Option(help="File of the weights, or folder of virst-7b; empty = the shipped one.")
    ] = "",
    method: Annotated[
        Method,
        typer.Option(help="virst, visa, tempvrs: ways to understand; grounding: a detector finds noun phrases."),
    ] = Method.virst,
    detector: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="grounding: folder of a zero-shot detector; empty = the shipped one."),
    ] = "",
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="grounding: score from which an object is there; 0 = the usual one.")
    ] = 0.0,
    clip_frames: Annotated[
        int, typer.Option(min=1, max=100, help="T_seg: frames of the video that the reasoner looks at together.")
    ] = ReasonerParameters.clip_frames,
    reasoner_weights: Annotated[
        str, typer.Option(help="visa, tempvrs: safetensors file of the reasoner; empty = the shipped one.")
    ] = "",
    memory_budget_gib: Annotated[
        float, typer.Option(min=0, help="virst-7b: memory of its device that the reasoner may take; 0 = what is free.")
    ] = 0.0,
    weight_bits: Annotated[
        int, typer.Option(help="virst-7b: of each weight of the language model's layers: 16 = as stored, 8 or 4.")
    ] = 16,
    device: Annotated[str, typer.Option(help="torch device, for example cpu or cuda:0.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = torch's choice.")] = 0,
    stages: Annotated[str, typer.Option(metavar="DIR", help="Stages of `virst export`; empty = torch.")] = "",
    no_overlay: Annotated[bool, typer.Option("--no-overlay", help="Write no video.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the results that DIR holds.")] = False,
) -> None:
    """Segment what sentences mean in a recorded video: masks as PNG, a video with overlay, figures as JSON."""
    from virst_engine.config import EngineConfig, EngineParameters
    from virst_engine.video.command import SegmentSettings, run_segment

    if delay_ms is not None and answers is Answers.instant:
        raise typer.BadParameter("--delay-ms needs --answers realtime")
    if offline and answers is Answers.realtime:
        raise typer.BadParameter("--offline asks once, about the whole video: no answer can be late")
    if not offline and anchors is not Anchors.dynamic:
        raise typer.BadParameter("--anchors needs --offline: a stream makes anchors of every answer")
    with _values_as_usage():
        config = EngineConfig(
            model=ModelParameters(name=model, weights=weights, device=device, threads=threads),
            engine=EngineParameters(path=stages),
            reasoner=ReasonerParameters(
                method=method.value,
                weights=reasoner_weights,
                clip_frames=clip_frames,
                memory_budget_gib=memory_budget_gib,
                weight_bits=weight_bits,
            ),
        )
        settings = SegmentSettings(
            video=video,
            goals=tuple(goal),
            out=out,
            config=config,
            is_offline=offline,
            anchors=anchors.value,
            is_realtime=answers is Answers.realtime,
            delay_s=None if delay_ms is None else delay_ms / 1e3,
            topic=topic,
            rate_hz=rate,
            detector=detector,
            threshold=threshold,
            overlay=not no_overlay,
            replace=replace,
        )
    with _steps("frames") as on_step:
        found = run_segment(settings, on_step=on_step)
    for line in found:
        typer.echo(line)
    typer.echo(f"{out}: masks/*.png, segments.json{'' if no_overlay else ', overlay.mp4'}")


@app.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Train a model in the paper's stages; `virst train --help` lists the options."""
    from virst_engine.train.command import train_app

    train_app(arguments or [], prog_name="virst train", standalone_mode=False)


@app.command("evaluate")
def evaluate_command(
    family: Annotated[Family, typer.Option(help="Kind of scenes.")] = Family.plain,
    scenes: Annotated[
        str,
        typer.Option(metavar="FIRST:LAST", help="Scene seeds, LAST not included; training never sees 1000000 and up."),
    ] = "1000000:1000200",
    mode: Annotated[
        Mode,
        typer.Option(
            help="offline: whole video, as published; stream: instant answers; realtime: late answers, dropped frames."
        ),
    ] = Mode.stream,
    phrasings: Annotated[
        Phrasings, typer.Option(help="Sentences like the trained ones, or held-out ones.")
    ] = Phrasings.train,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Markdown page here, with example pictures beside it.")
    ] = None,
    per_scene: Annotated[int, typer.Option(min=1, help="Sentences per scene, balanced over kinds.")] = 4,
    long_s: Annotated[
        float,
        typer.Option(
            "--long",
            metavar="SECONDS",
            min=0,
            help="With --family full: scenes of so many seconds (100 = 1,000 frames) in which things leave and come "
            "back; sentences about order, events and counts, set early.",
        ),
    ] = 0.0,
    method: Annotated[
        Method, typer.Option(help="virst, visa, tempvrs: ways to understand; grounding: a detector finds noun phrases.")
    ] = Method.virst,
    detector: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="grounding: folder of a zero-shot detector; empty = the shipped one."),
    ] = "",
    reasoner_weights: Annotated[
        str, typer.Option(help="visa, tempvrs: safetensors file of the reasoner; empty = the shipped one.")
    ] = "",
    top_k: Annotated[
        int, typer.Option(min=0, help="tempvrs: clips whose slow frames become anchors; 0 = the model's number.")
    ] = 0,
    weights: Annotated[str, typer.Option(help="safetensors file; empty = the shipped one.")] = "",
    device: Annotated[str, typer.Option(help="torch device, for example cpu or cuda:0.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    reasoner_delay_ms: Annotated[
        float | None, typer.Option(min=0, help="realtime: how late answers are; measured on this machine if left out.")
    ] = None,
    frame_ms: Annotated[
        float | None,
        typer.Option(min=0, help="realtime: how long a frame takes; measured on this machine if left out."),
    ] = None,
    shuffle_sentences: Annotated[
        bool, typer.Option("--shuffle-sentences", help="Ablation: another scene's sentences.")
    ] = False,
    no_refresh: Annotated[
        bool, typer.Option("--no-refresh", help="Ablation: only the first answer of each goal.")
    ] = False,
    first_anchor_only: Annotated[
        bool, typer.Option("--first-anchor-only", help="Ablation: no refresh, and one anchor: the frame of the goal.")
    ] = False,
    anchors: Annotated[Anchors, typer.Option(help="offline: which frames are anchors.")] = Anchors.dynamic,
    no_initial_fusion: Annotated[
        bool, typer.Option("--no-initial-fusion", help="Ablation: the [ST] tokens do not look at the video first.")
    ] = False,
    no_second_fusion: Annotated[
        bool, typer.Option("--no-second-fusion", help="Ablation: prompts without Second ST-Fusion.")
    ] = False,
    alpha: Annotated[int, typer.Option(min=1, max=8, help="Anchors that a frame attends to.")] = 3,
    start_presence: Annotated[
        float,
        typer.Option(min=0, max=1, help="Probability of presence from which an answer begins a track; 0 = as chosen."),
    ] = TrackingParameters.start_presence,
    keep_answers: Annotated[
        int, typer.Option(min=0, max=100, help="Agreeing answers after which a track is kept; 0 = never.")
    ] = TrackingParameters.keep_answers,
    pooled_keys: Annotated[bool, typer.Option("--pooled-keys", help="2 x 2 cells of a memory become one key.")] = False,
    backend: Annotated[Backend, typer.Option(help="What runs the stages of --stages.")] = Backend.auto,
    stages: Annotated[str, typer.Option(metavar="DIR", help="Stages of `virst export`; empty = torch.")] = "",
) -> None:
    """Score the model on simulated scenes against their truth: J, F, J&F, absence, robustness; per kind of sentence."""
    from dataclasses import replace

    from virst_engine.evaluate.cases import load_case
    from virst_engine.evaluate.modes import load_system
    from virst_engine.evaluate.runner import evaluate, measure_times
    from virst_engine.evaluate.settings import EvaluationSettings
    from virst_engine.evaluate.summary import markdown

    seeds = parse_range(scenes)
    with _values_as_usage():
        settings = EvaluationSettings(
            family=family.value,
            first_scene=seeds.start,
            last_scene=seeds.stop,
            mode=mode.value,
            phrasings=phrasings.value,
            per_scene=per_scene,
            long_s=long_s,
            method=method.value,
            detector=detector,
            reasoner_weights=reasoner_weights,
            top_k=top_k,
            weights=weights,
            device=device,
            threads=threads,
            shuffle_sentences=shuffle_sentences,
            no_refresh=no_refresh,
            first_anchor_only=first_anchor_only,
            anchors=anchors.value,
            no_initial_fusion=no_initial_fusion,
            no_second_fusion=no_second_fusion,
            alpha=alpha,
            start_presence=start_presence,
            keep_answers=keep_answers,
            pooled_keys=pooled_keys,
            backend=backend.value,
            stages=stages,
        )
        settings.engine_config()
    if mode is Mode.realtime:
        if reasoner_delay_ms is None or frame_ms is None:
            frame_s, reasoner_s = measure_times(load_system(settings), load_case(settings, seeds.start))
            frame_ms = 1e3 * frame_s if frame_ms is None else frame_ms
            reasoner_delay_ms = 1e3 * reasoner_s if reasoner_delay_ms is None else reasoner_delay_ms
        settings = replace(settings, reasoner_delay_s=reasoner_delay_ms / 1e3, frame_time_s=frame_ms / 1e3)

    with _progress(len(seeds), "scenes") as advance:
        evaluation = evaluate(settings, workers=min(workers or _cores(), len(seeds)), on_scene=lambda scene: advance())
    result = evaluation.result
    if report is not None:
        from virst_engine.evaluate.pictures import write_pictures

        report.parent.mkdir(parents=True, exist_ok=True)
        pictures = write_pictures(evaluation.answered, settings, report.parent / f"{report.stem}_pictures")
        report.write_text(markdown({**result, "pictures": pictures}), encoding="utf-8")
    _write_json(json_file, result)
    typer.echo(markdown(result))


@app.command("compare")
def compare_command(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="What is done is kept here; the same call goes on with it."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw J&F of all rows, as PNG.")] = None,
    rows: Annotated[
        str, typer.Option(metavar="NAME,...", help="Rows, or groups of rows; empty = all. --list tells them.")
    ] = "",
    list_rows: Annotated[bool, typer.Option("--list", help="List rows and groups, run nothing.")] = False,
    scenes_per_seed: Annotated[
        int, typer.Option(min=1, max=1000, help="Scenes of each of three disjoint ranges that no training has seen.")
    ] = 50,
    long_s: Annotated[
        float,
        typer.Option("--long", metavar="SECONDS", min=0, help="Long scenes instead, as of `virst evaluate --long`."),
    ] = 0.0,
    delay_ms: Annotated[
        float | None,
        typer.Option(min=0, help="How late answers are; measured if left out, so let nothing else run at the start."),
    ] = None,
    detector: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Row grounding: a zero-shot detector; empty = the shipped one."),
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
) -> None:
    """Compare methods, choices of anchors and ablations on the same simulated scenes, as VIRST and TempVRS do."""
    from virst_engine.evaluate.compare import compare
    from virst_engine.evaluate.compare_page import page, write_page
    from virst_engine.evaluate.compare_rows import default_rows
    from virst_engine.evaluate.comparison import ComparedScenes

    with _values_as_usage():
        known = default_rows(detector, long_s)
    if list_rows:
        typer.echo("\n".join(f"{row.name:<22} {row.group:<12} {row.label}" for row in known))
        return
    if json_file is None:
        raise typer.BadParameter("--json FILE is missing: what is done is kept there")
    wanted = list(filter(None, rows.split(","))) or [row.name for row in known]
    unknown = [name for name in wanted if name not in {row.name for row in known} | {row.group for row in known}]
    if unknown:
        raise typer.BadParameter(f"no row or group {unknown[0]!r}; virst compare --list tells them")
    chosen = tuple(row for row in known if row.name in wanted or row.group in wanted)
    with _steps("scenes") as on_step:
        comparison = compare(
            chosen,
            ComparedScenes(scenes_per_seed),
            json_file,
            workers=workers or _cores(),
            delay_s=None if delay_ms is None else delay_ms / 1e3,
            on_scene=lambda done, total: on_step(done, total, f"{len(chosen)} rows"),
        )
    typer.echo(page(comparison) if report is None else write_page(comparison, report))
    if plot is not None:
        from virst_engine.evaluate.compare_plot import draw_comparison

        draw_comparison(comparison, plot)


@app.command()
def bench(
    against: Annotated[
        str, typer.Option(metavar="PEER,...", help="Compare with others instead: sam2, transformers, or both.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="--against: tabletop-tiny or sam2.1-tiny, -small, -base-plus, -large.")
    ] = "sam2.1-tiny",
    size: Annotated[int, typer.Option(min=0, help="--against: side of the input, pixels; 0 = the model's own.")] = 0,
    objects: Annotated[str, typer.Option(metavar="N,...", help="--against: numbers of objects, 1 to 8.")] = "1,4,8",
    backends: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="--against: of ours, torch, torch-compiled, onnxruntime, tensorrt; empty = those that are here.",
        ),
    ] = "",
    pooled: Annotated[bool, typer.Option("--pooled", help="--against: ours with pooled memory keys, too.")] = False,
    precision: Annotated[str, typer.Option(help="--against: fp32, bf16 or fp16, in all systems.")] = "fp32",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="--against: draw time and memory over the frames, as PNG.")
    ] = None,
    frames: Annotated[int, typer.Option(min=10, help="Frames of each speed measurement.")] = 300,
    memory_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of the memory measurement; 2000, or --frames when comparing.")
    ] = None,
    rate: Annotated[float, typer.Option(min=1, help="Frames per second of the paced run.")] = 30.0,
    paced_seconds: Annotated[float, typer.Option(min=1, help="Length of each half of the paced run.")] = 10.0,
    scene: Annotated[int, typer.Option(min=0, help="Seed of the simulated scene that is played.")] = 1_000_000,
    weights: Annotated[
        str,
        typer.Option("--weights", "--checkpoint", help="File of the weights; empty = shipped; --against: random."),
    ] = "",
    device: Annotated[str, typer.Option(help="torch device, for example cpu or cuda:0.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=0, help="CPU threads; 0 = torch's choice. 1, or 0 when comparing.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables here, as Markdown.")] = None,
) -> None:
    """Measure ms per stage, frames per second, age of masks and memory of the model; or compare it with other trackers.

    With --against, all systems have the same weights, frames and boxes, and take turns at every frame.
    """
    from virst_engine.evaluate import bench as own

    if against:
        from virst_engine.evaluate import bench_peers

        with _values_as_usage():
            parameters = ModelParameters(
                name=model, weights=weights, image_size=size, device=device, threads=threads or 0
            )
            compared = bench_peers.PeerSettings(
                parameters,
                tuple(against.split(",")),
                bench_peers.parse_objects(objects),
                frames,
                memory_frames or 0,
                tuple(filter(None, backends.split(","))),
                pooled,
                precision,
            )
        with _status("comparing") as say:
            result = bench_peers.run_peers(compared, on_step=say)
        tables = bench_peers.markdown(result)
    else:
        from virst_engine.weights import load_reasoner, load_stages

        with _values_as_usage():
            own_threads = ModelParameters.threads if threads is None else threads
            parameters = ModelParameters(weights=weights, device=device, threads=own_threads)
            settings = own.BenchSettings(parameters, scene, frames, rate, paced_seconds, memory_frames or 2000)
        stages, reasoner = load_stages(parameters), load_reasoner(parameters)
        with _status("simulating a scene") as say:
            result = own.run_bench(settings, stages, reasoner, own.default_case(settings), on_step=say)
        tables = own.markdown(result)
    _write_json(json_file, result)
    if against and plot is not None:
        from virst_engine.evaluate.bench_plot import draw_curves

        draw_curves(result, plot)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(tables, encoding="utf-8")
    typer.echo(tables)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="tabletop-tiny or sam2.1-tiny, -small, -base-plus, -large.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the stages; made if it is not there.")],
    weights: Annotated[str, typer.Option(help="File of the weights, or folder of a checkpoint; empty = shipped.")] = "",
    sha256: Annotated[str, typer.Option(help="SHA-256 that a sam2.1 checkpoint must have.")] = "",
    image_size: Annotated[
        int, typer.Option("--size", min=0, help="Side of the input; 0 = what it was trained at.")
    ] = 0,
    precision: Annotated[
        Precision, typer.Option(help="bf16: everywhere; fp16: in image encoder and memory attention, where it is safe.")
    ] = Precision.fp32,
    pooled_keys: Annotated[bool, typer.Option("--pooled-keys", help="2 x 2 cells of a memory become one key.")] = False,
    anchors: Annotated[int, typer.Option(min=1, max=16, help="Anchors that a frame attends to.")] = (
        MemoryParameters.anchors_attended
    ),
    recent: Annotated[int, typer.Option(min=1, max=6, help="Recent frames that it attends to.")] = (
        MemoryParameters.recent_frames
    ),
    pointers: Annotated[int, typer.Option(min=1, max=16, help="Object pointers.")] = MemoryParameters.pointers,
) -> None:
    """Write a model's stages as ONNX files, and check each with ONNX Runtime against torch."""
    from virst_engine.config import EngineParameters
    from virst_engine.export.onnx import export_model

    with _values_as_usage():
        parameters = ModelParameters(name=model, weights=weights, sha256=sha256, image_size=image_size)
        engine = EngineParameters(precision=precision.value, pooled_keys=pooled_keys)
        memory = MemoryParameters(anchors_attended=anchors, recent_frames=recent, pointers=pointers)
    with _steps("stages") as on_step:
        manifest = export_model(parameters, engine, memory, out, on_step=on_step)
    typer.echo(
        f"{out}: {manifest.model}, {manifest.image_size} px, {manifest.precision}; build engines: virst build {out}"
    )


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `virst export`.")],
    objects: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of objects to build engines for.")] = "1,4,8",
    target: Annotated[
        str, typer.Option(metavar="SM,...", help="TensorRT-RTX: build for these GPUs, such as SM86,SM89; needs no GPU.")
    ] = "",
    rtx: Annotated[bool, typer.Option("--rtx", help="TensorRT-RTX in place of TensorRT, for the GPU here.")] = False,
    workspace: Annotated[int, typer.Option(min=0, help="MiB that a kernel may use; 0 = no limit.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Build also what is there.")] = False,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="Accept memory attention that is not one kernel a layer.")
    ] = False,
) -> None:
    """Compile exported stages for this GPU with TensorRT, or for others with TensorRT-RTX; engines stay beside them."""
    from virst_engine.export.tensorrt import build_engines

    try:
        buckets = [int(part) for part in objects.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--objects {objects!r} is not a list of numbers, for example 1,4,8") from None
    with _steps("engines") as on_step:
        built = build_engines(
            folder,
            objects=buckets,
            targets=[part for part in target.split(",") if part],
            rtx=rtx,
            workspace_mib=workspace,
            force=force,
            require_fused=not unfused,
            on_step=on_step,
        )
    for engine in built:
        how = "kept" if engine.kept else f"built in {engine.build_s:.1f} s"
        fused = f", {engine.fused_attentions} fused attentions" if engine.fused_attentions else ""
        typer.echo(f"{engine.path}: {engine.engine_bytes / 1e6:.1f} MB, {how}{fused}")


@scenes_app.command("write")
def scenes_write(
    folder: Annotated[Path, typer.Argument(help="Where the clips go; complete ones that are there are kept.")],
    seeds: Annotated[str, typer.Option(metavar="FIRST:LAST", help="Scene seeds, LAST not included.")] = "0:64",
    family: Annotated[Family, typer.Option(help="Kind of scenes.")] = Family.plain,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Of the frames, pixels.")] = "128x128",
    fps: Annotated[float, typer.Option(min=1, max=100, help="Frames per second.")] = 10.0,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Length of a clip; in full ones of more than 12, things go on happening.")
    ] = 4.8,
    queries: Annotated[
        int, typer.Option(min=0, help="Sentences per clip with their targets, and the frames that show these.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
) -> None:
    """Record simulated scenes with their truth: images, instance masks, poses, visibility, presence in each frame."""
    from virst_engine.sim.dataset import write_clips

    range_of_seeds = parse_range(seeds)
    width_and_height = _parse_size(size)
    with _progress(len(range_of_seeds), "scenes") as advance:
        done = 0

        def show(scenes: int, total: int) -> None:
            nonlocal done
            for _ in range(scenes - done):
                advance()
            done = scenes

        shards = write_clips(
            folder,
            range_of_seeds,
            family.value,
            fps=fps,
            duration_s=seconds,
            size=width_and_height,
            queries=queries,
            workers=workers or _cores(),
            progress=show,
        )
    typer.echo(f"{len(range_of_seeds)} scenes in {len(shards)} shards below {folder}")


@scenes_app.command("show")
def scenes_show(
    picture: Annotated[Path, typer.Argument(help="The .png file to write.")],
    seeds: Annotated[str, typer.Option(metavar="FIRST:LAST", help="Scene seeds, LAST not included.")] = "0:6",
    family: Annotated[Family, typer.Option(help="Kind of scenes.")] = Family.plain,
    sentences: Annotated[int, typer.Option(min=1, max=12, help="Per scene.")] = 3,
    phrasings: Annotated[Phrasings, typer.Option(help="Trained or held-out sentences.")] = Phrasings.train,
    seconds: Annotated[float, typer.Option(min=2.4, help="Length of a scene, as of `virst scenes write`.")] = 4.8,
) -> None:
    """Draw a contact sheet: a row per scene with moments of it, and the target of each sentence outlined.

    The bar below a sentence is green while its target shows.
    """
    from virst_engine.sim.dataset import contact_sheet

    sheet = contact_sheet(
        picture,
        parse_range(seeds),
        family.value,
        sentences=sentences,
        phrasings=phrasings.value,
        duration_s=seconds,
    )
    typer.echo(sheet)


@weights_app.command("info")
def weights_info(
    file: Annotated[str, typer.Argument(help="safetensors file, or folder of virst-7b; empty = the shipped one.")] = "",
    model: Annotated[str, typer.Option(help="Name of the shipped model.")] = "tabletop-tiny",
    verify: Annotated[bool, typer.Option("--verify", help="Of a folder: read all and compare checksums.")] = False,
) -> None:
    """Tell what a weights file holds: size, checksum, parameters, and where it comes from."""
    import hashlib

    from virst_engine.model.methods import holds_method, load_method, read_method_card
    from virst_engine.weights import load_model, read_card, weights_path

    if file and Path(file).expanduser().is_dir():
        folder = Path(file).expanduser()
        if (folder / "card.json").is_file():
            _detector_info(folder)
        else:
            _folder_info(folder, verify)
        return
    with _values_as_usage():
        path = weights_path(ModelParameters(name=model, weights=file))
    is_method = holds_method(path)
    card = read_method_card(path) if is_method else read_card(path)
    loaded = load_method(path) if is_method else load_model(path)
    typer.echo(f"file        {path}")
    typer.echo(f"size        {path.stat().st_size / 2**20:.1f} MiB")
    typer.echo(f"sha256      {hashlib.sha256(path.read_bytes()).hexdigest()}")
    typer.echo(f"model       {loaded.config.name}")
    typer.echo(f"parameters  {sum(p.numel() for p in loaded.parameters()) / 1e6:.2f} M")
    for name, value in card.items():
        typer.echo(f"{name:<11} {value}")


def _detector_info(folder: Path) -> None:
    """Of a detector of `virst train`, which writes a card beside it."""
    from virst_engine.weights import detector_identity

    typer.echo(f"folder      {folder}")
    typer.echo(f"size        {sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 2**20:.1f} MiB")
    typer.echo(f"sha256      {detector_identity(str(folder), ModelParameters())}...")
    for name, value in json.loads((folder / "card.json").read_text(encoding="utf-8")).items():
        typer.echo(f"{name:<11} {value}")


def _folder_info(folder: Path, verify: bool) -> None:
    from virst_engine.model.weights_folder import read_manifest, verify_folder, weights_bytes

    manifest = read_manifest(folder)
    if verify:
        with _status("comparing checksums"):
            verify_folder(folder)
    typer.echo(f"folder      {folder}{', every shard as its checksum says' if verify else ''}")
    typer.echo(f"size        {manifest.bytes / 2**30:.2f} GiB in {len(manifest.shards)} shards")
    typer.echo(f"segmenter   {weights_bytes(manifest, segmenter=True) / 2**30:.2f} GiB of weights")
    eight, four = (weights_bytes(manifest, weight_bits=bits) / 2**30 for bits in (8, 4))
    typer.echo(
        f"reasoner    {weights_bytes(manifest) / 2**30:.2f} GiB of weights; {eight:.2f} with --weight-bits 8, "
        f"{four:.2f} with --weight-bits 4"
    )
    typer.echo(f"sha256      {manifest.sha256}")
    typer.echo(f"model       {manifest.config.name}")
    typer.echo(f"questions   {'answered' if manifest.has_words else 'not answered, lm_head is missing'}")
    for name, value in manifest.facts.items():
        typer.echo(f"{name:<11} {value}")


@weights_app.command("convert")
def weights_convert(
    source: Annotated[
        str, typer.Argument(help="VIRST's published checkpoint; empty = the base models alone, ST-Fusion untrained.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    base: Annotated[Path, typer.Option(help="Folder of VideoChat-Flash-Qwen2-7B_res448, at least its tokenizer.")],
    sam2: Annotated[Path | None, typer.Option(help="sam2.1_hiera_large, where the checkpoint lacks it.")] = None,
    preset: Annotated[Preset, typer.Option(help="Choices in which the paper and the released code differ.")] = (
        Preset.released
    ),
    dtype: Annotated[str, typer.Option(help="Of the video language model: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Turn VIRST's published files into one folder of safetensors, with every tensor accounted for."""
    from virst_engine.model.virst_7b_config import Virst7bConfig, with_preset
    from virst_engine.model.virst_checkpoint import Sources, convert

    config = with_preset(Virst7bConfig(), preset.value)
    with _values_as_usage(), _status("checking names and shapes") as tell:
        done = 0

        def written(size: int) -> None:
            nonlocal done
            done += size
            tell(f"written {done / 2**30:.1f} GiB")

        sources = Sources(base, Path(source) if source else None, sam2)
        manifest = convert(sources, out, config, dtype, written=written)
    typer.echo(f"folder      {out}")
    typer.echo(f"size        {manifest.bytes / 2**30:.2f} GiB")
    typer.echo(f"shards      {len(manifest.shards)}")
    typer.echo(f"tensors     {len(manifest.tensors)}")
    for name, value in manifest.facts.items():
        typer.echo(f"{name:<11} {value}")


@app.command()
def words(
    weights: Annotated[str, typer.Option(help="safetensors file; empty = the shipped one.")] = "",
) -> None:
    """List the words that the model knows; a goal may use no others."""
    from virst_engine.weights import load_model, weights_path

    typer.echo("\n".join(load_model(weights_path(ModelParameters(weights=weights))).config.words))


@app.command()
def version() -> None:
    """Print the version of this package and of the packages that it is built on."""
    from virst_engine.evaluate.provenance import versions

    for name, number in versions().items():
        typer.echo(f"{name} {number}")


def _parse_size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, for example 320x240")
    return int(width), int(height)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_null_for_nan(result), indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def _null_for_nan(value: Any) -> Any:
    """The same, with None for what could not be measured: JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _null_for_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _values_as_usage() -> Iterator[None]:
    """A value that a configuration rejects is the caller's mistake, not a crash."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, so that stdout stays the result; yields what to call per item."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _steps(what: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on stderr whose total comes with the first step: yields what takes (done, total, what is next)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total, step: progress.update(
            task, completed=done, total=total, description=f"{what}: {step}"
        )


@contextmanager
def _status(words: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr with what is being done; yields how to change the words."""
    from rich.console import Console

    with Console(stderr=True).status(words) as status:
        yield status.update


def main() -> None:
    """Run the program; what this package raises on purpose ends as one line on stderr and exit code 2."""
    try:
        app()
    except VirstError as error:
        typer.echo(f"virst: {type(error).__name__}: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
