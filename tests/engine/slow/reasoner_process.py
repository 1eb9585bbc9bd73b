# SPDX-License-Identifier: Apache-2.0
"""A reasoner process without a model. Its sentences are commands. Run: python reasoner_process.py ENDPOINT"""

import logging
import sys
import time
from dataclasses import replace

import numpy as np

from virst_engine.errors import BadGoal
from virst_engine.slow.zmq_server import serve
from virst_engine.types import Prompt, ReasonerAnswer, ReasonerRequest


class ObedientReasoner:
    """Prompts hold the step of their frame. `sleep` and `spin` take the seconds that follow; others fail as told."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.sentences.append(request.sentence)
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
        answer = ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts)
        if order == "forge":
            forged = {
                "request": {"request_id": 999},
                "goal": {"goal_id": "another"},
                "epoch": {"epoch": 999},
                "frames": {"prompts": prompts[1:]},
            }
            answer = replace(answer, **forged[argument])
        return answer


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    serve(ObedientReasoner, sys.argv[1], identify=lambda: "obedient")
