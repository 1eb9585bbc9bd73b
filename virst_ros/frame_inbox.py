# SPDX-License-Identifier: Apache-2.0
"""One slot between the camera's callback and the inference thread: the newest frame wins, the rest is counted."""

import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FrameInbox(Generic[Item]):
    """Holds at most one item. `put` never waits; an item that nobody took before the next one came is dropped."""

    def __init__(self) -> None:
        self._item: Item | None = None
        self._closed = False
        self._received = 0
        self._dropped = 0
        self._changed = threading.Condition()

    @property
    def received(self) -> int:
        """Items put in since the beginning."""
        return self._received

    @property
    def dropped(self) -> int:
        """Items that were replaced by a newer one, or that came after `close`."""
        return self._dropped

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, item: Item) -> None:
        with self._changed:
            self._received += 1
            if self._closed:
                self._dropped += 1
                return
            if self._item is not None:
                self._dropped += 1
            self._item = item
            self._changed.notify()

    def take(self, timeout_s: float) -> Item | None:
        """The newest item, or None when there was none for `timeout_s` or after `close`."""
        with self._changed:
            if self._item is None and not self._closed:
                self._changed.wait(timeout_s)
            item, self._item = self._item, None
            return item

    def close(self) -> None:
        """Drop what is inside; `take` returns None from now on."""
        with self._changed:
            if self._item is not None:
                self._dropped += 1
                self._item = None
            self._closed = True
            self._changed.notify_all()
