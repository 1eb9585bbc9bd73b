# SPDX-License-Identifier: Apache-2.0
"""Finds the depth image of each processed frame by its time stamp, exactly or within half a frame.

message_filters is not to be had from the Python package index, and would not do: frames come late, after inference, and
one that waits for its depth must not hold up the next.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

FrameItem = TypeVar("FrameItem")
DepthItem = TypeVar("DepthItem")

SILENT_S = 1.0  # depth that has not come for this long is not waited for
PERIODS_KEPT = 15  # between images; their median is the period
FEWEST_PERIODS = 3


@dataclass(frozen=True)
class Match(Generic[FrameItem, DepthItem]):
    """A frame with its depth, or with None when there is none for it."""

    frame: FrameItem
    depth: DepthItem | None


class DepthSync(Generic[FrameItem, DepthItem]):
    """Gives each frame back once: with its depth, or without as soon as none can be expected. Any thread may call it.

    A frame waits only while depth keeps coming and has not come as far as the frame yet; the next frame ends its wait.
    So at most one frame waits, and frames come back in their order.

    Args:
        queue_size: depth images that are kept.
        slop_ns: largest difference in time; it is cut to half of the time between two images. 0 = equal stamps.
        now_s: a steady clock, seconds.
    """

    def __init__(self, queue_size: int, slop_ns: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self.wanted_slop_ns = slop_ns
        self._depths: deque[tuple[int, DepthItem]] = deque(maxlen=queue_size)
        self._depth_s = float("-inf")
        self._waiting: tuple[int, FrameItem] | None = None
        self._image_ns: int | None = None
        self._periods_ns: deque[int] = deque(maxlen=PERIODS_KEPT)
        self._now_s = now_s
        self._lock = threading.Lock()

    @property
    def slop_ns(self) -> int:
        """The difference in time that is allowed now. Only equal stamps until the time between images is known."""
        periods = list(self._periods_ns)
        if self.wanted_slop_ns == 0 or len(periods) < FEWEST_PERIODS:
            return 0
        return min(self.wanted_slop_ns, int(statistics.median(periods)) // 2)

    def image_came(self, stamp_ns: int) -> None:
        """Every image is told, also those that are never processed: they tell how long a frame lasts."""
        with self._lock:
            if self._image_ns is not None and stamp_ns > self._image_ns:
                self._periods_ns.append(stamp_ns - self._image_ns)
            self._image_ns = stamp_ns

    def put_depth(self, stamp_ns: int, depth: DepthItem) -> list[Match[FrameItem, DepthItem]]:
        """The frame that has waited for this depth, or that waits in vain now."""
        with self._lock:
            if self._depths and stamp_ns < self._depths[-1][0]:  # a bag starts again
                self._depths.clear()
            self._depths.append((stamp_ns, depth))
            self._depth_s = self._now_s()
            if self._waiting is None:
                return []
            waiting_ns, frame = self._waiting
            found = self._nearest(waiting_ns)
            if found is None and self._may_still_come(waiting_ns):
                return []
            self._waiting = None
            return [Match(frame, found)]

    def put_frame(self, stamp_ns: int, frame: FrameItem) -> list[Match[FrameItem, DepthItem]]:
        """What can be given back now: the frame that waited, this frame, both or neither."""
        with self._lock:
            done: list[Match[FrameItem, DepthItem]] = []
            if self._waiting is not None:
                done.append(Match(self._waiting[1], None))
                self._waiting = None
            found = self._nearest(stamp_ns)
            if found is None and self._may_still_come(stamp_ns):
                self._waiting = (stamp_ns, frame)
            else:
                done.append(Match(frame, found))
            return done

    def clear(self) -> None:
        """Forget frames and depth images: what comes next does not belong to them."""
        with self._lock:
            self._depths.clear()
            self._waiting = self._image_ns = None

    def nearest_gap_ns(self, stamp_ns: int) -> int | None:
        """How far the nearest depth image that is kept is from that time; None when there is none."""
        with self._lock:
            return min((abs(depth_ns - stamp_ns) for depth_ns, _ in self._depths), default=None)

    def _nearest(self, stamp_ns: int) -> DepthItem | None:
        gap_ns, depth = min(
            ((abs(depth_ns - stamp_ns), depth) for depth_ns, depth in self._depths),
            key=lambda pair: pair[0],
            default=(0, None),
        )
        return depth if gap_ns <= self.slop_ns else None

    def _may_still_come(self, stamp_ns: int) -> bool:
        """Depth images come in order: once one is past the frame, the frame's own has been lost."""
        if not self._depths or self._now_s() - self._depth_s > SILENT_S:
            return False
        return self._depths[-1][0] < stamp_ns + self.slop_ns
