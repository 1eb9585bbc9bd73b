# SPDX-License-Identifier: Apache-2.0
"""How the node's process uses memory."""

import ctypes

M_ARENA_MAX = -8  # malloc.h of glibc


def use_one_heap() -> bool:
    """Let all threads of this process share one heap, to be called before they start. False where that cannot be.

    By default each thread gets one of its own. Messages are made by one thread and freed by another, so that heaps grow
    at different times, and resident memory goes up in steps for an hour. Python's lock lets threads take turns anyway.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (AttributeError, OSError):  # another C library
        return False
