# SPDX-License-Identifier: Apache-2.0
"""Setting, clearing and listing the goals of a node's session, whoever wants it: services, the action, parameters."""

import math
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rclpy.node import Node
from virst_msgs.msg import Goal as GoalMessage

from virst_engine import Goal, KnownObject
from virst_engine.errors import BadGoal, UnknownGoal, VirstError
from virst_engine.slow.goals import checked_sentence
from virst_ros import conversions
from virst_ros.loading import LoadedEngine
from virst_ros.parameters import limits_of
from virst_ros.rate_limit import RateLimiter

NAME_LENGTH = 40  # of a foreign name in a message: a caller may send a megabyte
MOST_REASONS = 100  # that are remembered; they may hold a caller's words
REFUSALS_TOLD_EVERY_S = 10.0  # in the log; a flood of requests must not become one of lines


class GoalWatcher(Protocol):
    """Is told what happens to goals."""

    def goals_changed(self, goals: Sequence[Goal]) -> None: ...

    def goal_rejected(self, reason: str) -> None: ...

    def request_refused(self, reason: str) -> None: ...


class Goals:
    """The goals of the engine that is loaded.

    Args:
        engine: what is loaded now; None before configure.
        cameras: the names of the node's cameras.
    """

    def __init__(
        self,
        node: Node,
        watcher: GoalWatcher,
        engine: Callable[[], LoadedEngine | None],
        cameras: Callable[[], Sequence[str]],
    ) -> None:
        self._node, self._watcher = node, watcher
        self._engine, self._cameras = engine, cameras
        self._set_at_ns: dict[str, int] = {}
        self._limiter, self._refusal_told_s = RateLimiter(), -math.inf
        self._rejected_s: dict[tuple[str, str], float] = {}  # when a request was last said to be rejected, and why
        self.longest = 0  # characters of a sentence

    def all(self) -> tuple[Goal, ...]:
        engine = self._engine()
        return engine.session.goals() if engine is not None else ()

    def set(
        self,
        sentence: str,
        object_id: str = "",
        camera: str = "",
        *,
        replace: bool = False,
        max_instances: int = 0,
    ) -> Goal:
        """Raises BadGoal."""
        self.check(sentence, camera)
        goal = self._loaded().session.set_goal(
            sentence, object_id=object_id, camera=camera, replace=replace, max_instances=max_instances
        )
        self.changed()
        return goal

    def check(self, sentence: str, camera: str = "") -> None:
        """Raises BadGoal for what can be set at no time; an id that is in use, say, may be free a moment later."""
        self.check_camera(camera)
        self._loaded().check_goal(checked_sentence(sentence, self.longest))

    def check_camera(self, camera: str) -> None:
        """Raises BadGoal for a camera that is not this node's; empty means any."""
        own = self._cameras()
        if camera in ("", *own):
            return
        wanted = f"the goal is for {camera[:NAME_LENGTH]!r}"
        if len(own) > 1:
            raise BadGoal(f"this segmenter sees cameras {', '.join(own)}, {wanted}: name one of them, or none for all")
        raise BadGoal(
            f"this segmenter sees camera {own[0]!r}, {wanted}: leave camera empty, or ask the segmenter of that camera"
        )

    def clear(self, goal_id: str = "") -> int:
        """How many were cleared; an empty id means all. Raises UnknownGoal."""
        session = self._loaded().session
        if goal_id:
            session.clear_goal(goal_id)
            cleared = 1
        else:
            cleared = sum(self._is_cleared(goal.goal_id) for goal in session.goals())
        self.changed()
        return cleared

    def _is_cleared(self, goal_id: str) -> bool:
        """Clear it; False when somebody else was faster."""
        try:
            self._loaded().session.clear_goal(goal_id)
        except UnknownGoal:
            return False
        return True

    def remove_object(self, object_id: str) -> None:
        """End one object: an instance alone, any other with its goal. Raises UnknownGoal."""
        engine = self._loaded()
        if all(each.object_id != object_id for each in self.objects()):
            raise UnknownGoal(f"no object {object_id[:NAME_LENGTH]!r} is tracked; `~/list_goals` tells those that are")
        engine.session.remove_object(object_id)
        self.changed()

    def objects(self) -> list[KnownObject]:
        """Of all goals, their instances included."""
        engine = self._engine()
        known = engine.session.known_objects().values() if engine is not None else ()
        return [each for objects in known for each in objects]

    def messages(self) -> list[GoalMessage]:
        engine = self._engine()
        if engine is None:
            return []
        objects = engine.session.known_objects()
        return [
            conversions.goal_message(goal, objects[goal.goal_id], self._set_at_ns.get(goal.goal_id, 0))
            for goal in engine.session.goals()
            if goal.goal_id in objects  # else it was set a moment ago
        ]

    def changed(self) -> None:
        """The session's goals are others than before."""
        goals, now_ns = self.all(), self._node.get_clock().now().nanoseconds
        self._set_at_ns = {goal.goal_id: self._set_at_ns.get(goal.goal_id, now_ns) for goal in goals}
        self._watcher.goals_changed(goals)

    def forget(self) -> None:
        """The engine is gone, and its goals with it."""
        self._set_at_ns = {}

    def why_too_often(self, service: str, share: float = 1.0) -> str:
        """Take a request of that service, or say why not: it came too soon after others. Empty when it is taken.

        Args:
            share: how many times the limit this service may have.
        """
        limits = limits_of(self._node)
        per_s = limits.requests_per_s * share
        wait_s = self._limiter.wait_s(service, per_s, max(1, round(limits.burst * share)))
        if not wait_s:
            return ""
        reason = (
            f"{service} is asked more than {per_s:g} times per second: try again in {wait_s:.2f} s, or raise "
            "limits.requests_per_s and limits.burst"
        )
        self._watcher.request_refused(reason)
        now_s = time.monotonic()
        if now_s - self._refusal_told_s > REFUSALS_TOLD_EVERY_S:
            self._refusal_told_s = now_s
            self._node.get_logger().warning(f"{reason}. Others are counted in /diagnostics")
        return reason

    def refusal(self, asked: str, error: Exception) -> str:
        """What to answer a caller whose request failed; an exception out of a service callback would kill the node.

        Args:
            asked: the service, action or parameter that wanted it.
        """
        if not isinstance(error, VirstError):
            self._node.get_logger().error("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        self.reject(asked, str(error))
        return str(error)

    def reject(self, asked: str, reason: str) -> None:
        """Tell that a request is rejected: the diagnostics each time, the log now and then for the same reason."""
        self._watcher.goal_rejected(reason)
        now_s = time.monotonic()
        if now_s - self._rejected_s.get((asked, reason), -math.inf) < REFUSALS_TOLD_EVERY_S:
            return
        if len(self._rejected_s) >= MOST_REASONS:
            self._rejected_s.clear()
        self._rejected_s[asked, reason] = now_s
        self._node.get_logger().warning(f"{asked} rejected: {reason}")

    def _loaded(self) -> Any:
        engine = self._engine()
        assert engine is not None
        return engine
