# SPDX-License-Identifier: Apache-2.0
"""A ROS graph per test, in a domain of its own, over the real middleware."""

import fcntl
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ros.ros_graph import FakeEngine, Graph

PROFILE = Path(__file__).parents[2] / "launch" / "fastdds_profile.xml"
os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(PROFILE)  # read when the first node of a process is made


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


@pytest.fixture
def graph(domain_id: int) -> Iterator[Graph]:
    pytest.importorskip("rclpy")
    pytest.importorskip("virst_msgs.msg")
    made = Graph(domain_id)
    yield made
    made.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()
