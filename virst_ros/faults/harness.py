# SPDX-License-Identifier: Apache-2.0
"""The stage of the faults: a ROS domain with a scripted camera, a segmenter, its reasoner, and a second one of each.

Segmenters and reasoners are processes, started by their console scripts; camera and listener are in this process.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import LoggingSeverity
from rclpy.signals import SignalHandlerOptions
from virst_msgs.srv import ClearGoal, ListGoals, SetGoal

from virst_ros.demo.child_processes import ChildProcesses
from virst_ros.demo.recorded_run import load_recording
from virst_ros.demo.ros_domain import free_ros_domain
from virst_ros.fast_dds import use_profile
from virst_ros.faults.fault import FaultError, Reasoner
from virst_ros.faults.scripted_camera import ScriptedCamera
from virst_ros.faults.scripted_reasoner import ScriptedReasoner
from virst_ros.faults.segmenter import Segmenter, wait_until
from virst_ros.spinning import spin_until_shutdown

GOAL, OBJECT_NUMBER = "the red ball", 0  # of the recorded run
PAIR = ("left", "right")  # cameras of one segmenter
START_S = 60.0  # for loading models on a busy machine
CALL_S, REPEAT_S = 10.0, 2.0
GOOD_IOU, GOOD_MASKS = 0.5, 3  # masks in a row that overlap the truth by this: the object is followed
TRANSITIONS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
    "cleanup": Transition.TRANSITION_CLEANUP,
}


class Harness:
    """A context manager: entering starts everything and waits until the goal's object is followed.

    Args:
        folder: for logs, sockets and files of faults.
        seed: of what faults choose at random.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.answers: list[str] = []  # to the requests of the fault at hand
        self.ended_s: float | None = None  # when its cause was gone, if it says so
        self._started = 0
        self._clients: dict[str, Any] = {}
        self._stack = ExitStack()
        self._reasoner: tuple[Reasoner, Any] | None = None
        self._behind: subprocess.Popen[bytes] | None = None

    # Beginning and end

    def __enter__(self) -> "Harness":
        with ExitStack() as stack:
            use_profile()
            domain_id = stack.enter_context(free_ros_domain())
            self._children = stack.enter_context(ChildProcesses(self.folder / "logs"))
            os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
            self._environment = {
                **os.environ,
                "ROS_DOMAIN_ID": str(domain_id),
                "ROS_LOG_DIR": str(self.folder / "ros_log"),
                "PYTHONUNBUFFERED": "1",
            }
            self._context = rclpy.Context()
            rclpy.init(context=self._context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
            stack.callback(self._context.try_shutdown)
            self.node = rclpy.create_node("faults", context=self._context)
            stack.callback(self.node.destroy_node)
            self.node.get_logger().set_level(LoggingSeverity.ERROR)  # of what faults do to the graph on purpose
            self.camera = ScriptedCamera(self.node, load_recording(), OBJECT_NUMBER)
            self.segmenter = Segmenter(self.node, "segmenter", self.camera)
            self.spare = Segmenter(self.node, "spare", self.camera)
            # A segmenter of two cameras: what is done to one of them must not disturb the other.
            self.left, self.right = (
                ScriptedCamera(self.node, load_recording(), OBJECT_NUMBER, prefix=f"/{name}") for name in PAIR
            )
            self.disturbed = Segmenter(self.node, "pair", self.left, view=PAIR[0])
            self.bystander = Segmenter(self.node, "pair", self.right, view=PAIR[1], told_of=PAIR[0])
            executor = SingleThreadedExecutor(context=self._context)
            executor.add_node(self.node)
            spinning = threading.Thread(target=spin_until_shutdown, args=(executor,), daemon=True)
            spinning.start()
            stack.callback(spinning.join, CALL_S)
            stack.callback(executor.shutdown)
            for camera in (self.left, self.right):
                camera.unplug()
            for camera in (self.camera, self.left, self.right):
                camera.start()
                stack.callback(camera.stop)
            stack.callback(self._end_scripted)
            self.settle(Reasoner.PROCESS)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def settle(self, reasoner: Reasoner, *, two_cameras: bool = False) -> None:
        """Until everything is as it was at the beginning, whatever the last fault has left. Raises FaultError.

        `two_cameras`: the segmenter of two cameras, where it runs, is kept.
        """
        self.answers, self.ended_s = [], None
        self.end_spare()
        if not two_cameras:
            self.end_pair()
        self.use_reasoner(reasoner)
        if not self.segmenter.is_alive:
            self.start_segmenter(self.segmenter)
        if self.state(self.segmenter) != "active":
            for transition in ("configure", "activate"):
                self.change_state(self.segmenter, transition)
        if self.segmenter.goal_id not in self.goal_ids(self.segmenter):
            self.set_base_goal(self.segmenter)
        self.clear_goals(keep=self.segmenter.goal_id)
        self.answers = []
        if not wait_until(lambda: self.is_followed(self.segmenter, time.monotonic() - 1.0), START_S):
            raise FaultError(
                f"the segmenter does not follow {GOAL!r} within {START_S:g} s even without a fault; see "
                f"{self.segmenter.log}"
            )
        # What is not over yet would be told of this fault, or not be told again.
        wait_until(lambda: not (self.segmenter.reasoner_problem or self.segmenter.goal_problem), CALL_S)

    def is_followed(self, segmenter: Segmenter, since_s: float) -> bool:
        return self.followed_s(segmenter, since_s) is not None

    def followed_s(self, segmenter: Segmenter, since_s: float) -> float | None:
        """When the first of GOOD_MASKS good masks in a row came, all after `since_s`; None: not yet."""
        row: list[float] = []
        for mask in segmenter.masks_since(since_s):
            row = [*row, mask.received_s] if mask.is_known and mask.iou >= GOOD_IOU else []
            if len(row) == GOOD_MASKS:
                return row[0]
        return None

    def cause_is_gone(self) -> None:
        """The fault ends now; what comes is recovery."""
        self.ended_s = time.monotonic()

    # Processes

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
        """Start a child; its output goes to `log_path`. Raises ChildFailed."""
        self._started += 1
        own = {**self._environment, **(environment or {})}
        return self._children.start(f"{self._started:03d}_{name}", command, own)

    def log_path(self, name: str, *, of_next: bool = False) -> Path:
        """Where the child that was started last writes, or the next one will; of that name."""
        return self._children.log_folder / f"{self._started + of_next:03d}_{name}.log"

    def start_segmenter(self, segmenter: Segmenter, *arguments: str, **parameters: Any) -> None:
        """`arguments`: before the parameters, after --ros-args. Returns at once for the spare one."""
        chosen = {"use_depth": True, "diagnostics_period_s": 0.25, "reasoner.endpoint": self.endpoint}
        chosen |= {name.replace("__", "."): value for name, value in parameters.items()}
        given = [word for name, value in chosen.items() for word in ("-p", f"{name}:={_yaml(value)}")]
        command = [
            *console_script("segmenter", "virst_ros.segmenter_node"),
            "--ros-args",
            "-r",
            f"__node:={segmenter.name}",
        ]
        segmenter.judge("", 0)
        segmenter.process = self.start(segmenter.name, [*command, *arguments, *given])
        segmenter.log = self.log_path(segmenter.name)

    def start_spare(self, *arguments: str, active: bool = True, **parameters: Any) -> Segmenter:
        """A second segmenter, with its own parameters; it ends with the fault."""
        self.start_segmenter(self.spare, *arguments, **parameters)
        if active and not wait_until(lambda: self.state(self.spare) == "active", START_S):
            raise FaultError(f"the second segmenter has not become active; see {self.spare.log}")
        return self.spare

    def start_pair(self) -> None:
        """The segmenter of two cameras runs, and follows the object in both."""
        if not self.bystander.is_alive:
            for camera in (self.left, self.right):
                camera.plug_in()
            self.start_segmenter(self.bystander, cameras=list(PAIR), use_depth=False)
            self.disturbed.process, self.disturbed.log = self.bystander.process, self.bystander.log
            if not wait_until(lambda: self.state(self.bystander) == "active", START_S):
                raise FaultError(f"the segmenter of two cameras has not become active; see {self.bystander.log}")
            instance_id = self.set_base_goal(self.bystander)
            self.disturbed.judge(self.bystander.goal_id, instance_id)
        begin_s = time.monotonic()
        for segmenter in (self.disturbed, self.bystander):
            if not wait_until(lambda segmenter=segmenter: self.is_followed(segmenter, begin_s), START_S):
                raise FaultError(f"the object is not followed in both cameras; see {segmenter.log}")

    def end_pair(self) -> None:
        for camera in (self.left, self.right):
            camera.unplug()
        self._end(self.bystander)
        self.disturbed.process = None

    def end_spare(self) -> None:
        self._end(self.spare)

    def _end(self, segmenter: Segmenter) -> None:
        process = segmenter.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(CALL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        segmenter.process = None

    # Reasoners

    @property
    def endpoint(self) -> str:
        """Where segmenters expect theirs."""
        return f"ipc://{self.folder}/reasoner"

    @property
    def reasoner(self) -> "subprocess.Popen[bytes]":
        """The process that answers directly."""
        assert self._reasoner is not None
        assert self._reasoner[0] is Reasoner.PROCESS
        return self._reasoner[1]  # type: ignore[no-any-return]

    @property
    def scripted(self) -> ScriptedReasoner:
        assert self._reasoner is not None
        assert self._reasoner[0] is Reasoner.SCRIPTED
        return self._reasoner[1]  # type: ignore[no-any-return]

    def use_reasoner(self, wanted: Reasoner) -> None:
        """Let it answer at `endpoint`, and nobody else."""
        if self._reasoner is not None:
            kind, now = self._reasoner
            if kind is wanted and (kind is Reasoner.SCRIPTED or now.poll() is None):
                return
            self.end_reasoner()
        if wanted is Reasoner.PROCESS:
            self.start_reasoner()
            return
        behind = f"{self.endpoint}_behind"
        if self._behind is None or self._behind.poll() is not None:
            self._behind = self.run_reasoner(behind)
        self._reasoner = (Reasoner.SCRIPTED, ScriptedReasoner(self.endpoint, behind))

    def start_reasoner(self, weights: str = "") -> None:
        """Start the process at `endpoint`, and wait until it has loaded its model."""
        self._reasoner = (Reasoner.PROCESS, self.run_reasoner(self.endpoint, weights))

    def end_reasoner(self) -> None:
        """Nobody answers at `endpoint` any more."""
        assert self._reasoner is not None
        kind, now = self._reasoner
        if kind is Reasoner.SCRIPTED:
            now.close()
        else:
            end_process(now)
        self._reasoner = None

    def _end_scripted(self) -> None:
        if self._reasoner is not None and self._reasoner[0] is Reasoner.SCRIPTED:
            self.end_reasoner()

    def run_reasoner(self, endpoint: str, weights: str = "") -> "subprocess.Popen[bytes]":
        """One more reasoner process, which has loaded its model; it ends with the harness at the latest."""
        command = [*console_script("virst-reasoner", "virst_engine.slow.zmq_server"), "--endpoint", endpoint]
        process = self.start("reasoner", [*command, *(("--weights", weights) if weights else ())])
        log = self.log_path("reasoner")

        def is_ready() -> bool:
            return "answering at" in log.read_text(errors="replace") or process.poll() is not None

        if not wait_until(is_ready, START_S) or process.poll() is not None:
            raise FaultError(f"a reasoner has not started within {START_S:g} s; see {log}")
        return process  # type: ignore[no-any-return]

    # Requests

    def call(
        self,
        kind: type,
        service: str,
        request: Any,
        segmenter: Segmenter | None = None,
        timeout_s: float = CALL_S,
        *,
        repeat: bool = False,
    ) -> Any:
        """The response of a service; its message is noted among `answers`. Raises FaultError when none comes.

        `repeat`: ask again while nobody answers. The request may have gone to a process that was killed, which the
        middleware believes alive for a while, or its answer come before the middleware has joined both ends.
        """
        segmenter = segmenter or self.segmenter
        name = f"/{segmenter.name}/{service}"
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, name)
        client = self._clients[name]
        if not wait_until(lambda: client.service_is_ready() or not segmenter.is_alive, timeout_s):
            raise FaultError(f"nobody offers {name}")
        end_s = time.monotonic() + timeout_s
        future = _asked(client, request, segmenter, min(timeout_s, REPEAT_S) if repeat else timeout_s)
        while repeat and not future.done() and segmenter.is_alive and time.monotonic() < end_s:
            future = _asked(client, request, segmenter, REPEAT_S)
        if not future.done():
            reason = f"has not answered within {timeout_s:g} s" if segmenter.is_alive else "cannot answer: it has died"
            raise FaultError(f"{name} {reason}; see {segmenter.log}")
        response = future.result()
        if getattr(response, "message", ""):
            self.answers.append(response.message)
        return response

    def set_goal(self, sentence: str, segmenter: Segmenter | None = None) -> Any:
        return self.call(SetGoal, "set_goal", SetGoal.Request(goal=sentence), segmenter)

    def set_base_goal(self, segmenter: Segmenter) -> int:
        """The goal whose masks are judged; returns its value in them. Raises FaultError when it is refused."""
        response = self.set_goal(GOAL, segmenter)
        if not response.success:
            raise FaultError(f"the goal {GOAL!r} was refused: {response.message}")
        goals = self.call(ListGoals, "list_goals", ListGoals.Request(), segmenter, repeat=True).goals
        own = next(goal for goal in goals if goal.goal_id == response.goal_id)
        segmenter.judge(response.goal_id, own.instance_ids[0])
        return int(own.instance_ids[0])

    def clear_goals(self, keep: str = "") -> None:
        """Clear all goals of the segmenter but one."""
        for goal_id in self.goal_ids(self.segmenter):
            if goal_id != keep:
                self.call(ClearGoal, "clear_goal", ClearGoal.Request(goal_id=goal_id))

    def goal_ids(self, segmenter: Segmenter) -> list[str]:
        response = self.call(ListGoals, "list_goals", ListGoals.Request(), segmenter, repeat=True)
        return [goal.goal_id for goal in response.goals]

    def state(self, segmenter: Segmenter) -> str:
        """The lifecycle state's label. Raises FaultError while nobody answers."""
        response = self.call(GetState, "get_state", GetState.Request(), segmenter, timeout_s=START_S, repeat=True)
        return str(response.current_state.label)

    def change_state(self, segmenter: Segmenter, transition: str) -> bool:
        """Whether the transition succeeded."""
        request = ChangeState.Request(transition=Transition(id=TRANSITIONS[transition]))
        return bool(self.call(ChangeState, "change_state", request, segmenter, timeout_s=START_S).success)


def _asked(client: Any, request: Any, segmenter: Segmenter, wait_s: float) -> Any:
    """The future of one request, after waiting for its answer as long as it may come."""
    future = client.call_async(request)
    wait_until(lambda: future.done() or not segmenter.is_alive, wait_s, period_s=0.005)
    return future


def end_process(process: "subprocess.Popen[bytes]") -> None:
    """Ask it to end, and insist."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(CALL_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def console_script(name: str, module: str) -> list[str]:
    """The console script of this installation, or its module where the scripts are not installed."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    return [found] if found else [sys.executable, "-m", module]


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
