# SPDX-License-Identifier: Apache-2.0
"""A ROS domain of one's own on this machine."""

import fcntl
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from virst_engine.errors import VirstError

DOMAINS = range(1, 101)  # above 101 the ports of Fast DDS meet those of other programs on Linux


@contextmanager
def free_ros_domain() -> Iterator[int]:
    """A domain id that no other user of this function on this machine has now. Raises VirstError when all are taken."""
    candidates = list(DOMAINS)
    random.SystemRandom().shuffle(candidates)
    for candidate in candidates:
        # The name that the tests use too: a demo and a test run never share a domain.
        path = Path(tempfile.gettempdir()) / f"virst_test_domain_{candidate}.lock"
        try:
            lock = path.open("a")
        except OSError:  # another user's
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield candidate
            return
    raise VirstError("all ROS domains from 1 to 100 are taken; end other demos, or set ROS_DOMAIN_ID yourself")
