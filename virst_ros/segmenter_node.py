# SPDX-License-Identifier: Apache-2.0
"""The segmenter as a ROS 2 lifecycle node: images and sentences in, masks out.

configure loads the model, activate subscribes, deactivate unsubscribes and keeps the model, cleanup frees it.
Callbacks convert and leave work in the inbox; one thread owns the session and publishes what it finds. What belongs to
one camera is in camera, with inputs, outputs, depth_outputs, vision_outputs and diagnostics; what all cameras share is
in goals, services and segment_action.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from virst_engine import EngineConfig, Frame, FrameResult, Goal
from virst_engine.errors import VirstError
from virst_ros.camera import Camera
from virst_ros.diagnostics import LoadedModel
from virst_ros.frame_inbox import FrameInbox
from virst_ros.goals import Goals
from virst_ros.inference_thread import InferenceThread
from virst_ros.inputs import Received
from virst_ros.loading import LoadedEngine, ToldToEnd, load_engine
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
from virst_ros.vision_outputs import why_no_detections

STOP_TIMEOUT_S = 10.0


class SegmenterNode(LifecycleNode):
    """The segmenter of one camera, or of several that share the models and the goals.

    Args:
        load: makes the engine from its configuration and the names of several cameras, in configure; a VirstError
            becomes a failed transition. By default `load_engine`, which ends early when a signal ends the context.
        node_arguments: passed on to rclpy's Node (context, parameter_overrides, namespace, ...).
    """

    def __init__(
        self, load: Callable[[EngineConfig, Sequence[str]], LoadedEngine] | None = None, **node_arguments: Any
    ) -> None:
        self._segment: SegmentAction | None = None  # until it is made: a bad parameter ends the node before
        super().__init__("segmenter", **node_arguments)
        self._load = load or partial(load_engine, goes_on=self.context.ok)
        self._specs = [*engine_specs(), *node_specs()]
        declare(self, self._specs)
        self._settings: NodeParameters = node_parameters(values_of(self, node_specs()))
        self.add_on_set_parameters_callback(ParameterGate(self, self._parameters_changed))

        self._engine: LoadedEngine | None = None
        self._thread: InferenceThread[Received] | None = None
        self._initial_goal_is_set = False
        self._is_enabled = True
        names = self._settings.cameras
        self.cameras = tuple(
            Camera(self, name, f"{name}/" if names else "", lambda: self._settings)
            for name in names or (self._settings.camera_name,)
        )
        self._by_name = {camera.name: camera for camera in self.cameras}
        self._inbox = self._empty_inbox()

        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # For those who spin it with several threads: a configure of seconds (default group) holds up none of these.
        # Not on the node's clock: with use_sim_time and no /clock nobody would ever be told why nothing happens.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(
            self._settings.diagnostics_period_s,
            self._publish_diagnostics,
            callback_group=MutuallyExclusiveCallbackGroup(),
            clock=steady,
        )
        self.goals = Goals(self, self, self._loaded, lambda: tuple(self._by_name))
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
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=steady)

    @property
    def state(self) -> str:
        """Label of the lifecycle state: unconfigured, inactive, active, finalized."""
        return self._state_machine.current_state[1]

    failure = ""  # it never ends by itself: what goes wrong is in /diagnostics, and goals stay

    def close(self) -> None:
        """Give back threads and models, whatever the state; the node can then be destroyed.

        A step that hangs keeps its model: the end of the process frees it.
        """
        self._stop_inference("the segmenter ends")
        if not self._why_hanging():
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
            self._engine, self.goals.longest = self._load(config, self._settings.cameras), config.goal.max_length
        except ToldToEnd as news:
            self.get_logger().info(str(news))
            return TransitionCallbackReturn.FAILURE
        except (VirstError, ValueError) as error:
            return self._configure_failed(str(error))
        except Exception as error:
            self.get_logger().error(traceback.format_exc())
            return self._configure_failed(f"unexpected {type(error).__name__}: {error}")
        for camera in self.cameras:
            camera.diagnostics.model, camera.diagnostics.configure_failure = self._engine.model, ""
            camera.create_outputs()
        warning = why_no_detections(self._settings)
        if warning:
            self.get_logger().warning(warning)
        self._initial_goal_is_set = False
        self.get_logger().info(f"configured: {self._engine.model.name} on {self._engine.model.device}")
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self._engine is not None
        if self._is_refused("activate"):
            return TransitionCallbackReturn.FAILURE
        self._engine.session.reset()  # frames from before a pause do not belong to what comes; goals stay
        self._inbox = self._empty_inbox()
        self._thread = InferenceThread(
            self._engine.session,
            self._inbox,
            self._on_result,
            self._frame_failed,
            self._result_lost,
            self._settings.stop_after_failures,
        )
        result = super().on_activate(state)  # publishers first: the thread may publish at once
        self._thread.start()
        self._is_enabled = True
        for camera in self.cameras:
            camera.rejected = 0  # the inbox, too, counts anew
        self._begin_anew()
        if self._settings.initial_goal and not self._initial_goal_is_set:
            self._set_initial_goal()
        topics = ", ".join(camera.image_topic for camera in self.cameras)
        self.get_logger().info(f"active: waiting for images on {topics}")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_inference("the segmenter was deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._is_refused("cleanup"):
            return TransitionCallbackReturn.FAILURE
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.get_logger().error(f"a transition from {state.label} failed; back to unconfigured")
        self.close()
        # Of a model that is still in use there is no way back; FAILURE finalizes the node.
        return TransitionCallbackReturn.FAILURE if self._why_hanging() else TransitionCallbackReturn.SUCCESS

    def _is_refused(self, transition: str) -> bool:
        """Whether a transition cannot be made, because a step from before is still at the session."""
        reason = self._why_hanging()
        if reason:
            self.get_logger().error(f"cannot {transition}: {reason}")
        return bool(reason)

    def _configure_failed(self, reason: str) -> TransitionCallbackReturn:
        for camera in self.cameras:
            camera.diagnostics.configure_failure = reason
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

    def _begin_anew(self) -> None:
        """Take images; what was seen and told before them counts no more."""
        assert self._engine is not None
        goals = self._engine.session.goals()
        for camera in self.cameras:
            camera.reset(goals)
            camera.create_inputs(self._on_frame)

    def _empty_inbox(self) -> FrameInbox[tuple[Received, Frame]]:
        return FrameInbox(tuple(self._by_name))

    def _stop_inference(self, reason: str) -> None:
        for camera in self.cameras:
            camera.destroy_inputs()
        if self._segment is not None:
            self._segment.stop(reason)
        self._requests.stop(reason)
        if self._thread is not None:
            if self._thread.stop(STOP_TIMEOUT_S):
                self._thread = None
            else:  # only one thread may be at the session, so it is not forgotten
                self.get_logger().error(f"inference did not end within {STOP_TIMEOUT_S:g} s: {self._why_hanging()}")

    def _why_hanging(self) -> str:
        """That inference goes on although it was stopped; empty when it does not."""
        if self._thread is None or not self._thread.stopping or not self._thread.running:
            return ""
        return (
            "the frame at hand is still being computed, and the models are in use until it is done: try again later. "
            "If it never ends, restart the node, and look for what blocks the device (nvidia-smi, dmesg)"
        )

    def _unload(self) -> None:
        for camera in self.cameras:
            camera.destroy_outputs()
            camera.diagnostics.model = LoadedModel()
        if self._engine is not None:
            self._engine.session.close()
            self._engine = None
        self.goals.forget()

    def _loaded(self) -> LoadedEngine | None:
        return self._engine

    # Frames

    def _on_frame(self, received: Received, frame: Frame) -> None:
        self._inbox.put((received, frame), frame.camera)

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
        camera, goals = self._by_name[frame.camera], self._engine.session.goals()
        shown = camera.publish(received, frame, result, goals, self._inbox)
        self._segment.frame_segmented(shown)
        camera.goals_changed(goals)
        overhead_s = time.perf_counter() - received.received_s - self._thread.step_s
        camera.diagnostics.result_published(result, shown.age_s, overhead_s * 1e3)

    def _frame_failed(self, frame: Frame, reason: str) -> None:
        self._by_name[frame.camera].reject_frame(reason)

    def _result_lost(self, frame: Frame, reason: str) -> None:
        self._by_name[frame.camera].diagnostics.result_lost(reason)

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
            for camera in self.cameras:
                camera.destroy_inputs()
            return "images are not taken any more; goals stay"
        assert self._engine is not None
        self._engine.session.reset()  # what was seen before the pause does not belong to what comes
        self._begin_anew()
        return "images are taken again"

    def _set_initial_goal(self) -> None:
        self._initial_goal_is_set = True
        try:
            self.goals.set(self._settings.initial_goal)
        except VirstError as error:
            self.goals.reject("initial_goal", str(error))

    # Watching

    def _parameters_changed(self, engine: EngineConfig, node: NodeParameters) -> None:
        self._settings = node
        if self._engine is not None:
            self._engine.session.reconfigure(engine)

    def goals_changed(self, goals: Sequence[Goal]) -> None:
        """Told by `Goals`, as are `goal_rejected` and `request_refused`."""
        for camera in self.cameras:
            camera.goals_changed(goals)

    def goal_rejected(self, reason: str) -> None:
        for camera in self.cameras:
            camera.diagnostics.goal_rejected(reason)

    def request_refused(self, reason: str) -> None:
        for camera in self.cameras:
            camera.diagnostics.request_refused(reason)

    def _publish_diagnostics(self) -> None:
        thread, engine = self._thread, self._engine
        state = "paused by ~/enable" if self.state == "active" and not self._is_enabled else self.state
        failure = thread.failure_traceback if thread is not None else ""
        message = DiagnosticArray()
        for camera in self.cameras:
            problem = ""
            if engine is not None:
                problem = engine.reasoners[camera.name if self._settings.cameras else ""].status()
            seen = camera.surroundings(state, self._inbox, failure, problem)
            message.status += camera.diagnostics.statuses(seen)
            camera.log_news()
        message.status.append(self.cameras[0].diagnostics.process_status(self._full_name().lstrip("/"), state))
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(message)

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
