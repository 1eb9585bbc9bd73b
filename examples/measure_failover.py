# SPDX-License-Identifier: Apache-2.0
"""Measure how soon another reasoner of a pool has the request of one that is killed, hangs or stops.

    python examples/measure_failover.py                 # 20 times each, four minutes
    python examples/measure_failover.py --repeats 5 --tcp

Prints the Markdown table of docs/fleet.md. Pool and reasoners are real processes; the reasoners compute nothing, they
wait, so that the signal meets them at work. The time is from the signal (or from the start of a computation that does
not end) to the moment at which the other one begins.
"""

import argparse
import contextlib
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_endpoint import make_curve_keys
from virst_engine.slow.zmq_server import serve
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

COMPUTES_S = 0.3
FOR_EVER = "for ever"
SIGNALS = {
    "is killed (SIGKILL)": signal.SIGKILL,
    "hangs (SIGSTOP)": signal.SIGSTOP,
    "is told to stop (SIGTERM)": signal.SIGTERM,
    "computes for ever": None,
}


class WaitingReasoner:
    """Leaves a note GOAL.PROCESS in the folder when it begins, and waits; for ever if told so and nobody did before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        began_ms = time.monotonic() * 1e3  # the same clock in all processes of a machine
        is_first = not list(self._folder.glob(f"{request.goal_id}.*"))
        (self._folder / f"{request.goal_id}.{os.getpid()}").touch()
        time.sleep(3600 if is_first and request.sentence == FOR_EVER else COMPUTES_S)
        prompts = (Prompt(0, 0, np.zeros((1, 1), np.float32)),)
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts, "", {"began": began_ms})


class Site:
    """A pool, two reasoners and a robot."""

    def __init__(self, folder: Path, robots: str, reasoners: str, keys: str) -> None:
        self._folder, self._reasoners, self._keys = folder, reasoners, keys
        self._at_work: dict[int, subprocess.Popen[bytes]] = {}
        self._asked = 0
        command = ["-m", "virst_engine.slow.zmq_server", "--pool", reasoners, "--endpoint", robots]
        self._pool = _start([*command, "--curve-keys", keys, "--log-level", "error"])
        self._robot = ZmqReasonerClient(robots, curve_keys=keys)

    def lose_one(self, how: signal.Signals | None) -> float:
        """Seconds until another reasoner has the request."""
        self._staff()
        goal = self._ask(FOR_EVER if how is None else "the ball")
        while not (notes := self._who_began(goal)):
            self._move()
        lost, lost_s = self._at_work[notes.pop()], time.monotonic()
        if how is not None:
            lost.send_signal(how)
        (answer,) = self._answers(1)
        if how is not signal.SIGTERM:
            lost.kill()
        lost.wait()
        return answer.timings_ms["began"] / 1e3 - lost_s

    def close(self) -> None:
        self._robot.close()
        for process in (*self._at_work.values(), self._pool):
            process.kill()
            process.wait()

    def _staff(self) -> None:
        """Until two reasoners are there and each has answered: the first answer of a process may take long."""
        self._at_work = {number: process for number, process in self._at_work.items() if process.poll() is None}
        while len(self._at_work) < 2:
            new = _start([__file__, "--serve", self._reasoners, self._keys, str(self._folder)])
            self._at_work[new.pid] = new
        answered: set[int] = set()
        while answered != self._at_work.keys():
            goals = [self._ask("the ball"), self._ask("the box")]
            self._answers(2)
            answered |= self._who_began(goals[0]) | self._who_began(goals[1])

    def _ask(self, sentence: str) -> str:
        self._asked += 1
        goal = f"goal{self._asked}"
        clip = Clip(np.zeros(1, int), np.zeros(1, int), np.zeros((1, 1, 1, 3), np.uint8), np.zeros((1, 1, 1, 1), "f2"))
        self._robot.submit(ReasonerRequest(self._asked, 0, goal, sentence, clip))
        return goal

    def _who_began(self, goal: str) -> set[int]:
        return {int(note.suffix[1:]) for note in self._folder.glob(f"{goal}.*")}

    def _answers(self, count: int) -> list[ReasonerAnswer]:
        answers: list[ReasonerAnswer] = []
        end_s = time.monotonic() + 60
        while len(answers) < count:
            if time.monotonic() > end_s:
                raise TimeoutError(self._robot.status() or "no answer within a minute")
            answers += self._robot.poll()
            self._move()
        return answers

    def _move(self) -> None:
        self._robot.status()  # sends what could not be sent before
        time.sleep(0.001)


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"})


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def measure(repeats: int, is_tcp: bool) -> None:
    transport = "tcp with CURVE" if is_tcp else "ipc"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {transport}\n")
    print("| a reasoner that | times | median s | 90 % s | longest s |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        robots, reasoners, keys = f"ipc://{folder}/robots", f"ipc://{folder}/reasoners", ""
        if is_tcp:
            robots, reasoners, keys = _free_address(), _free_address(), str(folder / "keys")
            make_curve_keys(Path(keys))
        site = stack.enter_context(contextlib.closing(Site(folder, robots, reasoners, keys)))
        for what, how in SIGNALS.items():
            seconds = sorted(site.lose_one(how) for _ in range(repeats))
            most = seconds[int(0.9 * (repeats - 1))]
            print(
                f"| {what} | {repeats} | {statistics.median(seconds):.2f} | {most:.2f} | {seconds[-1]:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tcp", action="store_true", help="TCP with keys instead of ipc")
    parser.add_argument("--serve", nargs=3, metavar=("ADDRESS", "KEYS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        address, keys, folder = options.serve
        serve(lambda: WaitingReasoner(Path(folder)), address, curve_keys=keys, joins_pool=True)
    else:
        measure(options.repeats, options.tcp)


if __name__ == "__main__":
    main()
