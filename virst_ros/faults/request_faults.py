# SPDX-License-Identifier: Apache-2.0
"""What callers do: goals that are none, too many of them, at the wrong moment; parameters, actions, subscriptions."""

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from geometry_msgs.msg import Point
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger
from virst_msgs.action import Segment
from virst_msgs.msg import BoundingBox2D, Point2D, Pose2D
from virst_msgs.srv import AddObjects, Ask, ClearGoal, RemoveObject, SetGoal

from virst_ros import conversions
from virst_ros.faults.fault import Fault, FaultError, Inject, Masks
from virst_ros.faults.harness import CALL_S, Harness
from virst_ros.faults.segmenter import wait_until

ABSENT = "the purple egg"  # there is none in the scene


def _asked(kind: type, service: str, *requests: Any) -> Inject:
    """The service is called with each request, and must refuse all of them."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[None]:
        for request in requests:
            if harness.call(kind, service, request).success:
                raise FaultError(f"{service} has taken what it must refuse: {str(request)[:200]}")
        yield

    return inject


def _goal(*sentences: str, **fields: Any) -> Inject:
    return _asked(SetGoal, "set_goal", *(SetGoal.Request(goal=sentence, **fields) for sentence in sentences))


@contextmanager
def _hundred_goals(harness: Harness) -> Iterator[None]:
    taken = sum(harness.set_goal(f"the {colour} box").success for colour in ("red", "blue", "green", "white") * 25)
    if not 0 < taken < 100:
        raise FaultError(f"{taken} of 100 goals were taken")
    yield
    harness.clear_goals(keep=harness.segmenter.goal_id)


@contextmanager
def _goal_churn(harness: Harness) -> Iterator[None]:
    """Goals are set and cleared at once, 40 times, as fast as the limit of requests allows."""
    for number in range(40):
        time.sleep(0.06)
        response = harness.set_goal(("the blue can", "the green box")[number % 2])
        if not response.success:
            raise FaultError(f"goal {number} was refused: {response.message}")
        harness.call(ClearGoal, "clear_goal", ClearGoal.Request(goal_id=response.goal_id))
    yield


@contextmanager
def _goal_while_inactive(harness: Harness) -> Iterator[None]:
    harness.change_state(harness.segmenter, "deactivate")
    if harness.set_goal("the blue can").success:
        raise FaultError("a goal was taken while the segmenter was inactive")
    yield
    harness.cause_is_gone()
    harness.change_state(harness.segmenter, "activate")


@contextmanager
def _same_object_twice(harness: Harness) -> Iterator[None]:
    request = SetGoal.Request(goal="the blue can", object_id=harness.segmenter.goal_id)
    if harness.call(SetGoal, "set_goal", request).success:
        raise FaultError("two goals have one object")
    yield


def _mask(width: int, height: int) -> Image:
    return conversions.image_message(Header(), 255 * _ones(height, width), "mono8")


def _ones(height: int, width: int) -> Any:
    import numpy as np

    return np.ones((height, width), np.uint8)


def _box(x: float, size: float) -> BoundingBox2D:
    return BoundingBox2D(center=Pose2D(position=Point2D(x=x, y=100.0)), size_x=size, size_y=size)


def _pointed(**fields: Any) -> AddObjects.Request:
    return AddObjects.Request(**fields)


@contextmanager
def _nonsense_parameters(harness: Harness) -> Iterator[None]:
    nonsense: Sequence[tuple[str, ParameterValue]] = (
        ("reasoner.period_s", ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=math.nan)),
        ("tracking.agree_iou", ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=-5.0)),
        ("tracking.lost_after_steps", ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=2**62)),
        ("target", ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=3)),
        ("model.name", ParameterValue(type=ParameterType.PARAMETER_STRING, string_value="no such model")),
        ("no.such.parameter", ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=True)),
    )
    request = SetParameters.Request(parameters=[Parameter(name=name, value=value) for name, value in nonsense])
    response = harness.call(SetParameters, "set_parameters", request)
    taken = [name for (name, _), result in zip(nonsense, response.results, strict=True) if result.successful]
    harness.answers += [result.reason for result in response.results]
    if taken:
        raise FaultError(f"these parameters were taken: {', '.join(taken)}")
    yield


@contextmanager
def _action_cancelled(harness: Harness) -> Iterator[None]:
    client = ActionClient(harness.node, Segment, f"/{harness.segmenter.name}/segment")
    handle = _done(client.send_goal_async(Segment.Goal(goal=ABSENT, timeout=60.0)), "the action's goal")
    result = handle.get_result_async()
    time.sleep(0.5)
    _done(handle.cancel_goal_async(), "the cancelling of the action's goal")
    outcome = _done(result, "the result of the cancelled action").result
    if outcome.error_code != Segment.Result.CANCELED:
        raise FaultError(f"the action has ended with code {outcome.error_code}: {outcome.message}")
    if harness.goal_ids(harness.segmenter) != [harness.segmenter.goal_id]:
        raise FaultError("the cancelled action has left its goal behind")
    yield
    client.destroy()


def _done(future: Any, what: str) -> Any:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    if not done.wait(CALL_S):
        raise FaultError(f"no answer about {what} within {CALL_S:g} s")
    return future.result()


@contextmanager
def _action_client_killed(harness: Harness) -> Iterator[None]:
    """Its client is killed; afterwards another client's goal is served."""
    command = [sys.executable, "-m", "virst_ros.faults.clients", "segment", f"/{harness.segmenter.name}", ABSENT]
    process, log = harness.start("client", command), harness.log_path("client")
    if not wait_until(lambda: "accepted" in log.read_text(errors="replace"), CALL_S):
        raise FaultError(f"the action has not accepted a goal; see {log}")
    process.kill()
    process.wait()
    time.sleep(0.5)
    client = ActionClient(harness.node, Segment, f"/{harness.segmenter.name}/segment")
    goal = Segment.Goal(goal="the blue can", timeout=20.0, clear_when_done=True)
    handle = _done(client.send_goal_async(goal), "the next client's goal")
    outcome = _done_late(handle.get_result_async(), "the next client's result")
    if not outcome.result.success:
        raise FaultError(f"the next client's goal was not served: {outcome.result.message}")
    if harness.goal_ids(harness.segmenter) != [harness.segmenter.goal_id]:
        raise FaultError("the dead client's goal is still there")
    yield
    client.destroy()


def _done_late(future: Any, what: str) -> Any:
    if not wait_until(future.done, 25.0):
        raise FaultError(f"no answer about {what} within 25 s")
    return future.result()


@contextmanager
def _reader_hangs(harness: Harness) -> Iterator[None]:
    import signal

    topic = f"/{harness.segmenter.name}/mask"
    process = harness.start("reader", [sys.executable, "-m", "virst_ros.faults.clients", "read", topic])
    log = harness.log_path("reader")
    if not wait_until(lambda: "reading" in log.read_text(errors="replace"), CALL_S):
        raise FaultError(f"the reader has got no mask; see {log}")
    process.send_signal(signal.SIGSTOP)
    yield
    process.kill()
    process.wait()


@contextmanager
def _readers_come_and_go(harness: Harness) -> Iterator[None]:
    qos = qos_profile_sensor_data  # what every publisher offers
    for number in range(30):
        topic, kind = (("mask", Image), ("overlay", Image), ("points", PointCloud2))[number % 3]
        reader = harness.node.create_subscription(kind, f"/{harness.segmenter.name}/{topic}", lambda _: None, qos)
        time.sleep(0.05)
        harness.node.destroy_subscription(reader)
    yield


@contextmanager
def _reader_wants_more(harness: Harness) -> Iterator[None]:
    """A subscriber that wants masks from before it came, which nobody offers."""
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    reader = harness.node.create_subscription(Image, f"/{harness.segmenter.name}/mask", lambda _: None, qos)
    yield
    harness.node.destroy_subscription(reader)


@contextmanager
def _paused(harness: Harness) -> Iterator[None]:
    harness.call(SetBool, "enable", SetBool.Request(data=False))
    yield
    harness.cause_is_gone()
    harness.call(SetBool, "enable", SetBool.Request(data=True))


@contextmanager
def _reset_again_and_again(harness: Harness) -> Iterator[None]:
    for _ in range(20):
        harness.call(Trigger, "reset", Trigger.Request())
        time.sleep(0.05)
    yield


def _cycles(*transitions: str, times: int) -> Inject:
    @contextmanager
    def inject(harness: Harness) -> Iterator[None]:
        for _ in range(times):
            for transition in transitions:
                if not harness.change_state(harness.segmenter, transition):
                    raise FaultError(f"{transition} has failed; see {harness.segmenter.log}")
        yield

    return inject


def _refused(name: str, what: str, inject: Inject, answer: str, **expected: Any) -> Fault:
    """A request that is refused; the caller, the log and /diagnostics are told why. Masks go on."""
    return Fault(name, what, inject, Masks.OF_GOAL, log=answer, diagnostics=answer, answer=answer, **expected)


FAULTS = (
    _refused("goal_empty", "a goal without words", _goal("", "   "), "a goal must be a sentence"),
    _refused("goal_huge", "a goal of a megabyte", _goal("ball " * 200_000), "a goal may have 300 characters"),
    _refused(
        "goal_emoji",
        "a goal of emoji",
        _goal("\U0001f916\U0001f534", "\U0001f469\u200d\U0001f680"),
        "no word at all|does not know",
    ),
    _refused(
        "goal_other_scripts",
        "goals in scripts that the model cannot read",
        _goal("红色的球", "الكرة الحمراء", "לכדור האדום", "красный мяч"),
        "no word at all|does not know",
    ),
    _refused("goal_control_characters", "a goal with control characters", _goal("the red\nball\x07"), "U\\+000A"),
    _refused(
        "goal_for_other_camera", "a goal for a camera that is not there", _goal("the blue can", camera="rear"), "rear"
    ),
    _refused("goal_object_taken", "a goal for an object that another goal has", _same_object_twice, "belongs to goal"),
    _refused("goals_hundred", "100 goals, one after the other", _hundred_goals, "goals are set; clear one"),
    Fault("goals_churn", "40 goals are set and cleared at once", _goal_churn, Masks.OF_GOAL),
    Fault(
        "goal_while_inactive",
        "a goal while the segmenter is inactive; then it is activated",
        _goal_while_inactive,
        Masks.NONE,
        log="set_goal rejected: the segmenter is inactive",
        diagnostics="not active .inactive.",
        answer="is inactive, not active",
    ),
    _refused(
        "clear_unknown",
        "an unknown goal is cleared",
        _asked(ClearGoal, "clear_goal", ClearGoal.Request(goal_id="no such goal")),
        "goal id 'no such goal' is not set",
    ),
    _refused(
        "remove_unknown",
        "an unknown object is removed",
        _asked(RemoveObject, "remove_object", RemoveObject.Request(object_id="no such object")),
        "no object 'no such object'",
    ),
    _refused(
        "pointed_mask_of_other_size",
        "add_objects with a mask of another size",
        _asked(AddObjects, "add_objects", _pointed(mask_object_ids=["thing"], masks=[_mask(64, 48)])),
        "64",
    ),
    _refused(
        "pointed_at_old_image",
        "add_objects for an image of an hour ago",
        _asked(
            AddObjects,
            "add_objects",
            _pointed(
                request_header=Header(stamp=conversions.time_message(1_000_000_000)),
                bbox_object_ids=["thing"],
                bbox_coords=[_box(100.0, 40.0)],
            ),
        ),
        "is not cached",
    ),
    _refused(
        "pointed_nowhere",
        "add_objects with NaN, and far outside the image",
        _asked(
            AddObjects,
            "add_objects",
            _pointed(bbox_object_ids=["thing"], bbox_coords=[_box(math.nan, 40.0)]),
            _pointed(point_object_ids=["thing"], point_coords=[Point(x=-9e9, y=5.0)]),
        ),
        "is not one|outside",
    ),
    _refused(
        "question",
        "a question in words that the model does not know",
        _asked(Ask, "ask", Ask.Request(question="is the drawer open?")),
        "does not know .drawer., .open.",
    ),
    Fault(
        "parameter_nonsense",
        "NaN, out of range, other types, read-only and unknown parameters",
        _nonsense_parameters,
        Masks.OF_GOAL,
        answer="range|read.only|not declared",  # by rclpy, which does not tell the node
    ),
    Fault("action_cancelled", "the action is cancelled while it runs", _action_cancelled, Masks.OF_GOAL),
    Fault(
        "action_client_killed",
        "the action's client is killed; another one comes",
        _action_client_killed,
        Masks.OF_GOAL,
    ),
    Fault(
        "reader_hangs", "a reliable reader of the masks is stopped (SIGSTOP)", _reader_hangs, Masks.OF_GOAL, least_s=5.0
    ),
    Fault("readers_come_and_go", "30 subscribers, each for 50 ms", _readers_come_and_go, Masks.OF_GOAL),
    Fault(
        "reader_incompatible",
        "a subscriber wants old masks (transient local)",
        _reader_wants_more,
        Masks.OF_GOAL,
        log="a subscriber of .*mask wants another DURABILITY",
        diagnostics="a subscriber of .*mask wants another DURABILITY",
    ),
    Fault(
        "images_paused",
        "images are switched off and on (~/enable)",
        _paused,
        Masks.ANY,
        diagnostics="paused by ~/enable",
    ),
    Fault("resets", "20 resets in a row", _reset_again_and_again, Masks.COME),
    Fault(
        "activation_cycles",
        "deactivate and activate under load, 5 times",
        _cycles("deactivate", "activate", times=5),
        Masks.ANY,
    ),
    Fault(
        "requests_flood",
        "300 requests to one service as fast as they are answered",
        _asked(ClearGoal, "clear_goal", *[ClearGoal.Request(goal_id="no such goal")] * 300),
        Masks.OF_GOAL,
        log="more than .* times per second",
        diagnostics="requests refused by limits: [1-9]",
        answer="more than .* times per second",
    ),
    Fault(
        "configuration_cycles",
        "deactivate, clean up, configure and activate under load, twice",
        _cycles("deactivate", "cleanup", "configure", "activate", times=2),
        Masks.ANY,
        loses_goals=True,
    ),
)
