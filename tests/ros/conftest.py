# SPDX-License-Identifier: Apache-2.0
"""A ROS graph per test, in a domain of its own, over the real middleware."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ros.ros_graph import FakeEngine, Graph
from virst_ros.demo.ros_domain import free_ros_domain

PROFILE = Path(__file__).parents[2] / "launch" / "fastdds_profile.xml"
os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(PROFILE)  # read when the first node of a process is made


@pytest.fixture
def domain_id() -> Iterator[int]:
    """A ROS domain that no other test or demo on this machine uses now."""
    with free_ros_domain() as free:
        yield free


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
