# SPDX-License-Identifier: Apache-2.0
"""ROS messages <-> engine types; the only file that knows BGR. Calibration and 3D are in depth_conversions.py.

No cv_bridge: its builds break with NumPy 2, and an image is a header and a buffer.
"""

import copy
import io
import math
from array import array
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import PIL.Image
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import Header
from virst_msgs.msg import Goal as GoalMessage
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray, StageTimings

from virst_engine import Frame, FrameResult, Goal, KnownObject, ObjectResult, ObjectState
from virst_engine.depth import ObjectGeometry
from virst_engine.errors import BadFrame
from virst_ros.depth_conversions import fill_geometry

MOST_PIXELS = 64_000_000  # of an image, where nobody says otherwise
COLOUR_CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
_TO_RGB = {
    "bgr8": cv2.COLOR_BGR2RGB,
    "rgba8": cv2.COLOR_RGBA2RGB,
    "bgra8": cv2.COLOR_BGRA2RGB,
    "mono8": cv2.COLOR_GRAY2RGB,
}
_DEPTH_TYPES = {"32FC1": np.dtype(np.float32), "16UC1": np.dtype(np.uint16)}


def stamp_ns(stamp: Time) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def time_message(nanoseconds: int) -> Time:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return Time(sec=seconds, nanosec=rest)


def _rows(message: Image, bytes_per_pixel: int) -> np.ndarray:
    """The pixels' bytes, (height, width * bytes_per_pixel), a view without the padding of the rows."""
    height, width, step = message.height, message.width, message.step
    what = f"{width}x{height} {message.encoding} image"
    if height == 0 or width == 0:
        raise BadFrame(f"{what} has no pixels: the camera driver sends empty images; check its resolution")
    row_bytes = width * bytes_per_pixel
    if step < row_bytes:
        raise BadFrame(
            f"{what} has step {step}, but a row needs {row_bytes} bytes: the camera driver must set step "
            "to width x bytes per pixel, plus padding if there is any"
        )
    available, full = len(message.data), height * step
    needed = full - step + row_bytes  # some drivers leave out the padding of the last row
    if available < needed:
        raise BadFrame(
            f"{what} has {available} bytes of data, but {height} rows of step {step} need {needed}: it was cut short"
        )
    if available > full:
        raise BadFrame(
            f"{what} has {available} bytes of data, but {height} rows of step {step} are {full}: "
            "step or height do not describe the data; fix them in the camera driver"
        )
    flat = np.frombuffer(message.data, np.uint8)
    if available < full:
        flat = np.concatenate([flat, np.zeros(full - available, np.uint8)])
    return flat.reshape(height, step)[:, :row_bytes]


def image_rgb(message: Image) -> np.ndarray:
    """The picture as RGB uint8 (height, width, 3), C-contiguous; for tight rgb8 a view of the message's own buffer.

    Grey images become grey RGB, alpha is left out. is_bigendian does not matter: every supported channel is one byte.

    Raises:
        BadFrame: unsupported encoding, no pixels, or data that height, width and step do not describe.
    """
    channels = COLOUR_CHANNELS.get(message.encoding)
    if channels is None:
        raise BadFrame(
            f"image encoding {message.encoding!r} is not supported, only {', '.join(COLOUR_CHANNELS)}: "
            "have the camera driver publish rgb8, or convert before (for bayer and yuv: image_proc)"
        )
    pixels = _rows(message, channels).reshape(message.height, message.width, channels)
    if message.encoding == "rgb8":
        return np.ascontiguousarray(pixels)
    return cv2.cvtColor(pixels, _TO_RGB[message.encoding])


def check_pixels(width: int, height: int, what: str, most_pixels: int) -> None:
    """Raises BadFrame for more than that."""
    if width * height > most_pixels:
        raise BadFrame(
            f"{what} is {width}x{height}, more than {most_pixels / 1e6:g} million pixels: have the camera send smaller "
            "ones, or raise limits.image_megapixels"
        )


def frame(message: Image, camera: str, most_pixels: int = MOST_PIXELS) -> Frame:
    """One camera image as the engine takes it.

    Raises:
        BadFrame: as `image_rgb` does, for more than `most_pixels`, and for an image without a time.
    """
    check_pixels(message.width, message.height, "the image", most_pixels)
    time_ns = _time_ns(message.header)
    return Frame(image_rgb(message), time_ns, camera)


def compressed_frame(message: CompressedImage, camera: str, most_pixels: int = MOST_PIXELS) -> Frame:
    """One JPEG or PNG of a camera as the engine takes it.

    Raises:
        BadFrame: data that is no picture, one with more than `most_pixels`, or without a time.
    """
    data = np.frombuffer(message.data, np.uint8)
    what = f"{len(data)} bytes of {message.format[:40]!r}"
    try:
        # Reads the header only: a few bytes can claim to be a picture that fills the memory.
        with PIL.Image.open(io.BytesIO(memoryview(data))) as picture:
            width, height = picture.size
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise BadFrame(f"{what} are no picture that can be read: send JPEG or PNG on image/compressed") from error
    check_pixels(width, height, f"the picture in {what}", most_pixels)
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if decoded is None:
        raise BadFrame(f"{what} are cut short or damaged: look at the network between camera and segmenter")
    return Frame(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), _time_ns(message.header), camera)


def _time_ns(header: Header) -> int:
    """Raises BadFrame where there is none."""
    time_ns = stamp_ns(header.stamp)
    if time_ns <= 0:
        raise BadFrame(
            f"images carry no time stamp (header.stamp is {time_ns} ns): set it to the time of capture in the camera "
            "driver; goals are followed in the images' own time"
        )
    return time_ns


def mask(message: Image) -> np.ndarray:
    """Where a mono8 or 8UC1 image is above 0: bool (height, width). Raises BadFrame for anything else."""
    if message.encoding not in ("mono8", "8UC1"):
        raise BadFrame(f"mask encoding {message.encoding!r} is not supported, only mono8 with values above 0 inside")
    return _rows(message, 1) > 0


def check_depth(message: Image, most_pixels: int = MOST_PIXELS) -> None:
    """Raises BadFrame for what `depth_m` cannot read, and for more than `most_pixels`; takes no time."""
    check_pixels(message.width, message.height, "the depth image", most_pixels)
    kind = _DEPTH_TYPES.get(message.encoding)
    if kind is None:
        raise BadFrame(
            f"depth encoding {message.encoding!r} is not supported, only 32FC1 (metres) and 16UC1 (millimetres): "
            "choose one in the camera driver"
        )
    _rows(message, kind.itemsize)


def depth_m(message: Image) -> np.ndarray:
    """Depth in metres, float32 (height, width); the unit follows the encoding (REP-118), NaN = not measured.

    Raises:
        BadFrame: unsupported encoding, no pixels, or data that height, width and step do not describe.
    """
    check_depth(message, message.width * message.height)  # how large it may be is asked where it comes in
    kind = _DEPTH_TYPES[message.encoding]
    rows = np.ascontiguousarray(_rows(message, kind.itemsize))
    values = rows.view(kind.newbyteorder(">" if message.is_bigendian else "<"))
    metres = values.astype(np.float32) * np.float32(0.001 if message.encoding == "16UC1" else 1.0)
    metres[~(metres > 0.0)] = np.nan
    return metres


def image_message(header: Header, pixels: np.ndarray, encoding: str) -> Image:
    """An Image that owns a copy of `pixels` (height, width[, channels], any dtype). The header is used as it is."""
    height, width = pixels.shape[:2]
    tight = np.ascontiguousarray(pixels)
    data = array("B")
    # frombytes of a byte view is the one fast way in; a list or bytes takes rclpy many times as long.
    data.frombytes(memoryview(tight.reshape(-1).view(np.uint8)))
    return Image(
        header=header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=tight.strides[0],
        data=data,
    )


def binary(mask: np.ndarray) -> np.ndarray:
    """255 where the mask is, else 0."""
    return mask.view(np.uint8) * np.uint8(255)


def png_message(header: Header, ids: np.ndarray) -> CompressedImage:
    """Instance ids without loss; named as image_transport's compressed plugin does."""
    # Run lengths are all there is to gain in a picture of ids, and the quickest way.
    options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_COMPRESSION, 1]
    return _compressed(header, "mono8; png compressed ", cv2.imencode(".png", ids, options)[1])


def jpeg_message(header: Header, image_rgb_u8: np.ndarray) -> CompressedImage:
    """A picture for people; never for ids, which JPEG would change."""
    bgr = cv2.cvtColor(image_rgb_u8, cv2.COLOR_RGB2BGR)
    return _compressed(header, "rgb8; jpeg compressed bgr8", cv2.imencode(".jpg", bgr)[1])


def _compressed(header: Header, form: str, encoded: np.ndarray) -> CompressedImage:
    data = array("B")
    data.frombytes(memoryview(encoded.reshape(-1)))
    return CompressedImage(header=header, format=form, data=data)


def camera_info_message(header: Header, info: CameraInfo) -> CameraInfo:
    """The camera's calibration under the header of the processed frame (consumers pair it with the mask by stamp)."""
    paired = copy.copy(info)
    paired.header = header
    return paired


def object_message(found: ObjectResult, sentence: str, geometry: ObjectGeometry | None = None) -> SegmentedObject:
    """One object of one frame; `bbox` and the centroid in pixels are of the mask, the rest is of `geometry`."""
    message = SegmentedObject(
        object_id=found.object_id,
        goal_id=found.goal_id,
        goal=sentence,
        part_of=found.part_of,
        instance_id=found.instance_id,
        state=found.state.value,
        score=float(found.score),
        centroid_x_px=math.nan,
        centroid_y_px=math.nan,
        prompt_age=float(found.prompt_age_s),
        reasoner_latency=float(found.reasoner_latency_s),
        message=found.message,
    )
    fill_geometry(message, geometry)
    if found.state is not ObjectState.TRACKING:
        return message
    mask = found.mask.view(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if width > 0:
        # Within the box: of a whole image, moments would take longer than everything else here.
        moments = cv2.moments(mask[y : y + height, x : x + width], binaryImage=True)
        message.area_px = int(moments["m00"])
        message.bbox = RegionOfInterest(x_offset=x, y_offset=y, height=height, width=width)
        message.centroid_x_px = x + moments["m10"] / moments["m00"]
        message.centroid_y_px = y + moments["m01"] / moments["m00"]
    return message


def objects_message(
    header: Header,
    result: FrameResult,
    sentences: Mapping[str, str],
    age_ms: float,
    frames_in: int,
    frames_dropped: int,
    geometries: Mapping[str, ObjectGeometry] | None = None,
) -> SegmentedObjectArray:
    """Everything known of one frame; `sentences` by goal id, `geometries` by object id."""
    places = geometries or {}
    in_order = sorted(result.objects, key=lambda found: found.instance_id)
    return SegmentedObjectArray(
        header=header,
        step=result.step,
        objects=[
            object_message(found, sentences.get(found.goal_id, ""), places.get(found.object_id)) for found in in_order
        ],
        timings=StageTimings(
            stage=list(result.timings_ms),
            duration_ms=[float(ms) for ms in result.timings_ms.values()],
            age_ms=age_ms,
            frames_in=frames_in,
            frames_dropped=frames_dropped,
        ),
    )


def goal_message(goal: Goal, objects: Sequence[KnownObject], set_at_ns: int) -> GoalMessage:
    return GoalMessage(
        goal_id=goal.goal_id,
        goal=goal.sentence,
        camera=goal.camera,
        object_ids=[each.object_id for each in objects],
        instance_ids=[each.instance_id for each in objects],
        states=[each.state.value for each in objects],
        set_at=time_message(set_at_ns),
    )
