# SPDX-License-Identifier: Apache-2.0
import math
import mmap

import pytest

from virst_engine.timing import LatencyWindow, StageTimer, percentiles, resident_mib


def test_a_stage_adds_up_and_keeps_its_place() -> None:
    timer = StageTimer()
    for name in ("encode", "decode", "encode"):
        with timer.stage(name):
            pass
    first = timer.ms()
    assert list(first) == ["encode", "decode"]
    with timer.stage("encode"):
        sum(range(1000))
    assert timer.ms()["encode"] > first["encode"] >= 0.0
    assert timer.ms()["decode"] == first["decode"]


def test_percentiles_are_of_the_newest_figures() -> None:
    window = LatencyWindow(size=100)
    assert len(window) == 0
    assert all(math.isnan(value) for value in window.summary().values())
    assert math.isnan(window.percentile(50))
    for value in range(1000):
        window.add(value)
    assert len(window) == 100
    # 900 .. 999
    assert window.summary() == pytest.approx({"p50": 949.5, "p95": 994.05, "p99": 998.01})
    assert window.percentile(0) == 900.0


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be >= 1"):
        LatencyWindow(0)


def test_percentiles() -> None:
    assert percentiles(list(range(101))) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([]) is None


def test_resident_memory_sees_an_allocation() -> None:
    before = resident_mib()
    with mmap.mmap(-1, 64 * 2**20) as block:  # the heap may hold as much that is free already
        block.write(b"1" * len(block))
        assert resident_mib() - before > 50
