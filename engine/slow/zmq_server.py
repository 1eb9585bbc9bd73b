# SPDX-License-Identifier: Apache-2.0
"""The reasoner process: answers requests, one at a time. Console script `virst-reasoner`.

`ReasonerServer` binds an address for any number of sessions; `PoolMember` joins a pool that serves them (zmq_pool.py).
Two threads: the one that calls `run` owns the socket and says that it is alive even while the other one computes.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
import zmq

from virst_engine.config import METHOD_WINDOWS, METHODS, EngineConfig, ModelParameters, ReasonerParameters
from virst_engine.errors import VirstError, WireError
from virst_engine.slow import wire
from virst_engine.slow.pool import BEAT_S
from virst_engine.slow.process import RareWarnings, Waker, process_name, stopped_by_signals
from virst_engine.slow.reasoner import Reasoner, refusal
from virst_engine.slow.request_queue import RequestQueue, Waiting
from virst_engine.slow.zmq_endpoint import (
    REFUSED,
    Connection,
    Role,
    add_robot_keys,
    authenticate,
    bind,
    bound_memory,
    check_endpoint,
    make_curve_keys,
    receive,
    sole_owner,
    use_own_keys,
    use_server_keys,
)
from virst_engine.slow.zmq_pool import serve_pool
from virst_engine.types import ReasonerRequest

logger = logging.getLogger(__name__)

QUEUED_PER_PEER = 4  # messages that ZeroMQ buffers for or from one client
LAST_REQUEST_S = 3.0  # how long a stopping server waits for the request that is being computed
POOL_SILENT_S = 5.0  # then a member says in its log that nobody hears it


class ReasonerServer:
    """Binds at once, so that an address in use is found before weights are loaded; `run` then serves.

    Use as a context manager, or call `close`. Only `stop` may be called from another thread or a signal handler.
    """

    def __init__(self, endpoint: str, *, model: str = "", curve_keys: str = "") -> None:
        """`model` is told to clients (see `weights_identity`) and may be set until `run`.

        Raises EndpointError when the address is malformed, taken or not permitted, or keys are missing.
        """
        curve_keys = check_endpoint(endpoint, curve_keys)
        self.model = model
        self._endpoint = endpoint
        self._name = process_name()
        self._changed = threading.Condition()  # guards the three below
        self._waiting = RequestQueue()
        self._done: deque[tuple[bytes, list[wire.Buffer]]] = deque()
        self._busy_since_s: float | None = None
        self._is_stopping = False
        self._dropped = 0
        self._complaints = RareWarnings(logger)
        self._worker: threading.Thread | None = None
        self._waker = Waker()
        with ExitStack() as stack:
            stack.callback(self._waker.close)
            context = zmq.Context()
            stack.callback(context.destroy, linger=0)
            self._socket = self._open(context, stack, curve_keys)
            self._resources = stack.pop_all()

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], stack: ExitStack, curve_keys: str) -> zmq.Socket[bytes]:
        stack.enter_context(sole_owner(self._endpoint))
        if curve_keys:
            stack.enter_context(authenticate(context, curve_keys))
        socket = stack.enter_context(context.socket(zmq.ROUTER))
        bound_memory(socket, QUEUED_PER_PEER)
        socket.router_mandatory = True  # an unreachable client is an error here, not a silent loss
        if curve_keys:
            use_server_keys(socket, curve_keys, Role.ROBOT)
        bind(socket, self._endpoint)
        return socket

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
        poller.register(self._waker, zmq.POLLIN)
        while not self._is_stopping:
            ready = dict(poller.poll(self._beat()))
            if self._waker.fileno() in ready:
                self._waker.clear()
            if self._socket in ready:
                self._receive()
            self._send_done()

    def stop(self) -> None:
        """Let `run` return soon. The request that is being computed is not answered any more."""
        self._is_stopping = True  # no lock: a signal handler may interrupt the thread that holds it
        self._waker.wake()

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
        return self._waker.wakeup_fd

    def _beat(self) -> int | None:
        """Milliseconds until it must be called again, None for ever."""
        return None

    def _receive(self) -> None:
        try:
            client, parts = self._receive_parts()
        except zmq.Again:
            return
        try:
            self._accept(client, wire.decode(parts))
        except WireError as error:
            self._dropped += 1
            self._complaints.warning("dropped a message (%d since the start): %s", self._dropped, error)
            self._send(client, wire.encode(wire.Refusal(str(error))))

    def _receive_parts(self) -> tuple[bytes, list[memoryview]]:
        client, *parts = receive(self._socket, envelope=1)
        return bytes(client), parts

    def _accept(self, client: bytes, message: wire.Message) -> None:
        match message:
            case wire.Hello():
                self._send(client, wire.encode(self._heartbeat()))
            case ReasonerRequest():
                self._enqueue(Waiting(client, message, time.monotonic()))
            case wire.Cancel():
                with self._changed:
                    self._waiting.cancel(client, message.goal_id)
            case _:
                raise WireError(f"kind: a client does not send {type(message).__name__}")

    def _heartbeat(self) -> wire.Heartbeat:
        busy_since_s = self._busy_since_s
        busy_s = 0.0 if busy_since_s is None else time.monotonic() - busy_since_s
        return wire.Heartbeat(self.model, busy_s, self._dropped, self._name)

    def _enqueue(self, new: Waiting) -> None:
        with self._changed:
            given_way = self._waiting.put(new)
            length = len(self._waiting)
            self._changed.notify_all()
        for waiting in given_way:
            self._complaints.warning("refused a request: %d are waiting", length)
            error = f"the reasoner is overloaded, {length} requests wait; set fewer goals or start a pool of reasoners"
            self._send(waiting.client, wire.encode(refusal(waiting.request, error)))

    def _send_done(self) -> None:
        while self._done:
            self._send(*self._done.popleft())

    def _send(self, client: bytes, parts: list[wire.Buffer]) -> None:
        try:
            self._socket.send_multipart([client, *parts], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:  # gone (EHOSTUNREACH), or it does not read what it asked for (EAGAIN)
            self._complaints.warning("a message to a client was dropped: %s", error)

    def _work(self, reasoner: Reasoner) -> None:
        while True:
            with self._changed:
                while not len(self._waiting) and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                waiting = self._waiting.take()
                assert waiting is not None, "nobody else takes"
                self._busy_since_s = time.monotonic()
            parts = _answer(reasoner, waiting)
            with self._changed:
                self._busy_since_s = None
                self._done.append((waiting.client, parts))
            self._waker.wake()


class PoolMember(ReasonerServer):
    """A reasoner that joins the pool at `endpoint`, which need not be there yet; `run` then answers its requests."""

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], stack: ExitStack, curve_keys: str) -> zmq.Socket[bytes]:
        self._next_beat_s = 0.0
        self._heard_s = 0.0
        self._is_heard, self._is_refused = True, False
        socket = context.socket(zmq.DEALER)
        stack.callback(socket.close, linger=100)  # ms, so that the farewell can leave
        bound_memory(socket, QUEUED_PER_PEER)
        if curve_keys:
            use_own_keys(socket, curve_keys, Role.REASONER)
        self._connection = Connection(socket, self._endpoint)
        stack.callback(self._connection.close)
        return socket

    def run(self, reasoner: Reasoner) -> None:
        """Join, and answer until `stop`. Whatever `reasoner.answer` raises becomes an answer that says so."""
        self._heard_s = time.monotonic()
        super().run(reasoner)

    def close(self) -> bool:
        if self._worker is not None and not self._socket.closed:  # else it never joined
            self._try_to_send(wire.encode(wire.Leave()))
        return super().close()

    def _beat(self) -> int:
        now_s = time.monotonic()
        for event in self._connection.events():
            if event & REFUSED and not self._is_refused:  # it is asked again every other second
                logger.warning(
                    "the pool at %s does not accept our keys; give --curve-keys the folder that it was started with, "
                    "or copy our reasoner.key into that one",
                    self._endpoint,
                )
            self._is_refused = self._is_refused if event == zmq.EVENT_DISCONNECTED else bool(event & REFUSED)
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + BEAT_S
            if not self._done:  # an answer that does not find its way must not lose its place to heartbeats
                self._try_to_send(wire.encode(self._heartbeat()))
        is_heard = now_s - self._heard_s < POOL_SILENT_S
        if is_heard != self._is_heard:
            self._is_heard = is_heard
            if is_heard:
                logger.info("the pool at %s is there", self._endpoint)
            else:
                logger.warning(
                    "no pool answers at %s; start it with virst-reasoner --pool, with the same keys", self._endpoint
                )
        return max(1, round((self._next_beat_s - now_s) * 1e3))

    def _receive_parts(self) -> tuple[bytes, list[memoryview]]:
        parts = receive(self._socket)
        self._heard_s = time.monotonic()
        return b"", parts

    def _accept(self, client: bytes, message: wire.Message) -> None:
        if not isinstance(message, wire.Hello):  # which says that the pool is there; heartbeats come without asking
            super()._accept(client, message)

    def _send_done(self) -> None:
        if self._done and (self._try_to_send(self._done[0][1]) or not self._is_heard):
            self._done.popleft()

    def _send(self, client: bytes, parts: list[wire.Buffer]) -> None:
        self._try_to_send(parts)

    def _try_to_send(self, parts: list[wire.Buffer]) -> bool:
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:  # not connected, or the pool does not read
            return False
        return True


def _answer(reasoner: Reasoner, waiting: Waiting) -> list[wire.Buffer]:
    request = waiting.request
    queued_ms = (time.monotonic() - waiting.since_s) * 1e3
    try:
        answer = reasoner.answer(request)
        return wire.encode(replace(answer, timings_ms={"queue": queued_ms, **answer.timings_ms}))
    except VirstError as error:
        logger.debug("goal %a was not answered: %s", request.goal_id, error)  # asked again and again, and it is told
        return wire.encode(refusal(request, str(error)))
    except Exception as error:  # the process outlives any single request
        logger.exception("the reasoner failed on goal %a", request.goal_id)
        return wire.encode(refusal(request, f"the reasoner failed ({type(error).__name__}: {error}); see its log"))


def serve(
    load: Callable[[], Reasoner],
    endpoint: str,
    *,
    identify: Callable[[], str] = str,
    curve_keys: str = "",
    joins_pool: bool = False,
) -> bool:
    """Bind, load, answer until SIGTERM or SIGINT; for the main thread. False when a last computation did not end.

    `identify` names the weights that `load` has loaded, for the clients; the default names none. With `joins_pool`,
    `endpoint` is the address at which a pool expects its reasoners.
    """
    server = (PoolMember if joins_pool else ReasonerServer)(endpoint, curve_keys=curve_keys)
    with stopped_by_signals(server):
        try:
            reasoner, server.model = load(), identify()
            with_model = f" with {server.model}" if server.model else ""
            logger.info("%s %s%s", "joining the pool at" if joins_pool else "answering at", endpoint, with_model)
            server.run(reasoner)
        finally:
            has_ended = server.close()
    return has_ended


class LogLevel(Enum):
    """Choices of --log-level; the names are those of the logging module."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _threads(cpus: str) -> int:
    """All of the CPUs that were named, else half of those that are there."""
    there = len(os.sched_getaffinity(0))
    return there if cpus else max(1, there // 2)


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def _command(
    endpoint: Annotated[
        str, typer.Option(help="address for segmenters: ipc:///path or tcp://host:port; not used with --join")
    ] = ReasonerParameters().endpoint,
    pool: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="run no model; hand requests to the reasoners that join at this address (ipc:// or tcp://)",
        ),
    ] = "",
    join: Annotated[
        str, typer.Option(metavar="ADDRESS", help="work for the pool that expects its reasoners there")
    ] = "",
    model: Annotated[str, typer.Option(help="model to run")] = ModelParameters().name,
    weights: Annotated[str, typer.Option(help="safetensors file, or folder of virst-7b; empty = the shipped one")] = "",
    memory_budget_gib: Annotated[
        float,
        typer.Option(min=0, help="virst-7b: memory of the device that it may take; 0 = what a GPU has free"),
    ] = 0.0,
    weight_bits: Annotated[
        int,
        typer.Option(
            help="virst-7b: of each weight of the language model's layers; 16 = as stored, 8 = int8, 4 = nf4 (both "
            "need bitsandbytes)"
        ),
    ] = 16,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help=f"how sentences become prompts: {', '.join(METHODS)}")
    ] = ReasonerParameters().method,
    reasoner_weights: Annotated[
        str, typer.Option(help="visa, tempvrs: safetensors file of the reasoner; empty = the shipped one")
    ] = "",
    top_k: Annotated[
        int, typer.Option(min=0, help="tempvrs: clips whose slow frames become anchors; 0 = the model's number")
    ] = 0,
    detector: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="grounding: folder of a zero-shot detector; empty = the shipped one"),
    ] = "",
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="grounding: score from which an object is there; 0 = the usual one"),
    ] = 0.0,
    boxes: Annotated[
        int,
        typer.Option(min=1, max=wire.MAX_BOXES, help="grounding: most boxes that make up one object"),
    ] = 1,
    device: Annotated[str, typer.Option(help="torch device, for example cpu or cuda:0")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = half of the cores, or all of --cpus")] = 0,
    nice: Annotated[
        int | None,
        typer.Option(min=0, max=19, help="how far to step back behind other processes; 10, or 0 with --pool"),
    ] = None,
    cpus: Annotated[str, typer.Option(metavar="N,...", help="the only CPUs to use, for example 2,3; empty = any")] = "",
    curve_keys: Annotated[str, typer.Option(help="folder of CURVE keys, needed for tcp://")] = "",
    make_keys: Annotated[
        str, typer.Option("--make-curve-keys", metavar="FOLDER", help="write a new set of CURVE keys there and exit")
    ] = "",
    add_robot: Annotated[
        str,
        typer.Option(metavar="NAME", help="make a key for one more robot in the folder of --curve-keys and exit"),
    ] = "",
    log_level: Annotated[LogLevel, typer.Option(help="least important messages to show")] = LogLevel.INFO,
) -> None:
    """Answer the requests of segmenters: a sentence and a clip become prompts."""
    logging.basicConfig(level=log_level.name, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if nice is None:
        nice = 0 if pool else 10
    os.nice(nice)  # first: the threads of torch and ZeroMQ inherit it
    has_ended = True
    try:
        if cpus:  # before any thread begins: it is inherited, too
            stay_on(cpus)
        if pool and join:
            raise ValueError("--pool and --join are two processes: the pool, and each reasoner that joins it")
        if make_keys:
            make_curve_keys(Path(make_keys))
        elif add_robot:
            if not curve_keys:
                raise ValueError("--add-robot needs --curve-keys, the folder that --make-curve-keys has made")
            of_robot = add_robot_keys(Path(curve_keys), add_robot)
            typer.echo(f"copy {of_robot} to the robot and name it in its reasoner.curve_keys")
        elif pool:
            serve_pool(endpoint, pool, curve_keys=curve_keys)
        else:
            parameters = ModelParameters(name=model, weights=weights, device=device, threads=threads or _threads(cpus))
            asked = ReasonerParameters(
                method=method,
                weights=reasoner_weights,
                memory_budget_gib=memory_budget_gib,
                weight_bits=weight_bits,
            )
            EngineConfig(model=parameters, reasoner=asked)  # refuses what does not go together
            if detector and method != "grounding":
                raise ValueError("--detector is for --method grounding")
            if reasoner_weights and method not in METHOD_WINDOWS:
                raise ValueError(f"--reasoner-weights is for --method {' or '.join(METHOD_WINDOWS)}")
            if top_k and method != "tempvrs":
                raise ValueError("--top-k is for --method tempvrs")
            has_ended = serve(
                lambda: _load(parameters, asked, top_k, detector, threshold, boxes),
                join or endpoint,
                identify=lambda: _identify(parameters, asked),
                curve_keys=curve_keys,
                joins_pool=bool(join),
            )
    except (VirstError, ValueError) as error:
        typer.echo(f"virst-reasoner: {error}", err=True)
        raise typer.Exit(1) from error
    if not has_ended:  # a computation that cannot be interrupted must not keep the process alive
        logging.shutdown()
        os._exit(0)


def stay_on(cpus: str) -> None:
    """Let this process and the threads that it starts run on these CPUs only, like `0,2`. Raises ValueError."""
    try:
        wanted = {int(number) for number in cpus.split(",")}
        os.sched_setaffinity(0, wanted)
    except (ValueError, OSError) as error:
        there = ",".join(str(number) for number in sorted(os.sched_getaffinity(0)))
        raise ValueError(f"--cpus: {cpus!r} cannot be had ({error}); this process may use {there}") from error


def _load(
    parameters: ModelParameters, asked: ReasonerParameters, top_k: int, detector: str, threshold: float, boxes: int
) -> Reasoner:
    from virst_engine.weights import load_grounding, load_reasoner  # takes seconds; --help should not

    if asked.method == "grounding":
        return load_grounding(detector, parameters, threshold=threshold, most_boxes=boxes)
    return load_reasoner(
        parameters,
        asked.method,
        asked.weights,
        top_k=top_k,
        memory_budget_gib=asked.memory_budget_gib,
        weight_bits=asked.weight_bits,
    )


def _identify(parameters: ModelParameters, asked: ReasonerParameters) -> str:
    from virst_engine.weights import reasoner_identity

    return reasoner_identity(parameters, asked.method, asked.weights)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
