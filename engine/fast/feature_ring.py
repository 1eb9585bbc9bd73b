# SPDX-License-Identifier: Apache-2.0
"""What the newest frames looked like to the network and where each object was believed to be in them.

A late answer of the reasoner is decoded on the cached features of its own frame, compared with the mask believed there,
and, where they differ, the frames since then are replayed from here.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from virst_engine.types import ImageFeatures

NO_STEP = -1


class FeatureRing:
    """The last `capacity` steps, plus one pinned frame per owner. Buffers are allocated at the first frame.

    A pin is a copy that outlives the ring: the frame that an owner's open request will be answered for.
    """

    def __init__(
        self, capacity: int, slots: int, owners: int, mask_side: int, device: torch.device | str = "cpu"
    ) -> None:
        """`slots`: rows of beliefs per frame (shadows included); `owners`: how many may pin one frame each."""
        self._capacity = capacity
        self._features: ImageFeatures | None = None  # b = capacity + owners
        self._steps = [NO_STEP] * capacity
        self._stamps_ns = [0] * capacity
        self._pinned_steps = [NO_STEP] * owners
        self._masks = torch.zeros((capacity, slots, mask_side, mask_side), dtype=torch.bool, device=device)
        self._is_known = np.zeros((capacity, slots), dtype=np.bool_)

    def push(self, step: int, stamp_ns: int, features: ImageFeatures) -> ImageFeatures:
        """Copy the features of the newest frame (b = 1) in and view them; the frame `capacity` steps ago is gone."""
        row = step % self._capacity
        if self._features is None:
            self._features = self._allocate(features)
        for f in fields(ImageFeatures):
            getattr(self._features, f.name)[row].copy_(getattr(features, f.name)[0])
        self._steps[row], self._stamps_ns[row] = step, stamp_ns
        self._is_known[row] = False
        return self._view(row)

    def pin(self, owner: int, step: int) -> None:
        """Keep this step's features for `owner` until it pins another; it must be in the ring."""
        if self._features is None or not self.has(step):
            raise KeyError(step)
        for f in fields(ImageFeatures):
            buffer = getattr(self._features, f.name)
            buffer[self._capacity + owner].copy_(buffer[step % self._capacity])
        self._pinned_steps[owner] = step

    def has(self, step: int) -> bool:
        return step >= 0 and self._steps[step % self._capacity] == step

    def has_pinned(self, owner: int, step: int) -> bool:
        return step >= 0 and self._pinned_steps[owner] == step

    def oldest_step(self) -> int:
        """The oldest step that is still here; NO_STEP when nothing is."""
        return min((step for step in self._steps if step != NO_STEP), default=NO_STEP)

    def stamp_ns(self, step: int) -> int | None:
        return self._stamps_ns[step % self._capacity] if self.has(step) else None

    def features(self, step: int) -> ImageFeatures | None:
        """A view of one frame's features, valid until `capacity` more frames are pushed; None once evicted."""
        return self._view(step % self._capacity) if self.has(step) else None

    def gather(self, steps: Sequence[int], owner: int) -> ImageFeatures:
        """A copy of several frames' features, b = len(steps), from the ring or else from the owner's pin."""
        if self._features is None:
            raise KeyError(steps)
        rows = []
        for step in steps:
            if self.has(step):
                rows.append(step % self._capacity)
            elif self.has_pinned(owner, step):
                rows.append(self._capacity + owner)
            else:
                raise KeyError(step)
        row = torch.tensor(rows, device=self._masks.device)
        return ImageFeatures(*(getattr(self._features, f.name).index_select(0, row) for f in fields(ImageFeatures)))

    def believe(self, step: int, slot: int, mask: Bool[Tensor, "hm wm"]) -> None:
        """Note where the slot's object is in that frame (all False: not visible); nothing when the step is gone."""
        if self.has(step):
            row = step % self._capacity
            self._masks[row, slot].copy_(mask)
            self._is_known[row, slot] = True

    def belief(self, step: int, slot: int) -> Bool[Tensor, "hm wm"] | None:
        """A view of the mask believed in that frame; None when the step is gone or the object was not looked for."""
        row = step % self._capacity
        return self._masks[row, slot] if self.has(step) and bool(self._is_known[row, slot]) else None

    def forget(self, slot: int) -> None:
        """Nothing is believed of this slot any more."""
        self._is_known[:, slot] = False

    def release_pin(self, owner: int) -> None:
        self._pinned_steps[owner] = NO_STEP

    def copy_slot(self, source: int, target: int) -> None:
        """Believe of `target` what is believed of `source`, in all frames."""
        self._masks[:, target].copy_(self._masks[:, source])
        self._is_known[:, target] = self._is_known[:, source]

    def clear(self) -> None:
        """No frame is here any more; buffers stay."""
        self._steps = [NO_STEP] * len(self._steps)
        self._pinned_steps = [NO_STEP] * len(self._pinned_steps)
        self._is_known[:] = False

    def _view(self, row: int) -> ImageFeatures:
        return ImageFeatures(*(getattr(self._features, f.name)[row : row + 1] for f in fields(ImageFeatures)))

    def _allocate(self, features: ImageFeatures) -> ImageFeatures:
        rows = self._capacity + len(self._pinned_steps)
        like = [getattr(features, f.name) for f in fields(ImageFeatures)]
        return ImageFeatures(*(torch.zeros((rows, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in like))
