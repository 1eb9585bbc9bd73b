# SPDX-License-Identifier: Apache-2.0
"""Work that a frame must not wait for, such as drawing: in a thread of its own, on the newest item only."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from virst_ros.frame_inbox import FrameInbox

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class Background(Generic[Item]):
    """A thread that works on the newest item; those that come while it is busy replace each other.

    Args:
        work: called on the thread, one item at a time. What it raises is logged, once for each kind, and forgotten.
    """

    def __init__(self, name: str, work: Callable[[Item], None]) -> None:
        self._name, self._work = name, work
        self._inbox: FrameInbox[Item] = FrameInbox()
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def offer(self, item: Item) -> None:
        """Never waits."""
        self._inbox.put(item)

    def stop(self, timeout_s: float) -> bool:
        """Finish what is at hand and end; False when that took longer."""
        self._inbox.close()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._inbox.closed:
            for item in self._inbox.take(timeout_s=1.0):
                try:
                    self._work(item)
                except Exception as error:
                    kind = f"{type(error).__name__}: {error}"
                    if kind not in self._told and len(self._told) < 100:
                        self._told.add(kind)
                        logger.exception("%s failed", self._name)
