# SPDX-License-Identifier: Apache-2.0
"""A reasoner process without a model. Its sentences are commands. Run: python reasoner_process.py ENDPOINT [--join]"""

import argparse
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from virst_engine.errors import BadGoal
from virst_engine.slow.zmq_server import serve
from virst_engine.types import Prompt, ReasonerAnswer, ReasonerRequest


class ObedientReasoner:
    """Prompts hold the step of their frame, words repeat the question; `mask` and `talk` give the other one of both.

    `sleep` and `spin` take the seconds that follow, `leave` leaves the oldest frame out; others fail as told.

    With a `journal`, each request leaves a line there as it begins: seconds, process, sentence.
    """

    def __init__(self, journal: Path | None = None, delay_s: float = 0.0) -> None:
        self.sentences: list[str] = []
        self._journal, self._delay_s = journal, delay_s

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.sentences.append(request.sentence)
        if self._journal is not None:
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(f"{time.monotonic()}\t{os.getpid()}\t{request.sentence}\n")
        time.sleep(self._delay_s)
        order, _, argument = request.sentence.partition(" ")
        clip, fill = request.clip, 1.0
        match order:
            case "sleep":
                time.sleep(float(argument))
            case "spin":  # like sleep, but never lets go of the interpreter by itself
                end = time.monotonic() + float(argument)
                while time.monotonic() < end:
                    pass
            case "refuse":
                raise BadGoal("no word of it is known")
            case "crash":
                raise ZeroDivisionError("broken")
            case "nan":
                fill = np.nan
        prompts = tuple(
            Prompt(int(step), int(stamp_ns), np.full((2, 3), fill * step, np.float32))
            for step, stamp_ns in zip(clip.steps, clip.stamps_ns, strict=True)
        )
        if order == "leave":
            prompts = prompts[1:]
        answer = ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts)
        if (request.wants_words and order != "mask") or order == "talk":
            answer = replace(answer, prompts=(), words=f"you said: {request.sentence}")
        if order == "forge":
            forged = {
                "request": {"request_id": 999},
                "goal": {"goal_id": "another"},
                "epoch": {"epoch": 999},
                "frames": {"prompts": prompts[::-1]},
            }
            answer = replace(answer, **forged[argument])
        return answer


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(process)d %(name)s: %(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("--join", action="store_true")
    parser.add_argument("--model", default="obedient")
    parser.add_argument("--curve-keys", default="")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--delay-s", type=float, default=0.0)
    options = parser.parse_args()
    serve(
        lambda: ObedientReasoner(options.journal, options.delay_s),
        options.endpoint,
        identify=lambda: options.model,
        curve_keys=options.curve_keys,
        joins_pool=options.join,
    )
