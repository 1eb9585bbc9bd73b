# SPDX-License-Identifier: Apache-2.0
"""The training loop: stages in order, one optimiser step after another; a stopped run goes on where it was."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from virst_engine.data.clips import Batch, BatchSource, RecordedScene
from virst_engine.errors import WeightsError
from virst_engine.model.config import VirstConfig
from virst_engine.model.virst import Virst
from virst_engine.model.words import WordTokenizer
from virst_engine.train.config import StageConfig, TrainConfig
from virst_engine.train.steps import (
    AttributeHeads,
    Losses,
    image_step,
    pretraining_step,
    propagation_step,
    weighted,
)
from virst_engine.types import MaskPrediction

log = logging.getLogger(__name__)


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


def run_step(stage: StageConfig, model: Virst, heads: AttributeHeads, batch: Batch) -> tuple[Losses, MaskPrediction]:
    if stage.kind == "pretraining":
        return pretraining_step(model, heads, batch)
    if stage.kind == "propagation":
        return propagation_step(model, heads, batch)
    return image_step(model, heads, batch, train_segmenter="seg_model.image_encoder." not in stage.frozen)


class Trainer:
    """Owns a model in training, its auxiliary heads, the optimiser and the place in the schedule."""

    def __init__(
        self,
        model: Virst,
        heads: AttributeHeads,
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
        self.tokenizer = WordTokenizer(model.config.words)
        self.stage_number, self.step, self.seconds = 0, 0, 0.0
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
            if self.stage_number < len(self.config.stages):
                self._start_stage()
            self.save()
        return True

    def _start_stage(self) -> None:
        stage = self.config.stages[self.stage_number]
        decayed, plain = [], []
        for name, parameter in [*self.model.named_parameters(), *self.heads.named_parameters()]:
            parameter.requires_grad_(not name.startswith(stage.frozen) if stage.frozen else True)
            if parameter.requires_grad:
                (decayed if parameter.ndim >= 2 and "embed" not in name else plain).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))

    def _learning_rate(self, stage: StageConfig, step: int) -> float:
        if step < stage.warmup_steps:
            return stage.learning_rate * (step + 1) / stage.warmup_steps
        done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
        low = stage.final_rate
        return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def _run_stage(self, report: Callable[[Progress], None] | None, until: float) -> bool:
        stage = self.config.stages[self.stage_number]
        source = BatchSource(self.scenes, self.tokenizer, self.config, stage, self.config.seed)
        loader = DataLoader(
            source,
            batch_size=None,
            sampler=range(self.step, stage.steps),
            num_workers=self.loader_workers,
            prefetch_factor=4 if self.loader_workers else None,
            multiprocessing_context="fork" if self.loader_workers else None,
        )
        self.model.train()
        for batch in loader:
            start = time.monotonic()
            losses = self._optimise(stage, _to(batch, self.device))
            self.step += 1
            self.seconds += time.monotonic() - start
            self._report(stage, losses, time.monotonic() - start, report)
            if self.step % self.config.checkpoint_every == 0:
                self.save()
            if time.monotonic() > until:
                return self.step >= stage.steps
        return True

    def _optimise(self, stage: StageConfig, batch: Batch) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(stage, self.step)
        device_type = torch.device(self.device).type
        # On a CPU the fused attention's backward pass is slow; plain matrix products are about twice as fast.
        kernels = (
            [SDPBackend.MATH]
            if device_type == "cpu"
            else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
        with torch.autocast(device_type, torch.bfloat16, enabled=self.config.bf16), sdpa_kernel(kernels):
            losses, _ = run_step(stage, self.model, self.heads, batch)
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
                "step": self.step,
                "seconds": self.seconds,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises WeightsError when it is missing, damaged or of another model."""
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except Exception as error:
            raise WeightsError(f"cannot resume from {self.checkpoint}: {error}; start without --resume") from error
        if VirstConfig.from_json(state["config"]) != self.model.config:
            raise WeightsError(f"{self.checkpoint} belongs to a model of another configuration; start without --resume")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage_number, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        if self.stage_number < len(self.config.stages):
            self._start_stage()
            self.optimizer.load_state_dict(state["optimizer"])


def _to(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    values = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(batch).items()}
    return Batch(**values)
