# SPDX-License-Identifier: Apache-2.0
"""The segmenter as a ROS 2 lifecycle node: images and sentences in, masks out.

configure loads the model, activate subscribes, deactivate unsubscribes and keeps the model, cleanup frees it.
Callbacks convert and leave work in the inbox; one thread owns the session and publishes what it finds.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import qos_policy_name_from_kind
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from virst_msgs.msg import SegmentedObjectArray
from virst_msgs.srv import ClearGoal, ListGoals, SetGoal

from virst_engine import EngineConfig, Frame, FrameResult, Goal, ObjectState, instance_map
from virst_engine.errors import BadFrame, BadGoal, VirstError
from virst_engine.visualize import draw_overlay
from virst_ros import conversions, qos
from virst_ros.diagnostics import Diagnostics, LoadedModel, Surroundings
from virst_ros.frame_inbox import FrameInbox
from virst_ros.inference_thread import InferenceThread
from virst_ros.loading import LoadedEngine, load_engine
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
from virst_ros.spinning import run_node

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

STOP_TIMEOUT_S = 10.0
SAME_STAMPS = 5  # images in a row with one stamp that are taken; some drivers repeat an image now and then


class SegmenterNode(LifecycleNode):
    """One camera's segmenter.

    Args:
        load: makes the engine from its configuration, in configure; a VirstError becomes a failed transition.
        node_arguments: passed on to rclpy's Node (context, parameter_overrides, namespace, ...).
    """

    def __init__(self, load: Callable[[EngineConfig], LoadedEngine] = load_engine, **node_arguments: Any) -> None:
        super().__init__("segmenter", **node_arguments)
        self._load = load
        self._specs = [*engine_specs(), *node_specs()]
        declare(self, self._specs)
        self._settings: NodeParameters = node_parameters(values_of(self, node_specs()))
        self.add_on_set_parameters_callback(ParameterGate(self, self._parameters_changed))

        self._engine: LoadedEngine | None = None
        self._thread: InferenceThread[Header] | None = None
        self._inbox: FrameInbox[tuple[Header, Frame]] = FrameInbox()
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._camera_info: CameraInfo | None = None
        self._image_size = (0, 0)
        self._set_at_ns: dict[str, int] = {}
        self._longest_goal = 0
        self._stamp_ns, self._same_stamps = 0, 0
        self._rejected = 0
        self._initial_goal_is_set = False

        self._diagnostics = Diagnostics(self.get_name())
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # For those who spin it with several threads: a configure of seconds (default group) holds up none of these.
        self._timer_group = MutuallyExclusiveCallbackGroup()
        self._image_group = MutuallyExclusiveCallbackGroup()
        self._service_group = ReentrantCallbackGroup()
        self.create_timer(
            self._settings.diagnostics_period_s, self._publish_diagnostics, callback_group=self._timer_group
        )
        for kind, name, callback in (
            (SetGoal, "~/set_goal", self._on_set_goal),
            (ClearGoal, "~/clear_goal", self._on_clear_goal),
            (ListGoals, "~/list_goals", self._on_list_goals),
        ):
            self.create_service(kind, name, callback, callback_group=self._service_group)
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
        self._stop_inference()
        self._unload()

    # Transitions. rclpy swallows what they raise, so each reports its own failure.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            values = values_of(self, self._specs)
            self._settings, config = node_parameters(values), engine_config(values)
            self._engine, self._longest_goal = self._load(config), config.goal.max_length
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
        self._rejected, self._stamp_ns, self._same_stamps = 0, 0, 0
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
        self._create_inputs()
        if self._settings.initial_goal and not self._initial_goal_is_set:
            self._set_initial_goal()
        self._diagnostics.goals_changed(self._engine.session.goals())
        self.get_logger().info(f"active: waiting for images on {self._image_topic()}")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_inference()
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

    # Endpoints

    def _create_outputs(self) -> None:
        results = qos.profile(self._settings.output_qos, self._settings.output_depth)
        self._mask_publisher = self._output(Image, "~/mask", results)
        self._camera_info_publisher = self._output(CameraInfo, "~/camera_info", results)
        self._objects_publisher = self._output(SegmentedObjectArray, "~/objects", qos.LATCHED)
        self._overlay_publisher = self._output(Image, "~/overlay", qos.OVERLAY)

    def _output(self, kind: type, topic: str, profile: Any) -> Any:
        def incompatible(event: Any) -> None:
            self._qos_incompatible(
                topic, f"a subscriber of {topic} wants another {qos_policy_name_from_kind(event.last_policy_kind)}"
            )

        publisher = self.create_lifecycle_publisher(
            kind, topic, profile, event_callbacks=PublisherEventCallbacks(incompatible_qos=incompatible)
        )
        self._outputs.append(publisher)
        return publisher

    def _create_inputs(self) -> None:
        profile = qos.profile(self._settings.input_qos, self._settings.input_depth)
        self._inputs = [
            self._input(Image, "image", self._on_image, profile),
            self._input(CameraInfo, "camera_info", self._on_camera_info, profile),
        ]
        if self._settings.use_depth:
            self._inputs.append(self._input(Image, "depth", self._on_depth, profile))

    def _input(self, kind: type, topic: str, callback: Callable[[Any], None], profile: Any) -> Any:
        resolved = self.resolve_topic_name(topic)

        def incompatible(event: Any) -> None:
            policy = qos_policy_name_from_kind(event.last_policy_kind)
            self._qos_incompatible(
                resolved,
                f"a publisher of {resolved} offers another {policy} than this node wants: "
                "set input_qos to SENSOR_DATA, or the publisher's to reliable",
            )

        return self.create_subscription(
            kind,
            topic,
            callback,
            profile,
            callback_group=self._image_group,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=incompatible),
        )

    def _stop_inference(self) -> None:
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs = []
        if self._thread is not None:
            if not self._thread.stop(STOP_TIMEOUT_S):
                self.get_logger().error(f"inference did not end within {STOP_TIMEOUT_S:g} s")
            self._thread = None
        self._camera_info = None

    def _unload(self) -> None:
        for publisher in self._outputs:
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = []
        if self._engine is not None:
            self._engine.session.close()
            self._engine = None
        self._set_at_ns = {}
        self._diagnostics.model = LoadedModel()

    # Images

    def _on_image(self, message: Image) -> None:
        self._diagnostics.image_received()
        try:
            frame = conversions.frame(message, self._settings.camera_name)
            change = self._diagnostics.image_decoded(f"{message.width}x{message.height} {message.encoding}")
            if change:
                self.get_logger().warning(change, throttle_duration_sec=5.0)
            self._check_stamp(frame.stamp_ns)
        except BadFrame as error:
            self._rejected += 1
            self._reject_frame(str(error))
            return
        self._inbox.put((message.header, frame))

    def _check_stamp(self, stamp_ns: int) -> None:
        if stamp_ns < self._stamp_ns:
            self._diagnostics.stamp_went_back((self._stamp_ns - stamp_ns) * 1e-9)
        self._same_stamps = self._same_stamps + 1 if stamp_ns == self._stamp_ns else 1
        self._stamp_ns = stamp_ns
        if self._same_stamps > SAME_STAMPS:
            raise BadFrame(
                f"the last {self._same_stamps} images carry the same time stamp ({stamp_ns} ns): set header.stamp to "
                "the time of capture in the camera driver, or let the simulation run if it is paused"
            )

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._camera_info = message

    def _on_depth(self, message: Image) -> None:
        problem = ""
        try:
            size = conversions.depth_m(message).shape
            if self._image_size != (0, 0) and size != self._image_size:
                problem = f"depth is {size[1]}x{size[0]}, the image {self._image_size[1]}x{self._image_size[0]}"
        except BadFrame as error:
            problem = str(error)
        self._diagnostics.depth_received(problem)

    def _on_result(self, header: Header, frame: Frame, result: FrameResult) -> None:
        try:
            self._publish_result(header, frame, result)
        except Exception:
            if self.context.ok():
                raise
            # A signal has ended the context between two frames; nobody hears us any more, and that is no failure.

    def _publish_result(self, header: Header, frame: Frame, result: FrameResult) -> None:
        assert self._engine is not None
        height, width = frame.image_rgb_u8.shape[:2]
        self._image_size = (height, width)
        ids = instance_map(result.objects, height, width)
        self._mask_publisher.publish(conversions.image_message(header, ids, "mono8"))
        age_s = (self.get_clock().now().nanoseconds - frame.stamp_ns) * 1e-9

        goals = self._engine.session.goals()
        sentences = {goal.goal_id: goal.sentence for goal in goals}
        received = self._inbox.received + self._rejected
        dropped = self._inbox.dropped + self._rejected
        self._objects_publisher.publish(
            conversions.objects_message(header, result, sentences, age_s * 1e3, received, dropped)
        )
        self._publish_camera_info(header, width, height)
        if self._settings.overlay and self._overlay_publisher.get_subscription_count() > 0:
            drawn = draw_overlay(frame.image_rgb_u8, result, sentences)
            self._overlay_publisher.publish(conversions.image_message(header, drawn, "rgb8"))
        self._diagnostics.goals_changed(goals)
        self._diagnostics.result_published(result, age_s)

    def _publish_camera_info(self, header: Header, width: int, height: int) -> None:
        info, problem = self._camera_info, ""
        if info is not None and (info.width, info.height) == (width, height):
            self._camera_info_publisher.publish(conversions.camera_info_message(header, info))
        elif info is not None:
            problem = (
                f"camera_info is {info.width}x{info.height}, the image {width}x{height}: it is not passed on; "
                "remap `camera_info` to the topic that belongs to the image"
            )
        self._diagnostics.camera_info_checked(problem)

    def _reject_frame(self, reason: str) -> None:
        self._diagnostics.frame_rejected(reason)
        self.get_logger().warning(f"bad frame skipped: {reason}", throttle_duration_sec=5.0)

    # Goals

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

    def _set_goal(self, sentence: str, object_id: str, camera: str, replace: bool) -> Goal:
        assert self._engine is not None
        own = self._settings.camera_name
        if camera not in ("", own):
            raise BadGoal(
                f"this segmenter sees camera {own!r}, the goal is for {camera[:40]!r}: leave camera empty, or ask the "
                "segmenter of that camera"
            )
        if 0 < len(sentence.strip()) <= self._longest_goal:  # the session has a better word for others
            self._engine.check_goal(sentence)
        goal = self._engine.session.set_goal(sentence, object_id=object_id, camera=camera, replace=replace)
        self._goals_changed()
        return goal

    def _goals_changed(self) -> None:
        assert self._engine is not None
        goals, now_ns = self._engine.session.goals(), self.get_clock().now().nanoseconds
        self._set_at_ns = {goal.goal_id: self._set_at_ns.get(goal.goal_id, now_ns) for goal in goals}
        self._diagnostics.goals_changed(goals)

    def _set_initial_goal(self) -> None:
        self._initial_goal_is_set = True
        try:
            self._set_goal(self._settings.initial_goal, "", "", replace=False)
        except VirstError as error:
            self._reject_goal(str(error))

    def _on_set_goal(self, request: SetGoal.Request, response: SetGoal.Response) -> SetGoal.Response:
        response.success, response.message = False, self._why_closed()
        if response.message:
            self._reject_goal(response.message)
            return response
        try:
            goal = self._set_goal(request.goal, request.object_id, request.camera, request.replace)
        except Exception as error:
            response.message = self._refusal(error)
            return response
        response.success = True
        response.goal_id, response.object_ids = goal.goal_id, [goal.object_id]
        return response

    def _on_clear_goal(self, request: ClearGoal.Request, response: ClearGoal.Response) -> ClearGoal.Response:
        response.success, response.message = False, self._why_closed()
        if response.message:
            self._reject_goal(response.message)
            return response
        try:
            cleared = self._clear_goals(request.goal_id)
        except Exception as error:
            response.message = self._refusal(error)
            return response
        response.success, response.message = True, f"{cleared} goal(s) cleared"
        return response

    def _clear_goals(self, goal_id: str) -> int:
        assert self._engine is not None
        session = self._engine.session
        goal_ids = [goal_id] if goal_id else [goal.goal_id for goal in session.goals()]
        for each in goal_ids:
            session.clear_goal(each)
        self._goals_changed()
        return len(goal_ids)

    def _on_list_goals(self, _: ListGoals.Request, response: ListGoals.Response) -> ListGoals.Response:
        engine = self._engine
        if engine is None:
            return response
        states = engine.session.goal_states()
        response.goals = [
            conversions.goal_message(
                goal, states.get(goal.goal_id, ObjectState.SEARCHING), self._set_at_ns.get(goal.goal_id, 0)
            )
            for goal in engine.session.goals()
        ]
        return response

    def _refusal(self, error: Exception) -> str:
        """What to answer a caller whose request failed; an exception out of a service callback would kill the node."""
        if not isinstance(error, VirstError):
            self.get_logger().error("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        self._reject_goal(str(error))
        return str(error)

    def _reject_goal(self, reason: str) -> None:
        self._diagnostics.goal_rejected(reason)
        self.get_logger().warning(f"goal rejected: {reason}")

    # Watching

    def _parameters_changed(self, engine: EngineConfig, node: NodeParameters) -> None:
        self._settings = node
        if self._engine is not None:
            self._engine.session.reconfigure(engine)

    def _qos_incompatible(self, topic: str, reason: str) -> None:
        self._diagnostics.qos_incompatible(topic, reason)
        self.get_logger().warning(reason)

    def _publish_diagnostics(self) -> None:
        thread, engine = self._thread, self._engine
        topic = self._image_topic()
        seen = Surroundings(
            state=self.state,
            image_topic=topic,
            image_publishers=self.count_publishers(topic),
            received=self._inbox.received + self._rejected,
            dropped=self._inbox.dropped + self._rejected,
            depth_topic=self.resolve_topic_name("depth") if self._settings.use_depth else "",
            no_image_after_s=self._settings.no_image_after_s,
            inference_traceback=thread.failure_traceback if thread is not None else "",
            reasoner_problem=engine.reasoner.status() if engine is not None else "",
        )
        message = DiagnosticArray(status=self._diagnostics.statuses(seen))
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(message)

    def _image_topic(self) -> str:
        return self.resolve_topic_name("image")

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
