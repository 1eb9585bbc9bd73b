# SPDX-License-Identifier: Apache-2.0
"""What the demo shows while it runs: live rates in the terminal, and a window where there is a display."""

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from virst_engine.timing import percentiles
from virst_ros.demo.report import GoalRun, MaskedFrame, draw_frame

LINE_EVERY_S = 2.0
RATE_WINDOW_S = 2.0


@dataclass(frozen=True)
class Shown:
    """One update of the display."""

    sentence: str
    left_s: float  # of this goal; NaN when it has no end
    images: int  # received in all
    masks: int
    age_ms: tuple[float, ...]
    state: str
    score: float
    reasoner_latency_s: float
    message: str


class Display(Protocol):
    def show(self, shown: Shown) -> None: ...

    def close(self) -> None: ...


class Rates:
    """Per second, over the last two seconds."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int, int]] = deque()

    def update(self, images: int, masks: int, now_s: float | None = None) -> tuple[float, float]:
        now_s = time.monotonic() if now_s is None else now_s
        self._counts.append((now_s, images, masks))
        while now_s - self._counts[0][0] > RATE_WINDOW_S and len(self._counts) > 2:
            self._counts.popleft()
        then_s, images_then, masks_then = self._counts[0]
        span_s = now_s - then_s
        if span_s <= 0:
            return 0.0, 0.0
        return (images - images_then) / span_s, (masks - masks_then) / span_s


class LiveTable:
    """For a terminal: one table that changes in place."""

    def __init__(self, console: Console) -> None:
        self._rates = Rates()
        self._live = Live(console=console, refresh_per_second=5, transient=True)
        self._live.start()

    def show(self, shown: Shown) -> None:
        rate_in, rate_out = self._rates.update(shown.images, shown.masks)
        table = Table(show_header=False, title=f"“{shown.sentence}”", min_width=60)
        for name, value in _rows(shown, rate_in, rate_out):
            table.add_row(name, value)
        self._live.update(table)

    def close(self) -> None:
        self._live.stop()


class PlainLines:
    """For a log file or a pipe: a line every two seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._rates, self._due_s = console, Rates(), 0.0

    def show(self, shown: Shown) -> None:
        rate_in, rate_out = self._rates.update(shown.images, shown.masks)
        if time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + LINE_EVERY_S
        facts = ", ".join(f"{name} {value}" for name, value in _rows(shown, rate_in, rate_out) if value)
        self._console.print(f"  {facts}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Window:
    """The newest mask over its image, in a Tk window. `open` says why there is none."""

    def __init__(self, tk: Any) -> None:
        self._tk = tk
        self._root = tk.Tk()
        self._root.title("virst")
        self._label = tk.Label(self._root)
        self._label.pack()
        self._picture: Any = None  # Tk keeps no reference of its own
        self._is_open = True
        self._root.protocol("WM_DELETE_WINDOW", self.close)

    @classmethod
    def open(cls) -> "Window | str":
        """A window, or why there is none."""
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            return "there is no display (DISPLAY is not set)"
        try:
            import tkinter
        except ImportError:
            return "Python's tkinter is not installed (apt-get install python3-tk)"
        try:
            return cls(tkinter)
        except tkinter.TclError as error:
            return f"the display cannot be used: {error}"

    def show(self, run: GoalRun, frame: MaskedFrame | None) -> None:
        if not self._is_open or frame is None or frame.image_jpeg is None:
            return
        picture: np.ndarray = draw_frame(run, frame, scale=2)
        height, width = picture.shape[:2]
        data = b"P6 %d %d 255 " % (width, height) + picture.tobytes()
        self._picture = self._tk.PhotoImage(data=data, format="PPM")
        self._label.configure(image=self._picture)
        self._root.update()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._root.destroy()


def _rows(shown: Shown, rate_in: float, rate_out: float) -> list[tuple[str, str]]:
    age = percentiles(shown.age_ms)
    state = shown.state.lower().replace("_", " ")
    return [
        ("state", f"{state} {shown.score:.2f}" if shown.score else state),
        ("camera", f"{rate_in:.1f}/s"),
        ("masks", f"{rate_out:.1f}/s"),
        ("age p50/p95/p99", "" if age is None else f"{age['p50']:.0f}/{age['p95']:.0f}/{age['p99']:.0f} ms"),
        ("reasoner", "" if math.isnan(shown.reasoner_latency_s) else f"{1e3 * shown.reasoner_latency_s:.0f} ms"),
        ("", shown.message),
        ("left", "" if math.isnan(shown.left_s) else f"{max(0.0, shown.left_s):.0f} s"),
    ]
