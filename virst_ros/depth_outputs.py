# SPDX-License-Identifier: Apache-2.0
"""What is published of a frame once its depth image is there: places of objects, boxes, point clouds.

`objects` of a frame waits for its depth as `DepthSync` says; masks never do. Places are computed where the depth or the
result arrives (a few milliseconds per object), clouds on a thread of their own.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sensor_msgs.msg import CameraInfo, Image

from virst_engine import Frame, ObjectState
from virst_engine.depth import (
    ObjectGeometry,
    grow,
    object_cloud,
    object_geometry,
    resize_nearest,
    surroundings_cloud,
)
from virst_engine.errors import BadFrame
from virst_ros import conversions
from virst_ros.background import Background
from virst_ros.depth_conversions import check_same_view, cloud_message, markers_message, rays
from virst_ros.depth_sync import DepthSync, Match
from virst_ros.diagnostics import Diagnostics
from virst_ros.outputs import STOP_TIMEOUT_S, Publishers, SegmentedFrame
from virst_ros.parameters import NodeParameters


@dataclass(frozen=True)
class _Scene:
    """A frame on the grid of its depth image."""

    shown: SegmentedFrame
    depth_m: np.ndarray
    rays: np.ndarray
    settings: NodeParameters

    def on_grid(self, image: np.ndarray) -> np.ndarray:
        return resize_nearest(image, *self.depth_m.shape)


class DepthOutputs:
    """Pairs results with depth images and publishes what needs both. Its methods may be called by any thread.

    Args:
        settings: the node's parameters as they are now.
    """

    def __init__(
        self, publishers: Publishers, diagnostics: Diagnostics, settings: Callable[[], NodeParameters]
    ) -> None:
        self._publishers, self._diagnostics, self._settings = publishers, diagnostics, settings
        sync = settings().sync
        self._sync: DepthSync[SegmentedFrame, Image] = DepthSync(sync.queue_size, round(sync.slop_s * 1e9))
        self._info: CameraInfo | None = None
        self._depth_info: CameraInfo | None = None
        self._image_size, self._image_frame_id = (0, 0), ""
        self._rays: tuple[object, np.ndarray] | None = None
        self._publishing = threading.Lock()  # keeps frames in order when depth and a result come at once
        self._clouds: Background[_Scene] = Background("clouds", self._publish_clouds)

    def stop(self) -> None:
        self._clouds.stop(STOP_TIMEOUT_S)

    def pause(self) -> None:
        """Images are not taken any more; a frame that waits for its depth is not published later."""
        self._sync.clear()

    def image_came(self, frame: Frame, frame_id: str) -> None:
        """An image that can be used, processed or not."""
        height, width = frame.image_rgb_u8.shape[:2]
        self._image_size, self._image_frame_id = (width, height), frame_id
        self._sync.wanted_slop_ns = round(self._settings().sync.slop_s * 1e9)
        self._sync.image_came(frame.stamp_ns)

    def camera_info_came(self, info: CameraInfo) -> None:
        self._info = info

    def depth_info_came(self, info: CameraInfo) -> None:
        """The calibration of the depth image, used where its size is the depth's."""
        self._depth_info = info

    def depth_came(self, message: Image) -> None:
        try:
            conversions.check_depth(message, self._settings().limits.image_pixels)
            if self._image_size != (0, 0):
                check_same_view(message.width, message.height, *self._image_size, "depth")
        except BadFrame as error:
            self._diagnostics.depth_received(str(error))
            return
        frame_id, images = message.header.frame_id, self._image_frame_id
        self._diagnostics.depth_received(
            f"depth has the frame {frame_id!r}, the image {images!r}: points are given in the image's. Use depth that "
            "is registered with the image"
            if images and frame_id != images
            else ""
        )
        with self._publishing:
            self._publish(self._sync.put_depth(conversions.stamp_ns(message.header.stamp), message))

    def result_came(self, shown: SegmentedFrame) -> None:
        with self._publishing:
            self._publish(self._sync.put_frame(shown.frame.stamp_ns, shown))

    def _publish(self, matches: list[Match[SegmentedFrame, Image]]) -> None:
        for match in matches:
            shown, scene, problem = match.frame, None, ""
            gap_ns = 0 if match.depth is not None else self._sync.nearest_gap_ns(shown.frame.stamp_ns)
            self._diagnostics.depth_paired(match.depth is not None, gap_ns, self._sync.slop_ns)
            if match.depth is not None and self._publishers.want_depth:
                try:
                    scene = self._scene(shown, match.depth)
                except BadFrame as error:
                    problem = str(error)
                self._diagnostics.geometry_checked(problem)
            places = _places(scene) if scene is not None and self._want_places else {}
            self._publishers.publish_objects(shown, places)
            if self._publishers.markers.wanted:
                self._publishers.markers.publish(
                    markers_message(shown.header, shown.result.objects, places, shown.captions)
                )
            if scene is not None and (self._publishers.points.wanted or self._publishers.points_without_object.wanted):
                self._clouds.offer(scene)

    @property
    def _want_places(self) -> bool:
        return self._publishers.objects.wanted or self._publishers.markers.wanted

    def _scene(self, shown: SegmentedFrame, message: Image) -> _Scene:
        depth_m = conversions.depth_m(message)
        if not np.isfinite(depth_m).any():
            raise BadFrame(
                "depth measures nothing (0 or NaN everywhere): is the projector on, and the scene within its range?"
            )
        height, width = depth_m.shape
        settings = self._settings()
        info = self._info
        if self._depth_info is not None and (self._depth_info.width, self._depth_info.height) == (width, height):
            info = self._depth_info
        if info is None:
            raise BadFrame("no camera_info has come: without it depth gives no points; remap `camera_info`")
        rectified = settings.depth.rectified
        known_by = (width, height, info.width, info.height, info.distortion_model, rectified, *info.k, *info.p, *info.d)
        if self._rays is None or self._rays[0] != known_by:
            self._rays = (known_by, rays(info, height, width, rectified=rectified))
        return _Scene(shown, depth_m, self._rays[1], settings)

    def _publish_clouds(self, scene: _Scene) -> None:
        shown, to = scene.shown, self._publishers
        ids, image = scene.on_grid(shown.ids), scene.on_grid(shown.frame.image_rgb_u8)
        if to.points.wanted:
            cloud = object_cloud(scene.depth_m, scene.rays, ids, image)
            to.points.publish(cloud_message(shown.header, cloud, labelled=True))
        if to.points_without_object.wanted:
            excluded = np.zeros(ids.shape, bool)
            if shown.target is not None and shown.target.state is ObjectState.TRACKING:
                excluded = grow(scene.on_grid(shown.target.mask), scene.settings.depth.margin_px)
            cloud = surroundings_cloud(
                scene.depth_m, scene.rays, ids, image, excluded, every_px=scene.settings.depth.every_px
            )
            to.points_without_object.publish(cloud_message(shown.header, cloud, labelled=False))


def _places(scene: _Scene) -> dict[str, ObjectGeometry]:
    """Geometry by object id, of the objects that are seen and have depth."""
    seen = [found for found in scene.shown.result.objects if found.state is ObjectState.TRACKING and found.mask.any()]
    if not seen:
        return {}
    masks = {found.object_id: scene.on_grid(found.mask) for found in seen}
    taken = np.logical_or.reduce(list(masks.values())) if len(masks) > 1 else None
    places = {object_id: object_geometry(scene.depth_m, scene.rays, mask, taken) for object_id, mask in masks.items()}
    return {object_id: place for object_id, place in places.items() if place is not None}
