# SPDX-License-Identifier: Apache-2.0
"""What depth images and calibrations do: stay away, measure nothing, belong to something else. Masks need neither."""

from collections.abc import Callable

import numpy as np

from virst_ros import conversions
from virst_ros.faults.camera_faults import sent
from virst_ros.faults.fault import Fault, Inject, Masks
from virst_ros.faults.scripted_camera import Shot

MILLISECOND = 1_000_000


def _without_depth(shot: Shot) -> None:
    shot.depth = None


def _depth(pixels: Callable[[np.ndarray], np.ndarray], encoding: str) -> Inject:
    """Depth made of the truth (bool), in that encoding."""

    def change(shot: Shot) -> None:
        assert shot.depth is not None
        shot.depth = conversions.image_message(shot.depth.header, pixels(shot.truth), encoding)

    return sent(change)


def _depth_fields(**fields: object) -> Inject:
    def change(shot: Shot) -> None:
        assert shot.depth is not None
        for name, value in fields.items():
            setattr(shot.depth, name, value)

    return sent(change)


def _depth_frame(shot: Shot) -> None:
    assert shot.depth is not None
    shot.depth.header.frame_id = "camera_depth_optical_frame"


def _late_depth(shot: Shot) -> None:
    assert shot.depth is not None
    late_ns = conversions.stamp_ns(shot.depth.header.stamp) + 37 * MILLISECOND
    shot.depth.header.stamp = conversions.time_message(late_ns)


def _info(**fields: object) -> Inject:
    def change(shot: Shot) -> None:
        assert shot.info is not None
        for name, value in fields.items():
            setattr(shot.info, name, value)

    return sent(change)


FAULTS = (
    Fault(
        "depth_stops",
        "no depth images come any more",
        sent(_without_depth),
        Masks.OF_GOAL,
        log="no depth on /depth",
        diagnostics="no depth on /depth",
    ),
    Fault(
        "depth_nan",
        "depth is NaN everywhere",
        _depth(lambda truth: np.full(truth.shape, np.nan, np.float32), "32FC1"),
        Masks.OF_GOAL,
        log="depth measures nothing",
        diagnostics="depth measures nothing",
    ),
    Fault(
        "depth_zero",
        "depth is 0 everywhere",
        _depth(lambda truth: np.zeros(truth.shape, np.uint16), "16UC1"),
        Masks.OF_GOAL,
        log="depth measures nothing",
        diagnostics="depth measures nothing",
    ),
    Fault(
        "depth_of_other_shape",
        "depth of another view: 320x320",
        _depth(lambda _: np.full((320, 320), 900, np.uint16), "16UC1"),
        Masks.OF_GOAL,
        log="not two sizes of one view",
        diagnostics="depth is 320x320, the image 320x240: not two sizes of one view",
    ),
    Fault(
        "depth_encoding",
        "depth as mono8, for people",
        _depth(lambda truth: np.full(truth.shape, 90, np.uint8), "mono8"),
        Masks.OF_GOAL,
        log="depth encoding 'mono8' is not supported",
        diagnostics="depth encoding 'mono8' is not supported",
    ),
    Fault(
        "depth_step",
        "the step of depth is 0",
        _depth_fields(step=0),
        Masks.OF_GOAL,
        log="has step 0",
        diagnostics="has step 0",
    ),
    Fault(
        "depth_unaligned",
        "depth has the frame of its own sensor",
        sent(_depth_frame),
        Masks.OF_GOAL,
        log="depth has the frame 'camera_depth_optical_frame'",
        diagnostics="depth has the frame 'camera_depth_optical_frame'",
    ),
    Fault(
        "depth_stamps_differ",
        "depth is stamped 37 ms later than its image",
        sent(_late_depth),
        Masks.OF_GOAL,
        log="found no depth of their time",
        diagnostics="found no depth of their time",
    ),
    Fault(
        "camera_info_of_other_size",
        "camera_info says 640x480",
        _info(width=640, height=480),
        Masks.OF_GOAL,
        log="camera_info is 640x480, the image 320x240",
        diagnostics="camera_info is 640x480, the image 320x240",
    ),
    Fault(
        "camera_info_zero",
        "camera_info is all zero",
        _info(width=0, height=0, k=[0.0] * 9, p=[0.0] * 12),
        Masks.OF_GOAL,
        log="camera_info says no size",
        diagnostics="camera_info says no size",
    ),
    Fault(
        "camera_info_uncalibrated",
        "camera_info has its size, but no focal length",
        _info(k=[0.0] * 9, p=[0.0] * 12),
        Masks.OF_GOAL,
        log="camera_info has no focal length",
        diagnostics="camera_info has no focal length",
    ),
    Fault(
        "camera_info_distortion_unknown",
        "camera_info names a distortion model that nobody knows",
        _info(distortion_model="wide_angle", d=[0.1, 0.2]),
        Masks.OF_GOAL,
        log="the distortion model 'wide_angle'",
        diagnostics="the distortion model 'wide_angle'",
    ),
)
