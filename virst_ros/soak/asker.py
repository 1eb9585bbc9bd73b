# SPDX-License-Identifier: Apache-2.0
"""What people and planners ask of a segmenter, at random: goals set and cleared by every way that there is."""

import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image
from std_srvs.srv import SetBool, Trigger
from virst_msgs.action import Segment
from virst_msgs.msg import BoundingBox2D, Point2D
from virst_msgs.srv import AddObjects, ClearGoal, ListGoals, RemoveObject, SetGoal

from virst_ros import conversions
from virst_ros.soak.cameras import ReplayCamera, SteadyClock
from virst_ros.soak.checker import Checker, Life, Seen

ANSWER_S = 10.0  # for an answer of the node, which should take milliseconds
LEAST_AREA_PX = 150  # of a simulated object that is pointed at
PAUSES_S = (0.3, 1.5)  # images are off for so long
FOUND_SENTENCES = 8  # of those that follow; the last two mean nothing in the recorded scene, and are never found
SENTENCES = (
    "the red ball",
    "the blue can",
    "the box left of the blue can",
    "the object moving to the left",
    "the thing that can roll",
    "the yellow box",
    "the green box",
    "the white plate",
    "the boxes",
    "the purple egg",
    "the black box",
)
MOST_REPLAY_STEPS = 8
NONSENSE = ("", "   ", "x" * 5000, "the red\nball", "\u0000")


class NoAnswer(Exception):
    """The node has not answered in time."""


@dataclass
class _Action:
    """A goal of the action `segment` that is not done."""

    life: Life
    handle: Any
    result: Any  # Future
    keeps: bool
    is_canceled: bool = False


@dataclass
class Asker:
    """Asks, waits for the answer, and tells the checker. For one thread, while another one spins the node.

    Args:
        newest_ns: the stamp of the newest `objects` of a camera, 0 = none yet.
        instances: those of all cameras in the newest `objects`.
        named: the segmenter knows its cameras by name; else there is one, and no goal names it.
        most_objects: the segmenter's tracking.max_objects.
        hold_times: requests at the beginning while all objects are there.
    """

    node: Any
    segmenter: str
    checker: Checker
    cameras: dict[str, ReplayCamera]
    clock: SteadyClock
    newest_ns: Callable[[str], int]
    instances: Callable[[], Sequence[Seen]]
    named: bool
    most_objects: int
    hold_times: int
    seed: int
    asked: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._numbered = 0
        self._action: _Action | None = None
        self._clients = {
            name: self.node.create_client(kind, f"{self.segmenter}/{name}")
            for name, kind in (
                ("set_goal", SetGoal),
                ("clear_goal", ClearGoal),
                ("list_goals", ListGoals),
                ("add_objects", AddObjects),
                ("remove_object", RemoveObject),
                ("enable", SetBool),
                ("reset", Trigger),
                ("set_parameters", SetParameters),
            )
        }
        self._segment = ActionClient(self.node, Segment, f"{self.segmenter}/segment")
        self._first = self._opening()

    def _opening(self) -> list[Callable[[], None]]:
        """What is asked first: all objects at once, found in all cameras, then everything else once.

        What that allocates for good is so there before memory is compared: a batch of the most objects takes more than
        all others, and the allocator keeps it.
        """
        hold = [self._hold] * self.hold_times
        return [
            self._replay_most,
            self._full_house,
            *hold,
            self._reset,
            *hold,
            self._set_parameters,
            self._pause,
            self._ask_nonsense,
            self._clear_all,
            self._set_goal,
            self._point_at_new,
            self._replace,
            self.list_goals,
            self._remove_object,
            self._clear_goal,
            self._fill,
            self._clear_all,
            self._set_several,
            self._start_action,
        ]

    def is_ready(self) -> bool:
        services = (client.service_is_ready() for client in self._clients.values())
        return all(services) and self._segment.server_is_ready()

    def act(self) -> None:
        """One thing, chosen at random. What is answered wrongly is told to the checker."""
        self._finish_action()
        try:
            self._choose()()
        except NoAnswer as error:
            self.checker.failed("no answer", str(error))

    def _choose(self) -> Callable[[], None]:
        if self._first:
            return self._first.pop(0)
        alive = self.checker.lives()
        crowd = len(alive) / self.most_objects
        choices: list[tuple[float, Callable[[], None]]] = [
            (30 * (1.0 - crowd), self._set_goal),
            (5 * (1.0 - crowd), self._set_several),
            (8 * (1.0 - crowd), self._point_at_new),
            (4, self._point_again),
            (40 * crowd, self._clear_goal),
            (15 * crowd, self._remove_object),
            (4, self._remove_instance),
            (15, self.list_goals),
            (6 if self._action is None else 1, self._start_action),
            (4, self._set_parameters),
            (4, self._ask_nonsense),
            (1, self._pause),
            (1, self._reset),
            (1, self._fill),
        ]
        if self._action is None:  # what it sets is not known before its result, so nothing may clear it unseen
            choices += [(1, self._clear_all), (2, self._replace)]
        else:
            choices.append((3, self._cancel_action))
        weights, actions = zip(*choices, strict=True)
        return self._random.choices(actions, weights)[0]

    def finish(self) -> None:
        """End the action, and look at the list once more."""
        self._cancel_action()
        deadline_s = time.monotonic() + ANSWER_S
        while self._action is not None and time.monotonic() < deadline_s:
            time.sleep(0.02)
            self._finish_action()
        if self._action is not None:
            self.checker.failed("no answer", "segment does not end after it was canceled")
        try:
            self.list_goals()
        except NoAnswer as error:
            self.checker.failed("no answer", str(error))

    def list_goals(self) -> None:
        asked_ns = self.clock.now_ns()
        answer = self._call("list_goals", ListGoals.Request())
        goals = [
            Seen(goal.goal_id, object_id, instance_id, part_of=goal.object_ids[0] if number else "")
            for goal in answer.goals
            for number, (object_id, instance_id) in enumerate(zip(goal.object_ids, goal.instance_ids, strict=True))
        ]
        self.checker.listed(goals, asked_ns, self.clock.now_ns())

    # Setting goals

    def _set_goal(self) -> None:
        self._set(1)

    def _set_several(self) -> None:
        self._set(self._random.randint(2, 4))

    def _fill(self) -> None:
        self._set(max(1, self.most_objects - len(self.checker.lives())))

    def _full_house(self) -> None:
        """As many objects as there can be, in all cameras, of sentences that mean something in the scene."""
        for number in range(self.most_objects):
            request = SetGoal.Request(goal=SENTENCES[number % FOUND_SENTENCES], max_instances=1)
            life = self._ask(request)
            answer = self._wait("set_goal", self._send("set_goal", request))
            self._goal_answered(life, request, answer, must_be_taken=True)

    def _hold(self) -> None:
        """Something that ends no goal."""
        self._random.choice((self.list_goals, self._point_again, self._point_again))()

    def _replay_most(self) -> None:
        self._set_parameter("tracking.replay_steps", MOST_REPLAY_STEPS)

    def _set(self, times: int) -> None:
        """Several requests on their way at once."""
        others = self.checker.lives()
        # Instances take places, too, and how many is not known here.
        has_room = len(others) + times <= self.most_objects and not any(life.is_split for life in others)
        sent = []
        for _ in range(times):
            request = self._goal_request()
            life = self._ask(request)
            has_room = has_room and (times == 1 or not life.is_split)
            sent.append((life, request, self._send("set_goal", request)))
        for life, request, future in sent:
            self._goal_answered(life, request, self._wait("set_goal", future), must_be_taken=has_room)

    def _replace(self) -> None:
        request, others = self._goal_request(), self.checker.lives()
        request.replace = True
        life = self._ask(request)
        self.checker.ask_end(others, self.clock.now_ns())
        answer = self._wait("set_goal", self._send("set_goal", request))
        self._goal_answered(life, request, answer, must_be_taken=True)
        if answer.success:
            self.checker.has_ended(others, self.clock.now_ns())

    def _goal_answered(self, life: Life, request: Any, answer: Any, *, must_be_taken: bool) -> None:
        if answer.success:
            self.checker.was_set(life, self.clock.now_ns(), answer.goal_id, answer.object_ids[0])
            return
        self.checker.was_refused(life)
        self._was_refused("set_goal", answer.message, request.goal if must_be_taken else "")

    def _goal_request(self) -> Any:
        return SetGoal.Request(
            goal=self._random.choice(SENTENCES),
            object_id=self._random.choice(("", self._name())),
            camera=self._camera(),
            max_instances=self._random.choice((1, 1, 1, 3)),
        )

    def _ask(self, request: Any) -> Life:
        return self.checker.ask(
            self.clock.now_ns(),
            request.object_id,
            self._seen_by(request.camera),
            is_split=request.max_instances > 1,
        )

    # Pointing at objects

    def _point_at_new(self) -> None:
        """One or two objects of one camera's newest frame, by a box, a point or a mask."""
        if len(self.checker.lives()) + 2 > self.most_objects:
            return
        names = [self._name() for _ in range(self._random.randint(1, 2))]
        camera = self._random.choice(list(self.cameras))
        request = self._pointing(camera, names)
        if request is None:
            return
        lives = [self.checker.ask(self.clock.now_ns(), name, (camera,)) for name in names]
        answer = self._call("add_objects", request)
        if not answer.success:  # the frame may be gone by now, which is no mistake
            for life in lives:
                self.checker.was_refused(life)
            self._was_refused("add_objects", answer.message)
            return
        if sorted(answer.object_ids) != sorted(names):  # boxes are mentioned before points, points before masks
            self.checker.failed("wrong answer", f"add_objects of {names} answered {list(answer.object_ids)}")
        for life in lives:
            self.checker.was_set(life, self.clock.now_ns())

    def _point_again(self) -> None:
        """An object that exists is corrected; it stays who it is."""
        known = [life for life in self.checker.lives() if life.set_ns is not None and life.object_id]
        if not known:
            return
        life = self._random.choice(known)
        camera = self._random.choice(list(life.cameras))
        request = self._pointing(camera, [life.object_id])
        if request is None:
            return
        self.checker.is_disturbed(self.clock.now_ns(), [life])
        answer = self._call("add_objects", request)
        self.checker.is_disturbed(self.clock.now_ns(), [life])
        if not answer.success:
            self._was_refused("add_objects", answer.message)
        elif list(answer.object_ids) != [life.object_id]:
            self.checker.failed("wrong answer", f"{life.object_id!r} was corrected, and is {list(answer.object_ids)}")

    def _pointing(self, camera: str, names: Sequence[str]) -> Any:
        """None while there is no frame, or too little in it."""
        stamp_ns = self.newest_ns(camera)
        truth = self.cameras[camera].truth(stamp_ns)
        if truth is None:
            return None
        areas = np.bincount(truth.reshape(-1), minlength=256)
        visible = [each for each in np.flatnonzero(areas >= LEAST_AREA_PX).tolist() if each]
        if len(visible) < len(names):
            return None
        request = AddObjects.Request(camera=camera if self.named else "")
        request.request_header.stamp = conversions.time_message(stamp_ns)
        for name, thing in zip(names, self._random.sample(visible, len(names)), strict=True):
            self._random.choice((_add_box, _add_point, _add_mask))(request, name, truth == thing)
        return request

    # Clearing goals

    def _clear_goal(self) -> None:
        known = [life for life in self.checker.lives() if life.set_ns is not None and life.goal_id]
        if known:
            life = self._random.choice(known)
            self._end([life], "clear_goal", ClearGoal.Request(goal_id=life.goal_id))

    def _remove_object(self) -> None:
        known = [life for life in self.checker.lives() if life.set_ns is not None and life.object_id]
        if known:
            life = self._random.choice(known)
            self._end([life], "remove_object", RemoveObject.Request(object_id=life.object_id))

    def _remove_instance(self) -> None:
        """Alone: its goal goes on. It may have gone by itself since it was seen."""
        known = self.instances()
        if not known:
            return
        seen = self._random.choice(known)
        answer = self._call("remove_object", RemoveObject.Request(object_id=seen.object_id))
        if answer.success:
            self.checker.instance_removed(seen.goal_id, seen.object_id, self.clock.now_ns())
        else:
            self._was_refused("remove_object", answer.message)

    def _clear_all(self) -> None:
        self._end(self.checker.lives(), "clear_goal", ClearGoal.Request())

    def _end(self, lives: Sequence[Life], service: str, request: Any) -> None:
        self.checker.ask_end(lives, self.clock.now_ns())
        answer = self._call(service, request)
        if answer.success:
            self.checker.has_ended(lives, self.clock.now_ns())
        else:
            self._was_refused(service, answer.message, f"the end of {[life.object_id for life in lives]}")

    # The action

    def _start_action(self) -> None:
        """A newer goal takes the place of an older one, whose result then comes by itself."""
        if self._action is None and len(self.checker.lives()) >= self.most_objects:
            return
        before = self._action
        request = Segment.Goal(
            goal=self._random.choice(SENTENCES),
            object_id=self._name(),
            camera=self._camera(),
            timeout=self._random.uniform(0.5, 6.0),
            min_score=self._random.choice((0.0, 0.5)),
            clear_when_done=self._random.random() < 0.7,
            max_instances=self._random.choice((1, 1, 1, 3)),
        )
        self.asked["segment"] += 1
        life = self._ask(request)
        handle = self._wait("segment", self._segment.send_goal_async(request))
        if not handle.accepted:
            self.checker.was_refused(life)
            self._was_refused("segment", "rejected", request.goal)
            return
        self._action = _Action(life, handle, handle.get_result_async(), keeps=not request.clear_when_done)
        if before is not None:
            self._action_ended(before, self._wait("segment", before.result).result)

    def _cancel_action(self) -> None:
        if self._action is not None and not self._action.is_canceled:
            self._action.is_canceled = True
            self.asked["cancel"] += 1
            self._action.handle.cancel_goal_async()

    def _finish_action(self) -> None:
        action = self._action
        if action is not None and action.result.done():
            self._action = None
            self._action_ended(action, action.result.result().result)

    def _action_ended(self, action: _Action, result: Any) -> None:
        if result.success and action.keeps:
            self.checker.was_set(action.life, self.clock.now_ns(), result.goal_id)
        else:
            self.checker.has_ended([action.life], self.clock.now_ns())
        if not result.success:
            self.refused[f"segment: error_code {result.error_code}"] += 1

    # Everything else

    def _set_parameters(self) -> None:
        name, value = self._random.choice(
            (
                ("tracking.replay_steps", self._random.randint(2, MOST_REPLAY_STEPS)),
                ("tracking.lost_after_steps", self._random.randint(1, 6)),
                ("reasoner.period_s", self._random.uniform(0.5, 2.0)),
                ("reasoner.retry_s", self._random.uniform(0.2, 0.6)),
                ("memory.min_write_iou", self._random.uniform(0.3, 0.7)),
                ("overlay", self._random.random() < 0.5),
            )
        )
        result = self._set_parameter(name, value)
        if not result.successful:
            self.checker.failed("wrong answer", f"{name} = {value} was refused: {result.reason}")

    def _set_parameter(self, name: str, value: Any) -> Any:
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self._call("set_parameters", request).results[0]

    def _ask_nonsense(self) -> None:
        """What has to be refused, and change nothing."""
        service, request = self._random.choice(
            (
                ("set_goal", SetGoal.Request(goal=self._random.choice(NONSENSE))),
                ("set_goal", SetGoal.Request(goal="the red ball", camera="nowhere")),
                ("clear_goal", ClearGoal.Request(goal_id="nobody")),
                ("remove_object", RemoveObject.Request(object_id="nobody")),
                ("add_objects", AddObjects.Request(bbox_object_ids=["soak_box"])),
                ("set_parameters", None),
            )
        )
        if request is None:
            if self._set_parameter("memory.min_write_iou", 7.0).successful:
                self.checker.failed("wrong answer", "memory.min_write_iou = 7.0 was taken")
            return
        answer = self._call(service, request)
        if answer.success or not answer.message:
            self.checker.failed("wrong answer", f"{service} took nonsense, or refused it without a reason: {request}")

    def _pause(self) -> None:
        for wanted in (False, True):
            self.checker.is_disturbed(self.clock.now_ns())
            answer = self._call("enable", SetBool.Request(data=wanted))
            self.checker.is_disturbed(self.clock.now_ns())
            if not answer.success:
                self._was_refused("enable", answer.message, f"enable {wanted}")
            if not wanted:
                time.sleep(self._random.uniform(*PAUSES_S))

    def _reset(self) -> None:
        self.checker.is_disturbed(self.clock.now_ns())
        answer = self._call("reset", Trigger.Request())
        self.checker.is_disturbed(self.clock.now_ns())
        if not answer.success:
            self._was_refused("reset", answer.message, "reset")

    def _was_refused(self, service: str, message: str, wrongly: str = "") -> None:
        """`wrongly`: what was asked, where it had to be taken."""
        self.refused[f"{service}: {' '.join(message.split())[:80]}"] += 1
        if wrongly:
            self.checker.failed("wrong answer", f"{service} refused {wrongly!r}: {message}")

    def _name(self) -> str:
        self._numbered += 1
        return f"soak_{self._numbered}"

    def _camera(self) -> str:
        """Half of the goals are for all cameras."""
        return self._random.choice(("", self._random.choice(list(self.cameras)))) if self.named else ""

    def _seen_by(self, camera: str) -> Collection[str] | None:
        return (camera,) if camera else None

    def _call(self, service: str, request: Any) -> Any:
        return self._wait(service, self._send(service, request))

    def _send(self, service: str, request: Any) -> Any:
        self.asked[service] += 1
        return self._clients[service].call_async(request)

    def _wait(self, service: str, future: Any) -> Any:
        deadline_s = time.monotonic() + ANSWER_S
        while not future.done():
            if time.monotonic() > deadline_s:
                raise NoAnswer(f"{service} has not answered within {ANSWER_S:g} s")
            time.sleep(0.002)
        return future.result()


def _add_box(request: Any, name: str, mask: np.ndarray) -> None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = BoundingBox2D(size_x=float(columns[-1] - columns[0] + 1), size_y=float(rows[-1] - rows[0] + 1))
    box.center.position.x = float(columns[0] + columns[-1] + 1) / 2
    box.center.position.y = float(rows[0] + rows[-1] + 1) / 2
    request.bbox_object_ids.append(name)
    request.bbox_coords.append(box)


def _add_point(request: Any, name: str, mask: np.ndarray) -> None:
    rows, columns = np.nonzero(mask)
    middle = len(rows) // 2
    request.point_object_ids.append(name)
    request.point_coords.append(Point2D(x=float(columns[middle]), y=float(rows[middle])))


def _add_mask(request: Any, name: str, mask: np.ndarray) -> None:
    height, width = mask.shape
    data = array("B", conversions.binary(mask).tobytes())
    request.mask_object_ids.append(name)
    request.masks.append(Image(height=height, width=width, encoding="mono8", step=width, data=data))
