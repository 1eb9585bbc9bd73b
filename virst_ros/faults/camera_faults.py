# SPDX-License-Identifier: Apache-2.0
"""What cameras do: stop, change, flood, lie about sizes and times."""

import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image

from virst_ros import conversions
from virst_ros.faults.fault import Fault, Inject, Masks, SeenMask
from virst_ros.faults.harness import Harness
from virst_ros.faults.scripted_camera import TOPICS, Shot
from virst_ros.faults.segmenter import Segmenter, wait_until

SECOND = 1_000_000_000


def sent(change: Callable[[Shot], None], rate_hz: float | None = None) -> Inject:
    """The camera sends what `change` makes of each frame."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[None]:
        with harness.camera.changed(change, rate_hz):
            yield

    return inject


def _described(**fields: object) -> Inject:
    return sent(lambda shot: shot.describe(**fields))


def nothing(shot: Shot) -> None:
    shot.image = shot.info = shot.depth = None


def alone(shot: Shot) -> None:
    """The image without depth and calibration, which would come too seldom for it anyway."""
    shot.info = shot.depth = None


def _shown(pixels: Callable[[np.ndarray], np.ndarray], encoding: str = "rgb8") -> Inject:
    return sent(lambda shot: shot.show(pixels(shot.rgb), encoding))


def _plain(value: int) -> Inject:
    """Pictures of one grey."""

    def change(shot: Shot) -> None:
        shot.truth = np.zeros_like(shot.truth)
        shot.show(np.full_like(shot.rgb, value))

    return sent(change)


def scaled(width: int, height: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rgb: cv2.resize(rgb, (width, height))


@contextmanager
def _unplugged(harness: Harness) -> Iterator[None]:
    harness.camera.unplug()
    try:
        yield
    finally:
        harness.camera.plug_in()


@contextmanager
def _flapping(harness: Harness) -> Iterator[None]:
    for _ in range(20):
        harness.camera.unplug()
        time.sleep(0.05)
        harness.camera.plug_in()
        time.sleep(0.05)
    yield


@contextmanager
def _frozen(harness: Harness) -> Iterator[None]:
    kept: list[Shot] = []

    def change(shot: Shot) -> None:
        kept.append(shot)
        shot.show(kept[0].rgb)
        shot.truth = kept[0].truth

    with harness.camera.changed(change):
        yield


@contextmanager
def _same_stamp(harness: Harness) -> Iterator[None]:
    kept: list[int] = []

    def change(shot: Shot) -> None:
        assert shot.image is not None
        kept.append(conversions.stamp_ns(shot.image.header.stamp))
        shot.stamp(kept[0])

    with harness.camera.changed(change):
        yield


def _shifted(shift_ns: int) -> Inject:
    def change(shot: Shot) -> None:
        assert shot.image is not None
        shot.stamp(conversions.stamp_ns(shot.image.header.stamp) + shift_ns)

    return sent(change)


@contextmanager
def _two_cameras(harness: Harness) -> Iterator[None]:
    """A second publisher, whose clock is five seconds behind."""
    publisher = harness.node.create_publisher(Image, TOPICS["image"], QoSProfile(depth=1))

    def change(shot: Shot) -> None:
        assert shot.image is not None
        header, stamp_ns = shot.image.header, conversions.stamp_ns(shot.image.header.stamp) - 5 * SECOND
        other = conversions.image_message(type(header)(frame_id=header.frame_id), shot.rgb, "rgb8")
        other.header.stamp = conversions.time_message(stamp_ns)
        harness.camera.remember(other, shot.truth)
        # Between two images, or the newer one would take its place before it is looked at.
        threading.Timer(0.4 / harness.camera.rate_hz, publisher.publish, [other]).start()

    with harness.camera.changed(change):
        yield
    time.sleep(0.5 / harness.camera.rate_hz)
    harness.node.destroy_publisher(publisher)


def _renamed(frame_id: str) -> Inject:
    def change(shot: Shot) -> None:
        for message in (shot.image, shot.info, shot.depth):
            if message is not None:
                message.header.frame_id = frame_id

    return sent(change)


def _follow_frame_id(frame_id: str) -> Callable[[list[SeenMask]], str]:
    def check(masks: list[SeenMask]) -> str:
        if masks and masks[-1].frame_id != frame_id:
            return f"the masks' frame_id is {masks[-1].frame_id!r}, the images' {frame_id!r}"
        return ""

    return check


def _have_size(width: int, height: int) -> Callable[[list[SeenMask]], str]:
    def check(masks: list[SeenMask]) -> str:
        if not masks or masks[-1].size != (width, height):
            return f"no mask is {width}x{height} as the image is: {masks[-1].size if masks else 'none came'}"
        return ""

    return check


def _compressed(damage: Callable[[bytes], bytes]) -> Inject:
    """A second segmenter takes compressed images; they are damaged."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[Segmenter]:
        publisher = harness.node.create_publisher(CompressedImage, f"{TOPICS['image']}/compressed", 1)
        is_damaged = [False]

        def change(shot: Shot) -> None:
            assert shot.image is not None
            message = conversions.jpeg_message(shot.image.header, shot.rgb)
            if is_damaged[0]:
                data = damage(bytes(message.data))
                message = CompressedImage(header=shot.image.header, format=message.format, data=data)
            publisher.publish(message)

        spare = harness.start_spare(image_transport="compressed", use_depth=False)
        try:
            with harness.camera.changed(change):
                harness.set_base_goal(spare)
                begin_s = time.monotonic()
                wait_until(lambda: harness.is_followed(spare, begin_s), 20.0)
                is_damaged[0] = True
                yield spare
                is_damaged[0] = False
                harness.cause_is_gone()
                begin_s = time.monotonic()
                wait_until(lambda: harness.is_followed(spare, begin_s), 20.0)
        finally:
            harness.node.destroy_publisher(publisher)

    return inject


def _png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size, up to its pixels."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + fields
        + struct.pack(">I", zlib.crc32(fields))
        + b"\x00\x00\xff\xffIDAT"
    )


FAULTS = (
    Fault(
        "camera_stops",
        "the driver hangs: its publishers stay, nothing comes",
        sent(nothing),
        Masks.NONE,
        log="no images on /image",
        diagnostics="no images on /image .*has stopped arriving",
    ),
    Fault(
        "camera_unplugged",
        "the driver's publishers are gone",
        _unplugged,
        Masks.NONE,
        log="nobody publishes it",
        diagnostics="nobody publishes it",
    ),
    Fault("camera_flaps", "publishers come and go 20 times in 2 s", _flapping, Masks.ANY),
    Fault(
        "resolution_changes",
        "320x240 becomes 640x480",
        _shown(scaled(640, 480)),
        Masks.OF_GOAL,
        log="the image changed from 320x240 rgb8 to 640x480 rgb8",
        diagnostics="the image changed from 320x240 rgb8 to 640x480 rgb8",
        check=_have_size(640, 480),
    ),
    Fault(
        "encoding_changes",
        "rgb8 becomes bgr8",
        _shown(lambda rgb: rgb[..., ::-1], "bgr8"),
        Masks.OF_GOAL,
        log="the image changed from .* to 320x240 bgr8",
        diagnostics="the image changed from .* to 320x240 bgr8",
    ),
    Fault(
        "infrared",
        "rgb8 becomes mono8: the colour of the sentence cannot be seen",
        _shown(lambda rgb: rgb.mean(axis=2).astype(np.uint8), "mono8"),
        Masks.COME,
        log="the image changed from .* to 320x240 mono8",
        diagnostics="the image changed from .* to 320x240 mono8",
    ),
    Fault(
        "flood",
        "200 images per second",
        sent(alone, rate_hz=200.0),
        Masks.OF_GOAL,
        log="images come at .* Hz",
        diagnostics="images come at .* Hz",
        least_s=3.0,
    ),
    Fault(
        "crawl",
        "one image per second",
        sent(lambda _: None, rate_hz=1.0),
        Masks.OF_GOAL,
        least_s=4.0,
    ),
    Fault("black", "black images", _plain(0), Masks.COME, log="black", diagnostics="black"),
    Fault("saturated", "white images", _plain(255), Masks.COME, log="saturated", diagnostics="saturated"),
    Fault("grey", "images of one grey", _plain(127), Masks.COME, log="one colour", diagnostics="one colour"),
    Fault("frozen", "the same picture again and again, with new stamps", _frozen, Masks.OF_GOAL, least_s=2.0),
    Fault(
        "wrong_step",
        "step is smaller than a row",
        _described(step=3),
        Masks.NONE,
        log="has step 3",
        diagnostics="has step 3",
    ),
    Fault(
        "short_data",
        "the second half of the data is missing",
        _described(size=320 * 240 * 3 // 2),
        Masks.NONE,
        log="it was cut short",
        diagnostics="it was cut short",
    ),
    Fault(
        "excess_data",
        "height says half of the rows that are there",
        _described(height=120),
        Masks.NONE,
        log="step or height do not describe the data",
        diagnostics="step or height do not describe the data",
    ),
    Fault(
        "huge_claim",
        "a size of 4 thousand million pixels, and a few bytes",
        _described(height=2**16, width=2**16, step=3 * 2**16, size=1000),
        Masks.NONE,
        log="65536x65536, more than",
        diagnostics="65536x65536, more than",
    ),
    Fault(
        "no_pixels",
        "0x0 images without data",
        _described(height=0, width=0, step=0, size=0),
        Masks.NONE,
        log="has no pixels",
        diagnostics="has no pixels",
    ),
    Fault(
        "one_pixel",
        "1x1 images",
        _shown(scaled(1, 1)),
        Masks.COME,
        log="to 1x1 rgb8",
        diagnostics="to 1x1 rgb8",
        check=_have_size(1, 1),
    ),
    Fault(
        "four_k",
        "3840x2160 images",
        sent(lambda shot: shot.show(scaled(3840, 2160)(shot.rgb)), rate_hz=2.0),
        Masks.COME,
        log="to 3840x2160 rgb8",
        diagnostics="to 3840x2160 rgb8",
        least_s=4.0,
        check=_have_size(3840, 2160),
    ),
    Fault(
        "bayer",
        "raw bayer images",
        _shown(lambda rgb: rgb[..., 1], "bayer_rggb8"),
        Masks.NONE,
        log="encoding 'bayer_rggb8' is not supported",
        diagnostics="encoding 'bayer_rggb8' is not supported",
    ),
    Fault(
        "yuv422",
        "YUV 4:2:2 images",
        _shown(lambda rgb: rgb[..., :2], "yuv422_yuy2"),
        Masks.NONE,
        log="encoding 'yuv422_yuy2' is not supported",
        diagnostics="encoding 'yuv422_yuy2' is not supported",
    ),
    Fault(
        "unknown_encoding",
        "an encoding that nobody knows",
        _described(encoding="no such encoding"),
        Masks.NONE,
        log="encoding 'no such encoding' is not supported",
        diagnostics="encoding 'no such encoding' is not supported",
    ),
    Fault(
        "stamp_zero",
        "header.stamp is 0",
        sent(lambda shot: shot.stamp(0)),
        Masks.NONE,
        log="images carry no time stamp",
        diagnostics="images carry no time stamp",
    ),
    Fault(
        "stamp_repeated",
        "the same stamp again and again",
        _same_stamp,
        Masks.ANY,
        log="carry the same time stamp",
        diagnostics="carry the same time stamp",
    ),
    # In this order: stamps that are right again after those that went back jump forwards, too, and the log has that.
    Fault(
        "clock_forwards",
        "stamps jump forwards by an hour, and back again later",
        _shifted(3600 * SECOND),
        Masks.COME,
        log="jumped forwards by",
        diagnostics="time stamps jumped forwards by",
        least_s=2.0,
    ),
    Fault(
        "clock_backwards",
        "stamps go back by 10 s, and forwards again later",
        _shifted(-10 * SECOND),
        Masks.COME,
        log="went back by",
        diagnostics="time stamps went back by",
        least_s=3.0,
    ),
    Fault(
        "two_publishers",
        "a second publisher on the image topic, whose clock is 5 s behind",
        _two_cameras,
        Masks.COME,
        log="went back by",
        diagnostics="are there two publishers",
        least_s=2.0,
    ),
    Fault(
        "frame_id_changes",
        "images come from another frame",
        _renamed("gripper_camera"),
        Masks.OF_GOAL,
        check=_follow_frame_id("gripper_camera"),
    ),
    Fault(
        "compressed_garbage",
        "compressed images are random bytes",
        _compressed(lambda data: bytes(reversed(data))),
        Masks.NONE,
        log="no picture that can be read",
        diagnostics="no picture that can be read",
    ),
    Fault(
        "compressed_cut",
        "compressed images lack their second half",
        _compressed(lambda data: data[: len(data) // 2]),
        Masks.ANY,
    ),
    Fault(
        "compressed_bomb",
        "a few bytes claim to be a PNG of 9000x9000",
        _compressed(lambda _: _png_header(9000, 9000) + bytes(64)),
        Masks.NONE,
        log="9000x9000, more than",
        diagnostics="9000x9000, more than",
    ),
)
