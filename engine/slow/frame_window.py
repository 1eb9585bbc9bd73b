# SPDX-License-Identifier: Apache-2.0
"""Which past frames the reasoner sees, and a bounded store to take them from.

There are two ways to space the frames of a clip. By default each is as far from the newest one as it should be: clips
that end at different frames share few. On a grid, time is cut into cells of one spacing, and of each cell clips have
the first frame: in the next clip, only the frames of new cells and the newest one are new to a reasoner that keeps what
it made of the others. The newest frame is the last one of the clip in both.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from virst_engine.types import Clip

ROWS_PER_SPACING = 8  # frames closer together than spacing / 8 are not all kept: bounds the store at any frame rate

LONGEST = 2  # a clip that takes longer than this many times what it should shows something else than its frames say


def choose_frames(stamps_ns: Sequence[int], count: int, spacing_ns: int) -> list[int]:
    """Positions in `stamps_ns` (ascending) of the clip's frames, oldest first; the newest frame is always the last.

    Going back from the newest, each frame is the one nearest to `spacing_ns` times its number, and older than the one
    after it. When there is no older frame left, the oldest one is repeated at the front. A spacing of 0 takes the
    newest `count` frames as they are.
    """
    position = len(stamps_ns) - 1
    newest_ns = stamps_ns[position]
    chosen = [position]
    for back in range(1, count):
        if position > 0:
            target_ns = newest_ns - back * spacing_ns
            after = bisect_left(stamps_ns, target_ns, 0, position)  # first frame at or after the target
            after = min(after, position - 1)
            before = max(after - 1, 0)
            position = before if target_ns - stamps_ns[before] < stamps_ns[after] - target_ns else after
        chosen.append(position)
    return chosen[::-1]


class FrameWindow:
    """The recent past of one camera at the reasoner's resolution: small frames and the features that ST-Fusion reads.

    Both are allocated at the first frame. Features travel as float16: half the bytes, and the fusion normalises them.
    """

    def __init__(
        self, clip_frames: int, clip_spacing_s: float, camera: str = "camera", *, on_grid: bool = False
    ) -> None:
        """`on_grid`: clips share their frames; for a reasoner that keeps what it made of them."""
        self._count, self._spacing_ns, self._camera = clip_frames, round(clip_spacing_s * 1e9), camera
        self._on_grid = on_grid and self._spacing_ns > 0
        self._longest_ns = LONGEST * (clip_frames - 1) * self._spacing_ns
        per_spacing = ROWS_PER_SPACING if self._spacing_ns and not self._on_grid else 1
        self._rows = (clip_frames - 1) * per_spacing + 2
        self._order: list[int] = []  # rows in use, oldest first
        self._steps = np.zeros(self._rows, dtype=np.int64)
        self._stamps_ns = np.zeros(self._rows, dtype=np.int64)
        self._frames: UInt8[np.ndarray, "rows hv wv 3"] | None = None
        self._fusion: Float[np.ndarray, "rows cf hf wf"] | None = None

    def __len__(self) -> int:
        return len(self._order)

    def push(
        self,
        step: int,
        stamp_ns: int,
        frame_rgb_u8: UInt8[np.ndarray, "hv wv 3"],
        fusion: Float[np.ndarray, "cf hf wf"],
    ) -> None:
        """Copy the newest frame in. Stamps must not go back: `clear` the window when they do.

        After a pause of more than LONGEST spans of the clip the window starts anew: what was before is another story.
        """
        if self._order and 0 < self._longest_ns < stamp_ns - self._stamps_ns[self._order[-1]]:
            self._order.clear()
        if self._frames is not None and self._frames.shape[1:] != frame_rgb_u8.shape:  # the camera's size has changed
            self._order.clear()
            self._frames = None
        if self._frames is None or self._fusion is None:
            self._frames = np.zeros((self._rows, *frame_rgb_u8.shape), dtype=np.uint8)
            self._fusion = np.zeros((self._rows, *fusion.shape), dtype=np.float16)
        row = self._row_for(stamp_ns)
        self._steps[row], self._stamps_ns[row] = step, stamp_ns
        self._frames[row], self._fusion[row] = frame_rgb_u8, fusion

    def clip(self) -> Clip:
        """The clip that ends at the newest frame; a copy. There must be a frame."""
        if not self._order or self._frames is None or self._fusion is None:
            raise ValueError("there is no frame yet; push one first")
        stamps = [int(self._stamps_ns[row]) for row in self._order]
        spacing_ns = 0 if self._on_grid else self._spacing_ns  # the store holds the frames of the grid, and no others
        rows = [self._order[position] for position in choose_frames(stamps, self._count, spacing_ns)]
        return Clip(self._steps[rows], self._stamps_ns[rows], self._frames[rows], self._fusion[rows], self._camera)

    def is_full(self, clip: Clip) -> bool:
        """Whether the whole window has been seen: no repeated frame, and the time it spans is that of a clip.

        Half a spacing less is close enough, and LONGEST spans of a slow camera are; a window with a pause is longer. On
        a grid the newest frame may follow the first one of its cell at once, which makes a clip one spacing shorter.
        """
        if len(set(clip.steps.tolist())) < self._count:
            return False
        span_ns = int(clip.stamps_ns[-1] - clip.stamps_ns[0])
        spacings = self._count - 2 if self._on_grid else self._count - 1
        shortest_ns = spacings * self._spacing_ns - self._spacing_ns // 2
        return self._longest_ns == 0 or shortest_ns <= span_ns <= self._longest_ns

    def clear(self, camera: str | None = None) -> None:
        """No frame was ever seen; buffers stay."""
        self._order.clear()
        self._camera = self._camera if camera is None else camera

    def _row_for(self, stamp_ns: int) -> int:
        order = self._order
        if len(order) >= 2 and not self._is_worth_a_row(*self._stamps_ns[order[-2:]].tolist()):
            return order[-1]
        row = len(order) if len(order) < self._rows else order.pop(0)
        order.append(row)
        return row

    def _is_worth_a_row(self, before_ns: int, stamp_ns: int) -> bool:
        """Whether a frame that is not the newest any more is kept; `before_ns`: of the one that was kept before it."""
        if self._on_grid:  # the first frame of its cell
            return stamp_ns // self._spacing_ns > before_ns // self._spacing_ns
        return stamp_ns - before_ns >= self._spacing_ns // ROWS_PER_SPACING
