# SPDX-License-Identifier: Apache-2.0
"""The node's services. What takes time goes on in the session, or is an action; no answer keeps the others waiting."""

from collections.abc import Awaitable, Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup, MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger
from virst_msgs.srv import AddObjects, Ask, ClearGoal, ListGoals, RemoveObject, SetGoal

from virst_engine.errors import VirstError
from virst_ros.goals import Goals
from virst_ros.loading import LoadedEngine
from virst_ros.parameters import limits_of
from virst_ros.prompts import prompted_objects
from virst_ros.questions import Questions

ANSWER_GRACE_S = 1.0  # on top of reasoner.ttl_s: for the image that takes a question up, and for its telling why not
LIST_SHARE = 10.0  # list_goals may be asked so many times as often as the others: planners poll it


class Services:
    """Offers the services of a node.

    Args:
        goals: carries out what concerns goals.
        engine: what is loaded now; None before configure.
        why_closed: why nothing can be asked of the session now; empty when it can.
        enable: take images or not; returns what is the case now, in words.
    """

    def __init__(
        self,
        node: Node,
        goals: Goals,
        engine: Callable[[], LoadedEngine | None],
        why_closed: Callable[[], str],
        enable: Callable[[bool], str],
        group: CallbackGroup,
    ) -> None:
        self._node, self._goals, self._engine = node, goals, engine
        self._why_closed, self._enable = why_closed, enable
        self._questions = Questions(node, MutuallyExclusiveCallbackGroup())
        self._listed: list[Any] = []
        self._listed_goals: tuple[Any, ...] = ()
        for kind, name, callback in (
            (SetGoal, "set_goal", self._set_goal),
            (ClearGoal, "clear_goal", self._clear_goal),
            (AddObjects, "add_objects", self._add_objects),
            (RemoveObject, "remove_object", self._remove_object),
            (SetBool, "enable", self._set_enabled),
            (Trigger, "reset", self._reset),
        ):
            node.create_service(kind, f"~/{name}", self._guarded(name, callback), callback_group=group)
        node.create_service(Ask, "~/ask", self._guarded_wait("ask", self._ask), callback_group=group)
        node.create_service(ListGoals, "~/list_goals", self._list_goals, callback_group=group)

    def stop(self, reason: str) -> None:
        """End what is not answered yet: the node does not go on."""
        self._questions.stop(reason)

    def _guarded(self, name: str, callback: Callable[[Any, Any], None]) -> Callable[[Any, Any], Any]:
        """The callback, asked within limits and while the session can answer; what it raises becomes the answer."""

        def answer(request: Any, response: Any) -> Any:
            if not self._is_refused(name, response):
                try:
                    callback(request, response)
                    response.success = True
                except Exception as error:
                    response.message = self._goals.refusal(name, error)
            return response

        return answer

    def _guarded_wait(
        self, name: str, callback: Callable[[Any, Any], Awaitable[None]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """The same for a callback that waits; the executor serves others meanwhile."""

        async def answer(request: Any, response: Any) -> Any:
            if not self._is_refused(name, response):
                try:
                    await callback(request, response)
                    response.success = True
                except Exception as error:
                    response.message = self._goals.refusal(name, error)
            return response

        return answer

    def _is_refused(self, name: str, response: Any) -> bool:
        """Whether the request came too soon after others, or at a wrong time; the response says so then."""
        response.success = False
        too_often = self._goals.why_too_often(name)
        if too_often:
            response.message = f"nothing was done: {too_often}"
            return True
        response.message = self._why_closed()
        if response.message:
            self._goals.reject(name, response.message)
        return bool(response.message)

    def _set_goal(self, request: SetGoal.Request, response: SetGoal.Response) -> None:
        goal = self._goals.set(
            request.goal,
            request.object_id,
            request.camera,
            replace=request.replace,
            max_instances=request.max_instances,
        )
        response.goal_id, response.object_ids = goal.goal_id, [goal.object_id]

    def _clear_goal(self, request: ClearGoal.Request, response: ClearGoal.Response) -> None:
        response.message = f"{self._goals.clear(request.goal_id)} goal(s) cleared"

    def _list_goals(self, _: ListGoals.Request, response: ListGoals.Response) -> ListGoals.Response:
        goals = self._goals.all()
        # Asked too often, it answers with the list made last. Its states may be of before, its goals never are.
        if not self._goals.why_too_often("list_goals", LIST_SHARE) or goals != self._listed_goals:
            self._listed, self._listed_goals = self._goals.messages(), goals
        response.goals = self._listed
        return response

    def _add_objects(self, request: AddObjects.Request, response: AddObjects.Response) -> None:
        self._goals.check_camera(request.camera)
        stamp_ns, objects = prompted_objects(request, limits_of(self._node))
        engine = self._engine()
        assert engine is not None
        if engine.add_object is None:
            raise VirstError(
                "this engine takes sentences only, no boxes, points or masks: say with set_goal what to segment"
            )
        known = {goal.goal_id for goal in self._goals.all()}
        added = []
        try:
            for prompted in objects:
                added.append(engine.add_object(prompted, stamp_ns, request.camera))
        except Exception:
            for goal in added:  # all of them or none
                if goal.goal_id not in known:
                    self._goals.clear(goal.goal_id)
            raise
        self._goals.changed()
        indices = {each.object_id: each.instance_id for each in self._goals.objects()}  # of instances, too
        named = [(prompted.object_id, goal) for prompted, goal in zip(objects, added, strict=True)]
        response.object_ids = [object_id for object_id, _ in named]
        response.object_indices = [indices.get(object_id, goal.instance_id) for object_id, goal in named]

    def _remove_object(self, request: RemoveObject.Request, response: RemoveObject.Response) -> None:
        self._goals.remove_object(request.object_id)
        left = self._goals.objects()
        response.object_ids = [each.object_id for each in left]
        response.object_indices = [each.instance_id for each in left]

    async def _ask(self, request: Ask.Request, response: Ask.Response) -> None:
        engine = self._engine()
        assert engine is not None
        if engine.ask is None:
            self._goals.check_camera(request.camera)
            raise VirstError(
                f"the model {engine.model.name} answers with masks, not with words: it can be told what to segment "
                "(set_goal), but it cannot be asked"
            )
        self._goals.check(request.question, request.camera)
        ttl_s = self._node.get_parameter("reasoner.ttl_s").value
        answer = engine.ask(request.question, request.camera)
        response.answer = await self._questions.answer_of(answer, ttl_s + ANSWER_GRACE_S)

    def _set_enabled(self, request: SetBool.Request, response: SetBool.Response) -> None:
        response.message = self._enable(request.data)

    def _reset(self, _: Trigger.Request, response: Trigger.Response) -> None:
        engine = self._engine()
        assert engine is not None
        engine.session.reset()
        response.message = "what was seen is forgotten; goals stay and are looked for anew"
