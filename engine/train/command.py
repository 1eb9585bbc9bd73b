# SPDX-License-Identifier: Apache-2.0
"""`virst train`: the command that makes the shipped weights."""

import ctypes
import logging
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from virst_engine.data.clips import RecordedScene
from virst_engine.data.recorded import open_scenes
from virst_engine.model.config import Sam2Config, tabletop_tiny
from virst_engine.model.methods import build_method, save_method, start_from
from virst_engine.model.tempvrs import TempVrsConfig
from virst_engine.model.virst import Virst
from virst_engine.model.visa import VisaConfig
from virst_engine.sim.expressions import VOCABULARY
from virst_engine.sim.spec import COLOURS, SHAPES
from virst_engine.train import trainer
from virst_engine.train.config import Method, TrainConfig, detector_training, method_training, tabletop_tiny_training
from virst_engine.train.method_steps import MethodModel, MethodReadOuts
from virst_engine.train.phrases import PhraseScene
from virst_engine.train.steps import ReadOuts
from virst_engine.train.transformers_detector import (
    DetectorModel,
    DetectorReadOuts,
    calibrate,
    save_detector,
    split_scenes,
)
from virst_engine.weights import SHIPPED, file_sha256, load_model, read_card, save_model

log = logging.getLogger(__name__)
CALIBRATION_BATCHES = 30
train_app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@train_app.command()
def train(
    clips: Annotated[Path, typer.Option(help="Folder of recorded scenes (`virst scenes write`).")] = Path(
        "data_cache/clips"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint and the curves.")] = Path("runs/tabletop-tiny"),
    export: Annotated[
        Path | None,
        typer.Option(help="Write the weights here when done (safetensors, float16); grounding: a folder."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    init: Annotated[Path | None, typer.Option(help="Start from these weights instead of random ones.")] = None,
    stages: Annotated[str, typer.Option(help="Stages to run, comma-separated; empty = all.")] = "",
    scale: Annotated[float, typer.Option(min=0.0001, help="Multiplies the steps of every stage.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="Stop after this long, to be resumed; 0 = no limit.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="torch device, for example cpu or cuda:0.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = torch's choice.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches.")] = 1,
    size: Annotated[int, typer.Option(min=32, help="Side of the segmenter's input, pixels.")] = 128,
    method: Annotated[
        str,
        typer.Option(
            help="virst; visa or tempvrs: a reasoner beside the segmenter of --init (the shipped one); grounding: a "
            "detector."
        ),
    ] = "virst",
    supervision: Annotated[str, typer.Option(help="tempvrs: what <TEP> tells of, clip or frame.")] = "clip",
    one_seg: Annotated[bool, typer.Option("--one-seg", help="tempvrs: one <SEG> for all clips.")] = False,
) -> None:
    """Train `tabletop-tiny`: pre-training, then VIRST's alignment, few-image and propagation stages.

    With --method: another reasoner that goes on from its language model, or a detector that starts from nothing.
    """
    keep_freed_memory()
    _check_device(device)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if method != "tempvrs" and (one_seg or supervision != "clip"):
        raise typer.BadParameter(f"are for the method tempvrs, not for {method}", param_hint="--supervision, --one-seg")
    model: trainer.Trained
    heads: trainer.Heads
    scenes: Sequence[RecordedScene] = open_scenes(clips)
    held_out: Sequence[RecordedScene] = ()
    if method == "virst":
        config = tabletop_tiny_training(scale)
        model = _start_model(init, size)
        heads = ReadOuts(model.config, colours=len(COLOURS), shapes=len(SHAPES))
    elif method in get_args(Method):
        init = init or SHIPPED / "tabletop-tiny.safetensors"
        config = method_training(cast(Method, method), scale)
        model = _start_method(method, init, supervision, several_seg=not one_seg)
        heads = MethodReadOuts(model.reasoner, colours=len(COLOURS), shapes=len(SHAPES))
    elif method == "grounding":
        if init is not None:
            raise typer.BadParameter("a detector starts from nothing", param_hint="--init")
        config = detector_training(scale)
        model = DetectorModel("tabletop-tiny-grounding")
        heads = DetectorReadOuts(model.config.owl.vision_config.hidden_size, colours=len(COLOURS), shapes=len(SHAPES))
        scenes, held_out = split_scenes([PhraseScene(scene) for scene in scenes])
    else:
        raise typer.BadParameter(f"must be virst, visa, tempvrs or grounding, got {method!r}", param_hint="--method")
    config = _chosen_stages(replace(config, seed=seed), stages)
    run = trainer.Trainer(
        model, heads, config, scenes, folder=out, scalars=_curves(out), device=device, loader_workers=workers
    )
    if resume:
        run.resume()
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    finished = _run_with_bar(run, until)
    if export is not None:
        card = {
            "model": model.config.name,
            "command": " ".join(["virst train", *map(_without_folder, sys.argv[2:])]),
            "finished": finished,
            "scenes": len(scenes),
            "seed": seed,
            "training_hours": round(run.seconds / 3600, 2),
            "precision": run.precision,
            "device": device if device != "cpu" else f"{torch.get_num_threads()} threads of {platform.machine()}",
            "torch": torch.__version__,
            "steps": run.taken,
            "started_from": None if init is None else {"file": init.name, "card": read_card(init)},
        }
        if isinstance(model, DetectorModel):
            plan = config.stages[-1].clip_plan(config.clip_stride)
            model.to("cpu")
            save_detector(model, export, card, calibrate(model, held_out, plan, batches=CALIBRATION_BATCHES))
        elif isinstance(model, MethodModel):
            save_method(model.reasoner, export, card)
        else:
            save_model(model, export, card)
        log.info("wrote %s", export)


def _without_folder(word: str) -> str:
    """An argument as the card tells it: where a machine keeps its files is nobody's business."""
    return re.sub(r"[^=]*/", "", word)


def keep_freed_memory() -> None:
    """Let malloc keep what training frees: handing it back and faulting it in again costs more than the arithmetic."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**28)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch's words for "not built in" and "not there"
        cause = str(error).splitlines()[0]
        raise typer.BadParameter(f"{device!r} cannot be used: {cause}", param_hint="--device") from error


def _start_model(init: Path | None, size: int) -> Virst:
    if init is None:
        config = tabletop_tiny(VOCABULARY)
        return Virst(replace(config, sam2=_sized(config.sam2, size)))
    loaded = load_model(init, train_on=True)
    unknown = set(VOCABULARY) - set(loaded.config.words)
    if unknown:
        log.warning("%s does not know %d words of the sentences, for example %r", init, len(unknown), min(unknown))
    model = Virst(replace(loaded.config, sam2=_sized(loaded.config.sam2, size)))
    model.load_state_dict(loaded.state_dict())
    return model


def _start_method(method: str, init: Path, supervision: str, *, several_seg: bool = True) -> MethodModel:
    """A reasoner that goes on from the language model of `init`, and the segmenter of `init`."""
    virst = load_model(init)
    common: dict[str, Any] = {
        "name": f"{virst.config.name}-{method}",
        "video": virst.config.video,
        "language": virst.config.language,
        "prompt_channels": virst.config.sam2.channels,
        "words": virst.config.words,
        "segmenter": file_sha256(init),
    }
    try:
        if method == "visa":
            config: VisaConfig | TempVrsConfig = VisaConfig(**common)
        else:
            config = TempVrsConfig(**common, supervision=supervision, several_seg=several_seg)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reasoner = build_method(config)
    start_from(reasoner, virst)
    return MethodModel(reasoner, virst.seg_model, virst.config.fusion.feature_level)


def _sized(config: Sam2Config, size: int) -> Sam2Config:
    """The segmenter at another input size, with windows of the trunk that tile its grids without padding."""
    if size % 32:  # the windows' position table has to tile the stride-4 grid
        raise typer.BadParameter(f"must be a multiple of 32, got {size}", param_hint="--size")
    grid = size // 4
    windows = (
        8,
        *(
            next(w for w in (8, 10, 12, 7, 6, 5, 4, 3, 2, 1) if side % w == 0)
            for side in (grid // 2, grid // 4, grid // 8)
        ),
    )
    return replace(config, image_size=size, window_spec=windows)


def _chosen_stages(config: TrainConfig, names: str) -> TrainConfig:
    if not names:
        return config
    wanted = names.split(",")
    known = {stage.name: stage for stage in config.stages}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise typer.BadParameter(f"no stage {', '.join(unknown)}; there are {', '.join(known)}", param_hint="--stages")
    return replace(config, stages=tuple(known[name] for name in wanted))


def _curves(folder: Path) -> trainer.Scalars | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no curves are written: tensorboard is not installed (pip install tensorboard)")
        return None
    writer: trainer.Scalars = SummaryWriter(str(folder / "curves"))
    return writer


def _run_with_bar(run: trainer.Trainer, until: float) -> bool:
    columns = (
        TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns) as bar:
        tasks: dict[str, int] = {}

        def report(progress: trainer.Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.steps, losses="")
            shown = " ".join(f"{k} {v:.2f}" for k, v in progress.losses.items() if k not in ("total", "gradient"))
            bar.update(tasks[progress.stage], completed=progress.step, losses=f"loss {progress.loss:.2f}  {shown}")  # type: ignore[arg-type]
            if not bar.console.is_terminal and (progress.step % 20 == 0 or progress.step == 1):
                bar.console.print(
                    f"{progress.stage} {progress.step}/{progress.steps} loss {progress.loss:.3f} {shown} "
                    f"{progress.seconds:.2f} s", soft_wrap=True,
                )  # fmt: skip

        return run.run(report, until=until)
