# SPDX-License-Identifier: Apache-2.0
"""A ROS graph per test, in a domain of its own, over the real middleware."""

import fcntl
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture
def domain_id() -> Iterator[int]:
    """A ROS domain that no other test on this machine uses now."""
    candidates = list(range(1, 101))
    random.SystemRandom().shuffle(candidates)
    for candidate in candidates:
        path = Path(tempfile.gettempdir()) / f"virst_test_domain_{candidate}.lock"
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield candidate
            return
    pytest.fail("all ROS domains are taken")


class Graph:
    """Nodes under test and a node of the test beside them, spinning in the background."""

    def __init__(self, domain_id: int) -> None:
        import rclpy
        from rclpy.executors import MultiThreadedExecutor

        self.domain_id = domain_id
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain_id)
        self.executor = MultiThreadedExecutor(num_threads=6, context=self.context)
        self.node = rclpy.create_node("tester", context=self.context)
        self._under_test: list[Any] = []
        self.executor.add_node(self.node)
        self._spinning = threading.Thread(target=self._spin)
        self._spinning.start()

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        try:
            self.executor.spin()
        except ExternalShutdownException:
            return

    def add(self, make_node: Callable[..., Any], *arguments: Any, **parameters: Any) -> Any:
        """Make a node in this graph, with parameters, and spin it."""
        from rclpy.parameter import Parameter

        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in parameters.items()]
        node = make_node(*arguments, context=self.context, parameter_overrides=overrides)
        self._under_test.append(node)
        self.executor.add_node(node)
        return node

    def collect(self, kind: type, topic: str, qos: Any = 10) -> list[Any]:
        """A list that fills with the messages of a topic."""
        messages: list[Any] = []
        self.node.create_subscription(kind, topic, messages.append, qos)
        return messages

    def publisher(self, kind: type, topic: str, qos: Any = 10) -> Any:
        return self.node.create_publisher(kind, topic, qos)

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(TIMEOUT_S), f"no service {name}"
        future = client.call_async(request)
        wait_until(future.done)
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        for node in self._under_test:
            self.executor.remove_node(node)
            node.close()
        self.executor.shutdown(timeout_sec=TIMEOUT_S)
        # Before the interpreter ends: a thread in rclpy at exit ends in "terminate called without an active exception".
        self._spinning.join(TIMEOUT_S)
        for node in [*self._under_test, self.node]:
            node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture
def graph(domain_id: int) -> Iterator[Graph]:
    pytest.importorskip("rclpy")
    pytest.importorskip("virst_msgs.msg")
    made = Graph(domain_id)
    yield made
    made.close()
