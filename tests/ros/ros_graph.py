# SPDX-License-Identifier: Apache-2.0
"""What tests of nodes share: a graph over the real middleware, and a fake engine."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 20.0  # ten times what a busy machine needs


def wait_until(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of `condition`; the test fails when there is none in time."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"nothing within {timeout_s} s")


class Spinning:
    """A node served by a single-threaded executor in the background, as the nodes' main programs do."""

    def __init__(self, node: Any) -> None:
        from rclpy.executors import SingleThreadedExecutor

        from virst_ros.spinning import spin_until_shutdown

        self.node = node
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(node)
        self._thread = threading.Thread(target=spin_until_shutdown, args=(self._executor,))
        self._thread.start()

    def stop(self) -> None:
        self._executor.shutdown(timeout_sec=TIMEOUT_S)
        # Before the interpreter ends: a thread in rclpy at exit ends in "terminate called without an active exception".
        self._thread.join(TIMEOUT_S)
        if hasattr(self.node, "close"):
            self.node.close()
        self.node.destroy_node()


class Graph:
    """Nodes under test and a node of the test beside them."""

    def __init__(self, domain_id: int) -> None:
        import rclpy

        self.domain_id = domain_id
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain_id)
        self.node = rclpy.create_node("tester", context=self.context)
        self._spinning = [Spinning(self.node)]

    def add(self, make_node: Callable[..., Any], *arguments: Any, **parameters: Any) -> Any:
        """Make a node in this graph, with parameters, and spin it."""
        from rclpy.parameter import Parameter

        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in parameters.items()]
        node = make_node(*arguments, context=self.context, parameter_overrides=overrides)
        self._spinning.append(Spinning(node))
        return node

    def collect(self, kind: type, topic: str, qos: Any = 10) -> list[Any]:
        """A list that fills with the messages of a topic."""
        messages: list[Any] = []
        self.node.create_subscription(kind, topic, messages.append, qos)
        return messages

    def collect_log(self, node: Any) -> list[Any]:
        """A list that fills with the lines of /rosout, once those of `node` are known to arrive."""
        from rcl_interfaces.msg import Log

        lines = self.collect(Log, "/rosout", 100)

        def arrives() -> bool:
            node.get_logger().info("the test listens")
            return any(line.name == node.get_name() and line.msg == "the test listens" for line in list(lines))

        wait_until(arrives)
        return lines

    def publisher(self, kind: type, topic: str, qos: Any = 10) -> Any:
        return self.node.create_publisher(kind, topic, qos)

    def action_client(self, kind: type, name: str) -> Any:
        """Of a node of its own, spun once the client is made: rclpy shows an unfinished one to the executor."""
        import rclpy
        from rclpy.action import ActionClient

        node = rclpy.create_node("action_tester", context=self.context)
        client = ActionClient(node, kind, name)
        self._spinning.append(Spinning(node))
        assert client.wait_for_server(TIMEOUT_S), f"no action {name}"
        return client

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(TIMEOUT_S), f"no service {name}"
        future = client.call_async(request)
        wait_until(future.done)
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        for spinning in reversed(self._spinning):
            spinning.stop()
        self.context.try_shutdown()
        # rclpy's lifecycle nodes end with the garbage. One that ends while another of its name runs takes that one's
        # publisher of /rosout with it, which goes by the name within a process.
        gc.collect()


class FakeSession:
    """A session whose object is whatever is bright in the picture, for every goal; slow or failing when told to."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.failure: Exception | None = None
        self.failing_stamps: dict[int, Exception] = {}
        self.stepped_stamps: list[int] = []
        self.closed = False
        self.resets = 0
        self.reconfigured: list[Any] = []
        self._goals: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        self._numbered = 0

    def set_goal(
        self, sentence: str, *, object_id: str = "", camera: str = "", replace: bool = False, max_instances: int = 0
    ) -> Any:
        from virst_engine.errors import BadGoal
        from virst_engine.types import Goal

        if not sentence.strip():
            raise BadGoal("the goal is empty; say what to segment")
        if replace:
            self._goals.clear()
        self._numbered += 1
        goal_id = f"goal_{self._numbered}"
        self._goals[goal_id] = Goal(goal_id, object_id or goal_id, sentence, camera, self._numbered, max_instances or 1)
        return self._goals[goal_id]

    def goal_states(self, camera: str = "") -> dict[str, Any]:
        from virst_engine.types import ObjectState

        return {goal_id: self._states.get(goal_id, ObjectState.SEARCHING) for goal_id in self._goals}

    def known_objects(self) -> dict[str, Any]:
        from virst_engine.types import KnownObject

        states = self.goal_states()
        return {
            goal.goal_id: (KnownObject(goal.object_id, goal.instance_id, states[goal.goal_id]),)
            for goal in self.goals()
        }

    def remove_object(self, object_id: str) -> None:
        self.clear_goal(next(goal.goal_id for goal in self.goals() if goal.object_id == object_id))

    def clear_goal(self, goal_id: str) -> None:
        from virst_engine.errors import UnknownGoal

        if goal_id not in self._goals:
            raise UnknownGoal(f"no goal {goal_id!r} is set; see list_goals")
        del self._goals[goal_id]

    def goals(self) -> tuple[Any, ...]:
        return tuple(self._goals.values())

    def step(self, frame: Any) -> Any:
        from virst_engine.types import FrameResult, ObjectResult, ObjectState

        if self.step_s:
            time.sleep(self.step_s)
        failure = self.failing_stamps.get(frame.stamp_ns, self.failure)
        if failure is not None:
            raise failure
        self.stepped_stamps.append(frame.stamp_ns)
        mask = frame.image_rgb_u8.max(axis=2) > 128
        state = ObjectState.TRACKING if mask.any() else ObjectState.LOST
        self._states = dict.fromkeys(self._goals, state)
        objects = tuple(
            ObjectResult(goal.object_id, goal.goal_id, goal.instance_id, state, mask, 0.75 * mask.any(), 1.5, 0.25)
            for goal in self.goals()
            if goal.camera in ("", frame.camera)
        )
        return FrameResult(frame.stamp_ns, len(self.stepped_stamps), frame.camera, objects, {"image_encoder": 2.0})

    def check_frame(self, frame: Any) -> None:
        pass

    def skips(self, frame: Any, *, waited: bool | None = None) -> bool:
        return False

    def step_together(self, frames: Any) -> list[Any]:
        return [self.step(frame) for frame in frames]

    def reconfigure(self, config: Any) -> None:
        self.reconfigured.append(config)

    def reset(self, camera: str = "") -> None:
        self.resets += 1

    def close(self) -> None:
        self.closed = True


def words(answer: str) -> Any:
    """What an engine gives for a question that is answered at once."""
    from concurrent.futures import Future

    made: Future[str] = Future()
    made.set_result(answer)
    return made


class FakeReasonerClient:
    """The part of a reasoner's client that the node asks."""

    problem = ""

    def status(self) -> str:
        return self.problem


class FakeEngine:
    """Stands for `load_engine`: call it with a configuration. Keeps what it made for the test to look at."""

    def __init__(self) -> None:
        self.session = FakeSession()
        self.reasoner = FakeReasonerClient()
        self.configurations: list[Any] = []
        self.failure: Exception | None = None
        self.add_object: Any = None  # what the engine does with boxes, points and masks
        self.ask: Any = None

    def __call__(self, config: Any, cameras: Any = ()) -> Any:
        from virst_ros.diagnostics import LoadedModel
        from virst_ros.loading import LoadedEngine

        if self.failure is not None:
            raise self.failure
        self.configurations.append(config)
        if self.session.closed:
            self.session = FakeSession()
        model = LoadedModel("fake", "fake.safetensors", "Fake", "cpu")
        reasoners = dict.fromkeys(cameras or ("",), self.reasoner)
        return LoadedEngine(self.session, reasoners, model, self.check_goal, self.add_object, self.ask)

    def check_goal(self, sentence: str) -> None:
        from virst_engine.errors import BadGoal

        if "xyzzy" in sentence:
            raise BadGoal("this model does not know 'xyzzy'; say it in other words")
