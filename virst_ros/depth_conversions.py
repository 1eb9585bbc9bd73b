# SPDX-License-Identifier: Apache-2.0
"""Calibration and geometry <-> messages: rays of a camera, point clouds, boxes."""

import math
from array import array
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from sensor_msgs.msg import CameraInfo, PointCloud2, PointField
from std_msgs.msg import Header
from virst_msgs.msg import SegmentedObject
from visualization_msgs.msg import Marker, MarkerArray

from virst_engine import ObjectResult
from virst_engine.depth import Cloud, ObjectGeometry, OrientedBox, pinhole_rays, quaternion_xyzw
from virst_engine.errors import BadFrame
from virst_engine.visualize import caption_of, colour_of

# By the number of coefficients that the model may have: OpenCV tells the variants of the first two apart by it.
_PLUMB_BOB, _FISHEYE = ("plumb_bob", "rational_polynomial", "thin_prism_fisheye"), ("equidistant", "fisheye")
SHAPE_TOLERANCE = 0.02  # of width / height: two sizes of one view
TEXT_SHARE = 0.35  # of a box's largest side
NAN = math.nan


def rays(info: CameraInfo, height: int, width: int, *, rectified: bool) -> np.ndarray:
    """x / z and y / z of what each pixel of the image of that size sees, float32 (height, width, 2).

    The size may be another one than that of the calibration, if it is the same view. Takes long (0.3 s for 1280x720)
    when there is distortion: keep the result.

    Args:
        rectified: the image is rectified, so P holds for it and there is no distortion.

    Raises:
        BadFrame: not calibrated, another view, or a distortion model that is not known.
    """
    what = "camera_info"
    if info.width == 0 or info.height == 0:
        raise BadFrame(f"{what} says no size: the camera driver must fill width and height")
    matrix = np.array(info.p if rectified else info.k, float).reshape(3, -1)[:, :3]
    if not (matrix[0, 0] > 0 and matrix[1, 1] > 0 and np.isfinite(matrix).all()):
        raise BadFrame(
            f"{what} has no focal length in {'P' if rectified else 'K'}: calibrate the camera, or have its driver "
            "publish what it knows"
        )
    check_same_view(info.width, info.height, width, height, what)
    wide, high = width / info.width, height / info.height
    fx, fy = matrix[0, 0] * wide, matrix[1, 1] * high
    # Centres of pixels are whole numbers: resizing moves them by half a pixel.
    cx, cy = (matrix[0, 2] + 0.5) * wide - 0.5, (matrix[1, 2] + 0.5) * high - 0.5
    plain = pinhole_rays(fx, fy, cx, cy, width, height)
    distortion = np.array(info.d, float)
    if rectified or not distortion.any():
        return plain
    pixels = plain.reshape(-1, 1, 2).astype(np.float64)  # as if K were 1
    if info.distortion_model in _PLUMB_BOB:
        straight = cv2.undistortPoints(pixels, np.eye(3), distortion)
    elif info.distortion_model in _FISHEYE:
        straight = cv2.fisheye.undistortPoints(pixels, np.eye(3), distortion[:4])
    else:
        raise BadFrame(
            f"{what} has the distortion model {info.distortion_model!r}, not one of "
            f"{', '.join((*_PLUMB_BOB, *_FISHEYE))}: rectify the images and set depth.rectified"
        )
    return straight.reshape(height, width, 2).astype(np.float32)


def check_same_view(
    width: int, height: int, other_width: int, other_height: int, what: str, other: str = "the image"
) -> None:
    """Raises BadFrame unless both sizes have one shape: only then can one be the other, resized."""
    if abs(width * other_height / (height * other_width) - 1.0) > SHAPE_TOLERANCE:
        raise BadFrame(
            f"{what} is {width}x{height}, {other} {other_width}x{other_height}: not two sizes of one view. "
            "Choose the topic that is registered with the image (for depth: the aligned one)"
        )


def fill_geometry(message: SegmentedObject, geometry: ObjectGeometry | None) -> None:
    """Fill in what comes from depth; void without it."""
    if geometry is None:
        nowhere = Point(x=NAN, y=NAN, z=NAN)
        message.centroid, message.pose, message.size = nowhere, Pose(position=nowhere), Vector3(x=NAN, y=NAN, z=NAN)
        return
    message.depth_px, message.is_supported = geometry.depth_px, geometry.support is not None
    message.centroid, message.pose = _point(geometry.centroid_m), pose(geometry.box)
    message.size = _vector(geometry.box.size_m)


def pose(box: OrientedBox) -> Pose:
    """The box's middle and the rotation of its axes, in the camera's frame."""
    x, y, z, w = quaternion_xyzw(box.axes).tolist()
    return Pose(position=_point(box.centre_m), orientation=Quaternion(x=x, y=y, z=z, w=w))


def _point(values: np.ndarray) -> Point:
    x, y, z = values.tolist()
    return Point(x=x, y=y, z=z)


def _vector(values: np.ndarray) -> Vector3:
    x, y, z = values.tolist()
    return Vector3(x=x, y=y, z=z)


def cloud_message(header: Header, cloud: Cloud, *, labelled: bool) -> PointCloud2:
    """An unordered cloud of x, y, z (float32, metres) and rgb (as PCL packs it), with `label` (uint32) if wanted.

    No point is NaN.
    """
    names = ["x", "y", "z", "rgb", "label"][: 5 if labelled else 4]
    packed = np.empty((len(cloud.points_m), len(names)), np.uint32)
    packed[:, :3] = np.ascontiguousarray(cloud.points_m, np.float32).view(np.uint32)
    red, green, blue = (cloud.rgb_u8[:, k].astype(np.uint32) for k in range(3))
    packed[:, 3] = (red << 16) | (green << 8) | blue
    if labelled:
        packed[:, 4] = cloud.labels
    data = array("B")
    data.frombytes(memoryview(packed.reshape(-1).view(np.uint8)))
    step = 4 * len(names)
    return PointCloud2(
        header=header,
        height=1,
        width=len(packed),
        fields=[
            PointField(
                name=name,
                offset=4 * k,
                datatype=PointField.UINT32 if name == "label" else PointField.FLOAT32,
                count=1,
            )
            for k, name in enumerate(names)
        ],
        is_bigendian=False,
        point_step=step,
        row_step=step * len(packed),
        data=data,
        is_dense=True,
    )


def markers_message(
    header: Header,
    objects: Sequence[ObjectResult],
    geometries: Mapping[str, ObjectGeometry],
    captions: Mapping[str, str],
) -> MarkerArray:
    """A translucent box and its caption (by goal id) for each object with a place; what was shown before is deleted."""
    markers = [Marker(header=header, action=Marker.DELETEALL)]
    for found in objects:
        geometry = geometries.get(found.object_id)
        if geometry is None:
            continue
        red, green, blue = (value / 255 for value in colour_of(found.instance_id))
        box = Marker(header=header, ns="boxes", id=found.instance_id, type=Marker.CUBE, action=Marker.ADD)
        box.pose, box.scale = pose(geometry.box), _vector(np.maximum(geometry.box.size_m, 1e-3))
        box.color.r, box.color.g, box.color.b, box.color.a = red, green, blue, 0.4
        text = Marker(header=header, ns="names", id=found.instance_id, type=Marker.TEXT_VIEW_FACING, action=Marker.ADD)
        top_m = geometry.box.centre_m + geometry.box.axes[:, 2] * geometry.box.size_m[2] * 0.8
        text.pose = Pose(position=_point(top_m))
        text.scale.z = max(0.01, TEXT_SHARE * float(geometry.box.size_m.max()))
        text.color.r = text.color.g = text.color.b = text.color.a = 1.0
        text.text = caption_of(found, captions)
        markers += [box, text]
    return MarkerArray(markers=markers)
