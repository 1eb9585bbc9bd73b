# SPDX-License-Identifier: Apache-2.0
"""A reasoner that passes requests on to a real one and its messages back, as bytes, so that a fault may change them."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import zmq

from virst_engine.slow.zmq_server import QUEUED_PER_PEER

RELEASE_S = 0.1  # between late answers when their fault has ended

Parts = list[bytes]
# What is sent in place of one message of the reasoner: for each, the delay in seconds and its parts.
Change = Callable[[Parts], Iterable[tuple[float, Parts]]]


def _due_s(late: tuple[float, int, bytes, Parts]) -> float:
    return late[0]


def kind_of(parts: Parts) -> str:
    """The kind of a message as wire.py writes it."""
    return str(msgpack.unpackb(parts[0])["kind"])


def rewritten(parts: Parts, **fields: Any) -> Parts:
    """The message with other fields in its header."""
    header = msgpack.unpackb(parts[0])
    return [msgpack.packb({**header, **fields}), *parts[1:]]


def field_of(parts: Parts, name: str) -> Any:
    return msgpack.unpackb(parts[0])[name]


class ScriptedReasoner:
    """Binds `endpoint`; each client has its own connection to the real reasoner at `behind`. A thread of its own."""

    def __init__(self, endpoint: str, behind: str) -> None:
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.linger = 0
        self._front.sndhwm = QUEUED_PER_PEER  # as the real one: what a client does not read is lost, not kept for it
        self._front.bind(endpoint)
        self._behind = behind
        self._clients: dict[bytes, zmq.Socket[bytes]] = {}
        self._change: Change | None = None
        self._is_mute = self._is_released = False
        self._floods: list[Parts] = []  # sent to every client, again and again
        self._later: list[tuple[float, int, bytes, Parts]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted reasoner", daemon=True)
        self._thread.start()

    @contextmanager
    def answering(self, change: Change) -> Iterator[None]:
        """Meanwhile answers (not heartbeats) become what `change` makes of them. What is late then comes at its end."""
        with self._lock:
            self._change = change
        try:
            yield
        finally:
            with self._lock:
                self._change = None
                self._is_released = True

    @contextmanager
    def beating(self, change: Change) -> Iterator[None]:
        """Meanwhile heartbeats become what `change` makes of them."""

        def only_heartbeats(parts: Parts) -> Iterable[tuple[float, Parts]]:
            return change(parts) if kind_of(parts) == "heartbeat" else [(0.0, parts)]

        with self._lock:
            self._change = _Everything(only_heartbeats)
        try:
            yield
        finally:
            with self._lock:
                self._change = None

    @contextmanager
    def mute(self) -> Iterator[None]:
        """Meanwhile nothing goes to the clients, and nothing of theirs is read."""
        self._is_mute = True
        try:
            yield
        finally:
            self._is_mute = False

    @contextmanager
    def flooding(self, messages: list[Parts]) -> Iterator[None]:
        """Meanwhile every client gets these as fast as it reads."""
        with self._lock:
            self._floods = messages
        try:
            yield
        finally:
            with self._lock:
                self._floods = []

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        for socket in self._clients.values():
            socket.close(linger=0)
        self._front.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._is_mute:
                time.sleep(0.02)
                continue
            poller = zmq.Poller()
            for socket in (self._front, *self._clients.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(1 if self._floods else 20))
            if self._front in ready:
                client, *parts = self._front.recv_multipart()
                self._behind_of(client).send_multipart(parts)
            for client, socket in self._clients.items():
                if socket in ready:
                    self._pass_on(client, socket.recv_multipart())
            self._send_due()

    def _behind_of(self, client: bytes) -> "zmq.Socket[bytes]":
        if client not in self._clients:
            socket = self._clients[client] = self._context.socket(zmq.DEALER)
            socket.connect(self._behind)
        return self._clients[client]

    def _pass_on(self, client: bytes, parts: Parts) -> None:
        with self._lock:
            change = self._change
        if change is None or (not isinstance(change, _Everything) and kind_of(parts) != "answer"):
            self._front.send_multipart([client, *parts])
            return
        for delay_s, each in change(parts):
            heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._numbers), client, each))

    def _send_due(self) -> None:
        with self._lock:
            floods, is_released, self._is_released = list(self._floods), self._is_released, False
        if is_released:  # one after the other, as a reasoner answers; of many at once, a client would get the first few
            now_s = time.monotonic()
            self._later = [
                (now_s + RELEASE_S * place, *late[1:]) for place, late in enumerate(sorted(self._later, key=_due_s))
            ]
        while self._later and self._later[0][0] <= time.monotonic():
            *_, client, parts = heapq.heappop(self._later)
            self._front.send_multipart([client, *parts])
        for client in self._clients if floods else ():
            for parts in floods:
                self._front.send_multipart([client, *parts])  # a ROUTER drops what a client does not read


class _Everything:
    """A change that is also asked about heartbeats."""

    def __init__(self, change: Change) -> None:
        self._change = change

    def __call__(self, parts: Parts) -> Iterable[tuple[float, Parts]]:
        return self._change(parts)
