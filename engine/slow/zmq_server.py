# SPDX-License-Identifier: Apache-2.0
"""The reasoner process: answers the requests of any number of sessions, one at a time. Console script `virst-reasoner`.

Two threads: the one that calls `ReasonerServer.run` owns the socket and replies to hellos even while the other one
computes. Per client and goal only the newest waiting request is kept.
"""

import logging
import os
import signal
import socket as unix
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated

import typer
import zmq
from zmq.auth.thread import ThreadAuthenticator

from virst_engine.config import ModelParameters, ReasonerParameters
from virst_engine.errors import VirstError, WireError
from virst_engine.slow import wire
from virst_engine.slow.reasoner import Reasoner, refusal
from virst_engine.slow.zmq_endpoint import (
    bind,
    bound_memory,
    check_endpoint,
    make_curve_keys,
    receive,
    sole_owner,
    use_server_keys,
)
from virst_engine.types import ReasonerRequest

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # requests
MAX_WAITING_BYTES = 1 << 30
QUEUED_PER_PEER = 4  # messages that ZeroMQ buffers for or from one client
COMPLAIN_EVERY_S = 1.0  # garbage may come fast, the log stays readable
LAST_REQUEST_S = 3.0  # how long a stopping server waits for the request that is being computed


@dataclass(frozen=True)
class _Waiting:
    client: bytes  # ZeroMQ's name of the connection
    request: ReasonerRequest
    since_s: float

    @property
    def size(self) -> int:
        clip = self.request.clip
        return clip.frames_rgb_u8.nbytes + clip.fusion.nbytes


class ReasonerServer:
    """Binds at once, so that an address in use is found before weights are loaded; `run` then serves.

    Use as a context manager, or call `close`. Only `stop` may be called from another thread or a signal handler.
    """

    def __init__(self, endpoint: str, *, model: str = "", curve_keys: str = "") -> None:
        """`model` is told to clients (see `weights_identity`) and may be set until `run`.

        Raises EndpointError when the address is malformed, taken or not permitted, or keys are missing.
        """
        check_endpoint(endpoint, curve_keys)
        self.model = model
        self._changed = threading.Condition()  # guards the five below
        self._waiting: dict[tuple[bytes, str], _Waiting] = {}
        self._waiting_bytes = 0
        self._done: deque[tuple[bytes, list[wire.Buffer]]] = deque()
        self._busy_since_s: float | None = None
        self._is_stopping = False
        self._dropped = 0
        self._next_complaint_s = 0.0
        self._worker: threading.Thread | None = None
        with ExitStack() as stack:
            self._woken, self._waker = unix.socketpair()
            for end in (self._woken, self._waker):
                end.setblocking(False)
                stack.callback(end.close)
            stack.enter_context(sole_owner(endpoint))
            context = zmq.Context()
            stack.callback(context.destroy, linger=0)
            self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
            stack.callback(self._socket.close, linger=0)
            bound_memory(self._socket, QUEUED_PER_PEER)
            self._socket.router_mandatory = True  # an unreachable client is an error here, not a silent loss
            if curve_keys:
                use_server_keys(self._socket, curve_keys)
                authenticator = ThreadAuthenticator(context, log=logger)
                authenticator.start()
                stack.callback(authenticator.stop)
                authenticator.configure_curve(domain="*", location=curve_keys)  # only public keys of the folder
            bind(self._socket, endpoint)
            self._resources = stack.pop_all()

    def __enter__(self) -> "ReasonerServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, reasoner: Reasoner) -> None:
        """Serve until `stop`. Whatever `reasoner.answer` raises becomes an answer that says so."""
        self._worker = threading.Thread(target=self._work, args=(reasoner,), name="reasoner", daemon=True)
        self._worker.start()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while not self._is_stopping:
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
                self._send_done()
            if self._socket in ready:
                self._receive()

    def stop(self) -> None:
        """Let `run` return soon. The request that is being computed is not answered any more."""
        self._is_stopping = True  # no lock: a signal handler may interrupt the thread that holds it
        self._wake()

    def close(self) -> bool:
        """Give the address back; False when the computation of the last request did not end within LAST_REQUEST_S."""
        self._is_stopping = True
        if self._worker is not None:
            with self._changed:
                self._changed.notify_all()
            self._worker.join(LAST_REQUEST_S)
        self._resources.close()
        return self._worker is None or not self._worker.is_alive()

    @property
    def wakeup_fd(self) -> int:
        """A byte written here makes `run` look up; for signal.set_wakeup_fd."""
        return self._waker.fileno()

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:  # full of wake-ups already
            return

    def _receive(self) -> None:
        try:
            client, *parts = receive(self._socket, envelope=1)
        except zmq.Again:
            return
        try:
            self._accept(bytes(client), wire.decode(parts))
        except WireError as error:
            self._dropped += 1
            if time.monotonic() >= self._next_complaint_s:
                self._next_complaint_s = time.monotonic() + COMPLAIN_EVERY_S
                logger.warning("dropped a message (%d since the start): %s", self._dropped, error)
            self._send(bytes(client), wire.encode(wire.Refusal(str(error))))

    def _accept(self, client: bytes, message: wire.Message) -> None:
        match message:
            case wire.Hello():
                busy_since_s = self._busy_since_s
                busy_s = 0.0 if busy_since_s is None else time.monotonic() - busy_since_s
                self._send(client, wire.encode(wire.Heartbeat(self.model, busy_s, self._dropped)))
            case ReasonerRequest():
                self._enqueue(_Waiting(client, message, time.monotonic()))
            case wire.Cancel():
                self._cancel(client, message.goal_id)
            case _:
                raise WireError(f"kind: a client does not send {type(message).__name__}")

    def _enqueue(self, new: _Waiting) -> None:
        key = (new.client, new.request.goal_id)
        with self._changed:
            old = self._waiting.get(key)
            waiting_bytes = self._waiting_bytes + new.size - (old.size if old else 0)
            is_full = (old is None and len(self._waiting) >= MAX_WAITING) or waiting_bytes > MAX_WAITING_BYTES
            if not is_full:
                self._waiting[key] = new  # in the old one's place: asking often must not mean waiting for ever
                self._waiting_bytes = waiting_bytes
                self._changed.notify_all()
        if is_full:
            logger.warning("refused a request: %d are waiting", len(self._waiting))
            error = (
                f"the reasoner is overloaded, {len(self._waiting)} requests wait; set fewer goals or start another one"
            )
            self._send(new.client, wire.encode(refusal(new.request, error)))

    def _cancel(self, client: bytes, goal_id: str) -> None:
        with self._changed:
            for key in [key for key in self._waiting if key[0] == client and goal_id in ("", key[1])]:
                self._waiting_bytes -= self._waiting.pop(key).size

    def _send_done(self) -> None:
        with self._changed:
            done = list(self._done)
            self._done.clear()
        for client, parts in done:
            self._send(client, parts)

    def _send(self, client: bytes, parts: list[wire.Buffer]) -> None:
        try:
            self._socket.send_multipart([client, *parts], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:  # gone (EHOSTUNREACH), or it does not read what it asked for (EAGAIN)
            logger.info("a message to a client was dropped: %s", error)

    def _work(self, reasoner: Reasoner) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                waiting = self._waiting.pop(next(iter(self._waiting)))
                self._waiting_bytes -= waiting.size
                self._busy_since_s = time.monotonic()
            parts = _answer(reasoner, waiting)
            with self._changed:
                self._busy_since_s = None
                self._done.append((waiting.client, parts))
            self._wake()


def _answer(reasoner: Reasoner, waiting: _Waiting) -> list[wire.Buffer]:
    request = waiting.request
    queued_ms = (time.monotonic() - waiting.since_s) * 1e3
    try:
        answer = reasoner.answer(request)
        return wire.encode(replace(answer, timings_ms={"queue": queued_ms, **answer.timings_ms}))
    except VirstError as error:
        logger.debug("goal %s was not answered: %s", request.goal_id, error)  # asked again and again, and it is told
        return wire.encode(refusal(request, str(error)))
    except Exception as error:  # the process outlives any single request
        logger.exception("the reasoner failed on goal %s", request.goal_id)
        return wire.encode(refusal(request, f"the reasoner failed ({type(error).__name__}: {error}); see its log"))


def serve(
    load: Callable[[], Reasoner], endpoint: str, *, identify: Callable[[], str] = str, curve_keys: str = ""
) -> bool:
    """Bind, load, answer until SIGTERM or SIGINT; for the main thread. False when a last computation did not end.

    `identify` names the weights that `load` has loaded, for the clients; the default names none.
    """
    server = ReasonerServer(endpoint, curve_keys=curve_keys)

    def stop(signal_number: int, _: FrameType | None) -> None:
        logger.info("stopping on %s", signal.Signals(signal_number).name)
        server.stop()

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    # A signal that arrives just before `run` waits, or in another thread, does not interrupt the waiting; this does.
    earlier_fd = signal.set_wakeup_fd(server.wakeup_fd, warn_on_full_buffer=False)
    try:
        reasoner, server.model = load(), identify()
        logger.info("answering at %s%s", endpoint, f" with {server.model}" if server.model else "")
        server.run(reasoner)
    finally:
        signal.set_wakeup_fd(earlier_fd)
        has_ended = server.close()
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return has_ended


class LogLevel(Enum):
    """Choices of --log-level; the names are those of the logging module."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _half_of_the_cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def _command(
    endpoint: Annotated[str, typer.Option(help="address to serve: ipc:///path or tcp://host:port")] = (
        ReasonerParameters().endpoint
    ),
    model: Annotated[str, typer.Option(help="model to run")] = ModelParameters().name,
    weights: Annotated[str, typer.Option(help="safetensors file; empty = the shipped one")] = "",
    device: Annotated[str, typer.Option(help="torch device, for example cpu or cuda:0")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = half of the cores")] = 0,
    nice: Annotated[int, typer.Option(min=0, max=19, help="how far to step back behind other processes")] = 10,
    curve_keys: Annotated[str, typer.Option(help="folder of CURVE keys, needed for tcp://")] = "",
    make_keys: Annotated[
        str, typer.Option("--make-curve-keys", metavar="FOLDER", help="write a new set of CURVE keys there and exit")
    ] = "",
    log_level: Annotated[LogLevel, typer.Option(help="least important messages to show")] = LogLevel.INFO,
) -> None:
    """Answer the requests of segmenters: a sentence and a clip become prompts."""
    logging.basicConfig(level=log_level.name, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.nice(nice)  # first: the threads of torch and ZeroMQ inherit it
    try:
        if make_keys:
            make_curve_keys(Path(make_keys))
            return
        parameters = ModelParameters(
            name=model, weights=weights, device=device, threads=threads or _half_of_the_cores()
        )
        has_ended = serve(
            lambda: _load(parameters), endpoint, identify=lambda: _identify(parameters), curve_keys=curve_keys
        )
    except (VirstError, ValueError) as error:
        typer.echo(f"virst-reasoner: {error}", err=True)
        raise typer.Exit(1) from error
    if not has_ended:  # a computation that cannot be interrupted must not keep the process alive
        logging.shutdown()
        os._exit(0)


def _load(parameters: ModelParameters) -> Reasoner:
    from virst_engine.weights import load_reasoner  # takes seconds; --help and a wrong endpoint should not

    return load_reasoner(parameters)


def _identify(parameters: ModelParameters) -> str:
    from virst_engine.weights import weights_identity

    return weights_identity(parameters)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
