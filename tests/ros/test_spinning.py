# SPDX-License-Identifier: Apache-2.0
"""A signal may shut the context down at any moment, also while rclpy builds a wait set on it."""

from types import SimpleNamespace

import pytest

from virst_ros.spinning import RCLError, spin_until_shutdown


def failing_executor(*, context_is_valid: bool) -> SimpleNamespace:
    def spin() -> None:
        raise RCLError("failed to initialize wait set: the given context is not valid")

    return SimpleNamespace(spin=spin, context=SimpleNamespace(ok=lambda: context_is_valid))


def test_a_context_that_ends_under_the_wait_set_ends_the_spin():
    spin_until_shutdown(failing_executor(context_is_valid=False))


def test_another_error_of_the_middleware_is_not_hidden():
    with pytest.raises(RCLError):
        spin_until_shutdown(failing_executor(context_is_valid=True))
