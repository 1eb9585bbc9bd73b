# SPDX-License-Identifier: Apache-2.0
"""A pool with real sockets and real processes, which are killed, stopped, restarted and lied to."""

import contextlib
import itertools
import os
import signal
import socket as tcp
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import pytest
import zmq

from tests.engine.slow.messages import answer_to, request_of
from tests.engine.slow.reasoner_process import ObedientReasoner
from virst_engine.errors import EndpointError
from virst_engine.slow import wire
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_endpoint import add_robot_keys, make_curve_keys
from virst_engine.slow.zmq_pool import PoolServer
from virst_engine.slow.zmq_server import PoolMember, main
from virst_engine.types import ReasonerAnswer

PROGRAM = Path(__file__).with_name("reasoner_process.py")
Value = TypeVar("Value")


def wait_until(condition: Callable[[], Value], seconds: float = 60.0) -> Value:
    """The first true value of `condition`; fails the test when none comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.005)
    pytest.fail(f"nothing happened within {seconds} s")


@dataclass(frozen=True)
class Begun:
    """A line of the journal: a reasoner begins with a request."""

    at_s: float  # time.monotonic, the same clock in all processes of a machine
    process: int
    sentence: str


class Site:
    """The addresses of one pool, and processes around it that end with the test."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.robots, self.reasoners = f"ipc://{folder}/robots", f"ipc://{folder}/reasoners"
        self.keys = ""
        self._journal = folder / "journal"
        self._stack = stack

    def pool(self) -> PoolServer:
        """In a thread of this process."""
        server = self._stack.enter_context(PoolServer(self.robots, self.reasoners, curve_keys=self.keys))
        thread = threading.Thread(target=server.run)
        self._stack.callback(thread.join)
        self._stack.callback(server.stop)
        thread.start()
        return server

    def pool_process(self) -> "subprocess.Popen[bytes]":
        command = ["-m", "virst_engine.slow.zmq_server", "--pool", self.reasoners, "--endpoint", self.robots]
        return self._process([*command, "--curve-keys", self.keys])

    def member(self) -> PoolMember:
        """A reasoner in a thread of this process, for tests that do not kill it."""
        server = self._stack.enter_context(PoolMember(self.reasoners, model="obedient", curve_keys=self.keys))
        thread = threading.Thread(target=server.run, args=(ObedientReasoner(self._journal),))
        self._stack.callback(thread.join)
        self._stack.callback(server.stop)
        thread.start()
        return server

    def reasoner(self, *options: str) -> "subprocess.Popen[bytes]":
        command = [str(PROGRAM), self.reasoners, "--join", "--journal", str(self._journal)]
        return self._process([*command, "--curve-keys", self.keys, *options])

    def robot(self, model: str = "obedient", **options: Any) -> ZmqReasonerClient:
        options = {"curve_keys": self.keys, "heartbeat_s": 0.05, **options}
        return self._stack.enter_context(contextlib.closing(ZmqReasonerClient(self.robots, model=model, **options)))

    def peer(self, endpoint: str) -> "zmq.Socket[bytes]":
        """Somebody who sends whatever he likes."""
        context = self._stack.enter_context(zmq.Context())
        socket = self._stack.enter_context(context.socket(zmq.DEALER))
        socket.linger, socket.rcvtimeo = 0, 10_000
        socket.connect(endpoint)
        return socket

    def begun(self, sentence: str) -> list[Begun]:
        if not self._journal.exists():
            return []
        lines = [line.split("\t") for line in self._journal.read_text(encoding="utf-8").splitlines()]
        return [Begun(float(at_s), int(process), what) for at_s, process, what in lines if what == sentence]

    def _process(self, command: list[str]) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        yield Site(tmp_path, stack)


@pytest.fixture
def secured(site: Site, tmp_path: Path) -> Site:
    """Over TCP, with keys."""
    site.robots, site.reasoners = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    site.keys = str(tmp_path / "keys")
    make_curve_keys(Path(site.keys))
    return site


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(tcp.socket()) for _ in range(count)]
        for socket in sockets:
            socket.bind(("127.0.0.1", 0))
        return [socket.getsockname()[1] for socket in sockets]


def reasoners_seen_by(robot: ZmqReasonerClient) -> int:
    heartbeat = robot.heartbeat()
    return 0 if heartbeat is None else heartbeat.reasoners


def wait_for_reasoners(robot: ZmqReasonerClient, count: int) -> None:
    wait_until(lambda: reasoners_seen_by(robot) == count and robot.status() == "", seconds=60)


def ask(robot: ZmqReasonerClient, sentence: str = "the red ball", request_id: int = 1, **more: Any) -> ReasonerAnswer:
    robot.submit(request_of(sentence, request_id, **more))
    (answer,) = wait_until(robot.poll)
    return answer


def victim(site: Site, processes: list["subprocess.Popen[bytes]"], sentence: str) -> "subprocess.Popen[bytes]":
    """The process that works on the sentence."""
    (begun,) = wait_until(lambda: site.begun(sentence))
    return next(process for process in processes if process.pid == begun.process)


def test_a_pool_answers_like_a_single_reasoner(site: Site) -> None:
    robot = site.robot()
    wait_until(lambda: "no reasoner answers" in robot.status())
    site.pool()
    wait_until(lambda: "no reasoner has joined the pool" in robot.status())
    site.member()
    wait_for_reasoners(robot, 1)
    answer = ask(robot, request_id=7, goal_id="g", epoch=3)
    assert (answer.request_id, answer.goal_id, answer.epoch, answer.error) == (7, "g", 3, "")
    assert [(prompt.step, prompt.stamp_ns) for prompt in answer.prompts] == [(0, 0), (1, 100), (2, 200)]
    assert {"pool", "queue"} <= answer.timings_ms.keys()
    assert "no word of it is known" in ask(robot, "refuse").error
    assert "ZeroDivisionError" in ask(robot, "crash").error


def test_many_robots_and_reasoners_at_once(site: Site) -> None:
    site.pool()
    for _ in range(3):
        site.member()
    robots = [site.robot() for _ in range(6)]
    wait_for_reasoners(robots[0], 3)
    expected = {(request_id, goal) for request_id in range(1, 4) for goal in ("1", "2")}
    for request_id, robot in itertools.product(range(1, 4), robots):
        for goal in ("1", "2"):
            robot.submit(request_of("sleep 0.01", request_id * 10 + int(goal), f"{goal} {request_id}"))
    for robot in robots:
        answers: list[ReasonerAnswer] = []
        wait_until(lambda robot=robot, answers=answers: len(answers.extend(robot.poll()) or answers) == len(expected))
        assert {(answer.request_id // 10, answer.goal_id[0]) for answer in answers} == expected
        assert [answer.error for answer in answers] == [""] * len(expected)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_request_outlives_the_reasoner_that_works_on_it(
    site: Site, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    site.pool()
    reasoners = [site.reasoner() for _ in range(2)]
    robot = site.robot()
    wait_for_reasoners(robot, 2)
    robot.submit(request_of("sleep 3"))
    lost = victim(site, reasoners, "sleep 3")
    lost.send_signal(how)
    lost_s = time.monotonic()
    _, second = wait_until(lambda: len(begun := site.begun("sleep 3")) == 2 and begun)
    with capsys.disabled():
        print(f"\n[{how.name}: another reasoner had the request after {second.at_s - lost_s:.2f} s]", end="")
    assert second.process != lost.pid
    (answer,) = wait_until(robot.poll)
    assert answer.error == ""
    wait_for_reasoners(robot, 1)
    assert ask(robot, request_id=2).error == ""

    lost.send_signal(signal.SIGCONT)
    if how is signal.SIGKILL:
        reasoners.append(site.reasoner())
    wait_for_reasoners(robot, 2)
    assert robot.poll() == []  # the late answer went nowhere
    robot.submit(request_of("sleep 0.5", 3, "3"))
    robot.submit(request_of("sleep 0.5", 4, "4"))
    wait_until(
        lambda: robot.status() or len(site.begun("sleep 0.5")) == 2
    )  # asking for the status sends the second one
    assert len({begun.process for begun in site.begun("sleep 0.5")}) == 2


def test_a_request_waits_for_a_reasoner_that_is_restarted(site: Site) -> None:
    site.pool()
    first = site.reasoner()
    robot = site.robot()
    wait_for_reasoners(robot, 1)
    robot.submit(request_of("sleep 1"))
    victim(site, [first], "sleep 1").kill()
    wait_until(lambda: "no reasoner has joined the pool" in robot.status())
    site.reasoner()
    (answer,) = wait_until(robot.poll)
    assert answer.error == ""


def test_a_reasoner_that_is_told_to_stop_hands_its_request_over(site: Site) -> None:
    site.pool()
    reasoners = [site.reasoner() for _ in range(3)]
    robot = site.robot()
    wait_for_reasoners(robot, 3)
    robot.submit(request_of("sleep 1"))
    for count in (1, 2):  # two do not count as lost, or the goal would be refused
        begun = wait_until(lambda count=count: len(begun := site.begun("sleep 1")) == count and begun)
        stopped = next(process for process in reasoners if process.pid == begun[-1].process)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(timeout=20) == 0
    (answer,) = wait_until(robot.poll)
    assert answer.error == ""


def test_a_sentence_that_kills_reasoners_is_reported_and_leaves_some(site: Site) -> None:
    site.pool()
    reasoners = [site.reasoner() for _ in range(3)]
    robot = site.robot()
    wait_for_reasoners(robot, 3)
    robot.submit(request_of("sleep 60"))
    for count in (1, 2):
        begun = wait_until(lambda count=count: len(begun := site.begun("sleep 60")) == count and begun)
        next(process for process in reasoners if process.pid == begun[-1].process).kill()
    (answer,) = wait_until(robot.poll)
    assert "2 reasoners were lost while they worked on this goal" in answer.error
    assert ask(robot, request_id=2, goal_id="another").error == ""


def test_a_pool_that_is_killed_and_restarted_finds_everybody_again(site: Site) -> None:
    pool = site.pool_process()
    site.reasoner()
    robot = site.robot()
    wait_for_reasoners(robot, 1)
    robot.submit(request_of("sleep 1"))
    wait_until(lambda: site.begun("sleep 1"))
    pool.kill()
    wait_until(lambda: "no reasoner answers" in robot.status())  # the session asks again when this is over
    pool = site.pool_process()
    wait_for_reasoners(robot, 1)
    assert ask(robot, request_id=2).request_id == 2
    pool.send_signal(signal.SIGTERM)
    assert pool.wait(timeout=20) == 0
    assert not Path(site.robots.removeprefix("ipc://")).exists()


def test_a_robot_that_goes_away_with_its_request_harms_nobody(site: Site) -> None:
    server = site.pool()
    site.member()
    robot, leaver = site.robot(), site.robot()
    wait_for_reasoners(robot, 1)
    leaver.submit(request_of("sleep 0.5"))
    wait_until(lambda: leaver.poll() or site.begun("sleep 0.5"))
    leaver.close()
    assert ask(robot).error == ""
    assert server._pool.answered == 1


def test_the_less_loaded_reasoner_works_and_the_other_helps_out(site: Site) -> None:
    site.pool()
    fast, slow = site.reasoner(), site.reasoner("--delay-s", "0.4")
    robot = site.robot()
    wait_for_reasoners(robot, 2)
    for number in range(8):
        ask(robot, f"number {number}", request_id=number)
    processes = [site.begun(f"number {number}")[0].process for number in range(8)]
    assert processes.count(slow.pid) == 1  # nobody knew before
    assert processes.count(fast.pid) == 7
    robot.submit(request_of("sleep 0.1", 11, "11"))
    robot.submit(request_of("sleep 0.1", 12, "12"))
    wait_until(lambda: robot.status() or len(site.begun("sleep 0.1")) == 2)
    assert {begun.process for begun in site.begun("sleep 0.1")} == {fast.pid, slow.pid}


def test_a_reasoner_with_other_weights_is_told_and_not_used(site: Site) -> None:
    site.pool()
    other = site.reasoner("--model", "other weights")
    robot, careless = site.robot(), site.robot(model="")
    wait_until(lambda: "runs other weights (other weights) than the segmenter (obedient)" in robot.status(), seconds=60)
    assert ask(careless, "for any").error == ""
    robot.submit(request_of("for one"))
    site.reasoner()
    (answer,) = wait_until(robot.poll)
    assert answer.error == ""
    (begun,) = site.begun("for one")
    assert begun.process != other.pid
    wait_for_reasoners(careless, 2)
    wait_for_reasoners(robot, 1)


def test_garbage_of_robots_is_refused_and_harms_nobody(site: Site) -> None:
    server = site.pool()
    site.member()
    robot = site.robot()
    wait_for_reasoners(robot, 1)
    peer = site.peer(site.robots)
    good = [bytes(part) for part in wire.encode(request_of())]
    garbage = [
        [b"\x80\x04\x95pickle"],
        [b""],
        [b""] * 500,
        good,  # before hello
        good[:2],
        [msgpack.packb({"version": 1, "kind": "hello", "tensors": []})],
        [bytes(part) for part in wire.encode(wire.Heartbeat("obedient", 0.0, 0))],  # robots cannot join
        [bytes(part) for part in wire.encode(answer_to(request_of()))],
    ]
    for number, parts in enumerate(garbage, start=1):
        peer.send_multipart(parts)
        assert isinstance(wire.decode(peer.recv_multipart()), wire.Refusal)
        assert server._pool.dropped == number
    assert reasoners_seen_by(robot) == 1
    assert ask(robot).error == ""


def test_garbage_of_reasoners_is_dropped_and_costs_them_their_request(site: Site) -> None:
    server = site.pool()
    robot = site.robot()
    peers = [site.peer(site.reasoners) for _ in range(2)]
    for parts in ([b"garbage"], [b""] * 500, wire.encode(request_of())):  # of one that never joined
        peers[0].send_multipart(parts)
    peers[0].send_multipart(wire.encode(wire.Heartbeat("obedient", 0.0, 0, "the liar")))
    wait_for_reasoners(robot, 1)
    assert server._pool.dropped == 3
    robot.submit(request_of("whatever"))
    given = wait_until(lambda: _next_request(peers[0]))
    peers[0].send_multipart([b"garbage", *wire.encode(answer_to(given))])
    wait_until(lambda: server._pool.dropped == 4)
    site.member()
    (answer,) = wait_until(robot.poll)
    assert answer.error == ""
    assert len(site.begun("whatever")) == 1
    peers[0].send_multipart(wire.encode(answer_to(given)))  # too late
    assert ask(robot, request_id=2).request_id == 2


def _next_request(peer: "zmq.Socket[bytes]") -> Any:
    message = wire.decode(peer.recv_multipart())
    return None if isinstance(message, wire.Hello) else message


@pytest.mark.parametrize("kind", ["garbage", "hellos", "requests"])
def test_a_flood_does_not_keep_others_from_their_answers(site: Site, kind: str) -> None:
    server = site.pool()
    site.member()
    robot = site.robot()
    wait_for_reasoners(robot, 1)
    peer = site.peer(site.robots)
    peer.send_multipart(wire.encode(wire.Hello()))
    is_over = threading.Event()
    sent = itertools.count()

    def flood() -> None:
        while not is_over.is_set():
            number = next(sent)
            message = wire.Hello() if kind == "hellos" else request_of("sleep 0.05", number, str(number % 1000))
            parts = [b"garbage"] * 3 if kind == "garbage" else wire.encode(message)
            with contextlib.suppress(zmq.Again):
                peer.send_multipart(parts, zmq.NOBLOCK)
            while peer.poll(0):  # it even takes what it gets
                peer.recv_multipart()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for number in range(20):
            assert ask(robot, f"number {number}", request_id=number).error == ""
            assert len(server._pool._queue) <= 256
        assert robot.status() == ""
        assert reasoners_seen_by(robot) == 1
    finally:
        is_over.set()
        thread.join()
    assert next(sent) > 500


def test_keys_open_what_they_are_for_and_nothing_opens_without(secured: Site, tmp_path: Path) -> None:
    server = secured.pool()
    secured.member()
    robot = secured.robot()
    wait_for_reasoners(robot, 1)
    assert ask(robot).error == ""

    make_curve_keys(tmp_path / "other")
    stranger_keys = tmp_path / "stranger"  # knows the server, is not known
    stranger_keys.mkdir()
    for source, name in ((Path(secured.keys), "server.key"), (tmp_path / "other", "client.key_secret")):
        (stranger_keys / name).write_bytes((source / name).read_bytes())
    stranger = secured.robot(curve_keys=str(stranger_keys))
    stranger.submit(request_of("of a stranger"))
    wait_until(lambda: "does not accept our keys" in stranger.status())

    for pair, endpoint, message in (
        (None, secured.robots, wire.Hello()),
        (None, secured.reasoners, wire.Heartbeat("obedient", 0.0, 0, "an impostor")),
        ("client", secured.reasoners, wire.Heartbeat("obedient", 0.0, 0, "a robot that poses as a reasoner")),
        ("reasoner", secured.robots, wire.Hello()),
        ("server", secured.robots, wire.Hello()),
    ):
        peer = secured.peer("tcp://127.0.0.1:1")  # nobody; keys must be set before the connection
        peer.disconnect("tcp://127.0.0.1:1")
        peer.rcvtimeo = 400
        if pair is not None:
            public, secret = zmq.auth.load_certificate(Path(secured.keys) / f"{pair}.key_secret")
            peer.curve_publickey, peer.curve_secretkey = public, secret
            peer.curve_serverkey, _ = zmq.auth.load_certificate(Path(secured.keys) / "server.key")
        peer.connect(endpoint)
        peer.send_multipart(wire.encode(message))
        with pytest.raises(zmq.Again):
            peer.recv_multipart()
    assert len(server._pool._members) == 1
    assert len(server._pool._clients) == 1
    assert server._pool.dropped == 0  # not even heard
    assert secured.begun("of a stranger") == []


def test_robots_may_come_over_tcp_while_reasoners_sit_on_the_same_machine(site: Site, tmp_path: Path) -> None:
    site.robots = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    site.keys = str(tmp_path / "keys")
    make_curve_keys(Path(site.keys))
    site.pool()
    site.member()
    robot = site.robot()
    wait_for_reasoners(robot, 1)
    assert ask(robot).error == ""
    local = site.peer(site.reasoners)  # ipc is not encrypted: its file is for its owner only
    local.send_multipart(wire.encode(wire.Heartbeat("obedient", 0.0, 0)))
    wait_for_reasoners(robot, 2)
    assert (Path(site.reasoners.removeprefix("ipc://")).stat().st_mode & 0o077) == 0


def test_a_robot_with_a_key_of_its_own_can_be_let_in_and_shut_out(secured: Site) -> None:
    secured.pool()
    secured.member()
    of_robot = add_robot_keys(Path(secured.keys), "arm-1")  # while the pool runs
    assert {path.name for path in of_robot.iterdir()} == {"server.key", "client.key", "client.key_secret"}
    assert (of_robot.stat().st_mode & 0o077) == ((of_robot / "client.key_secret").stat().st_mode & 0o077) == 0
    robot = secured.robot(curve_keys=str(of_robot))
    wait_for_reasoners(robot, 1)
    assert ask(robot).error == ""
    robot.close()
    public = Path(secured.keys) / "arm-1.key"
    key = public.read_bytes()
    public.unlink()
    shut_out = secured.robot(curve_keys=str(of_robot))
    wait_until(lambda: "does not accept our keys" in shut_out.status())
    wait_for_reasoners(secured.robot(), 1)  # the others are not affected
    public.write_bytes(key)
    wait_for_reasoners(shut_out, 1)  # it asks again by itself


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)  # ZMTP 3.1
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "what", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" * 100, GREETING, GREETING + READY, os.urandom(5000), b""]
)
def test_a_peer_that_speaks_no_curve_hears_a_greeting_and_nothing_else(secured: Site, what: bytes) -> None:
    secured.pool()
    secured.member()
    robot = secured.robot()
    wait_for_reasoners(robot, 1)
    for endpoint in (secured.robots, secured.reasoners):
        with tcp.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=10) as peer:
            peer.sendall(what)
            peer.settimeout(0.5)
            heard = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while received := peer.recv(4096):
                    heard += received
        assert len(heard) <= 64  # ZMTP's greeting: version and mechanism
    assert ask(robot).error == ""


def test_a_reasoner_whose_key_comes_late_joins_by_itself(secured: Site, caplog: pytest.LogCaptureFixture) -> None:
    public = Path(secured.keys) / "reasoner.key"
    (Path(secured.keys) / "reasoner-other.key").write_bytes((Path(secured.keys) / "server.key").read_bytes())
    key = public.read_bytes()
    public.unlink()
    secured.pool()
    secured.member()
    robot = secured.robot()
    wait_until(lambda: "no reasoner has joined the pool" in robot.status())
    wait_until(lambda: "does not accept our keys" in caplog.text)
    public.write_bytes(key)
    wait_for_reasoners(robot, 1)


def test_connections_that_never_shake_hands_do_not_keep_robots_out(secured: Site) -> None:
    secured.pool()
    secured.member()
    robot = secured.robot()
    wait_for_reasoners(robot, 1)
    port = int(secured.robots.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(tcp.create_connection(("127.0.0.1", port), timeout=10))
        assert ask(robot).error == ""
        late = secured.robot()
        wait_for_reasoners(late, 1)
        assert ask(late).error == ""


def test_both_addresses_are_checked(site: Site, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="must be two addresses"):
        PoolServer(site.robots, site.robots)
    with pytest.raises(EndpointError, match="tcp:// needs CURVE keys"):
        PoolServer(site.robots, "tcp://127.0.0.1:5555")
    make_curve_keys(tmp_path / "keys")
    (tmp_path / "keys" / "reasoner.key").unlink()
    with pytest.raises(EndpointError, match="holds no public key of a reasoner, so nobody could connect"):
        PoolServer(site.robots, f"tcp://127.0.0.1:{free_ports(1)[0]}", curve_keys=str(tmp_path / "keys"))
    site.pool()
    with pytest.raises(EndpointError, match="is served already"):
        PoolServer(site.robots, f"{site.reasoners}2")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("server", "cannot name a robot"),
        ("reasoner-2", "cannot name a robot"),
        ("../arm", "cannot name a robot"),
        ("", "cannot name a robot"),
        ("client", "exists"),
    ],
)
def test_a_robot_needs_a_name_of_its_own(tmp_path: Path, name: str, reason: str) -> None:
    make_curve_keys(tmp_path / "keys")
    with pytest.raises(EndpointError, match=reason):
        add_robot_keys(tmp_path / "keys", name)
    with pytest.raises(EndpointError, match="no usable CURVE key"):
        add_robot_keys(tmp_path / "nowhere", "arm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pool", "ipc:///tmp/a", "--join", "ipc:///tmp/a"], "--pool and --join are two processes"),
        (["--pool", "ipc:///tmp/a", "--endpoint", "ipc:///tmp/a"], "must be two addresses"),
        (["--pool", "tcp://127.0.0.1:5555"], "tcp:// needs CURVE keys"),
        (["--join", "tcp://127.0.0.1:5555"], "tcp:// needs CURVE keys"),
        (["--add-robot", "arm"], "--add-robot needs --curve-keys"),
    ],
)
def test_the_program_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["virst-reasoner", "--nice", "0", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_the_program_makes_the_keys_of_a_fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    for options in (["--make-curve-keys", str(keys)], ["--curve-keys", str(keys), "--add-robot", "arm-1"]):
        monkeypatch.setattr(sys, "argv", ["virst-reasoner", "--nice", "0", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert f"copy {keys / 'arm-1'} to the robot" in capsys.readouterr().out
    assert (keys / "arm-1" / "client.key_secret").exists()
