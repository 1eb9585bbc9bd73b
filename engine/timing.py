# SPDX-License-Identifier: Apache-2.0
"""What a run costs: how long stages take, percentiles, resident memory."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


class StageTimer:
    """Milliseconds per stage, added up over calls, so that N objects give one figure of memory attention.

    On a GPU the stages are timed by events: a host clock around kernel launches measures nothing. `ms` waits for them.
    """

    def __init__(self, device: torch.device | str = "cpu", clock_s: Callable[[], float] = time.perf_counter) -> None:
        """`clock_s`: a steady clock, seconds; not used on a GPU."""
        self._clock_s = clock_s
        self._on_gpu = torch.device(device).type == "cuda"
        self._host_ms: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin_s = self._clock_s()
            yield
            self._host_ms[name] = self._host_ms.get(name, 0.0) + 1e3 * (self._clock_s() - begin_s)

    def ms(self) -> dict[str, float]:
        """Stage -> milliseconds so far, in the order in which stages first ended."""
        if self._events:
            self._events[-1][2].synchronize()
        total = dict(self._host_ms)
        for name, begin, end in self._events:
            total[name] = total.get(name, 0.0) + begin.elapsed_time(end)
        return total


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99, rounded to three digits; None of no value."""
    if not len(values):
        return None
    p50, p95, p99 = np.percentile(np.asarray(values, dtype=np.float64), (50, 95, 99))
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "p99": round(float(p99), 3)}


def resident_mib() -> float:
    """Memory of this process that is in RAM, MiB; NaN where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return math.nan


def device_memory_mib(device: str) -> tuple[float, float] | None:
    """Memory that this process's tensors hold on a CUDA device, and what is free there, MiB; None on any other.

    TensorRT's engines and the driver take more than the tensors: all of it is missing from what is free.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device) / 2**20, free / 2**20


class LatencyWindow:
    """Percentiles over the newest `size` figures, in a ring that never grows."""

    def __init__(self, size: int = 512) -> None:
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self._values = np.zeros(size)
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self._values.size)

    def add(self, value: float) -> None:
        self._values[self._added % self._values.size] = value
        self._added += 1

    def percentile(self, percent: float) -> float:
        """NaN while nothing was added."""
        return float(np.percentile(self._values[: len(self)], percent)) if self._added else float("nan")

    def summary(self) -> dict[str, float]:
        """p50, p95, p99 of what is in the window; NaN while it is empty."""
        if not self._added:
            return {"p50": float("nan"), "p95": float("nan"), "p99": float("nan")}
        p50, p95, p99 = np.percentile(self._values[: len(self)], (50, 95, 99))
        return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}
