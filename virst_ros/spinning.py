# SPDX-License-Identifier: Apache-2.0
"""Spin an executor until it is told to end."""

from rclpy.executors import Executor, ExternalShutdownException, InvalidHandle, ShutdownException


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
