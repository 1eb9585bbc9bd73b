# SPDX-License-Identifier: Apache-2.0
"""Resident memory of processes over time, and how much it has grown. No ROS in it."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

WARM_UP_S = 60.0  # growth counts from then on: the first goals allocate what all later ones use
MOST_SAMPLES = 4096  # then every second one is dropped


def resident_mib(pid: int) -> float:
    """Memory of a process and its children that is in RAM, MiB; NaN where there is no such process or no /proc."""
    pages, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            pages += int((folder / "statm").read_text(encoding="ascii").split()[1])
            for thread in (folder / "task").iterdir():
                waiting += map(int, (thread / "children").read_text(encoding="ascii").split())
        except (OSError, ValueError):
            continue  # it has ended while we looked
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages else math.nan


def growth_percent(times_s: Sequence[float], values: Sequence[float]) -> float:
    """From the median of the first tenth of the samples after the warm-up to that of the last tenth, in percent.

    Of a run shorter than two warm-ups, its second half counts. NaN for fewer than 4 samples.
    """
    if not times_s:
        return math.nan
    after_s = min(WARM_UP_S, times_s[-1] / 2)
    counted = [value for time_s, value in zip(times_s, values, strict=True) if time_s >= after_s and value == value]
    if len(counted) < 4:
        return math.nan
    tenth = max(1, len(counted) // 10)
    first, last = statistics.median(counted[:tenth]), statistics.median(counted[-tenth:])
    return 100.0 * (last / first - 1.0)


@dataclass
class MemorySamples:
    """Samples of several processes at the same times, in bounded memory."""

    pids: dict[str, int]  # by name
    period_s: float = 0.5
    times_s: list[float] = field(default_factory=list)
    mib: dict[str, list[float]] = field(default_factory=dict)

    def sample(self, now_s: float) -> None:
        """Once per `period_s`; more often does nothing. `now_s`: since the beginning."""
        if self.times_s and now_s - self.times_s[-1] < self.period_s:
            return
        self.times_s.append(now_s)
        for name, pid in self.pids.items():
            self.mib.setdefault(name, []).append(resident_mib(pid))
        if len(self.times_s) > MOST_SAMPLES:
            self.period_s *= 2
            self.times_s = self.times_s[::2]
            self.mib = {name: values[::2] for name, values in self.mib.items()}

    def growth_percent(self, name: str) -> float:
        return growth_percent(self.times_s, self.mib.get(name, []))

    def thinned(self, most: int = 120) -> dict[str, list[float]]:
        """For a report: seconds, and MiB of each process."""
        step = max(1, math.ceil(len(self.times_s) / most))
        columns = {f"{name}_mib": values for name, values in self.mib.items()}
        return {
            "seconds": [round(time_s, 1) for time_s in self.times_s[::step]],
            **{name: [round(value, 2) for value in values[::step]] for name, values in columns.items()},
        }
