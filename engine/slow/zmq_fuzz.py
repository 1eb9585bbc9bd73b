# SPDX-License-Identifier: Apache-2.0
"""Damaged messages against every end of the border: nothing may crash, hang, or allocate beyond its bound.

    python -m virst_engine.slow.zmq_fuzz                         # 100,000 messages to each end, a minute or two
    python -m virst_engine.slow.zmq_fuzz --messages 1000 --ends client,server --seed 7 --json figures.json

The ends are real ones in processes of their own, and every BATCH messages they must still do their work:

    decode         the decoder alone; memory is measured for each message, as Python allocates it
    server         a reasoner process, as a robot reaches it
    client         a session's client, as its reasoner reaches it
    pool           a pool, as a robot reaches it
    pool_reasoner  a pool, as a reasoner that joins it reaches it
    member         a reasoner of a pool, as the pool reaches it
    stream         a pool's sockets below the messages: damaged byte streams, with and without CURVE (one connection
                   each, and a hundredth of the number)

The memory of a process is its peak (VmHWM of Linux) above what it had before.
"""

import argparse
import contextlib
import json
import os
import random
import socket as tcp
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zmq

from virst_engine.errors import VirstError, WireError
from virst_engine.slow import wire
from virst_engine.slow.msgpack_mutations import mutate, sample_messages
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_endpoint import make_curve_keys
from virst_engine.slow.zmq_pool import serve_pool
from virst_engine.slow.zmq_server import serve
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

DECODE_BOUND = 128 * wire.MAX_HEADER_BYTES  # bytes: the Python objects of one header; tensors are never copied
# Bytes, of a process: some hundred waiting requests of this size, what ZeroMQ buffers, Python's own waste. A damaged
# header may declare a tensor that is sixteen times as large.
PROCESS_BOUND = wire.MAX_TENSOR_BYTES // 16
BATCH = 1000  # messages
HANGS_AFTER_S = 20.0
CUT_WITHIN_S = 0.01  # connections that are closed later count as accepted
DONE = "done"


class FuzzFailure(VirstError):
    """An end crashed, hung or allocated too much. The message says how to do it again."""


@dataclass(frozen=True)
class Figures:
    """What one end went through."""

    end: str
    messages: int
    refused: int  # recognised as damaged and dropped; stream: connections that were cut at once
    accepted: int  # the rest: none of up to three damages made the message invalid
    peak_bytes: int  # allocated: for one message (decode), by the process
    bound_bytes: int
    seconds: float


def fuzz(messages: int = 100_000, seed: int = 0, ends: tuple[str, ...] = ()) -> list[Figures]:
    """Send so many messages to each of `ends` (empty = all); the same ones for the same seed.

    Raises:
        FuzzFailure: an end crashed, hung or allocated more than its bound.
        ValueError: there is no such end.
    """
    if unknown := set(ends) - ENDS.keys():
        raise ValueError(f"no end is called {', '.join(sorted(unknown))}; there are {', '.join(ENDS)}")
    figures = []
    for end in ends or ENDS:
        try:
            figures.append(ENDS[end](messages, seed))
        except FuzzFailure as error:
            raise FuzzFailure(
                f"{end}: {error}; again with `python -m virst_engine.slow.zmq_fuzz --ends {end} --seed {seed} "
                f"--messages {messages}`"
            ) from error
        if figures[-1].peak_bytes > figures[-1].bound_bytes:
            raise FuzzFailure(
                f"{end}: allocated {figures[-1].peak_bytes} bytes, {figures[-1].bound_bytes} are allowed; again with "
                f"`python -m virst_engine.slow.zmq_fuzz --ends {end} --seed {seed} --messages {messages}`"
            )
    return figures


def table(figures: list[Figures]) -> str:
    """The figures in Markdown."""
    lines = ["| end | messages | refused | accepted | peak MB | bound MB | s |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in figures:
        peak, bound = row.peak_bytes / 1e6, row.bound_bytes / 1e6
        lines.append(
            f"| {row.end} | {row.messages} | {row.refused} | {row.accepted} | {peak:.2f} | {bound:.0f} | "
            f"{row.seconds:.1f} |"
        )
    return "\n".join(lines)


def _damaged(seed: int) -> Iterator[list[bytearray]]:
    generator = random.Random(seed)
    originals = [[bytes(part) for part in wire.encode(message)] for message in sample_messages()]
    while True:
        yield mutate(generator, generator.choice(originals))


def _fuzz_decode(messages: int, seed: int) -> Figures:
    start_s = time.monotonic()
    refused = peak_bytes = 0
    damaged = _damaged(seed)
    tracemalloc.start()
    try:
        for number in range(messages):
            parts = next(damaged)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                wire.decode(parts)
            except WireError:
                refused += 1
            except Exception as error:
                raise FuzzFailure(f"message {number} raised {type(error).__name__}: {error}") from error
            peak_bytes = max(peak_bytes, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    seconds = time.monotonic() - start_s
    return Figures("decode", messages, refused, messages - refused, peak_bytes, DECODE_BOUND, seconds)


class _Child:
    """An end in a process of its own: `python -m ... --serve ROLE ADDRESS...`."""

    def __init__(self, stack: contextlib.ExitStack, log_file: Path, role: str, *addresses: str) -> None:
        log = stack.enter_context(log_file.open("w"))
        command = [sys.executable, "-m", "virst_engine.slow.zmq_fuzz", "--serve", role, *addresses]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        self._log_file = log_file
        stack.callback(self._process.wait)
        stack.callback(self._process.kill)
        self._before_kb = 0

    def start_measuring(self) -> None:
        """From now on `peak_bytes` counts."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        self._before_kb = self._status_kb("VmRSS")

    @property
    def peak_bytes(self) -> int:
        return max(0, self._status_kb("VmHWM") - self._before_kb) * 1024

    def must_live(self) -> None:
        """Raises FuzzFailure, with its last words."""
        if (code := self._process.poll()) is not None:
            raise FuzzFailure(f"the process ended with {code}: {self._log_file.read_text()[-2000:]}")

    def _status_kb(self, name: str) -> int:
        self.must_live()
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise FuzzFailure(f"Linux tells no {name} of the process")


class _Bench:
    """Sockets and processes of one fuzzed end, gone with it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._children = 0

    def __enter__(self) -> "_Bench":
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="virst_fuzz_")))
        self._context = self._stack.enter_context(zmq.Context())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def address(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}"

    def child(self, role: str, *addresses: str) -> _Child:
        self._children += 1
        return _Child(self._stack, self.folder / f"log{self._children}", role, *addresses)

    def socket(self, kind: int, address: str) -> "zmq.Socket[bytes]":
        """A ROUTER binds, a DEALER connects."""
        socket = self._stack.enter_context(self._context.socket(kind))
        socket.linger = 0
        socket.sndtimeo = socket.rcvtimeo = round(HANGS_AFTER_S * 1e3)
        if kind == zmq.ROUTER:
            socket.router_mandatory = True
            socket.bind(address)
        else:
            socket.connect(address)
        return socket

    def robot(self, address: str) -> ZmqReasonerClient:
        """A good one."""
        return self._stack.enter_context(contextlib.closing(ZmqReasonerClient(address, heartbeat_s=0.05)))


def _until(condition: Callable[[], object], what: str, child: _Child | None = None) -> None:
    end_s = time.monotonic() + HANGS_AFTER_S
    while not condition():
        if child is not None:
            child.must_live()
        if time.monotonic() > end_s:
            raise FuzzFailure(f"hangs: {what} did not happen within {HANGS_AFTER_S:.0f} s")
        time.sleep(0.002)


def _answers(robot: ZmqReasonerClient, child: _Child) -> None:
    """The end still does its work."""
    child.must_live()
    _until(lambda: robot.status() == "", "a heartbeat")
    request = _request(time.monotonic_ns())
    robot.submit(request)
    _until(lambda: [each for each in robot.poll() if each.request_id == request.request_id], "an answer")


def _request(request_id: int, sentence: str = "the red ball") -> ReasonerRequest:
    clip = Clip(np.arange(1), np.arange(1), np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 2, 2, 2), np.float16))
    return ReasonerRequest(request_id, 0, "probe", sentence, clip)


def _feed(
    socket: "zmq.Socket[bytes]", envelope: list[bytes], messages: int, seed: int, probe: Callable[[], None]
) -> None:
    damaged = _damaged(seed)
    for number in range(messages):
        parts = next(damaged)
        try:
            socket.send_multipart([*envelope, *(parts or [bytearray()])])
        except zmq.ZMQError as error:
            probe()
            raise FuzzFailure(f"message {number} could not be sent: {error}") from error
        while socket.poll(0):
            socket.recv_multipart()
        if number % BATCH == BATCH - 1:
            probe()


def _dropped(robot: ZmqReasonerClient) -> int:
    """As the newest heartbeat counts; when it counts no further."""
    counted: list[int] = [-1]

    def is_settled() -> bool:
        heartbeat = robot.heartbeat()
        counted.append(-1 if heartbeat is None else heartbeat.dropped)
        return len(counted) > 150 and len(set(counted[-150:])) == 1

    _until(is_settled, "the end of the backlog")
    return counted[-1]


def _fuzz_bound(end: str, messages: int, seed: int) -> Figures:
    """An end that binds, so that a good robot beside us can tell how it is."""
    with _Bench() as bench:
        robots, reasoners = bench.address("robots"), bench.address("reasoners")
        if end == "server":
            child = bench.child("server", robots)
        else:
            child = bench.child("pool", robots, reasoners)
            bench.child("member", reasoners)
        robot = bench.robot(robots)
        peer = bench.socket(zmq.DEALER, reasoners if end == "pool_reasoner" else robots)
        _until(lambda: (beat := robot.heartbeat()) is not None and beat.reasoners, "the start", child)
        _answers(robot, child)
        child.start_measuring()
        start_s = time.monotonic()
        if end == "pool_reasoner":  # while we are one of the reasoners, our robot's requests may come to us
            _feed(peer, [], messages, seed, lambda: _until(lambda: robot.status() == "", "a heartbeat"))
            refused = _dropped(robot)
            peer.close()
        else:
            peer.send_multipart(wire.encode(wire.Hello()))  # or a pool would not even look at requests
            _feed(peer, [], messages, seed, lambda: _answers(robot, child))
            refused = _dropped(robot)
        _answers(robot, child)
        seconds = time.monotonic() - start_s
        return Figures(end, messages, refused, messages - refused, child.peak_bytes, PROCESS_BOUND, seconds)


def _fuzz_member(messages: int, seed: int) -> Figures:
    with _Bench() as bench:
        pool = bench.socket(zmq.ROUTER, bench.address("reasoners"))
        child = bench.child("member", bench.address("reasoners"))
        name, *_ = pool.recv_multipart()
        request_ids = iter(range(10**9, 2 * 10**9))
        dropped = 0

        def probe() -> None:
            nonlocal dropped
            child.must_live()
            wanted = next(request_ids)
            pool.send_multipart([name, *wire.encode(_request(wanted))])
            is_answered = False
            while True:  # until a heartbeat after the answer: it counts all that came before
                try:
                    message = wire.decode(pool.recv_multipart()[1:])
                except zmq.Again as error:
                    raise FuzzFailure(f"hangs: no answer within {HANGS_AFTER_S:.0f} s") from error
                is_answered |= isinstance(message, ReasonerAnswer) and message.request_id == wanted
                if is_answered and isinstance(message, wire.Heartbeat):
                    dropped = message.dropped
                    return

        probe()
        child.start_measuring()
        start_s = time.monotonic()
        _feed(pool, [name], messages, seed, probe)
        probe()
        seconds = time.monotonic() - start_s
        return Figures("member", messages, dropped, messages - dropped, child.peak_bytes, PROCESS_BOUND, seconds)


def _fuzz_client(messages: int, seed: int) -> Figures:
    with _Bench() as bench:
        reasoner = bench.socket(zmq.ROUTER, bench.address("robots"))
        result = bench.folder / "result"
        child = bench.child("client", bench.address("robots"), str(result))
        name, *_ = reasoner.recv_multipart()

        def probe() -> None:
            child.must_live()
            try:
                while not isinstance(wire.decode(reasoner.recv_multipart()[1:]), wire.Hello):
                    pass
            except zmq.Again as error:
                raise FuzzFailure(f"hangs: no hello within {HANGS_AFTER_S:.0f} s") from error

        child.start_measuring()
        start_s = time.monotonic()
        _feed(reasoner, [name], messages, seed, probe)
        peak_bytes = child.peak_bytes
        reasoner.send_multipart([name, *wire.encode(wire.Heartbeat("", 0.0, 0, DONE))])
        _until(result.exists, "the end of the backlog", child)
        refused = int(result.read_text())
        seconds = time.monotonic() - start_s
        return Figures("client", messages, refused, messages - refused, peak_bytes, PROCESS_BOUND, seconds)


def _fuzz_stream(messages: int, seed: int) -> Figures:
    connections = max(2, messages // 100)
    generator = random.Random(seed)
    with _Bench() as bench:
        make_curve_keys(bench.folder / "keys")
        with tcp.socket() as free:
            free.bind(("127.0.0.1", 0))
            host, port = free.getsockname()
        plain, curve, keys = bench.address("robots"), f"tcp://{host}:{port}", str(bench.folder / "keys")
        children = [
            bench.child("pool", plain, bench.address("reasoners")),
            bench.child("pool", curve, bench.address("reasoners2"), keys),
        ]

        def probe() -> None:  # a robot that comes now is served
            for address, curve_keys, child in zip((plain, curve), ("", keys), children, strict=True):
                child.must_live()
                with contextlib.closing(ZmqReasonerClient(address, curve_keys=curve_keys)) as robot:
                    _until(robot.heartbeat, "a heartbeat", child)

        probe()
        for child in children:
            child.start_measuring()
        start_s = time.monotonic()
        cut = 0
        for number in range(connections):
            is_curve = number % 2 == 1
            stream = b"".join(mutate(generator, _stream(generator, is_curve)))
            with tcp.socket(tcp.AF_INET if is_curve else tcp.AF_UNIX) as peer:
                peer.settimeout(HANGS_AFTER_S)
                try:
                    peer.connect((host, port) if is_curve else plain.removeprefix("ipc://"))
                    peer.sendall(stream)
                except TimeoutError as error:
                    raise FuzzFailure(f"hangs: connection {number} was not accepted or read") from error
                except ConnectionError:
                    cut += 1
                    continue
                peer.settimeout(CUT_WITHIN_S)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    while heard := peer.recv(4096):
                        pass
                    cut += heard == b""
            if number % 100 == 99:
                probe()
        probe()
        peak_bytes = max(child.peak_bytes for child in children)
        seconds = time.monotonic() - start_s
        return Figures("stream", connections, cut, connections - cut, peak_bytes, PROCESS_BOUND, seconds)


def _stream(generator: random.Random, is_curve: bool) -> list[bytes]:
    """What a ZMTP 3.1 peer sends: greeting, handshake, and messages if the handshake could succeed."""
    mechanism = b"CURVE" if is_curve else b"NULL"
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)
    if is_curve:
        hello = b"\x05HELLO\x01\x00" + bytes(72) + generator.randbytes(32) + bytes(8) + generator.randbytes(80)
        return [greeting, b"\x04" + bytes([len(hello)]) + hello]
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    frames = []
    for message in sample_messages():
        parts = [bytes(part) for part in wire.encode(message)]
        for part in parts:
            flags = 0x02 | (part is not parts[-1])  # a long size, more to come
            frames.append(bytes([flags]) + len(part).to_bytes(8, "big") + part)
    return [greeting, b"\x04" + bytes([len(ready)]) + ready, *frames]


ENDS: dict[str, Callable[[int, int], Figures]] = {
    "decode": _fuzz_decode,
    "server": partial(_fuzz_bound, "server"),
    "client": _fuzz_client,
    "pool": partial(_fuzz_bound, "pool"),
    "pool_reasoner": partial(_fuzz_bound, "pool_reasoner"),
    "member": _fuzz_member,
    "stream": _fuzz_stream,
}


class _Echo:
    """A reasoner without a model."""

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        if request.wants_words:
            return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (), words=request.sentence[:100])
        frames = zip(request.clip.steps.tolist(), request.clip.stamps_ns.tolist(), strict=True)
        prompts = tuple(Prompt(step, stamp_ns, np.zeros((3, 2), np.float32)) for step, stamp_ns in frames)
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts)


def _be_client(address: str, result: Path) -> None:
    """A session that asks about one goal and one question, as the sample answers answer them."""
    samples = [message for message in sample_messages() if isinstance(message, ReasonerRequest)]
    with contextlib.closing(ZmqReasonerClient(address, model="tabletop-tiny 0123", heartbeat_s=0.05)) as client:
        while True:
            for sample in samples:
                client.submit(sample)
            client.poll()
            client.status()
            heartbeat = client.heartbeat()
            if heartbeat is not None and heartbeat.name == DONE and not result.exists():
                unfinished = result.with_suffix(".new")
                unfinished.write_text(str(client.dropped))
                unfinished.rename(result)


def _be(role: str, addresses: list[str]) -> None:
    match role:
        case "server":
            serve(_Echo, addresses[0])
        case "pool":
            robots, reasoners, *keys = addresses
            serve_pool(robots, reasoners, curve_keys="".join(keys))
        case "member":
            serve(_Echo, addresses[0], joins_pool=True)
        case "client":
            _be_client(addresses[0], Path(addresses[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m virst_engine.slow.zmq_fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--messages", type=int, default=100_000, help="to each end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ends", default="", help=f"comma-separated, of {', '.join(ENDS)}; empty = all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--serve", nargs="+", metavar="ROLE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _be(options.serve[0], options.serve[1:])
        return
    try:
        figures = fuzz(options.messages, options.seed, tuple(filter(None, options.ends.split(","))))
    except (FuzzFailure, ValueError) as error:
        sys.exit(f"zmq_fuzz: {error}")
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in figures], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
