# SPDX-License-Identifier: Apache-2.0
"""What the newest frames looked like to the network and where each object was believed to be in them.

A late answer of the reasoner is decoded on the cached features of its own frame, compared with the mask believed there,
and, where they differ, the frames since then are replayed from here.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from virst_engine.types import ImageFeatures

NO_STEP = -1
CHUNK_ROWS = 8  # resampled at a time: bounds what is in memory twice
CACHED = ("top", "high_res_s0", "high_res_s1")  # `fusion` is most of the bytes, and the segmenter never reads it


class FeatureRing:
    """The last `capacity` steps, plus a few pinned frames per owner. Buffers are allocated at the first frame.

    Pins are copies that outlive the ring: the frames that an owner's open request will be answered for. `fusion` is not
    cached: the features that come back have none of its channels.
    """

    def __init__(
        self,
        capacity: int,
        slots: int,
        owners: int,
        mask_side: int,
        device: torch.device | str = "cpu",
        *,
        pins: int = 1,
    ) -> None:
        """`slots`: rows of beliefs per frame (shadows included); `owners`: how many may pin `pins` frames each."""
        self._capacity, self._pins = capacity, pins
        rows = capacity + owners * pins  # the ring, then the pins of each owner
        self._buffers: dict[str, Tensor] = {}
        self._no_fusion = torch.zeros((rows, 0, 1, 1), device=device)
        self._steps = [NO_STEP] * rows
        self._stamps_ns = [0] * capacity
        self._image_sizes = [(0, 0)] * capacity
        self._masks = torch.empty((rows, slots, mask_side, mask_side), dtype=torch.bool, device=device).zero_()
        self._is_known = np.zeros((rows, slots), dtype=np.bool_)

    def allocate(self, features: ImageFeatures) -> None:
        """Make the buffers for features like these, unless they are there. All of their memory is taken at once."""
        for name in CACHED:
            if name not in self._buffers:
                like = getattr(features, name)
                shape = (len(self._steps), *like.shape[1:])
                # Written to: pages of `zeros` would be taken one by one, as slots are first used.
                self._buffers[name] = torch.empty(shape, dtype=like.dtype, device=like.device).zero_()

    def push(
        self, step: int, stamp_ns: int, features: ImageFeatures, image_size: tuple[int, int] = (0, 0)
    ) -> ImageFeatures:
        """Copy the features of the newest frame (b = 1) in and view them; the frame `capacity` steps ago is gone.

        `image_size`: height and width of the camera's image.
        """
        row = step % self._capacity
        self.allocate(features)
        for name in CACHED:
            self._buffers[name][row].copy_(getattr(features, name)[0])
        self._steps[row], self._stamps_ns[row], self._image_sizes[row] = step, stamp_ns, image_size
        self._is_known[row] = False
        return self._view(row)

    def pin(self, owner: int, steps: Sequence[int]) -> None:
        """Keep these steps, with all beliefs of them, for `owner` until it pins others; those gone already are not.

        Of more than `pins` steps the last ones are kept.
        """
        kept = [step for step in steps if self._row(step, owner) is not None][-self._pins :]
        first = self._first_pin(owner)
        free = [row for row in range(first, first + self._pins) if self._steps[row] not in kept]
        for row in free:
            self._steps[row] = NO_STEP
        for step in kept:
            if self.has_pinned(owner, step):
                continue  # in its place already, where beliefs are kept up to date too
            row, source = free.pop(), step % self._capacity
            for buffer in self._buffers.values():
                buffer[row].copy_(buffer[source])
            self._masks[row].copy_(self._masks[source])
            self._is_known[row] = self._is_known[source]
            self._steps[row] = step

    def has(self, step: int) -> bool:
        """Whether the step is among the last `capacity` ones."""
        return step >= 0 and self._steps[step % self._capacity] == step

    def has_pinned(self, owner: int, step: int) -> bool:
        first = self._first_pin(owner)
        return step >= 0 and step in self._steps[first : first + self._pins]

    def oldest_step(self) -> int:
        """The oldest step that is still in the ring; NO_STEP when nothing is."""
        return min((step for step in self._steps[: self._capacity] if step != NO_STEP), default=NO_STEP)

    def stamp_ns(self, step: int) -> int | None:
        return self._stamps_ns[step % self._capacity] if self.has(step) else None

    def image_size(self, step: int) -> tuple[int, int] | None:
        """Height and width of the camera's image of that step; None once evicted."""
        return self._image_sizes[step % self._capacity] if self.has(step) else None

    def features(self, step: int) -> ImageFeatures | None:
        """A view of one frame's features, valid until `capacity` more frames are pushed; None once evicted."""
        return self._view(step % self._capacity) if self.has(step) else None

    def gather(self, steps: Sequence[int], owner: int) -> ImageFeatures:
        """A copy of several frames' features, b = len(steps), from the ring or else from the owner's pins."""
        rows = []
        for step in steps:
            row = self._row(step, owner)
            if row is None:
                raise KeyError(step)
            rows.append(row)
        index = torch.tensor(rows, device=self._masks.device)
        return self._features({name: self._buffers[name].index_select(0, index) for name in CACHED}, len(rows))

    def believe(self, step: int, slot: int, mask: Bool[Tensor, "hm wm"]) -> None:
        """Note where the slot's object is in that frame (all False: not visible); nothing when the step is gone."""
        for row in self._rows(step):
            self._masks[row, slot].copy_(mask)
            self._is_known[row, slot] = True

    def belief(self, step: int, slot: int) -> Bool[Tensor, "hm wm"] | None:
        """A view of the mask believed in that frame, cached or pinned by anyone.

        None when the step is gone or the object was not looked for.
        """
        for row in self._rows(step):
            if bool(self._is_known[row, slot]):
                return self._masks[row, slot]
        return None

    def forget(self, slot: int) -> None:
        """Nothing is believed of this slot any more."""
        self._is_known[:, slot] = False

    def release_pins(self, owner: int) -> None:
        first = self._first_pin(owner)
        self._steps[first : first + self._pins] = [NO_STEP] * self._pins

    def copy_slot(self, source: int, target: int) -> None:
        """Believe of `target` what is believed of `source`, in all frames."""
        self._masks[:, target].copy_(self._masks[:, source])
        self._is_known[:, target] = self._is_known[:, source]

    @torch.no_grad()
    def resize(self, mask_side: int) -> None:
        """Resample all that is here as if the model's input, and with it its masks, had another size."""
        before = self._masks.shape[-1]
        if mask_side == before:
            return
        self._buffers = {
            name: _resampled(buffer, round(buffer.shape[-1] * mask_side / before), "bilinear")
            for name, buffer in self._buffers.items()
        }
        self._masks = _resampled(self._masks.view(torch.uint8), mask_side, "nearest-exact").view(torch.bool)

    def clear(self) -> None:
        """No frame is here any more; buffers stay."""
        self._steps = [NO_STEP] * len(self._steps)
        self._is_known[:] = False

    def _first_pin(self, owner: int) -> int:
        return self._capacity + owner * self._pins

    def _rows(self, step: int) -> list[int]:
        """Where this step is: in the ring, in pins, or nowhere."""
        if step < 0:
            return []
        pinned = [row for row in range(self._capacity, len(self._steps)) if self._steps[row] == step]
        return [step % self._capacity, *pinned] if self.has(step) else pinned

    def _row(self, step: int, owner: int) -> int | None:
        if self.has(step):
            return step % self._capacity
        first = self._first_pin(owner)
        return next((row for row in range(first, first + self._pins) if step >= 0 and self._steps[row] == step), None)

    def _view(self, row: int) -> ImageFeatures:
        return self._features({name: self._buffers[name][row : row + 1] for name in CACHED}, 1)

    def _features(self, cached: dict[str, Tensor], count: int) -> ImageFeatures:
        return ImageFeatures(**cached, fusion=self._no_fusion[:count])


def _resampled(images: Tensor, side: int, mode: str) -> Tensor:
    resized = images.new_empty((*images.shape[:2], side, side))
    for source, target in zip(images.split(CHUNK_ROWS), resized.split(CHUNK_ROWS), strict=True):
        target.copy_(F.interpolate(source, size=(side, side), mode=mode))
    return resized
