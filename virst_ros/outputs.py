# SPDX-License-Identifier: Apache-2.0
"""What one camera's results are published on: every topic that needs no depth, and the publishers of all of them.

Nothing is computed for a topic without a subscriber, except `objects`: it is latched for those who join later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile, qos_policy_name_from_kind
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header
from virst_msgs.msg import SegmentedObjectArray
from visualization_msgs.msg import MarkerArray

from virst_engine import Frame, FrameResult, Goal, ObjectResult, ObjectState, instance_map
from virst_engine.visualize import draw_overlay
from virst_ros import conversions, qos
from virst_ros.background import Background
from virst_ros.parameters import NodeParameters

try:
    from rclpy.event_handler import PublisherEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks

STOP_TIMEOUT_S = 5.0


@dataclass
class SegmentedFrame:
    """One frame with everything that is told of it. Read by several threads; only `age_s` is set later."""

    header: Header
    frame: Frame
    result: FrameResult
    goals: tuple[Goal, ...]
    target: ObjectResult | None
    frames_in: int
    frames_dropped: int
    age_s: float = 0.0  # when its mask was published

    @cached_property
    def ids(self) -> np.ndarray:
        """Instance ids, uint8 (height, width), 0 = no object."""
        return instance_map(self.result.objects, *self.frame.image_rgb_u8.shape[:2])

    @cached_property
    def sentences(self) -> dict[str, str]:
        """By goal id, of goals that were cleared while the frame was processed, too; empty for what was pointed at."""
        known = {goal.goal_id: goal.sentence for goal in self.goals}
        return {found.goal_id: found.sentence for found in self.result.objects} | known

    @cached_property
    def captions(self) -> dict[str, str]:
        """What to call the object of each goal, by goal id: the sentence, or the object's name where there is none."""
        unions = [found for found in self.result.objects if not found.part_of]
        known = {goal.goal_id: goal.sentence or goal.object_id for goal in self.goals}
        return {found.goal_id: found.sentence or found.object_id for found in unions} | known


def choose_target(objects: Sequence[ObjectResult], goals: Sequence[Goal], wanted: str) -> ObjectResult | None:
    """The object of that id; without an id, the one of the newest goal that has any. None when there is none.

    Of a goal that is split it is the union; an instance has to be asked for by its id.
    """
    if wanted:
        return next((found for found in objects if found.object_id == wanted), None)
    for goal in reversed(goals):
        union = next((found for found in objects if found.goal_id == goal.goal_id and not found.part_of), None)
        if union is not None:
            return union
    return None


class Output:
    """A publisher that knows whether anybody listens."""

    def __init__(self, publisher: Any) -> None:
        self.publisher = publisher

    @property
    def wanted(self) -> bool:
        return self.publisher.get_subscription_count() > 0

    def publish(self, message: Any) -> None:
        self.publisher.publish(message)


class Publishers:
    """Every publisher of one camera, made for a configured node.

    Args:
        prefix: of the topics, "~/" or "~/<camera>/".
        on_incompatible: told the topic and, in words, which quality of service a subscriber wants in vain.
    """

    def __init__(
        self,
        node: LifecycleNode,
        settings: NodeParameters,
        on_incompatible: Callable[[str, str], None],
        prefix: str = "~/",
    ) -> None:
        self._node, self._prefix, self._on_incompatible = node, prefix, on_incompatible
        self._made: list[Any] = []
        results = qos.profile(settings.output_qos, settings.output_depth)
        self.mask = self.make(Image, "mask", results)
        self.mask_png = self.make(CompressedImage, "mask/compressed", results)
        self.target_mask = self.make(Image, "target_mask", results)
        self.camera_info = self.make(CameraInfo, "camera_info", results)
        self.objects = self.make(SegmentedObjectArray, "objects", qos.LATCHED)
        self.overlay = self.make(Image, "overlay", qos.OVERLAY)
        self.overlay_jpeg = self.make(CompressedImage, "overlay/compressed", qos.OVERLAY)
        self.points = self.make(PointCloud2, "points", qos.NEWEST)
        self.points_without_object = self.make(PointCloud2, "points_without_object", qos.NEWEST)
        self.markers = self.make(MarkerArray, "markers", qos.NEWEST)

    def make(self, kind: type, topic: str, profile: QoSProfile) -> Output:
        """One more publisher of this camera, destroyed with the others."""
        name = f"{self._prefix}{topic}"

        def incompatible(event: Any) -> None:
            policy = qos_policy_name_from_kind(event.last_policy_kind)
            self._on_incompatible(name, f"a subscriber of {name} wants another {policy}")

        publisher = self._node.create_lifecycle_publisher(
            kind, name, profile, event_callbacks=PublisherEventCallbacks(incompatible_qos=incompatible)
        )
        self._made.append(publisher)
        return Output(publisher)

    def destroy(self) -> None:
        for publisher in self._made:
            self._node.destroy_lifecycle_publisher(publisher)
        self._made = []

    @property
    def want_depth(self) -> bool:
        """Whether anybody listens to what needs depth."""
        return any(each.wanted for each in (self.objects, self.points, self.points_without_object, self.markers))

    def why_unserved(self, settings: NodeParameters) -> str:
        """Why somebody subscribes to a topic on which nothing comes; empty when nobody does."""
        if not settings.use_depth:
            for topic in ("points", "points_without_object", "markers"):
                if getattr(self, topic).wanted:
                    return (
                        f"{self._prefix}{topic} has a subscriber, but comes from depth only: set use_depth, and remap "
                        "`depth` to the camera's registered depth (at launch: depth_topic:=...)"
                    )
        if not settings.overlay and (self.overlay.wanted or self.overlay_jpeg.wanted):
            return f"{self._prefix}overlay has a subscriber, but the parameter overlay is false"
        return ""

    def publish_objects(self, shown: SegmentedFrame, geometries: dict[str, Any]) -> None:
        self.objects.publish(
            conversions.objects_message(
                shown.header,
                shown.result,
                shown.sentences,
                shown.age_s * 1e3,
                shown.frames_in,
                shown.frames_dropped,
                geometries,
            )
        )


class FrameOutputs:
    """Publishes what is made of an image alone. Called on the inference thread; pictures are drawn on another."""

    def __init__(self, publishers: Publishers) -> None:
        self._publishers = publishers
        self._drawing: Background[SegmentedFrame] = Background("overlay", self._draw)

    def stop(self) -> None:
        self._drawing.stop(STOP_TIMEOUT_S)

    def publish(self, shown: SegmentedFrame, info: CameraInfo | None, *, overlay: bool) -> None:
        """The mask first: others may wait, it may not. `info`: of this image's size, or None."""
        to, header = self._publishers, shown.header
        if to.mask.wanted:
            to.mask.publish(conversions.image_message(header, shown.ids, "mono8"))
        if to.target_mask.wanted:
            to.target_mask.publish(conversions.image_message(header, target_mask(shown), "mono8"))
        if info is not None and to.camera_info.wanted:
            to.camera_info.publish(conversions.camera_info_message(header, info))
        if to.mask_png.wanted:
            to.mask_png.publish(conversions.png_message(header, shown.ids))
        if overlay and (to.overlay.wanted or to.overlay_jpeg.wanted):
            self._drawing.offer(shown)

    def _draw(self, shown: SegmentedFrame) -> None:
        drawn = draw_overlay(shown.frame.image_rgb_u8, shown.result, shown.captions)
        if self._publishers.overlay.wanted:
            self._publishers.overlay.publish(conversions.image_message(shown.header, drawn, "rgb8"))
        if self._publishers.overlay_jpeg.wanted:
            self._publishers.overlay_jpeg.publish(conversions.jpeg_message(shown.header, drawn))


def target_mask(shown: SegmentedFrame) -> np.ndarray:
    """255 where the target is seen now, else 0."""
    if shown.target is None or shown.target.state is not ObjectState.TRACKING:
        return np.zeros(shown.frame.image_rgb_u8.shape[:2], np.uint8)
    return conversions.binary(shown.target.mask)
