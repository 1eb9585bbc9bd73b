# SPDX-License-Identifier: Apache-2.0
"""Calibration -> rays, geometry -> messages, without middleware."""

import cv2
import numpy as np
import pytest

pytest.importorskip("virst_msgs.msg")

from sensor_msgs.msg import CameraInfo, PointField
from std_msgs.msg import Header
from virst_msgs.msg import SegmentedObject
from visualization_msgs.msg import Marker

from tests.ros.rgbd_camera import points_of
from virst_engine.depth import Cloud, ObjectGeometry, OrientedBox
from virst_engine.errors import BadFrame
from virst_engine.types import ObjectResult, ObjectState
from virst_ros import depth_conversions

pytestmark = pytest.mark.ros
WIDTH, HEIGHT = 80, 60
K = np.array([[70.0, 0.0, 41.0], [0.0, 72.0, 28.0], [0.0, 0.0, 1.0]])


def info(model="plumb_bob", d=(0.0,) * 5, k=K, **more):
    return CameraInfo(
        width=WIDTH,
        height=HEIGHT,
        distortion_model=model,
        d=[float(value) for value in d],
        k=k.ravel().tolist(),
        p=np.hstack([K, np.zeros((3, 1))]).ravel().tolist(),
        **more,
    )


def test_without_distortion_a_ray_is_what_the_pinhole_says():
    rays = depth_conversions.rays(info(), HEIGHT, WIDTH, rectified=False)
    assert rays.dtype == np.float32
    np.testing.assert_allclose(rays[5, 7], [(7 - 41) / 70, (5 - 28) / 72], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "d"),
    [
        ("plumb_bob", (-0.25, 0.08, 0.001, -0.002, 0.0)),
        ("rational_polynomial", (0.2, -0.3, 0.001, 0.0005, 0.02, 0.25, -0.25, 0.01)),
        ("equidistant", (0.05, -0.01, 0.002, 0.0)),
    ],
)
def test_a_ray_projects_back_to_its_pixel_with_distortion(model, d):
    rays = depth_conversions.rays(info(model, d), HEIGHT, WIDTH, rectified=False)
    rows, columns = [3, 28, 55, 10], [5, 41, 70, 60]
    points = np.array([[*rays[row, column], 1.0] for row, column in zip(rows, columns, strict=True)], np.float64)
    nothing = np.zeros(3)
    if model == "equidistant":
        back, _ = cv2.fisheye.projectPoints(points[:, None], nothing, nothing, K, np.array(d))
    else:
        back, _ = cv2.projectPoints(points[:, None], nothing, nothing, K, np.array(d))
    np.testing.assert_allclose(back[:, 0], np.stack([columns, rows], axis=1), atol=0.1)


def test_rectified_images_use_the_projection_matrix():
    bent = info(d=(-0.25, 0.08, 0.0, 0.0, 0.0), k=K * 2)
    rays = depth_conversions.rays(bent, HEIGHT, WIDTH, rectified=True)
    np.testing.assert_allclose(rays[5, 7], [(7 - 41) / 70, (5 - 28) / 72], rtol=1e-6)


def test_a_smaller_image_of_the_same_view_has_the_rays_of_its_pixels_centres():
    large = depth_conversions.rays(info(), HEIGHT, WIDTH, rectified=False)
    small = depth_conversions.rays(info(), HEIGHT // 2, WIDTH // 2, rectified=False)
    np.testing.assert_allclose(small, (large[::2, ::2] + large[1::2, 1::2]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "size", "says"),
    [
        (info(k=np.zeros((3, 3))), (HEIGHT, WIDTH), "no focal length in K"),
        (CameraInfo(), (HEIGHT, WIDTH), "says no size"),
        (info(), (HEIGHT, WIDTH // 2), "not two sizes of one view"),
        (info("made up", (0.1, 0.0)), (HEIGHT, WIDTH), "'made up'"),
    ],
)
def test_what_gives_no_rays_is_named(given, size, says):
    with pytest.raises(BadFrame, match=says):
        depth_conversions.rays(given, *size, rectified=False)


CLOUD = Cloud(
    np.array([[1, 2, 3], [4, 5, 6.5]], np.float32),
    np.array([[255, 128, 1], [0, 0, 7]], np.uint8),
    np.array([3, 200], np.uint8),
)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_cloud_reads_back(labelled):
    header = Header(frame_id="camera")
    message = depth_conversions.cloud_message(header, CLOUD, labelled=labelled)
    assert message.header == header
    assert (message.height, message.width) == (1, 2)
    assert message.row_step == len(message.data) == message.point_step * 2
    assert [field.datatype for field in message.fields][:4] == [PointField.FLOAT32] * 4
    points = points_of(message)
    np.testing.assert_array_equal(np.stack([points[name] for name in "xyz"], axis=1), CLOUD.points_m)
    assert points["rgb"].view(np.uint32).tolist() == [0xFF8001, 7]
    assert ("label" in points.dtype.names) is labelled
    if labelled:
        assert points["label"].tolist() == [3, 200]


def test_an_empty_cloud_is_a_cloud():
    nothing = Cloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.uint8))
    message = depth_conversions.cloud_message(Header(), nothing, labelled=True)
    assert (message.width, len(message.data), message.row_step) == (0, 0, 0)


GEOMETRY = ObjectGeometry(
    centroid_m=np.array([0.1, 0.2, 0.9]),
    box=OrientedBox(np.array([0.1, 0.2, 1.0]), np.diag([1.0, -1.0, -1.0]), np.array([0.3, 0.2, 0.1])),
    support=None,
    depth_px=77,
)


def test_geometry_is_filled_in():
    message = SegmentedObject()
    depth_conversions.fill_geometry(message, GEOMETRY)
    assert (message.depth_px, message.is_supported) == (77, False)
    assert (message.centroid.z, message.pose.position.z, message.size.x) == (0.9, 1.0, 0.3)
    assert (abs(message.pose.orientation.x), message.pose.orientation.w) == (1.0, 0.0)


def test_markers_are_replaced_and_objects_without_a_place_have_none():
    mask = np.zeros((2, 2), bool)
    objects = [
        ObjectResult(name, f"goal {name}", number, ObjectState.TRACKING, mask, 0.5, 0.0, 0.0)
        for number, name in enumerate(("a", "b"), start=4)
    ]
    message = depth_conversions.markers_message(Header(), objects, {"b": GEOMETRY}, {"goal b": "the b"})
    assert message.markers[0].action == Marker.DELETEALL
    assert [(marker.ns, marker.id) for marker in message.markers[1:]] == [("boxes", 5), ("names", 5)]
    assert message.markers[2].text == "the b"
    assert message.markers[1].color.a > 0
