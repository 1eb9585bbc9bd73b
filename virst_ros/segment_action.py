# SPDX-License-Identifier: Apache-2.0
"""The action `~/segment`: a sentence in, its first good mask out, with what happens in between as feedback.

One goal at a time: a newer one takes the place of the one that runs. Frames are looked at on the inference thread only
to remember the newest; everything that concerns the action happens on the executor's thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import rclpy
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from virst_msgs.action import Segment
from virst_msgs.msg import SegmentedObject

from virst_engine import Goal, ObjectResult, ObjectState
from virst_engine.errors import BadGoal
from virst_ros import conversions
from virst_ros.goals import Goals
from virst_ros.outputs import SegmentedFrame

CHECK_PERIOD_S = 0.05  # of time-outs and cancellations while a goal runs
FEEDBACK_PERIOD_S = 0.5  # at the latest; every change of the stage is told at once
LONGEST_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class _Sighting:
    """The goal's object in one frame of one camera."""

    camera: str
    header: Header
    found: ObjectResult


@dataclass
class _Run:
    """One goal of the action while it is not done."""

    handle: Any
    goal: Goal
    timeout_s: float
    started_s: float
    outcome: Any  # rclpy Future of the result
    stage: str = ""
    told_s: float = -math.inf
    newest: _Sighting | None = None  # written by the inference thread
    is_done: bool = field(default=False)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


def stage_of(found: ObjectResult | None) -> str:
    """How far a goal has come, by what is known of its object in the newest frame."""
    if found is None:
        return "queued"
    if found.state is ObjectState.TRACKING:
        return "tracking"
    return "prompted" if math.isfinite(found.reasoner_latency_s) else "reasoner"


class SegmentAction:
    """Serves the action.

    Args:
        goals: sets and clears the goals.
        why_closed: why nothing can be segmented now; empty when it can.
        default_timeout_s: for goals that give none.
    """

    def __init__(
        self,
        node: Node,
        goals: Goals,
        why_closed: Callable[[], str],
        default_timeout_s: Callable[[], float],
        group: CallbackGroup,
    ) -> None:
        self._node, self._goals, self._group = node, goals, group
        self._why_closed, self._default_timeout_s = why_closed, default_timeout_s
        self._run: _Run | None = None
        self._timer: Any = None
        self._frame_came = node.create_guard_condition(self._look, callback_group=group)
        self._server = ActionServer(
            node,
            Segment,
            "~/segment",
            execute_callback=self._execute,
            callback_group=group,
            goal_callback=self._goal_requested,
            cancel_callback=self._cancel_requested,
        )

    def destroy(self) -> None:
        """With the node; no goal may run any more."""
        self._server.destroy()

    def frame_segmented(self, shown: SegmentedFrame) -> None:
        """On the inference thread: remember the running goal's object, and wake the executor."""
        run = self._run
        if run is None:
            return
        for found in shown.result.objects:
            if found.goal_id == run.goal.goal_id:
                sighting, before = _Sighting(shown.result.camera, shown.header, found), run.newest
                # Of several cameras, one that sees it well is not outdone by one that does not.
                if before is None or before.camera == sighting.camera or not self._is_good(run, before.found):
                    run.newest = sighting
                self._frame_came.trigger()
                return

    def stop(self, reason: str) -> None:
        """End the goal that runs, if any: the node does not go on."""
        if self._run is not None:
            self._finish(self._run, Segment.Result.STOPPED, reason)

    # On the executor's thread

    def _goal_requested(self, _: Segment.Goal) -> GoalResponse:
        # A rejection has no words, so what cannot be is accepted, and its result says why. Not so in a flood: results
        # of accepted goals are kept for minutes.
        return GoalResponse.REJECT if self._goals.why_too_often("segment") else GoalResponse.ACCEPT

    def _cancel_requested(self, _: Any) -> CancelResponse:
        return CancelResponse.ACCEPT  # carried out by `_look`: the handle's state changes after this

    async def _execute(self, handle: Any) -> Segment.Result:
        reason = self._why_closed()
        if reason:
            self._goals.reject("segment", reason)
            handle.abort()
            return Segment.Result(success=False, message=reason, error_code=Segment.Result.STOPPED)
        try:
            self._check(handle.request)
            if self._run is not None:
                self._finish(self._run, Segment.Result.PREEMPTED, "a newer goal has taken its place")
            run = self._begin(handle)
        except Exception as error:
            message = self._goals.refusal("segment", error)
            handle.abort()
            return Segment.Result(success=False, message=message, error_code=Segment.Result.BAD_GOAL)
        self._run = run
        # Time-outs are in real time, also where the node's clock is simulated and stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self._node.create_timer(CHECK_PERIOD_S, self._look, callback_group=self._group, clock=steady)
        self._look()
        return await run.outcome

    def _check(self, request: Segment.Goal) -> None:
        """Whether it may take the place of the one that runs. Raises BadGoal."""
        if not 0.0 <= request.timeout <= LONGEST_TIMEOUT_S:  # False for NaN
            raise BadGoal(f"timeout must be within 0 and {LONGEST_TIMEOUT_S:g} seconds, got {request.timeout}")
        if not 0.0 <= request.min_score <= 1.0:
            raise BadGoal(f"min_score must be within 0 and 1, got {request.min_score}")
        self._goals.check(request.goal, request.camera)

    def _begin(self, handle: Any) -> _Run:
        """Raises BadGoal."""
        request = handle.request
        goal = self._goals.set(request.goal, request.object_id, request.camera, max_instances=request.max_instances)
        return _Run(
            handle,
            goal,
            timeout_s=request.timeout or self._default_timeout_s(),
            started_s=time.monotonic(),
            outcome=rclpy.task.Future(),
        )

    def _look(self) -> None:
        """Tell what is new of the running goal, and end it when it is through."""
        run = self._run
        if run is None:
            return
        newest = run.newest
        found = newest.found if newest is not None else None
        self._tell(run, found)
        if run.handle.is_cancel_requested:
            self._finish(run, Segment.Result.CANCELED, "canceled by the client")
        elif all(goal.goal_id != run.goal.goal_id for goal in self._goals.all()):
            self._finish(run, Segment.Result.STOPPED, "its goal was cleared, or replaced by another one")
        elif found is not None and self._is_good(run, found):
            self._finish(run, Segment.Result.NONE, "")
        elif self._why_closed():
            self._finish(run, Segment.Result.STOPPED, self._why_closed())
        elif run.elapsed_s > run.timeout_s:
            self._finish(run, *self._why_late(run, found))

    @staticmethod
    def _is_good(run: _Run, found: ObjectResult) -> bool:
        is_seen = found.state is ObjectState.TRACKING and bool(found.mask.any())
        return is_seen and found.score >= run.handle.request.min_score

    @staticmethod
    def _why_late(run: _Run, found: ObjectResult | None) -> tuple[int, str]:
        after = f"no mask within {run.timeout_s:g} s"
        if found is None:
            return Segment.Result.TIMEOUT, f"{after}: no image was processed since; see /diagnostics"
        if found.state is ObjectState.NOT_FOUND:
            return Segment.Result.NOT_FOUND, f"{after}: {found.message or 'there is no such object'}"
        if found.state is ObjectState.TRACKING:
            wanted = run.handle.request.min_score
            return (
                Segment.Result.TIMEOUT,
                f"{after} of at least min_score {wanted:.2f}; the newest has {found.score:.2f}",
            )
        return Segment.Result.TIMEOUT, f"{after}: {found.state.name}, {found.message}"

    def _tell(self, run: _Run, found: ObjectResult | None) -> None:
        stage, now_s = stage_of(found), time.monotonic()
        if stage == run.stage and now_s - run.told_s < FEEDBACK_PERIOD_S:
            return
        run.stage, run.told_s = stage, now_s
        score = float(found.score) if found is not None else 0.0
        run.handle.publish_feedback(Segment.Feedback(stage=stage, elapsed=run.elapsed_s, score=score))

    def _finish(self, run: _Run, error_code: int, message: str) -> None:
        if run.is_done:
            return
        run.is_done = True
        if self._run is run:
            self._run = None
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
            self._timer = None
        result = Segment.Result(success=error_code == Segment.Result.NONE, message=message, error_code=error_code)
        keeps = result.success and not run.handle.request.clear_when_done
        if keeps:
            result.goal_id = run.goal.goal_id
        elif any(goal.goal_id == run.goal.goal_id for goal in self._goals.all()):
            self._goals.clear(run.goal.goal_id)
        result.object, result.mask = self._seen(run, with_mask=result.success)
        if result.success:
            run.handle.succeed()
        elif error_code == Segment.Result.CANCELED:
            run.handle.canceled()
        else:
            run.handle.abort()
            self._node.get_logger().info(f"segment {run.goal.sentence[:60]!r} ended: {message}")
        run.outcome.set_result(result)

    @staticmethod
    def _seen(run: _Run, *, with_mask: bool) -> tuple[SegmentedObject, Image]:
        newest = run.newest
        if newest is None:
            return SegmentedObject(object_id=run.goal.object_id, goal_id=run.goal.goal_id), Image()
        mask = Image()
        if with_mask:
            mask = conversions.image_message(newest.header, conversions.binary(newest.found.mask), "mono8")
        return conversions.object_message(newest.found, run.goal.sentence), mask
