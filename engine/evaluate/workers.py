# SPDX-License-Identifier: Apache-2.0
"""Scenes spread over processes, for evaluations and comparisons."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from virst_engine.errors import VirstError

Result = TypeVar("Result")


def in_processes(
    work: Callable[..., Result], arguments: Mapping[int, tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Result]]:
    """(scene, what `work` returns for its arguments), as they get done.

    `work` is a module-level function: it travels to the processes. What it raises is raised here, and ends all.
    Raises VirstError where a process ends by itself.
    """
    # spawn: neither torch's threads nor an OpenGL context survive a fork
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        waiting = {pool.submit(work, *of_scene): scene for scene, of_scene in arguments.items()}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise VirstError("a worker ended unexpectedly, perhaps for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
