# SPDX-License-Identifier: Apache-2.0
"""The training loop: stages in order, one optimiser step after another; a stopped run goes on where it was."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from virst_engine.data.clips import Batch, BatchSource, RecordedScene, Tokenizer
from virst_engine.errors import WeightsError
from virst_engine.model.virst import Virst
from virst_engine.model.words import WordTokenizer
from virst_engine.train.config import StageConfig, TrainConfig
from virst_engine.train.method_steps import MethodModel, MethodReadOuts, tempvrs_step, visa_step
from virst_engine.train.steps import (
    Losses,
    ReadOuts,
    image_step,
    pretraining_step,
    propagation_step,
    video_step,
    weighted,
)
from virst_engine.train.transformers_detector import DetectorModel, DetectorReadOuts, detector_step

log = logging.getLogger(__name__)
FINISHED = "finished"  # in place of a stage's name
SLOWER_RATE = 0.25


class Scalars(Protocol):
    """Where curves go; torch.utils.tensorboard.SummaryWriter fits."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


@dataclass(frozen=True)
class Progress:
    """What one step reports."""

    stage: str
    step: int
    steps: int
    loss: float
    losses: dict[str, float]
    seconds: float


def computes_bf16(device: str) -> bool:
    """Whether the device has instructions for bfloat16. Emulated it is slower than float32, on a CPU twenty times."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


Trained = Virst | MethodModel | DetectorModel
Heads = ReadOuts | MethodReadOuts | DetectorReadOuts


def run_step(stage: StageConfig, model: Trained, heads: Heads, batch: Batch) -> Losses:
    if isinstance(model, DetectorModel) or isinstance(heads, DetectorReadOuts):
        assert isinstance(model, DetectorModel)
        assert isinstance(heads, DetectorReadOuts)
        return detector_step(model, heads, batch, stage.patches)
    if isinstance(model, MethodModel) or isinstance(heads, MethodReadOuts):
        assert isinstance(model, MethodModel)
        assert isinstance(heads, MethodReadOuts)
        return visa_step(model, heads, batch) if stage.kind == "visa" else tempvrs_step(model, heads, batch)
    is_encoder_frozen = "seg_model.image_encoder.".startswith(stage.frozen)
    if stage.kind == "video":
        return video_step(model, heads, batch)
    if stage.kind == "pretraining":
        return pretraining_step(model, heads, batch, train_segmenter=not is_encoder_frozen)[0]
    if stage.kind == "propagation":
        return propagation_step(model, heads, batch)[0]
    return image_step(model, heads, batch, train_segmenter=not is_encoder_frozen)[0]


class Trainer:
    """Owns a model in training, its auxiliary heads, the optimiser and the place in the schedule."""

    def __init__(
        self,
        model: Trained,
        heads: Heads,
        config: TrainConfig,
        scenes: Sequence[RecordedScene],
        *,
        folder: Path,
        scalars: Scalars | None = None,
        device: str = "cpu",
        loader_workers: int = 1,
    ) -> None:
        self.model, self.heads, self.config = model.to(device), heads.to(device), config
        self.scenes, self.folder, self.scalars = scenes, folder, scalars
        self.device, self.loader_workers = device, loader_workers
        self.tokenizer: Tokenizer = (
            model.tokenizer if isinstance(model, DetectorModel) else WordTokenizer(model.config.words)
        )
        self.stage_number, self.step, self.seconds = 0, 0, 0.0
        self.taken: dict[str, int] = {}  # steps of each stage so far
        self.precision = "bfloat16" if config.bf16 and computes_bf16(device) else "float32"
        log.info("training in %s", self.precision)
        self._start_stage()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, report: Callable[[Progress], None] | None = None, *, until: float = math.inf) -> bool:
        """Train to the end, or until `time.monotonic()` passes `until`. Returns whether the end was reached."""
        while self.stage_number < len(self.config.stages):
            if not self._run_stage(report, until):
                self.save()
                return False
            self.stage_number, self.step = self.stage_number + 1, 0
            is_finished = self.stage_number == len(self.config.stages)
            if not is_finished:
                self._start_stage()
            self.save()
            if not is_finished and time.monotonic() > until:
                return False
        return True

    def _start_stage(self) -> None:
        stage = self.config.stages[self.stage_number]
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in [*self.model.named_parameters(), *self.heads.named_parameters()]:
            parameter.requires_grad_(not name.startswith(stage.frozen))
            if parameter.requires_grad:
                decay = self.config.weight_decay if parameter.ndim >= 2 and "embed" not in name else 0.0
                share = SLOWER_RATE if name.startswith(stage.slower) else 1.0
                groups.setdefault((decay, share), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "weight_decay": decay, "share": share} for (decay, share), p in groups.items()],
            lr=stage.learning_rate,
            betas=(0.9, 0.98),
        )

    def _learning_rate(self, stage: StageConfig, step: int) -> float:
        if step < stage.warmup_steps:
            return stage.learning_rate * (step + 1) / stage.warmup_steps
        done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
        low = stage.final_rate
        return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def _run_stage(self, report: Callable[[Progress], None] | None, until: float) -> bool:
        stage = self.config.stages[self.stage_number]
        plan = stage.clip_plan(self.config.clip_stride)
        seed = [self.config.seed, sum(map(ord, stage.name))]
        source = BatchSource(self.scenes, self.tokenizer, plan, seed, stage.steps)
        loader = DataLoader(
            source,
            batch_size=None,
            sampler=range(self.step, stage.steps),
            num_workers=self.loader_workers,
            prefetch_factor=4 if self.loader_workers else None,
            multiprocessing_context="fork" if self.loader_workers else None,
        )
        self._set_modes(stage)
        for batch in loader:
            start = time.monotonic()
            losses = self._optimise(stage, _to(batch, self.device))
            self.step += 1
            self.taken[stage.name] = self.taken.get(stage.name, 0) + 1
            self.seconds += time.monotonic() - start
            self._report(stage, losses, time.monotonic() - start, report)
            if self.step % self.config.checkpoint_every == 0:
                self.save()
            if time.monotonic() > until:
                return self.step >= stage.steps
        return True

    def _set_modes(self, stage: StageConfig) -> None:
        """Training mode, but not for what is frozen: BatchNorm's statistics would go on changing."""
        self.model.train()
        for name, module in self.model.named_modules():
            if f"{name}.".startswith(stage.frozen):
                module.eval()

    def _optimise(self, stage: StageConfig, batch: Batch) -> dict[str, float]:
        # What a step draws depends on its place only, so that a resumed run draws the same.
        place = [self.config.seed, self.stage_number, self.step]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self._learning_rate(stage, self.step)
        device_type = torch.device(self.device).type
        # On a CPU the fused attention's backward pass is slow; plain matrix products are about twice as fast.
        kernels = (
            [SDPBackend.MATH]
            if device_type == "cpu"
            else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
        with torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bfloat16"), sdpa_kernel(kernels):
            losses = run_step(stage, self.model, self.heads, batch)
            loss = weighted(losses, stage.weights)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_gradient)
        if not bool(torch.isfinite(norm)):
            log.warning("stage %s, step %d: gradient is not finite; the step is skipped", stage.name, self.step)
        else:
            self.optimizer.step()
        values = {name: float(value.detach()) for name, value in losses.items()}
        return values | {"total": float(loss.detach()), "gradient": float(norm)}

    def _report(
        self, stage: StageConfig, losses: dict[str, float], seconds: float, report: Callable[[Progress], None] | None
    ) -> None:
        overall = sum(s.steps for s in self.config.stages[: self.stage_number]) + self.step
        if self.scalars is not None:
            for name, value in losses.items():
                self.scalars.add_scalar(f"{stage.name}/{name}", value, overall)
            self.scalars.add_scalar(f"{stage.name}/seconds", seconds, overall)
        if report is not None:
            report(Progress(stage.name, self.step, stage.steps, losses["total"], losses, seconds))

    def save(self) -> None:
        """Write the checkpoint; a reader never sees half of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "config": self.model.config.to_json(),
                "stage": self.stage_number,
                "stage_name": [*(stage.name for stage in self.config.stages), FINISHED][self.stage_number],
                "step": self.step,
                "seconds": self.seconds,
                "taken": self.taken,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises WeightsError when it is missing, damaged or of another run."""
        remedy = "start without --resume, or with another --out"
        if not self.checkpoint.is_file():
            raise WeightsError(f"cannot resume: there is no checkpoint {self.checkpoint}; {remedy}")
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            is_of_this_model = _agrees(json.loads(state["config"]), json.loads(self.model.config.to_json()))
            stage_number, stage_name = state["stage"], state.get("stage_name")
        except Exception as error:  # whatever a damaged file makes torch raise; its advice is to execute the file
            kind = type(error).__name__
            raise WeightsError(
                f"cannot resume: {self.checkpoint} is damaged or no checkpoint ({kind}); {remedy}"
            ) from error
        if not is_of_this_model:
            raise WeightsError(f"{self.checkpoint} belongs to a model of another configuration; {remedy}")
        names = [*(stage.name for stage in self.config.stages), FINISHED]
        goes_on = stage_name == FINISHED and set(names[:stage_number]) <= state.get("taken", {}).keys()
        if stage_number >= len(names) or not (goes_on or stage_name in (None, names[stage_number])):
            raise WeightsError(f"{self.checkpoint} belongs to a run of other stages than {', '.join(names)}; {remedy}")
        try:
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
        except RuntimeError as error:  # torch's words for other names or shapes, one line per tensor
            raise WeightsError(f"{self.checkpoint} is from another version of this program; {remedy}") from error
        self.stage_number, self.step, self.seconds = stage_number, state["step"], state["seconds"]
        self.taken = dict(state.get("taken", {}))
        if self.stage_number < len(self.config.stages):
            self._start_stage()
            if stage_name != FINISHED:  # a finished run that goes on with more stages has nothing to say of them
                self.optimizer.load_state_dict(state["optimizer"])


def _agrees(saved: Any, ours: Any) -> bool:
    """Whether two configurations are equal; fields that are newer than the saved one do not count."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        return saved.keys() <= ours.keys() and all(_agrees(value, ours[name]) for name, value in saved.items())
    return bool(saved == ours)


def _to(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    values: dict[str, Any] = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return Batch(**values)
