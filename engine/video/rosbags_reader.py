# SPDX-License-Identifier: Apache-2.0
"""Images of a rosbag2 folder, or of a single MCAP or SQLite file of one, without ROS: `rosbags` reads them.

Stamps are those of capture (header.stamp); where a message has none, the time at which it was recorded.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from virst_engine.errors import VideoError
from virst_engine.types import Frame
from virst_engine.video.recordings import DEFAULT_RATE_HZ, StreamedVideo

logger = logging.getLogger(__name__)

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
# Encoding -> channels, and how OpenCV turns them into RGB.
ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}


def open_bag(path: Path, topic: str = "") -> StreamedVideo:
    """The images of one topic; `topic` may be empty where there is only one.

    Raises:
        VideoError: `rosbags` is not installed, the bag is damaged, or has no such topic.
    """
    try:
        from rosbags.highlevel import AnyReader, AnyReaderError
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise VideoError(
            f"{path} is a ROS bag, and the package that reads it is missing ({error}): pip install rosbags"
        ) from error

    # Of bags without message definitions; those of images have not changed since the first ROS 2.
    typestore = get_typestore(Stores.LATEST)

    def opened() -> Any:
        return AnyReader([path], default_typestore=typestore)

    try:
        with opened() as reader:
            found = {c.topic: c.msgtype for c in reader.connections if c.msgtype in (IMAGE, COMPRESSED)}
            topic = _choose(path, topic, found)
            count, span_s = reader.topics[topic].msgcount, reader.duration / 1e9
    except (AnyReaderError, OSError, ValueError, KeyError) as error:
        raise VideoError(f"{path} cannot be read as a bag ({error}); try `ros2 bag reindex`") from error

    def read() -> Iterator[Frame]:
        newest_ns, dropped = -1, 0
        with opened() as reader:
            wanted = [connection for connection in reader.connections if connection.topic == topic]
            try:
                for number, (connection, recorded_ns, data) in enumerate(reader.messages(wanted)):
                    message = reader.deserialize(data, connection.msgtype)
                    stamp = message.header.stamp
                    stamp_ns = stamp.sec * 1_000_000_000 + stamp.nanosec or recorded_ns
                    if stamp_ns <= newest_ns:  # sent twice, or overtaken on the way
                        dropped += 1
                        continue
                    newest_ns = stamp_ns
                    yield Frame(_image(message, f"image {number} of {topic} in {path}"), stamp_ns)
            except AnyReaderError as error:
                raise VideoError(f"{path} is damaged ({error}); try `ros2 bag reindex`") from error
        if dropped:
            logger.warning("%s: left out %d images that are not newer than the one before", path, dropped)

    rate_hz = (count - 1) / span_s if count > 1 and span_s > 0 else DEFAULT_RATE_HZ
    return StreamedVideo(read, rate_hz=rate_hz, expected_frames=count)


def _choose(path: Path, topic: str, found: dict[str, str]) -> str:
    there = ", ".join(sorted(found)) or "none"
    if topic:
        if topic not in found:
            raise VideoError(f"{path} has no topic {topic!r} of images; there are: {there}")
        return topic
    # The same pictures are often recorded raw and compressed: the raw ones are taken.
    several = [name for name, kind in found.items() if kind == IMAGE] or list(found)
    if len(several) != 1:
        raise VideoError(f"{path}: say which topic; topics of images: {there}")
    return several[0]


def _image(message: Any, what: str) -> UInt8[np.ndarray, "height width 3"]:
    if not hasattr(message, "encoding"):
        picture = cv2.imdecode(np.asarray(message.data, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise VideoError(f"{what} ({message.format[:40]!r}) is no JPEG or PNG that can be decoded")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    if message.encoding not in ENCODINGS:
        raise VideoError(
            f"{what} has the encoding {message.encoding[:40]!r}; only {', '.join(ENCODINGS)} are read: "
            "choose another topic"
        )
    channels, to_rgb = ENCODINGS[message.encoding]
    height, width, step, data = message.height, message.width, message.step, np.asarray(message.data, np.uint8)
    row_bytes = width * channels
    if height < 1 or width < 1 or step < row_bytes or len(data) < (height - 1) * step + row_bytes:
        raise VideoError(f"{what} is cut short: {len(data)} bytes for {height} rows of step {step}, width {width}")
    rows = np.zeros(height * step, np.uint8)
    rows[: min(len(data), len(rows))] = data[: len(rows)]
    pixels = rows.reshape(height, step)[:, :row_bytes].reshape(height, width, channels)
    return np.ascontiguousarray(pixels) if to_rgb is None else cv2.cvtColor(np.ascontiguousarray(pixels), to_rgb)
