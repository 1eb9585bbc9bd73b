# SPDX-License-Identifier: Apache-2.0
"""What `virst segment` leaves behind: a mask image per frame, a video with the masks drawn over it, the figures."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from virst_engine.errors import VideoError
from virst_engine.fast.postprocess import instance_map
from virst_engine.types import Frame, FrameResult, Goal, ObjectResult
from virst_engine.video.video_file import can_be_played, open_video_writer
from virst_engine.visualize import draw_overlay

MASKS, OVERLAY, FIGURES = "masks", "overlay.mp4", "segments.json"
WAITING_QUALITY = 95  # JPEG, of pictures that came before their turn
OVERLAY_RATES_HZ = (1.0, 60.0)  # what players play
SMALLEST_OVERLAY_PX = 240  # smaller pictures are enlarged, so that the text can be read


class SegmentWriter:
    """Writes while frames come; on leaving also what describes them, however the run ended.

    masks/000000.png    per frame, 8 bit: instance ids, 0 = background; where objects overlap, the one of higher score
    overlay.mp4         the video with the masks drawn over it, in the video's order: what comes before its turn waits
    segments.json       goals, and per frame: stamp, objects with state, score, box and area, times per stage

    When the disk is full, what is left can be read: whole masks, no overlay that cannot be played, and the figures
    where there is room for them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rate_hz: float,
        description: Mapping[str, Any],
        overlay: bool = True,
        replace: bool = False,
    ) -> None:
        """`description` goes into the JSON file as it is. Raises VideoError when there are results already."""
        self._folder, self._rate_hz, self._description = folder, rate_hz, description
        self._frames: list[dict[str, Any]] = []
        self._goals: Sequence[Goal] = ()
        self._wants_overlay = overlay
        self._write_picture: Callable[[np.ndarray], None] | None = None
        self._close_video: Callable[[], None] = lambda: None
        self._size: tuple[int, int] | None = None
        self._next_picture = 0
        self._waiting: dict[int, bytes] = {}  # a whole video is computed from an anchor on, then backwards
        there = [name for name in (MASKS, OVERLAY, FIGURES) if (folder / name).exists()]
        if there and not replace:
            raise VideoError(f"{folder} holds results already ({', '.join(there)}); give another folder, or --replace")
        try:
            for name in there:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (folder / MASKS).mkdir(parents=True)
        except OSError as error:
            raise VideoError(f"cannot write into {folder} ({error}); choose a folder that you may write to") from error

    def __enter__(self) -> "SegmentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problem = self._finish_overlay()
        result = {
            **self._description,
            "is_complete": error is None and not problem,
            "goals": [
                {"goal_id": g.goal_id, "object_id": g.object_id, "instance_id": g.instance_id, "sentence": g.sentence}
                for g in self._goals
            ],
            "frames": sorted(self._frames, key=lambda each: each["frame"]),
        }
        text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
        try:
            self._write(FIGURES, (text + "\n").encode())
        except VideoError as unwritten:
            problem = str(unwritten)
        if problem and (error is None or isinstance(error, Exception)):  # Ctrl-C stays what it is
            # An error of the run comes first: this one is often its consequence.
            raise VideoError(problem if error is None else f"{error}; then: {problem}") from error

    def add(self, number: int, frame: Frame, result: FrameResult, goals: Sequence[Goal]) -> None:
        """One frame, in any order. Raises VideoError when a file cannot be written."""
        self._goals = goals
        height, width = frame.image_rgb_u8.shape[:2]
        mask_file = f"{MASKS}/{number:06d}.png"
        self._write_image(mask_file, instance_map(result.objects, height, width))
        self._frames.append(
            {
                "frame": number,
                "stamp_ns": frame.stamp_ns,
                "mask": mask_file,
                "objects": [_described(found) for found in result.objects],
                "timings_ms": {stage: round(spent_ms, 3) for stage, spent_ms in result.timings_ms.items()},
            }
        )
        if self._wants_overlay:
            self._draw(number, frame, result, {goal.goal_id: goal.sentence for goal in goals})

    @property
    def frames(self) -> list[dict[str, Any]]:
        """As they will stand in the JSON file."""
        return self._frames

    def _draw(self, number: int, frame: Frame, result: FrameResult, captions: Mapping[str, str]) -> None:
        smaller = min(frame.image_rgb_u8.shape[:2])
        picture = draw_overlay(
            frame.image_rgb_u8, result, captions, scale=max(1, math.ceil(SMALLEST_OVERLAY_PX / smaller))
        )
        if self._size is None:  # codecs want even sides
            self._size = picture.shape[1] // 2 * 2, picture.shape[0] // 2 * 2
            low, high = OVERLAY_RATES_HZ
            rate_hz = min(max(self._rate_hz, low), high)
            self._write_picture, self._close_video = open_video_writer(self._folder / OVERLAY, *self._size, rate_hz)
        width, height = self._size
        if picture.shape[0] // 2 * 2 != height or picture.shape[1] // 2 * 2 != width:
            picture = cv2.resize(picture, self._size, interpolation=cv2.INTER_AREA)
        picture = np.ascontiguousarray(picture[:height, :width])
        if number != self._next_picture:
            quality = [cv2.IMWRITE_JPEG_QUALITY, WAITING_QUALITY]
            self._waiting[number] = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
            return
        self._show(picture)
        while self._next_picture in self._waiting:
            self._show_waiting(self._next_picture)

    def _show_waiting(self, number: int) -> None:
        picture = cv2.imdecode(np.frombuffer(self._waiting.pop(number), np.uint8), cv2.IMREAD_COLOR)
        self._show(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))

    def _show(self, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        assert self._write_picture is not None
        try:
            self._write_picture(picture)
        except OSError as error:  # the encoder has ended
            raise VideoError(f"cannot write {self._folder / OVERLAY} ({error}); {self._remedy()}") from error
        self._next_picture += 1

    def _write_image(self, name: str, image: UInt8[np.ndarray, "height width"]) -> None:
        self._write(name, cv2.imencode(".png", image)[1].tobytes())

    def _write(self, name: str, data: bytes) -> None:
        """The whole file or none. Raises VideoError."""
        path = self._folder / name
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise VideoError(f"cannot write {path} ({error.strerror}); {self._remedy()}") from error

    def _finish_overlay(self) -> str:
        """Close it. What is wrong with it, empty when it can be played; what cannot be played is deleted."""
        if self._size is None:
            return ""
        with contextlib.suppress(VideoError):  # seen below
            for number in sorted(self._waiting):  # the run ended before those between
                self._show_waiting(number)
        with contextlib.suppress(OSError):  # seen below
            self._close_video()
        path = self._folder / OVERLAY
        if can_be_played(path):
            return ""
        path.unlink(missing_ok=True)
        return f"cannot write the whole of {path}, so it is deleted (--no-overlay leaves it out); {self._remedy()}"

    def _remedy(self) -> str:
        try:
            free = f"{shutil.disk_usage(self._folder).free / 2**20:.0f} MiB are free"
        except OSError:
            free = "the folder is gone"
        return (
            f"{free}: make room, or raise the limit of file sizes (`ulimit -f`), and run again with --replace; "
            f"{len(self._frames)} masks are written"
        )


def _described(found: ObjectResult) -> dict[str, Any]:
    rows, columns = np.nonzero(found.mask.any(axis=1))[0], np.nonzero(found.mask.any(axis=0))[0]
    box_px = None
    if len(rows):  # left, top, right, bottom; right and bottom are outside
        box_px = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    return {
        "instance_id": found.instance_id,
        "goal_id": found.goal_id,
        "state": found.state.name,
        "score": round(found.score, 4),
        "area_px": int(found.mask.sum()),
        "box_px": box_px,
        "prompt_age_s": _number(found.prompt_age_s),
        "reasoner_latency_s": _number(found.reasoner_latency_s),
        "message": found.message,
    }


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return round(value, 4) if math.isfinite(value) else None
