# SPDX-License-Identifier: Apache-2.0
"""The fake reasoner as a process: python -m tests.ros.reasoner_process ENDPOINT. It knows Latin letters only."""

import logging
import sys

from tests.fakes import FakeReasoner
from virst_engine.errors import BadGoal
from virst_engine.slow.zmq_server import serve
from virst_engine.types import ReasonerAnswer, ReasonerRequest


class LatinReasoner(FakeReasoner):
    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        if not request.sentence.isascii():
            raise BadGoal(f"no word of {request.sentence!r} is known; say it in English")
        return super().answer(request)


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    serve(LatinReasoner, sys.argv[1], identify=lambda: "fake")
