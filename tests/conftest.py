# SPDX-License-Identifier: Apache-2.0
"""What every test gets: checked shapes and types, fixed seeds, one thread, no process left behind.

Must be loaded before virst_engine is imported for the first time: shapes are checked by rewriting its modules as they
are imported.
"""

import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

import tests.type_checks

if any(name == "virst_engine" or name.startswith("virst_engine.") for name in sys.modules):
    raise RuntimeError("virst_engine was imported before tests/conftest.py, so its shapes would not be checked")
install_import_hook("virst_engine", f"{tests.type_checks.__name__}.checked")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests and other processes share a few cores
os.environ.setdefault("ROS_LOG_DIR", os.path.join(tempfile.gettempdir(), "virst_test_ros_log"))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

ROS_FIXTURES = {"graph", "domain_id"}  # of tests/ros/conftest.py


def _missing_for_ros() -> str:
    missing = [name for name in ("rclpy", "virst_msgs") if importlib.util.find_spec(name) is None]
    return f"no {' and no '.join(missing)} in this Python; ./scripts/setup installs them" if missing else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need, and skip with a reason those whose need is not met."""
    missing_for_ros = _missing_for_ros()
    for item in items:
        if ROS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ros)
        if item.get_closest_marker("ros") and missing_for_ros:
            item.add_marker(pytest.mark.skip(reason=missing_for_ros))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that torch can use"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_process_left() -> Iterator[None]:
    """End what tests started and lost, and fail for it: a forgotten node would disturb the next run."""
    yield
    left = [process for process in psutil.Process().children(recursive=True) if not _belongs_to_python(process)]
    commands = []
    for process in left:
        try:
            commands.append(" ".join(process.cmdline())[:200])
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
    assert not commands, f"tests left processes running: {commands}"


def _belongs_to_python(process: psutil.Process) -> bool:
    """multiprocessing's own helpers live until the interpreter ends; a zombie only waits for its parent."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True
    return "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command
