# SPDX-License-Identifier: Apache-2.0
"""What is remembered of every object, in buffers that are allocated once.

Anchors are permanent (never aged out by time, replaced only by newer anchors), recent frames are temporary. One frame
attends to the alpha anchors nearest in time and to the P - 1 recent entries (VIRST, equation 12), with the temporal
encodings of SAM 2: anchors all share row P - 1 of maskmem_tpos_enc, the recent entry k writes ago has row k - 1
(sam2/modeling/sam2_base.py, `_prepare_memory_conditioned_features`, commit 2b90b9f).

Departures from SAM 2 (`memory.rules` "stream"; with "sam2" only the cap and causality are left):
- Memories are kept in float32, not rounded to bfloat16.
- Anchors are capped: the first one and the newest ones are kept.
- Causal: an anchor of a later step than the frame is never attended.
- Writes are gated by the caller, and "k frames back" means k *writes* back, as in SAMURAI: an object that was hidden
  for a second still has its last P - 1 views. Without gating both meanings are the same.
- Object pointers keep their true distance in steps. Those of the attended anchors come on top of the last
  `pointers - 1` written ones.
- A frame that is an anchor may be in the recent ring too, with the mask that was tracked there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from virst_engine.config import MemoryParameters
from virst_engine.types import MemoryEntry, MemoryTensors, StageSizes

EMPTY = -1  # in place of a step: nothing is remembered there


@dataclass(frozen=True)
class Recall:
    """How much of what is remembered one frame attends to."""

    anchors: int  # the nearest in time
    recent: int  # the newest
    pointers: int  # the newest, next to those of the anchors


class MemoryBank:
    """Memory of `rows` objects. Contents are on the device; which step sits where is numpy, so nothing waits."""

    def __init__(
        self,
        sizes: StageSizes,
        parameters: MemoryParameters,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._anchors, self._recent, self._pointers = (
            parameters.anchor_slots, parameters.recent_frames, parameters.pointers - 1,
        )  # fmt: skip
        if self._recent >= sizes.memory_frames:
            raise ValueError(
                f"memory.recent_frames must be < the model's {sizes.memory_frames} memory frames, got {self._recent}"
            )
        self._everything = self._recall = Recall(parameters.anchors_attended, self._recent, self._pointers)
        self._read_by_step = parameters.rules == "sam2"
        self._anchor_tpos = sizes.memory_frames - 1
        # Anchors first, then the ring: one gather reads both.
        columns = self._anchors + self._recent
        shape = (rows, columns, sizes.memory_channels, sizes.grid, sizes.grid)
        # SAM2VideoPredictor rounds memories to bfloat16 (_run_single_frame_inference), whatever it computes in.
        kept = torch.bfloat16 if self._read_by_step else dtype
        self._dtype, self._spatial = dtype, torch.empty(shape, device=device, dtype=kept).zero_()  # taken at once
        self._pointer = torch.zeros((rows, self._anchors + self._pointers, sizes.channels), device=device, dtype=dtype)
        self._is_approved = np.zeros((rows, self._anchors), dtype=np.bool_)
        self._anchor_steps = np.full((rows, self._anchors), EMPTY, dtype=np.int64)
        self._recent_steps = np.full((rows, self._recent), EMPTY, dtype=np.int64)
        self._pointer_steps = np.full((rows, self._pointers), EMPTY, dtype=np.int64)
        # Memories at the size of the model's own input, while another one is used; which of them still hold.
        self._own_spatial: torch.Tensor | None = None
        self._is_own = np.zeros((rows, columns), dtype=np.bool_)
        self._writes = np.zeros(rows, dtype=np.int64)  # recent entries ever written; the next goes to writes % ring

    def recall_at_most(self, limit: Recall | None) -> None:
        """Let `read` leave out the rest from now on; None: nothing. What is remembered stays."""
        full = self._everything
        self._recall = full
        if limit is not None:
            self._recall = Recall(
                min(limit.anchors, full.anchors), min(limit.recent, full.recent), min(limit.pointers, full.pointers)
            )

    @torch.no_grad()
    def resize(self, grid: int) -> None:
        """Resample all memories to a grid of another side: the model's input has changed.

        Those from before the first change come back unharmed when the grid does.
        """
        if grid == self._spatial.shape[-1]:
            return
        if self._own_spatial is None:
            self._own_spatial = self._spatial
            self._is_own[:] = True
        flat = self._spatial.flatten(0, 1).float()
        resampled = F.interpolate(flat, size=(grid, grid), mode="bilinear", align_corners=False)
        self._spatial = resampled.to(self._spatial.dtype).unflatten(0, self._spatial.shape[:2])
        if grid == self._own_spatial.shape[-1]:
            is_own = torch.from_numpy(self._is_own).to(self._spatial.device)
            self._spatial[is_own] = self._own_spatial[is_own]
            self._own_spatial = None

    def remember_anchor(
        self, slot: int, step: int, entry: MemoryEntry, entry_row: int = 0, *, is_approved: bool = False
    ) -> None:
        """Keep row `entry_row` of `entry` as an anchor; an anchor of the same step is replaced, unless the user
        approved that one and not this.

        The first anchor stays for good: it is what the user meant. When all slots are full, the oldest of the others
        makes room, unless the new one is older still; one that `is_approved` by the user only for another one.
        """
        steps = self._anchor_steps[slot]
        same, free = np.flatnonzero(steps == step), np.flatnonzero(steps == EMPTY)
        if same.size:
            column = int(same[0])
            if self._is_approved[slot, column] and not is_approved:
                return
        elif free.size:
            column = int(free[0])
        elif self._anchors == 1:
            column = 0
        else:
            others = np.arange(1, self._anchors)
            spare = others[~self._is_approved[slot, 1:]]
            if not spare.size and not is_approved:
                return
            spare = spare if spare.size else others
            column = int(spare[steps[spare].argmin()])
            if steps[column] > step and not is_approved:
                return
        self._spatial[slot, column].copy_(entry.spatial[entry_row])
        self._is_own[slot, column] = False
        self._pointer[slot, column].copy_(entry.pointer[entry_row])
        steps[column], self._is_approved[slot, column] = step, is_approved
        if self._read_by_step:  # SAM 2: a frame is an anchor or a recent one
            for recent in (self._recent_steps[slot], self._pointer_steps[slot]):
                recent[recent == step] = EMPTY

    def remember_recent(self, slot: int, step: int, entry: MemoryEntry, entry_row: int = 0) -> None:
        """Push row `entry_row` of `entry` into the ring of recent frames; the oldest entry falls out."""
        writes = int(self._writes[slot])
        column = writes % self._recent
        self._spatial[slot, self._anchors + column].copy_(entry.spatial[entry_row])
        self._is_own[slot, self._anchors + column] = False
        self._recent_steps[slot, column] = step
        if self._pointers:
            column = writes % self._pointers
            self._pointer[slot, self._anchors + column].copy_(entry.pointer[entry_row])
            self._pointer_steps[slot, column] = step
        self._writes[slot] = writes + 1

    def clear(self, slot: int) -> None:
        self._anchor_steps[slot] = EMPTY
        self._is_approved[slot] = False
        self._recent_steps[slot] = EMPTY
        self._pointer_steps[slot] = EMPTY
        self._writes[slot] = 0

    def forget_recent(self, slot: int) -> None:
        """Only anchors are remembered: what was tracked is not worth it."""
        self.forget_recent_after(slot, EMPTY)

    def forget_recent_after(self, slot: int, step: int) -> None:
        """What was tracked in later steps was never written."""
        longest = self._pointer_steps if self._pointers > self._recent else self._recent_steps
        self._writes[slot] -= int((longest[slot] > step).sum())
        for steps in (self._recent_steps[slot], self._pointer_steps[slot]):
            steps[steps > step] = EMPTY

    def forget_anchors_after(self, slot: int, step: int) -> None:
        """No anchor of a later step is remembered, but for those that the user approved."""
        steps = self._anchor_steps[slot]
        steps[(steps > step) & ~self._is_approved[slot]] = EMPTY

    def copy_slot(self, source: int, target: int) -> None:
        """Make `target` remember what `source` does, and nothing else."""
        for buffer in (self._spatial, self._pointer, self._own_spatial):
            if buffer is not None:
                buffer[target].copy_(buffer[source])
        for table in (
            self._anchor_steps, self._is_approved, self._recent_steps, self._pointer_steps, self._writes, self._is_own,
        ):  # fmt: skip
            table[target] = table[source]

    def is_empty(self, slot: int) -> bool:
        tables = (self._anchor_steps, self._recent_steps, self._pointer_steps)
        return all(bool((steps[slot] == EMPTY).all()) for steps in tables)

    def anchor_steps(self, slot: int) -> list[int]:
        """Steps of the anchors kept, ascending."""
        return sorted(int(step) for step in self._anchor_steps[slot] if step != EMPTY)

    def recent_steps(self, slot: int) -> list[int]:
        """Steps of the recent ring, ascending."""
        return sorted(int(step) for step in self._recent_steps[slot] if step != EMPTY)

    @torch.inference_mode()
    def read(self, step: int, slots: Sequence[int]) -> MemoryTensors:
        """What frame `step` attends to, one row per slot; a copy.

        Shapes depend on the number of slots and on `recall_at_most` only.
        """
        attended, newest, newest_pointers = self._recall.anchors, self._recall.recent, self._recall.pointers
        rows = np.asarray(slots, dtype=np.int64)[:, None]
        anchor_steps = self._anchor_steps[rows[:, 0]]
        usable = (anchor_steps != EMPTY) & (anchor_steps <= step)
        age = np.where(usable, step - anchor_steps, np.iinfo(np.int64).max)
        anchors = age.argsort(axis=1, kind="stable")[:, :attended]
        anchors_valid = np.take_along_axis(usable, anchors, axis=1)
        anchors_age = np.take_along_axis(age, anchors, axis=1)

        back = np.arange(1, newest + 1)
        recent, recent_valid, _ = self._recent_columns(step, rows, back, self._recent_steps, anchors, anchors_valid)
        columns = np.concatenate((anchors, recent), axis=1)
        valid = np.concatenate((anchors_valid, recent_valid), axis=1)
        tpos = np.empty_like(columns)
        tpos[:, :attended], tpos[:, attended:] = self._anchor_tpos, back - 1

        pointers, pointers_valid, distance = anchors, anchors_valid, anchors_age
        if newest_pointers:
            back = np.arange(1, newest_pointers + 1)
            recent, recent_valid, recent_age = self._recent_columns(
                step, rows, back, self._pointer_steps, anchors, anchors_valid
            )
            pointers = np.concatenate((anchors, recent), axis=1)
            pointers_valid = np.concatenate((anchors_valid, recent_valid), axis=1)
            distance = np.concatenate((anchors_age, recent_age), axis=1)
        distance = np.where(pointers_valid, distance, 0).astype(np.float32)

        return MemoryTensors(
            spatial=_gather(self._spatial, rows, columns).to(self._dtype),
            spatial_tpos=self._on_device(tpos),
            spatial_valid=self._on_device(valid),
            pointers=_gather(self._pointer, rows, pointers),
            pointer_distance=self._on_device(distance),
            pointer_valid=self._on_device(pointers_valid),
        )

    def _recent_columns(
        self,
        step: int,
        rows: np.ndarray,
        back: np.ndarray,
        ring_steps: np.ndarray,
        anchors: np.ndarray,
        anchors_valid: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of what happened `back` before this step: its column, whether there is any, its age in steps.

        `back` counts writes; with `memory.rules` "sam2" it counts steps, and an anchor that is not attended as one
        stands for its frame (unselected_cond_outputs).
        """
        steps, ring = ring_steps[rows[:, 0]], ring_steps.shape[1]
        if not self._read_by_step:
            writes = self._writes[rows]
            column = (writes - back) % ring
            at = np.take_along_axis(steps, column, axis=1)
            return self._anchors + column, (writes >= back) & (at != EMPTY), step - at
        anchor_steps = self._anchor_steps[rows[:, 0]].copy()
        attended = np.where(anchors_valid, anchors, self._anchors)
        spare = np.concatenate((anchor_steps, np.full((len(rows), 1), EMPTY)), axis=1)
        np.put_along_axis(spare, attended, EMPTY, axis=1)
        known = np.concatenate((spare[:, : self._anchors], steps), axis=1)
        wanted = step - back
        found = (known[:, None, :] == wanted[None, :, None]) & (wanted >= 0)[None, :, None]
        return found.argmax(axis=2), found.any(axis=2), np.broadcast_to(back, (len(rows), len(back)))

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._spatial.device, non_blocking=True)


def _gather(buffer: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    flat = torch.from_numpy((rows * buffer.shape[1] + columns).reshape(-1)).to(buffer.device, non_blocking=True)
    return buffer.flatten(0, 1).index_select(0, flat).unflatten(0, columns.shape)
