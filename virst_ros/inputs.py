# SPDX-License-Identifier: Apache-2.0
"""One camera's subscriptions: messages are checked and converted here, and handed on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import qos_policy_name_from_kind
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from virst_engine import Frame
from virst_engine.errors import BadFrame
from virst_ros import conversions, qos
from virst_ros.depth_outputs import DepthOutputs
from virst_ros.diagnostics import Diagnostics
from virst_ros.image_checks import why_blank
from virst_ros.parameters import NodeParameters

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

JUMP_S = 10.0  # a stamp that runs ahead of the clock by more has jumped; a bag may be played faster than life
SAME_STAMPS = 5  # images in a row with one stamp that are taken; some drivers repeat an image now and then


@dataclass(frozen=True)
class Received:
    """What is remembered of an image message while its frame is processed."""

    header: Header
    received_s: float  # time.perf_counter() at the beginning of its callback


class CameraInputs:
    """The subscriptions of one camera while the node is active; they end with `destroy`.

    Args:
        camera: its name.
        prefix: of its topics, "" or "<camera>/".
        depth: takes depth images and calibrations; None = depth is not subscribed to.
        on_frame: called with each image that can be used.
        on_bad_frame: called with the reason for each that cannot.
        on_incompatible: told the topic and the reason when a publisher's quality of service does not fit.
    """

    def __init__(
        self,
        node: LifecycleNode,
        settings: NodeParameters,
        diagnostics: Diagnostics,
        depth: DepthOutputs | None,
        on_frame: Callable[[Received, Frame], None],
        on_bad_frame: Callable[[str], None],
        on_incompatible: Callable[[str, str], None],
        group: CallbackGroup,
        *,
        camera: str,
        prefix: str = "",
    ) -> None:
        self._camera, self._prefix = camera, prefix
        self._node, self._settings, self._diagnostics, self._depth = node, settings, diagnostics, depth
        self._on_frame, self._on_bad_frame, self._on_incompatible = on_frame, on_bad_frame, on_incompatible
        self._group = group
        self._profile = qos.profile(settings.input_qos, settings.input_depth)
        self._stamp_ns, self._same_stamps = 0, 0
        self._received_s = 0.0  # when the image of that stamp came
        self.camera_info: CameraInfo | None = None
        self._subscriptions = [
            self._subscribe(CompressedImage, "image/compressed", self._on_compressed)
            if settings.image_transport == "compressed"
            else self._subscribe(Image, "image", self._on_image),
            self._subscribe(CameraInfo, "camera_info", self._on_camera_info),
        ]
        if depth is not None:
            self._subscriptions += [
                self._subscribe(Image, "depth", depth.depth_came),
                self._subscribe(CameraInfo, "depth/camera_info", depth.depth_info_came),
            ]

    def destroy(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def camera_info_for(self, width: int, height: int) -> CameraInfo | None:
        """The calibration if it belongs to images of this size; diagnostics tell when it does not."""
        info, problem = self.camera_info, ""
        if info is not None and (info.width, info.height) != (width, height):
            problem = (
                f"camera_info is {info.width}x{info.height}, the image {width}x{height}: it is not passed on; "
                "remap `camera_info` to the topic that belongs to the image"
            )
            info = None
        self._diagnostics.camera_info_checked(problem)
        return info

    def _subscribe(self, kind: type, topic: str, callback: Callable[[Any], None]) -> Any:
        topic = f"{self._prefix}{topic}"
        resolved = self._node.resolve_topic_name(topic)

        def incompatible(event: Any) -> None:
            policy = qos_policy_name_from_kind(event.last_policy_kind)
            self._on_incompatible(
                resolved,
                f"a publisher of {resolved} offers another {policy} than this node wants: "
                "set input_qos to SENSOR_DATA, or the publisher's to reliable",
            )

        return self._node.create_subscription(
            kind,
            topic,
            callback,
            self._profile,
            callback_group=self._group,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=incompatible),
        )

    def _on_image(self, message: Image) -> None:
        self._take(message, conversions.frame, message.encoding)

    def _on_compressed(self, message: CompressedImage) -> None:
        self._take(message, conversions.compressed_frame, message.format[:40])

    def _take(self, message: Any, convert: Callable[[Any, str, int], Frame], encoding: str) -> None:
        received = Received(message.header, time.perf_counter())
        self._diagnostics.image_received()
        try:
            frame = convert(message, self._camera, self._settings.limits.image_pixels)
            height, width = frame.image_rgb_u8.shape[:2]
            self._diagnostics.image_decoded(f"{width}x{height} {encoding}")
            self._diagnostics.picture_checked(why_blank(frame.image_rgb_u8))
            self._check_stamp(frame.stamp_ns, received.received_s)
        except BadFrame as error:
            self._on_bad_frame(str(error))
            return
        self._on_frame(received, frame)
        if self._depth is not None:
            self._depth.image_came(frame, message.header.frame_id)

    def _check_stamp(self, stamp_ns: int, received_s: float) -> None:
        ahead_s = (stamp_ns - self._stamp_ns) * 1e-9 - (received_s - self._received_s)
        if stamp_ns < self._stamp_ns:
            self._diagnostics.stamp_went_back((self._stamp_ns - stamp_ns) * 1e-9)
        elif self._stamp_ns and ahead_s > JUMP_S:
            self._diagnostics.stamp_jumped(ahead_s)
        self._received_s = received_s
        self._same_stamps = self._same_stamps + 1 if stamp_ns == self._stamp_ns else 1
        self._stamp_ns = stamp_ns
        if self._same_stamps > SAME_STAMPS:
            raise BadFrame(
                f"the last {self._same_stamps} images carry the same time stamp ({stamp_ns} ns): set header.stamp to "
                "the time of capture in the camera driver, or let the simulation run if it is paused"
            )

    def _on_camera_info(self, message: CameraInfo) -> None:
        self.camera_info = message
        if self._depth is not None:
            self._depth.camera_info_came(message)
