# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, a folder of images or a rosbag2/MCAP file, read when they are asked for."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from jaxtyping import UInt8

from virst_engine.errors import VideoError
from virst_engine.types import Frame

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BAG_SUFFIXES = (".mcap", ".db3")
DEFAULT_RATE_HZ = 30.0
MOST_RATE_HZ = 1000.0  # what files say beyond it is no rate


class RecordedVideo(Protocol):
    """A recording with a fixed order of frames; stamps ascend. As a `FrameSource` it may be indexed, too."""

    @property
    def rate_hz(self) -> float:
        """Frames per second, about."""
        ...

    @property
    def expected_frames(self) -> int | None:
        """What the file says, or None; `len` counts."""
        ...

    def __iter__(self) -> Iterator[Frame]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Frame: ...


def open_recording(path: Path, *, rate_hz: float = 0.0, topic: str = "") -> RecordedVideo:
    """The recording at `path`, whatever it is.

    Args:
        rate_hz: frames per second of a folder of images, and of a video that has no times; 0 = 30.
        topic: of a bag with several topics of images.

    Raises:
        VideoError: there is nothing that can be read; one frame may still fail later.
    """
    path = path.expanduser()
    if not path.exists():
        raise VideoError(f"there is no {path}; give a video file, a folder of images, a rosbag2 folder or an MCAP file")
    is_bag = path.suffix.lower() in BAG_SUFFIXES if path.is_file() else (path / "metadata.yaml").is_file()
    if is_bag:
        from virst_engine.video.rosbags_reader import open_bag

        return open_bag(path, topic)
    if topic:
        raise VideoError(f"{path} is no rosbag2 folder or MCAP file, so it has no topic {topic!r}; leave the topic out")
    return open_image_folder(path, rate_hz) if path.is_dir() else open_video_file(path, rate_hz)


class ImageFolder:
    """Image files in the order of their names, numbers by value: frame2 before frame10."""

    def __init__(self, files: list[Path], rate_hz: float) -> None:
        self.rate_hz, self._files = rate_hz, files

    @property
    def expected_frames(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Frame]:
        return (self[number] for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int, /) -> Frame:
        file = self._files[number]
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            raise VideoError(f"{file} is no image that can be read; repair it, or take it out of the folder")
        return Frame(_rgb(image), round(number * 1e9 / self.rate_hz))


def open_image_folder(folder: Path, rate_hz: float = 0.0) -> ImageFolder:
    """Raises VideoError for a folder without images."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise VideoError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no metadata.yaml of a rosbag2; "
            "give another folder"
        )
    return ImageFolder(sorted(files, key=_natural), rate_hz or DEFAULT_RATE_HZ)


class StreamedVideo:
    """What can only be read from its start: forwards is fast, a step back reads anew. Holds one frame."""

    def __init__(self, read: Callable[[], Iterator[Frame]], *, rate_hz: float, expected_frames: int | None) -> None:
        self.rate_hz, self.expected_frames = rate_hz, expected_frames
        self._read = read
        self._count: int | None = None
        self._frames: Iterator[Frame] = iter(())
        self._newest: tuple[int, Frame] | None = None

    def __iter__(self) -> Iterator[Frame]:
        return self._read()

    def __len__(self) -> int:
        """Exact; the first time it reads the whole recording."""
        if self._count is None:
            self._count = sum(1 for _ in self._read())
        return self._count

    def __getitem__(self, number: int, /) -> Frame:
        if number < 0:
            number += len(self)
        if self._newest is None or number < self._newest[0]:
            self._frames, self._newest = self._read(), None
        position = -1 if self._newest is None else self._newest[0]
        while self._newest is None or position < number:
            frame = next(self._frames, None)
            if frame is None:
                self._newest = None
                raise IndexError(f"frame {number} of {position + 1}")
            position += 1
            self._newest = position, frame
        return self._newest[1]


def open_video_file(file: Path, rate_hz: float = 0.0) -> StreamedVideo:
    """Raises VideoError for a file that OpenCV cannot decode."""
    capture = cv2.VideoCapture(str(file))
    try:
        is_there = capture.isOpened() and capture.read()[0]
        told_hz, told_frames = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()
    if not is_there:
        raise VideoError(
            f"{file} is no video that OpenCV can decode; convert it, for example with "
            f"`ffmpeg -i {file.name} -c:v libx264 video.mp4`"
        )
    if not 0.0 < told_hz <= MOST_RATE_HZ:
        told_hz = 0.0
    rate_hz = rate_hz or told_hz or DEFAULT_RATE_HZ
    return StreamedVideo(
        lambda: _decode(file, rate_hz, trusts_times=bool(told_hz)),
        rate_hz=rate_hz,
        expected_frames=told_frames if told_frames > 0 else None,
    )


def _decode(file: Path, rate_hz: float, *, trusts_times: bool) -> Iterator[Frame]:
    """A frame that cannot be decoded ends the video: OpenCV does not tell it from the end."""
    capture = cv2.VideoCapture(str(file))
    stamp_ns, period_ns = -1, round(1e9 / rate_hz)
    try:
        while True:
            is_there, image = capture.read()
            if not is_there:
                return
            told_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6) if trusts_times else -1
            expected_ns = 0 if stamp_ns < 0 else stamp_ns + period_ns
            stamp_ns = told_ns if told_ns > stamp_ns else expected_ns  # some files count wrongly, or not at all
            yield Frame(_rgb(image), stamp_ns)
    finally:
        capture.release()


def _rgb(image_bgr_u8: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    return cv2.cvtColor(image_bgr_u8, cv2.COLOR_BGR2RGB)


def _natural(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]
