# SPDX-License-Identifier: Apache-2.0
"""Run a node, or spin an executor, until it is told to end."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import rclpy
import rclpy.logging
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import (
    Executor,
    ExternalShutdownException,
    InvalidHandle,
    ShutdownException,
    SingleThreadedExecutor,
)
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.impl.rcutils_logger import RcutilsLogger

from virst_ros.heap import use_one_heap
from virst_ros.log_bridge import LogBridge

RCLError = rclpy_implementation.RCLError
RCLInvalidROSArgsError = rclpy_implementation.RCLInvalidROSArgsError


class OwnNode(Protocol):
    """An rclpy node that has something to release."""

    failure: str  # why it ended by itself; empty otherwise

    def get_logger(self) -> RcutilsLogger: ...
    def close(self) -> None: ...
    def destroy_node(self) -> None: ...


def run_node(make: Callable[[], OwnNode], name: str, arguments: list[str] | None) -> int:
    """Run one node until it is told to stop. The exit status is 1 when it failed, or its arguments cannot be used."""
    use_one_heap()
    try:
        rclpy.init(args=arguments)
    except (RCLError, RCLInvalidROSArgsError) as error:
        reason = " ".join(str(error).split())
        rclpy.logging.get_logger(name).fatal(
            f"cannot start: {reason}. Look at what follows --ros-args, and at the parameter file that it names"
        )
        return 1
    node = None
    try:
        try:
            node = make()
        except (InvalidParameterValueException, InvalidParameterTypeException, ValueError) as error:
            rclpy.logging.get_logger(name).fatal(f"a parameter is not acceptable: {error}")
            return 1
        # Every callback is short but configure; inference and filming have threads of their own. rclpy's
        # MultiThreadedExecutor wakes hundreds of times a second where this one wakes for each message, and takes the
        # interpreter from inference.
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        with ExitStack() as bridges:
            for source in ("virst_engine", "virst_ros"):
                bridges.enter_context(LogBridge(node.get_logger(), source))
            spin_until_shutdown(executor)
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 1 if node.failure else 0


def spin_until_shutdown(executor: Executor) -> None:
    """Serve the executor's nodes until SIGINT, SIGTERM or a shutdown of the context or the executor."""
    while True:
        try:
            executor.spin()
            return
        except InvalidHandle:
            # rclpy 9.1: an endpoint with QoS events that another thread destroys (as deactivate does) while the
            # executor builds its wait set ends the spin. The next wait set no longer has it.
            continue
        except (KeyboardInterrupt, ExternalShutdownException, ShutdownException):
            return
        except RCLError:
            # The same end: a signal shuts the context down between rclpy's look at it and the wait set built on it.
            if executor.context.ok():
                raise
            return
