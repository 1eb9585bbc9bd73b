# SPDX-License-Identifier: Apache-2.0
"""Write a video, and see whether it was written."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from virst_engine.errors import VideoError


def open_video_writer(
    path: Path, width: int, height: int, rate_hz: float
) -> tuple[Callable[[UInt8[np.ndarray, "height width 3"]], None], Callable[[], None]]:
    """Functions that take RGB pictures, and that close the file: H.264 where imageio-ffmpeg is installed, else MPEG-4
    part 2, which OpenCV brings along. Sides must be even. Raises VideoError."""
    try:
        import imageio_ffmpeg
    except ImportError:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate_hz, (width, height))
        if not writer.isOpened():
            raise VideoError(f"cannot write {path}; choose a folder that you may write to") from None

        def write(picture: UInt8[np.ndarray, "height width 3"]) -> None:
            writer.write(np.ascontiguousarray(picture[..., ::-1]))

        return write, writer.release
    stream = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=rate_hz,
        codec="libx264",
        quality=7,
        macro_block_size=1,
        ffmpeg_log_level="error",
    )
    stream.send(None)
    return stream.send, stream.close


def can_be_played(path: Path) -> bool:
    """Whether a finished video has a first picture: OpenCV's writer tells of no failure, as on a full disk."""
    capture = cv2.VideoCapture(str(path))
    found = bool(capture.isOpened() and capture.read()[0])
    capture.release()
    return found
