# SPDX-License-Identifier: Apache-2.0
"""Several reasoner processes, on one or several machines, behind one address: `virst-reasoner --pool ADDRESS`.

Two addresses: robots connect to one as to a single reasoner, reasoners (`virst-reasoner --join ADDRESS`) to the other.
Keys of robots open the first only, so a robot cannot pose as a reasoner. One thread moves messages between the two
sockets; who gets what is decided in pool.py. Tensors are passed on without being copied.
"""

import logging
import secrets
import time
from contextlib import ExitStack
from types import TracebackType

import zmq

from virst_engine.errors import EndpointError, WireError
from virst_engine.slow import wire
from virst_engine.slow.pool import BEAT_S, Letter, Pool
from virst_engine.slow.process import RareWarnings, Waker, process_name, stopped_by_signals
from virst_engine.slow.zmq_endpoint import (
    Role,
    authenticate,
    bind,
    bound_memory,
    check_endpoint,
    receive,
    sole_owner,
    use_server_keys,
)

logger = logging.getLogger(__name__)

IO_THREADS = 4  # of ZeroMQ: they encrypt and decrypt, each for its share of the connections
QUEUED_PER_ROBOT = 2  # messages that ZeroMQ buffers for or from one peer
QUEUED_PER_REASONER = 8
MESSAGES_AT_ONCE = 64  # of the reasoners, before it is a robot's turn again
REPORT_EVERY_S = 60.0


class PoolServer:
    """Binds both addresses at once; `run` then serves. Use as a context manager, or call `close`.

    Only `stop` may be called from another thread or a signal handler.
    """

    def __init__(self, robots: str, reasoners: str, *, curve_keys: str = "") -> None:
        """`robots` and `reasoners` are the addresses for each; `curve_keys` is for those that are tcp://.

        Raises EndpointError when an address is malformed, taken or not permitted, or keys are missing.
        """
        if robots == reasoners:
            raise EndpointError(f"{robots}: --pool and --endpoint must be two addresses, for reasoners and for robots")
        robots_keys, reasoners_keys = (check_endpoint(endpoint, curve_keys) for endpoint in (robots, reasoners))
        # Tickets of an earlier pool may still be answered to this one.
        self._pool = Pool(process_name(), first_ticket=secrets.randbits(48))
        self._is_stopping = False
        self._complaints = RareWarnings(logger)
        self._next_tick_s = 0.0
        self._next_report_s = time.monotonic() + REPORT_EVERY_S
        self._reported = ""
        self._waker = Waker()
        with ExitStack() as stack:
            stack.callback(self._waker.close)
            for endpoint in (robots, reasoners):
                stack.enter_context(sole_owner(endpoint))
            context = zmq.Context(IO_THREADS)
            stack.callback(context.destroy, linger=0)
            if robots_keys or reasoners_keys:
                stack.enter_context(authenticate(context, curve_keys))
            self._robots = _router(context, stack, robots, robots_keys, Role.ROBOT, QUEUED_PER_ROBOT)
            self._reasoners = _router(context, stack, reasoners, reasoners_keys, Role.REASONER, QUEUED_PER_REASONER)
            self._resources = stack.pop_all()

    def __enter__(self) -> "PoolServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self) -> None:
        """Serve until `stop`."""
        poller = zmq.Poller()
        for watched in (self._robots, self._reasoners, self._waker):
            poller.register(watched, zmq.POLLIN)
        while not self._is_stopping:
            until_tick_s = self._next_tick_s - time.monotonic()
            ready = dict(poller.poll(max(0, round(until_tick_s * 1e3))))
            if self._waker.fileno() in ready:
                self._waker.clear()
            # Reasoners first: a flood of robots must not make them look silent. One message of a robot at a time;
            # ZeroMQ takes the robots in turn.
            for _ in range(MESSAGES_AT_ONCE if self._reasoners in ready else 0):
                if not self._receive_from_reasoner():
                    break
            if self._robots in ready:
                self._receive_from_robot()
            if time.monotonic() >= self._next_tick_s:
                self._pool.tick(time.monotonic())
                self._next_tick_s = time.monotonic() + BEAT_S
                self._report()
            self._send_letters()

    def stop(self) -> None:
        """Let `run` return soon. Requests that are under way are lost; robots ask the next pool again."""
        self._is_stopping = True
        self._waker.wake()

    def close(self) -> None:
        """Give the addresses back."""
        self._resources.close()

    @property
    def wakeup_fd(self) -> int:
        """A byte written here makes `run` look up; for signal.set_wakeup_fd."""
        return self._waker.wakeup_fd

    def _receive_from_robot(self) -> None:
        try:
            peer, *parts = receive(self._robots, envelope=1)
        except zmq.Again:
            return
        client = bytes(peer)
        try:
            self._pool.robot_says(client, wire.decode(parts), time.monotonic())
        except WireError as error:
            self._complain("a robot", error)
            self._pool.letters.append(Letter(False, client, wire.Refusal(str(error))))

    def _receive_from_reasoner(self) -> bool:
        try:
            peer, *parts = receive(self._reasoners, envelope=1)
        except zmq.Again:
            return False
        member = bytes(peer)
        try:
            self._pool.reasoner_says(member, wire.decode(parts), time.monotonic())
        except WireError as error:
            self._complain("a reasoner", error)
            self._pool.ban(member, str(error), time.monotonic())
        return True

    def _complain(self, who: str, error: WireError) -> None:
        self._pool.dropped += 1
        self._complaints.warning("dropped a message of %s (%d since the start): %s", who, self._pool.dropped, error)

    def _send_letters(self) -> None:
        while self._pool.letters:
            letter = self._pool.letters.popleft()
            socket = self._reasoners if letter.to_member else self._robots
            try:
                parts = wire.encode(letter.message)
                socket.send_multipart([letter.peer, *parts], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                if not letter.to_member:  # gone (EHOSTUNREACH), or it does not read what it asked for (EAGAIN)
                    self._complaints.warning("a message to a robot was dropped: %s", error)
                elif error.errno == zmq.EHOSTUNREACH:
                    self._pool.lose(letter.peer, "is gone", time.monotonic())
                elif not isinstance(letter.message, wire.Hello):  # it does not read; its silence is noticed as well
                    self._pool.lose(letter.peer, "takes no request", time.monotonic())

    def _report(self) -> None:
        if time.monotonic() >= self._next_report_s:
            self._next_report_s = time.monotonic() + REPORT_EVERY_S
            if str(self._pool) != self._reported:
                self._reported = str(self._pool)
                logger.info("%s", self._reported)


def _router(
    context: zmq.Context[zmq.Socket[bytes]], stack: ExitStack, endpoint: str, curve_keys: str, role: Role, queued: int
) -> zmq.Socket[bytes]:
    socket = stack.enter_context(context.socket(zmq.ROUTER))
    bound_memory(socket, queued)
    socket.router_mandatory = True  # an unreachable peer is an error here, not a silent loss
    if curve_keys:
        use_server_keys(socket, curve_keys, role)
    bind(socket, endpoint)
    return socket


def serve_pool(robots: str, reasoners: str, *, curve_keys: str = "") -> None:
    """Bind and serve until SIGTERM or SIGINT; for the main thread. Raises EndpointError."""
    server = PoolServer(robots, reasoners, curve_keys=curve_keys)
    with stopped_by_signals(server), server:
        logger.info("robots at %s, reasoners at %s", robots, reasoners)
        server.run()
