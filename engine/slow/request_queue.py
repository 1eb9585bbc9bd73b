# SPDX-License-Identifier: Apache-2.0
"""The requests that wait for a reasoner: bounded, the newest per goal, and no client starves another.

Clients take turns, and within a client its goals do. When there is no room, the client that fills the queue most gives
way, so many requests or large ones harm whoever sends them. Not thread-safe.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from virst_engine.types import ReasonerRequest

MAX_WAITING = 256  # requests
MAX_WAITING_BYTES = 1 << 30


@dataclass(frozen=True)
class Waiting:
    client: bytes  # ZeroMQ's name of the connection
    request: ReasonerRequest
    since_s: float

    @property
    def nbytes(self) -> int:
        clip = self.request.clip
        return clip.frames_rgb_u8.nbytes + clip.fusion.nbytes


class RequestQueue:
    def __init__(self, max_waiting: int = MAX_WAITING, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self._max_waiting, self._max_bytes = max_waiting, max_bytes
        self._by_client: dict[bytes, dict[str, Waiting]] = {}  # in order of turns; the inner one by goal
        self._length = self._nbytes = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiting]:
        return (waiting for goals in self._by_client.values() for waiting in goals.values())

    def get(self, client: bytes, goal_id: str) -> Waiting | None:
        """The waiting request of this goal."""
        return self._by_client.get(client, {}).get(goal_id)

    def put(self, new: Waiting) -> list[Waiting]:
        """Add `new` in the place of the older request of its goal. What had to give way is returned, maybe `new`."""
        goals = self._by_client.setdefault(new.client, {})
        old = goals.get(new.request.goal_id)
        goals[new.request.goal_id] = new  # in the old one's place: asking often must not mean waiting for ever
        self._count(+1, new)
        if old is not None:
            self._count(-1, old)
        given_way = []
        while self._length > self._max_waiting or self._nbytes > self._max_bytes:
            # Who fills it most, and among equals the one who came last: the others were promised their place.
            client = max(reversed(self._by_client), key=self._share)
            given_way.append(self._remove(client, next(reversed(self._by_client[client]))))
        return given_way

    def put_back(self, waiting: Waiting) -> None:
        """Add one that was taken before all others, unless a newer one of its goal waits. Bounds do not hold for it."""
        goals = self._by_client.pop(waiting.client, {})
        if waiting.request.goal_id not in goals:
            goals = {waiting.request.goal_id: waiting, **goals}
            self._count(+1, waiting)
        self._by_client = {waiting.client: goals, **self._by_client}

    def take(self, is_wanted: Callable[[Waiting], bool] = lambda waiting: True) -> Waiting | None:
        """The next request that `is_wanted`; it is not in the queue any more, and its client's turn is over."""
        waiting = next(filter(is_wanted, self), None)
        if waiting is not None:
            self._remove(waiting.client, waiting.request.goal_id)
            if goals := self._by_client.pop(waiting.client, None):
                self._by_client[waiting.client] = goals
        return waiting

    def cancel(self, client: bytes, goal_id: str = "") -> None:
        """Drop the waiting request of this goal, or of all goals of the client."""
        for name in list(self._by_client.get(client, {})):
            if goal_id in ("", name):
                self._remove(client, name)

    def _remove(self, client: bytes, goal_id: str) -> Waiting:
        goals = self._by_client[client]
        waiting = goals.pop(goal_id)
        if not goals:
            del self._by_client[client]
        self._count(-1, waiting)
        return waiting

    def _count(self, sign: int, waiting: Waiting) -> None:
        self._length += sign
        self._nbytes += sign * waiting.nbytes

    def _share(self, client: bytes) -> float:
        waiting = self._by_client[client].values()
        return max(len(waiting) / self._max_waiting, sum(each.nbytes for each in waiting) / self._max_bytes)
