# SPDX-License-Identifier: Apache-2.0
"""What a demo run showed: scores against the simulator's truth, the table, the video and the picture. No ROS in it."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from virst_engine.errors import VirstError
from virst_engine.evaluate.metrics import score_sequence
from virst_engine.timing import percentiles
from virst_engine.types import FrameResult, ObjectResult, ObjectState
from virst_engine.video.video_file import can_be_played, open_video_writer
from virst_engine.visualize import draw_overlay

PICTURE_COLUMNS = 4
VIDEO_SCALE = 2
FULL = "make room on the disk, or raise the limit of file sizes (`ulimit -f`)"


@dataclass(frozen=True)
class MaskedFrame:
    """One published mask with what belongs to the same stamp. Pictures are encoded: a run holds thousands."""

    stamp_ns: int
    mask_png: bytes  # instance ids
    instance_id: int  # of the goal's object
    state: ObjectState
    score: float
    reasoner_latency_s: float  # NaN before the first answer
    age_ms: float  # stamp of the image to publishing of the mask
    frames_in: int  # images that the segmenter had received by then, since its activation
    image_jpeg: bytes | None = None  # None where it was not kept
    truth_png: bytes | None = None  # k + 1 for object k


@dataclass
class GoalRun:
    """One goal from its setting to the next one's."""

    sentence: str
    goal_id: str
    target_ids: tuple[int, ...] | None = None  # None: the grammar of the simulator does not know the sentence
    frames: list[MaskedFrame] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last one, by their stamps; 0 with fewer than two frames."""
        count = len(self.frames)
        span_s = (self.frames[-1].stamp_ns - self.frames[0].stamp_ns) / 1e9 if count else 0.0
        return span_s * count / (count - 1) if count > 1 else 0.0

    @property
    def frames_in(self) -> int:
        """Images that reached the segmenter from the goal's first frame to its last."""
        return self.frames[-1].frames_in - self.frames[0].frames_in + 1 if self.frames else 0

    def answered_frames(self) -> list[MaskedFrame]:
        """From the first answer of the reasoner on."""
        first = next((i for i, frame in enumerate(self.frames) if frame.state is not ObjectState.SEARCHING), None)
        return [] if first is None else self.frames[first:]


def encode_mask(mask: np.ndarray) -> bytes:
    """Lossless; level 1 because it runs beside the system that is measured."""
    return bytes(cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


def encode_image(image_rgb_u8: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", image_rgb_u8[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1])


def goal_figures(run: GoalRun) -> dict[str, Any]:
    """One row of the table. J, F, JF are 0..100 over all frames from the first answer on, or None without truth."""
    answered = run.answered_frames()
    scored = [frame for frame in answered if frame.truth_png is not None] if run.target_ids is not None else []
    figures: dict[str, Any] = {
        "goal": run.sentence,
        "target_ids": None if run.target_ids is None else list(run.target_ids),
        "state": run.frames[-1].state.name if run.frames else ObjectState.SEARCHING.name,
        "J": None,
        "F": None,
        "JF": None,
        "frames_in": run.frames_in,
        "frames_out": len(run.frames),
        "frames_scored": len(scored),
        "fps_out": round(len(run.frames) / run.seconds, 2) if run.seconds else None,
        "age_ms": percentiles([frame.age_ms for frame in run.frames]),
        "reasoner_latency_ms": percentiles(latencies_ms(run.frames)),
        "first_answer_s": None,
    }
    if answered:
        figures["first_answer_s"] = round((answered[0].stamp_ns - run.frames[0].stamp_ns) / 1e9, 3)
    if scored:
        predicted = np.stack([_decode(frame.mask_png) == frame.instance_id for frame in scored])
        ids = np.stack([_decode(frame.truth_png) for frame in scored if frame.truth_png is not None])
        truth = np.isin(ids, [k + 1 for k in run.target_ids or ()])
        score = score_sequence(predicted, truth, ids > 0)
        figures |= {"J": _percent(score.j), "F": _percent(score.f), "JF": _percent(score.jf)}
    return figures


def summary(runs: Sequence[GoalRun]) -> dict[str, Any]:
    """The figures of the whole run, and of each goal."""
    frames = [frame for run in runs for frame in run.frames]
    seconds = sum(run.seconds for run in runs)
    return {
        "fps_in": round(sum(run.frames_in for run in runs) / seconds, 2) if seconds else None,
        "fps_out": round(len(frames) / seconds, 2) if seconds else None,
        "age_ms": percentiles([frame.age_ms for frame in frames]),
        "reasoner_latency_ms": percentiles(latencies_ms(frames)),
        "seconds": round(seconds, 1),
        "goals": [goal_figures(run) for run in runs],
    }


def latencies_ms(frames: Sequence[MaskedFrame]) -> list[float]:
    """One figure per answer: a frame repeats the latency of the newest one."""
    known = [1e3 * frame.reasoner_latency_s for frame in frames if not math.isnan(frame.reasoner_latency_s)]
    return [value for i, value in enumerate(known) if i == 0 or value != known[i - 1]]


def table(result: dict[str, Any]) -> Table:
    """A row per goal, for the terminal."""
    drawn = Table(title="Masks against the simulator's truth, each for the frame that it belongs to")
    drawn.add_column("goal", overflow="fold")
    for heading in ("state", "J", "F", "J&F", "frames in/out", "age ms p50/p95/p99", "reasoner ms", "first answer s"):
        drawn.add_column(heading, justify="right")
    for row in result["goals"]:
        age, latency = row["age_ms"], row["reasoner_latency_ms"]
        drawn.add_row(
            row["goal"],
            row["state"],
            *(_cell(row[name]) for name in ("J", "F", "JF")),
            f"{row['frames_in']}/{row['frames_out']}",
            "-" if age is None else f"{age['p50']:.0f}/{age['p95']:.0f}/{age['p99']:.0f}",
            "-" if latency is None else f"{latency['p50']:.0f}",
            "-" if row["first_answer_s"] is None else f"{row['first_answer_s']:.2f}",
        )
    return drawn


def write_video(path: Path, runs: Sequence[GoalRun]) -> bool:
    """The video with masks drawn over it, at the rate at which they came; False when no picture was kept.

    Raises:
        VirstError: the file cannot be written.
    """
    kept = [(run, frame) for run in runs for frame in run.frames if frame.image_jpeg is not None]
    if not kept:
        return False
    span_s = sum(run.seconds for run in runs)
    rate_hz = min(60.0, max(1.0, sum(len(run.frames) for run in runs) / span_s if span_s else 20.0))
    write = None
    close: Callable[[], None] = lambda: None  # noqa: E731
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for run, frame in kept:
            picture = draw_frame(run, frame, scale=VIDEO_SCALE)
            if write is None:
                write, close = open_video_writer(path, picture.shape[1], picture.shape[0], rate_hz)
            write(np.ascontiguousarray(picture))
    except OSError as error:  # the encoder has ended
        raise VirstError(f"cannot write {path} ({error}); {FULL}") from error
    finally:
        with contextlib.suppress(OSError):  # seen below
            close()
    if not can_be_played(path):
        path.unlink(missing_ok=True)
        raise VirstError(f"cannot write the whole of {path}, so it is deleted; {FULL}")
    return True


def write_picture(path: Path, runs: Sequence[GoalRun]) -> bool:
    """A row of frames per goal, masks drawn over them; False when no picture was kept."""
    rows = []
    for run in runs:
        kept = [frame for frame in run.answered_frames() or run.frames if frame.image_jpeg is not None]
        if kept:
            chosen = [kept[int(i)] for i in np.linspace(0, len(kept) - 1, PICTURE_COLUMNS).round()]
            rows.append(np.hstack([draw_frame(run, frame, scale=1) for frame in chosen]))
    if not rows:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.vstack(rows)[..., ::-1]):
        raise VirstError(f"cannot write {path}; choose a folder that you may write to")
    return True


def draw_frame(run: GoalRun, frame: MaskedFrame, scale: int) -> np.ndarray:
    """One published mask over its image, RGB."""
    assert frame.image_jpeg is not None
    image = np.ascontiguousarray(cv2.imdecode(np.frombuffer(frame.image_jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
    mask = _decode(frame.mask_png) == frame.instance_id
    found = ObjectResult(
        object_id=run.goal_id,
        goal_id=run.goal_id,
        instance_id=frame.instance_id,
        state=frame.state,
        mask=mask,
        score=frame.score,
        prompt_age_s=math.inf,
        reasoner_latency_s=frame.reasoner_latency_s,
    )
    result = FrameResult(frame.stamp_ns, 0, "camera", (found,), {})
    return draw_overlay(image, result, {run.goal_id: run.sentence}, scale=scale)


def _decode(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def _percent(fraction: float) -> float:
    return round(100 * fraction, 2)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
