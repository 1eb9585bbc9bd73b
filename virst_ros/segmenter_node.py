# SPDX-License-Identifier: Apache-2.0
"""The segmenter as a ROS 2 lifecycle node: images and sentences in, masks out.

configure loads the model, activate subscribes, deactivate unsubscribes and keeps the model, cleanup frees it.
Callbacks convert and leave work in the inbox; one thread owns the session and publishes what it finds. The parts are in
inputs, outputs, depth_outputs, vision_outputs, goals, services, segment_action and diagnostics.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from virst_engine import EngineConfig, Frame, FrameResult
from virst_engine.errors import VirstError
from virst_ros.depth_outputs import DepthOutputs
from virst_ros.diagnostics import Diagnostics, LoadedModel, Surroundings
from virst_ros.frame_inbox import FrameInbox
from virst_ros.goals import Goals
from virst_ros.inference_thread import InferenceThread
from virst_ros.inputs import CameraInputs, Received
from virst_ros.loading import LoadedEngine, load_engine
from virst_ros.outputs import FrameOutputs, Publishers, SegmentedFrame, choose_target
from virst_ros.parameters import (
    NodeParameters,
    ParameterGate,
    declare,
    engine_config,
    engine_specs,
    node_parameters,
    node_specs,
    values_of,
)
from virst_ros.segment_action import SegmentAction
from virst_ros.services import Services
from virst_ros.spinning import run_node
from virst_ros.vision_outputs import VisionOutputs, why_no_detections

STOP_TIMEOUT_S = 10.0


class SegmenterNode(LifecycleNode):
    """One camera's segmenter.

    Args:
        load: makes the engine from its configuration, in configure; a VirstError becomes a failed transition.
        node_arguments: passed on to rclpy's Node (context, parameter_overrides, namespace, ...).
    """

    def __init__(self, load: Callable[[EngineConfig], LoadedEngine] = load_engine, **node_arguments: Any) -> None:
        self._segment: SegmentAction | None = None  # until it is made: a bad parameter ends the node before
        super().__init__("segmenter", **node_arguments)
        self._load = load
        self._specs = [*engine_specs(), *node_specs()]
        declare(self, self._specs)
        self._settings: NodeParameters = node_parameters(values_of(self, node_specs()))
        self.add_on_set_parameters_callback(ParameterGate(self, self._parameters_changed))

        self._engine: LoadedEngine | None = None
        self._thread: InferenceThread[Received] | None = None
        self._inbox: FrameInbox[tuple[Received, Frame]] = FrameInbox()
        self._initial_goal_is_set = False
        self._is_enabled = True
        # Made in configure:
        self.outputs: Publishers | None = None
        self._frame_outputs: FrameOutputs | None = None
        self._depth_outputs: DepthOutputs | None = None
        self._vision_outputs: VisionOutputs | None = None
        # Made in activate, unless images are paused:
        self.inputs: CameraInputs | None = None

        self._diagnostics = Diagnostics(self.get_name())
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # For those who spin it with several threads: a configure of seconds (default group) holds up none of these.
        self._image_group = MutuallyExclusiveCallbackGroup()
        self.create_timer(
            self._settings.diagnostics_period_s,
            self._publish_diagnostics,
            callback_group=MutuallyExclusiveCallbackGroup(),
        )
        self.goals = Goals(self, self._diagnostics, self._loaded, lambda: self._settings.camera_name)
        services = ReentrantCallbackGroup()
        self._requests = Services(self, self.goals, self._loaded, self._why_closed, self._enable, services)
        # Its callbacks share what runs; the action client's waiting happens between them.
        self._segment = SegmentAction(
            self,
            self.goals,
            self._why_closed,
            lambda: self._settings.segment_timeout_s,
            MutuallyExclusiveCallbackGroup(),
        )
        warning = missing_profile_warning(rclpy.get_rmw_implementation_identifier(), os.environ)
        if warning:
            self.get_logger().warning(warning)
        if self._settings.autostart:
            self._autostart_timer = self.create_timer(0.0, self._autostart)

    @property
    def state(self) -> str:
        """Label of the lifecycle state: unconfigured, inactive, active, finalized."""
        return self._state_machine.current_state[1]

    failure = ""  # it never ends by itself: what goes wrong is in /diagnostics, and goals stay

    def close(self) -> None:
        """Give back threads and models, whatever the state; the node can then be destroyed."""
        self._stop_inference("the segmenter ends")
        self._unload()

    def destroy_node(self) -> None:
        if self._segment is not None:
            self._segment.destroy()
        super().destroy_node()

    # Transitions. rclpy swallows what they raise, so each reports its own failure.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            values = values_of(self, self._specs)
            self._settings, config = node_parameters(values), engine_config(values)
            self._engine, self.goals.longest = self._load(config), config.goal.max_length
        except (VirstError, ValueError) as error:
            return self._configure_failed(str(error))
        except Exception as error:
            self.get_logger().error(traceback.format_exc())
            return self._configure_failed(f"unexpected {type(error).__name__}: {error}")
        self._diagnostics.model, self._diagnostics.configure_failure = self._engine.model, ""
        self._initial_goal_is_set = False
        self._create_outputs()
        self.get_logger().info(f"configured: {self._engine.model.name} on {self._engine.model.device}")
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self._engine is not None
        self._engine.session.reset()  # frames from before a pause do not belong to what comes; goals stay
        self._diagnostics.reset()
        self._inbox = FrameInbox()
        self._thread = InferenceThread(
            self._engine.session,
            self._inbox,
            self._on_result,
            self._reject_frame,
            self._settings.stop_after_failures,
        )
        result = super().on_activate(state)  # publishers first: the thread may publish at once
        self._thread.start()
        self._is_enabled = True
        self._create_inputs()
        if self._settings.initial_goal and not self._initial_goal_is_set:
            self._set_initial_goal()
        self._diagnostics.goals_changed(self._engine.session.goals())
        self.get_logger().info(f"active: waiting for images on {self._image_topic()}")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_inference("the segmenter was deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.get_logger().error(f"a transition from {state.label} failed; back to unconfigured")
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def _configure_failed(self, reason: str) -> TransitionCallbackReturn:
        self._diagnostics.configure_failure = reason
        self.get_logger().error(f"cannot configure: {reason}. Then: ros2 lifecycle set {self._full_name()} configure")
        self._unload()
        return TransitionCallbackReturn.FAILURE

    def _autostart(self) -> None:
        self.destroy_timer(self._autostart_timer)
        if self.state == "unconfigured":
            self.trigger_configure()
        if self.state == "inactive":
            self.trigger_activate()

    # What configure and activate make, and their ends

    def _create_outputs(self) -> None:
        self.outputs = Publishers(self, self._settings, self._qos_incompatible)
        self._frame_outputs = FrameOutputs(self.outputs)
        if self._settings.use_depth:
            self._depth_outputs = DepthOutputs(self.outputs, self._diagnostics, lambda: self._settings)
        self._vision_outputs = VisionOutputs.make(self.outputs, self._settings)
        warning = why_no_detections(self._settings)
        if warning:
            self.get_logger().warning(warning)

    def _create_inputs(self) -> None:
        self.inputs = CameraInputs(
            self,
            self._settings,
            self._diagnostics,
            self._depth_outputs,
            self._on_frame,
            self._reject_frame,
            self._qos_incompatible,
            self._image_group,
        )

    def _destroy_inputs(self) -> None:
        if self.inputs is not None:
            self.inputs.destroy()
            self.inputs = None
        if self._depth_outputs is not None:
            self._depth_outputs.pause()

    def _stop_inference(self, reason: str) -> None:
        self._destroy_inputs()
        if self._segment is not None:
            self._segment.stop(reason)
        if self._thread is not None:
            if not self._thread.stop(STOP_TIMEOUT_S):
                self.get_logger().error(f"inference did not end within {STOP_TIMEOUT_S:g} s")
            self._thread = None

    def _unload(self) -> None:
        for part in (self._frame_outputs, self._depth_outputs):
            if part is not None:
                part.stop()
        self._frame_outputs = self._depth_outputs = self._vision_outputs = None
        if self.outputs is not None:
            self.outputs.destroy()
            self.outputs = None
        if self._engine is not None:
            self._engine.session.close()
            self._engine = None
        self.goals.forget()
        self._diagnostics.model = LoadedModel()

    def _loaded(self) -> LoadedEngine | None:
        return self._engine

    # Frames

    def _on_frame(self, received: Received, frame: Frame) -> None:
        self._inbox.put((received, frame))

    def _on_result(self, received: Received, frame: Frame, result: FrameResult) -> None:
        try:
            self._publish_result(received, frame, result)
        except Exception:
            if self.context.ok():
                raise
            # A signal has ended the context between two frames; nobody hears us any more, and that is no failure.

    def _publish_result(self, received: Received, frame: Frame, result: FrameResult) -> None:
        assert self._engine is not None
        assert self._thread is not None
        assert self._frame_outputs is not None
        assert self.outputs is not None
        inputs, goals = self.inputs, self._engine.session.goals()
        rejected = inputs.rejected if inputs is not None else 0
        shown = SegmentedFrame(
            received.header,
            frame,
            result,
            goals,
            choose_target(result.objects, goals, self._settings.target),
            frames_in=self._inbox.received + rejected,
            frames_dropped=self._inbox.dropped + rejected,
        )
        height, width = frame.image_rgb_u8.shape[:2]
        info = inputs.camera_info_for(width, height) if inputs is not None else None
        self._frame_outputs.publish(shown, info, overlay=self._settings.overlay)
        shown.age_s = (self.get_clock().now().nanoseconds - frame.stamp_ns) * 1e-9
        if self._vision_outputs is not None:
            self._vision_outputs.publish(shown)
        if self._depth_outputs is not None:
            self._depth_outputs.result_came(shown)
        else:
            self.outputs.publish_objects(shown, {})
        self._segment.frame_segmented(shown)
        self._diagnostics.goals_changed(goals)
        overhead_s = time.perf_counter() - received.received_s - self._thread.step_s
        self._diagnostics.result_published(result, shown.age_s, overhead_s * 1e3)

    def _reject_frame(self, reason: str) -> None:
        self._diagnostics.frame_rejected(reason)
        self.get_logger().warning(f"bad frame skipped: {reason}", throttle_duration_sec=5.0)

    # Requests

    def _why_closed(self) -> str:
        """Why goals cannot be taken now; empty when they can."""
        thread = self._thread
        if self.state != "active" or thread is None:
            return (
                f"the segmenter is {self.state}, not active: `ros2 lifecycle set {self._full_name()} "
                f"{'activate' if self.state == 'inactive' else 'configure'}` first"
            )
        if thread.failed:
            return "inference has stopped after repeated failures, see /diagnostics: deactivate and activate the node"
        return ""

    def _enable(self, wanted: bool) -> str:
        if wanted == self._is_enabled:
            return "images are taken already" if wanted else "images are not taken already"
        self._is_enabled = wanted
        if not wanted:
            self._destroy_inputs()
            return "images are not taken any more; goals stay"
        assert self._engine is not None
        self._engine.session.reset()  # what was seen before the pause does not belong to what comes
        self._diagnostics.reset()
        self._diagnostics.goals_changed(self._engine.session.goals())
        self._create_inputs()
        return "images are taken again"

    def _set_initial_goal(self) -> None:
        self._initial_goal_is_set = True
        try:
            self.goals.set(self._settings.initial_goal)
        except VirstError as error:
            self.goals.reject(str(error))

    # Watching

    def _parameters_changed(self, engine: EngineConfig, node: NodeParameters) -> None:
        self._settings = node
        if self._engine is not None:
            self._engine.session.reconfigure(engine)

    def _qos_incompatible(self, topic: str, reason: str) -> None:
        self._diagnostics.qos_incompatible(topic, reason)
        self.get_logger().warning(reason)

    def _publish_diagnostics(self) -> None:
        thread, engine, inputs, outputs = self._thread, self._engine, self.inputs, self.outputs
        topic = self._image_topic()
        rejected = inputs.rejected if inputs is not None else 0
        seen = Surroundings(
            state="paused by ~/enable" if self.state == "active" and not self._is_enabled else self.state,
            image_topic=topic,
            image_publishers=self.count_publishers(topic),
            received=self._inbox.received + rejected,
            dropped=self._inbox.dropped + rejected,
            depth_topic=self.resolve_topic_name("depth") if self._settings.use_depth else "",
            no_image_after_s=self._settings.no_image_after_s,
            inference_traceback=thread.failure_traceback if thread is not None else "",
            reasoner_problem=engine.reasoner.status() if engine is not None else "",
            unserved=outputs.why_unserved(self._settings) if outputs is not None else "",
        )
        message = DiagnosticArray(status=self._diagnostics.statuses(seen))
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(message)

    def _image_topic(self) -> str:
        return self.resolve_topic_name(
            "image/compressed" if self._settings.image_transport == "compressed" else "image"
        )

    def _full_name(self) -> str:
        return f"{self.get_namespace().rstrip('/')}/{self.get_name()}"


def missing_profile_warning(rmw: str, environment: "os._Environ[str] | dict[str, str]") -> str:
    """What to tell when large images will be lost between processes; empty when they will not."""
    names = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
    if not rmw.startswith("rmw_fastrtps") or any(environment.get(name) for name in names):
        return ""
    return (
        "FASTDDS_DEFAULT_PROFILES_FILE (up to Jazzy: FASTRTPS_DEFAULT_PROFILES_FILE) is not set: with Fast DDS's "
        "defaults, images above half a megabyte (640x480 in colour) do not arrive from other processes. Set it to "
        "launch/fastdds_profile.xml of virst_ros, here and for the camera; segment.launch.py and scripts/demo do"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one segmenter until it is told to stop. The exit status is 1 when a parameter was not acceptable."""
    return run_node(SegmenterNode, "segmenter", arguments)


if __name__ == "__main__":
    sys.exit(main())
