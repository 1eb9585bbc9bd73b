# SPDX-License-Identifier: Apache-2.0
"""Nothing grows with time. Run as a program, this file prints the figures that the test compares."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

STEPS = 10_000
SETTLED = 500  # after this many frames every buffer exists and every cache is warm


@pytest.mark.slow
def test_memory_is_constant_over_ten_thousand_frames() -> None:
    # In a process of its own: the shape checks of the tests take most of the time, and other tests leave memory behind.
    command = [sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    before, after = json.loads(run.stdout)
    assert after["takeovers"] - before["takeovers"] > 100  # replays did happen
    assert after["addresses"] == before["addresses"]
    assert abs(after["python_blocks"] - before["python_blocks"]) < 500
    assert after["resident"] < 1.02 * before["resident"]
    assert after["is_finite"]


def main() -> None:
    """Two goals, one of them hidden now and then, refreshed all the time by late answers that also disagree."""
    from tests.fakes import (
        BLUE,
        RED,
        DelayedClient,
        FakeReasoner,
        FakeStages,
        Square,
        Video,
        moving_square,
        small_config,
    )
    from virst_engine.session import Session
    from virst_engine.types import Frame

    hidden = Square(RED, lambda t: None if t % 100 < 30 else (2, 1 + t % 10))
    video = Video([hidden, moving_square(BLUE, row=9)])
    images = [video.frame(t).image_rgb_u8 for t in range(100)]
    answers = [RED, RED, BLUE, BLUE, BLUE]
    client = DelayedClient(FakeReasoner(lambda request: answers[request.request_id // 3 % 5]), delay_steps=4)
    session = Session(
        small_config(period_s=0.5, max_objects=2, overrule_answers=1, keep_answers=0), FakeStages(), client
    )
    session.set_goal("one")
    session.set_goal("another")
    tracker, takeovers = session._streams[""].tracker, 0

    def figures() -> dict[str, int | bool | list[int]]:
        gc.collect()
        memory, ring = tracker.memory, tracker.ring
        tensors = [memory._spatial, memory._pointer, ring._masks]
        tensors += ring._buffers.values()
        arrays = [memory._anchor_steps, memory._recent_steps, memory._pointer_steps, memory._writes, ring._is_known]
        return {
            "takeovers": takeovers,
            "addresses": [tensor.data_ptr() for tensor in tensors] + [array.ctypes.data for array in arrays],
            "python_blocks": sys.getallocatedblocks(),
            "resident": psutil.Process().memory_info().rss,
            "is_finite": bool(torch.isfinite(memory._spatial).all()),
        }

    measured = []
    for step in range(STEPS):
        client.tick()
        was_replaying = tracker.is_replaying(0)
        session.step(Frame(images[step % 100], step * 100_000_000))
        takeovers += was_replaying and not tracker.is_replaying(0)
        client.reasoner.requests.clear()
        if step in (SETTLED, STEPS - 1):
            measured.append(figures())
    print(json.dumps(measured))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.fakes
    torch.set_num_threads(1)
    main()
