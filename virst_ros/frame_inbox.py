# SPDX-License-Identifier: Apache-2.0
"""One slot per camera between the callbacks and the inference thread: the newest frame wins, the rest is counted."""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FrameInbox(Generic[Item]):
    """Holds at most one item of each camera. `put` never waits; an item that nobody took before the next one of its
    camera came is dropped."""

    def __init__(self, cameras: Sequence[str] = ("",)) -> None:
        self._items: dict[str, Item | None] = dict.fromkeys(cameras)
        self._closed = False
        self._received: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._changed = threading.Condition()

    def received(self, camera: str = "") -> int:
        """Items put in since the beginning."""
        return self._received[camera]

    def dropped(self, camera: str = "") -> int:
        """Items that were replaced by a newer one, that came after `close`, or that were left out."""
        return self._dropped[camera] + self._left_out[camera]

    def left_out(self, camera: str = "") -> int:
        """Items that were taken, but not looked at."""
        return self._left_out[camera]

    def leave_out(self, camera: str = "") -> None:
        """Count an item that was taken as one that is not looked at."""
        with self._changed:
            self._left_out[camera] += 1

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def holds_any(self) -> bool:
        """`take` would not wait: an item came while nobody was there for it."""
        with self._changed:
            return any(item is not None for item in self._items.values())

    def put(self, item: Item, camera: str = "") -> None:
        with self._changed:
            self._received[camera] += 1
            if self._closed:
                self._dropped[camera] += 1
                return
            if self._items[camera] is not None:
                self._dropped[camera] += 1
            self._items[camera] = item
            self._changed.notify()

    def take(self, timeout_s: float) -> list[Item]:
        """The newest item of each camera that has any; none when there was none for `timeout_s` or after `close`."""
        with self._changed:
            if not self._closed and all(item is None for item in self._items.values()):
                self._changed.wait(timeout_s)
            taken = [item for item in self._items.values() if item is not None]
            self._items = dict.fromkeys(self._items)
            return taken

    def close(self) -> None:
        """Drop what is inside; `take` returns nothing from now on."""
        with self._changed:
            for camera, item in self._items.items():
                self._dropped[camera] += item is not None
            self._items = dict.fromkeys(self._items)
            self._closed = True
            self._changed.notify_all()
