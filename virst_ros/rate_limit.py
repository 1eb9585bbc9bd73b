# SPDX-License-Identifier: Apache-2.0
"""How often something may be asked: token buckets, one for each name. No ROS in it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Bucket:
    """Requests that may still be taken, as of a moment."""

    tokens: float
    at_s: float


class RateLimiter:
    """Takes `burst` requests of a name at once and `per_s` on average; each name has its own bucket.

    A refusal changes nothing, so a caller that goes on asking too often gets its share, and no less. Any thread may
    ask. Names are the program's own: a bucket is never given up.

    Args:
        now_s: a steady clock, seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def wait_s(self, name: str, per_s: float, burst: int) -> float:
        """0 when the request is taken; else refused, and the seconds until one would be taken.

        The limits may differ from call to call: what has gathered so far is cut to the new burst.
        """
        if not (per_s > 0 and burst >= 1):
            raise ValueError(f"a rate limit needs per_s > 0 and burst >= 1, got {per_s} and {burst}")
        now_s = self._now_s()
        with self._lock:
            bucket = self._buckets.setdefault(name, _Bucket(float(burst), now_s))
            gathered = max(0.0, now_s - bucket.at_s) * per_s
            bucket.tokens, bucket.at_s = min(float(burst), bucket.tokens + gathered), now_s
            if bucket.tokens >= 1.0:
                bucket.tokens -= 1.0
                return 0.0
            return (1.0 - bucket.tokens) / per_s
