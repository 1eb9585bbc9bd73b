# SPDX-License-Identifier: Apache-2.0
"""Processes that live as long as their parent: started with a log, watched, ended on every way out."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from virst_engine.errors import VirstError

POLITE_S = 6.0  # for SIGINT, on which ROS nodes and the reasoner end cleanly
FIRM_S = 2.0  # for SIGTERM
LOG_LINES = 25
PR_SET_PDEATHSIG = 1


class ChildFailed(VirstError):
    """A child process ended by itself; the message holds the end of its log."""


@dataclass(frozen=True)
class _Child:
    name: str
    process: "subprocess.Popen[bytes]"
    log: Path


class ChildProcesses:
    """A context manager: leaving it ends every child and everything that the children started."""

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder
        self._children: list[_Child] = []

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command, with its output in `log_folder`/`name`.log. Raises ChildFailed when it cannot be started."""
        self.log_folder.mkdir(parents=True, exist_ok=True)
        log = self.log_folder / f"{name}.log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(os.environ if environment is None else environment),
                    start_new_session=True,  # Ctrl-C goes to the parent alone, which then ends its children in order
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
            except OSError as error:
                raise ChildFailed(f"{name} cannot be started: {error}") from error
        self._children.append(_Child(name, process, log))
        return process

    def check(self) -> None:
        """Raises ChildFailed when a child has ended."""
        for child in self._children:
            status = child.process.poll()
            if status is not None:
                raise ChildFailed(
                    f"{child.name} ended with status {status}; the end of {child.log}:\n{_tail(child.log)}"
                )

    def end(self) -> None:
        """End all children; returns when they are gone. May be called twice."""
        for number, patience_s in ((signal.SIGINT, POLITE_S), (signal.SIGTERM, FIRM_S), (signal.SIGKILL, FIRM_S)):
            alive = [child for child in self._children if child.process.poll() is None]
            for child in alive:
                _signal_group(child.process, number)
            deadline_s = time.monotonic() + patience_s
            for child in alive:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline_s - time.monotonic()))
        for child in self._children:
            _signal_group(child.process, signal.SIGKILL)  # what a child left behind
        self._children.clear()

    def __enter__(self) -> "ChildProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _die_with_parent() -> None:
    # Also when the parent is killed and cannot end anybody.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    (it said nothing)"
