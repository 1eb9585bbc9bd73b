# SPDX-License-Identifier: Apache-2.0
"""What the node has of one camera: subscriptions, publishers, depth, diagnostics."""

from collections.abc import Callable, Sequence
from functools import partial

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from rclpy.topic_endpoint_info import TopicEndpointInfo

from virst_engine import Frame, FrameResult, Goal
from virst_ros import qos
from virst_ros.depth_outputs import DepthOutputs
from virst_ros.diagnostics import Diagnostics, Surroundings
from virst_ros.frame_inbox import FrameInbox
from virst_ros.inputs import CameraInputs, Received
from virst_ros.object_masks import ObjectMasks
from virst_ros.outputs import FrameOutputs, Publishers, SegmentedFrame, choose_target
from virst_ros.parameters import NodeParameters
from virst_ros.vision_outputs import VisionOutputs


class Camera:
    """One camera of a node, from configure to cleanup and beyond.

    Args:
        name: of the camera, in goals and frames.
        prefix: of its topics: "<name>/", or "" for the only camera of a node.
        settings: the node's parameters as they are now.
    """

    def __init__(self, node: LifecycleNode, name: str, prefix: str, settings: Callable[[], NodeParameters]) -> None:
        self._node, self.name, self._prefix, self._settings = node, name, prefix, settings
        full_name = node.get_fully_qualified_name().lstrip("/")
        self.diagnostics = Diagnostics(f"{full_name}/{name}" if prefix else full_name)
        self.rejected = 0  # images that could not be used, since activation
        # For those who spin the node with several threads: neither a configure nor another camera holds up its images.
        self._group = MutuallyExclusiveCallbackGroup()
        # Made in configure:
        self.outputs: Publishers | None = None
        self._frame_outputs: FrameOutputs | None = None
        self._depth_outputs: DepthOutputs | None = None
        self.vision_outputs: VisionOutputs | None = None
        self._object_masks: ObjectMasks | None = None
        # Made in activate, unless images are paused:
        self.inputs: CameraInputs | None = None

    @property
    def image_topic(self) -> str:
        compressed = "/compressed" if self._settings().image_transport == "compressed" else ""
        return self._node.resolve_topic_name(f"{self._prefix}image{compressed}")

    def sees(self, goal: Goal) -> bool:
        return goal.camera in ("", self.name)

    def create_outputs(self) -> None:
        settings = self._settings()
        self.outputs = Publishers(self._node, settings, partial(self._qos_incompatible, "output"), f"~/{self._prefix}")
        self._frame_outputs = FrameOutputs(self.outputs)
        if settings.use_depth:
            self._depth_outputs = DepthOutputs(self.outputs, self.diagnostics, self._settings)
        self.vision_outputs = VisionOutputs.make(self.outputs, settings)
        if settings.object_masks:
            results = qos.profile(settings.output_qos, settings.output_depth)
            self._object_masks = ObjectMasks(self._node, f"~/{self._prefix}", results)

    def destroy_outputs(self) -> None:
        for part in (self._frame_outputs, self._depth_outputs):
            if part is not None:
                part.stop()
        self._frame_outputs = self._depth_outputs = self.vision_outputs = None
        if self._object_masks is not None:
            self._object_masks.destroy()
            self._object_masks = None
        if self.outputs is not None:
            self.outputs.destroy()
            self.outputs = None
        self.diagnostics.forget_qos("output")

    def create_inputs(self, on_frame: Callable[[Received, Frame], None]) -> None:
        self.inputs = CameraInputs(
            self._node,
            self._settings(),
            self.diagnostics,
            self._depth_outputs,
            on_frame,
            self._reject_image,
            partial(self._qos_incompatible, "input"),
            self._group,
            camera=self.name,
            prefix=self._prefix,
        )

    def destroy_inputs(self) -> None:
        if self.inputs is not None:
            self.inputs.destroy()
            self.inputs = None
        self.diagnostics.forget_qos("input")
        if self._depth_outputs is not None:
            self._depth_outputs.pause()

    def reset(self, goals: Sequence[Goal]) -> None:
        """A new beginning: nothing that happened before is told any more."""
        self.diagnostics.reset()
        self.goals_changed(goals)

    def goals_changed(self, goals: Sequence[Goal]) -> None:
        self.diagnostics.goals_changed([goal for goal in goals if self.sees(goal)])

    def reject_frame(self, reason: str) -> None:
        self.diagnostics.frame_rejected(reason)

    def log_news(self) -> None:
        """Log what is new in the diagnostics: each trouble once, and its end."""
        of_camera = f"{self.name}: " if self._prefix else ""
        troubled, well = self.diagnostics.news()
        for line in troubled:
            self._node.get_logger().warning(f"{of_camera}{line}")
        for line in well:
            self._node.get_logger().info(f"{of_camera}{line}")

    def publish(
        self,
        received: Received,
        frame: Frame,
        result: FrameResult,
        goals: Sequence[Goal],
        inbox: "FrameInbox[tuple[Received, Frame]]",
    ) -> SegmentedFrame:
        """Publish everything that is known of a frame, or hand it to what waits for its depth."""
        assert self.outputs is not None
        assert self._frame_outputs is not None
        settings, inputs = self._settings(), self.inputs
        own = tuple(goal for goal in goals if self.sees(goal))
        shown = SegmentedFrame(
            received.header,
            frame,
            result,
            own,
            choose_target(result.objects, own, settings.target),
            frames_in=self._received(inbox),
            frames_dropped=self._dropped(inbox),
        )
        height, width = frame.image_rgb_u8.shape[:2]
        info = inputs.camera_info_for(width, height) if inputs is not None else None
        self._frame_outputs.publish(shown, info, overlay=settings.overlay)
        shown.age_s = (self._node.get_clock().now().nanoseconds - frame.stamp_ns) * 1e-9
        if self._object_masks is not None:
            self._object_masks.publish(shown)
        if self.vision_outputs is not None:
            self.vision_outputs.publish(shown)
        if self._depth_outputs is not None:
            self._depth_outputs.result_came(shown)
        else:
            self.outputs.publish_objects(shown, {})
        return shown

    def surroundings(
        self,
        state: str,
        inbox: "FrameInbox[tuple[Received, Frame]]",
        inference_traceback: str,
        reasoner_problem: str,
    ) -> Surroundings:
        settings, topic = self._settings(), self.image_topic
        self.diagnostics.settle_qos("input", partial(_fits_publishers, self._node))
        self.diagnostics.settle_qos("output", partial(_fits_subscribers, self._node))
        return Surroundings(
            state=state,
            image_topic=topic,
            image_publishers=self._node.count_publishers(topic),
            received=self._received(inbox),
            dropped=self._dropped(inbox),
            left_out=inbox.left_out(self.name),
            depth_topic=self._node.resolve_topic_name(f"{self._prefix}depth") if settings.use_depth else "",
            no_image_after_s=settings.no_image_after_s,
            inference_traceback=inference_traceback,
            reasoner_problem=reasoner_problem,
            unserved=self.outputs.why_unserved(settings) if self.outputs is not None else "",
            has_no_time=self._node.get_clock().now().nanoseconds == 0,
        )

    def _received(self, inbox: "FrameInbox[tuple[Received, Frame]]") -> int:
        return inbox.received(self.name) + self.rejected

    def _dropped(self, inbox: "FrameInbox[tuple[Received, Frame]]") -> int:
        return inbox.dropped(self.name) + self.rejected

    def _reject_image(self, reason: str) -> None:
        self.rejected += 1
        self.reject_frame(reason)

    def _qos_incompatible(self, subject: str, topic: str, reason: str) -> None:
        self.diagnostics.qos_incompatible(subject, topic, reason)
        self._node.get_logger().warning(reason)


def _fits_publishers(node: Node, topic: str) -> bool:
    """Whether every publisher of a topic fits this node's subscriptions."""
    own = [each for each in node.get_subscriptions_info_by_topic(topic) if _is_of(node, each)]
    others = node.get_publishers_info_by_topic(topic)
    return all(_fit(other.qos_profile, each.qos_profile) for each in own for other in others)


def _fits_subscribers(node: Node, topic: str) -> bool:
    """Whether every subscriber of a topic fits this node's publishers."""
    own = [each for each in node.get_publishers_info_by_topic(topic) if _is_of(node, each)]
    others = node.get_subscriptions_info_by_topic(topic)
    return all(_fit(each.qos_profile, other.qos_profile) for each in own for other in others)


def _is_of(node: Node, endpoint: TopicEndpointInfo) -> bool:
    return (endpoint.node_namespace, endpoint.node_name) == (node.get_namespace(), node.get_name())


def _fit(publisher: QoSProfile, subscription: QoSProfile) -> bool:
    return bool(qos_check_compatible(publisher, subscription)[0] == QoSCompatibility.OK)
