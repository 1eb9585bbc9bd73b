# SPDX-License-Identifier: Apache-2.0
"""Scenes spread over real processes: results, what a worker raises, and a worker that dies."""

import os

import pytest

from virst_engine.errors import SceneError, VirstError
from virst_engine.evaluate.workers import in_processes


def squared(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def failing(number: int) -> int:
    if number == 2:
        raise SceneError("scene 2 has no light")
    return number


def dying(number: int) -> int:
    os._exit(9)  # as the kernel does to a process that takes too much memory


def test_every_scene_is_worked_on_once_elsewhere() -> None:
    found = dict(in_processes(squared, {scene: (scene,) for scene in range(5)}, 2))
    assert {scene: result for scene, (result, _) in found.items()} == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}
    assert os.getpid() not in {process for _, process in found.values()}


def test_what_a_worker_raises_is_raised_here() -> None:
    with pytest.raises(SceneError, match="scene 2 has no light"):
        list(in_processes(failing, {scene: (scene,) for scene in range(5)}, 1))


def test_a_worker_that_dies_is_told_with_a_remedy() -> None:
    with pytest.raises(VirstError, match=r"ended unexpectedly.*use fewer --workers"):
        list(in_processes(dying, {0: (0,), 1: (1,)}, 1))
