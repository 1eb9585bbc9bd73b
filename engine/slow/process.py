# SPDX-License-Identifier: Apache-2.0
"""What the processes of the slow path share: they serve in one thread until a signal or another thread stops them."""

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

logger = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 1.0


class Waker:
    """A file descriptor that a poller watches, so that other threads and signal handlers can end its waiting."""

    def __init__(self) -> None:
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)

    def fileno(self) -> int:
        """Readable after `wake`, until `clear`."""
        return self._woken.fileno()

    @property
    def wakeup_fd(self) -> int:
        """A byte written here is a `wake`; for signal.set_wakeup_fd."""
        return self._waker.fileno()

    def wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:  # full of wake-ups already
            return

    def clear(self) -> None:
        self._woken.recv(4096)

    def close(self) -> None:
        self._woken.close()
        self._waker.close()


class RareWarnings:
    """Of what others may cause as often as they like: one a second at most, so that they cannot fill the log."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._next_s = log, 0.0

    def warning(self, message: str, *values: object) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + COMPLAIN_EVERY_S
            self._log.warning(message, *values)


class _Stoppable(Protocol):
    @property
    def wakeup_fd(self) -> int: ...

    def stop(self) -> None: ...


@contextmanager
def stopped_by_signals(server: _Stoppable) -> Iterator[None]:
    """SIGTERM and SIGINT call `server.stop`; for the main thread."""

    def stop(signal_number: int, _: FrameType | None) -> None:
        logger.info("stopping on %s", signal.Signals(signal_number).name)
        server.stop()

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    # A signal that comes just before the server waits, or in another thread, does not interrupt the waiting; this does.
    earlier_fd = signal.set_wakeup_fd(server.wakeup_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_fd)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def process_name() -> str:
    """Host and number of this process, for people who read logs."""
    return f"{socket.gethostname()}:{os.getpid()}"
