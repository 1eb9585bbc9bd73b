# SPDX-License-Identifier: Apache-2.0
"""The border between processes, with real sockets, real processes and a reasoner that does what the sentence says."""

import contextlib
import importlib.util
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from virst_engine.errors import EndpointError, WireError
from virst_engine.slow import wire
from virst_engine.slow.process import process_name
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_endpoint import make_curve_keys
from virst_engine.slow.zmq_server import ReasonerServer, main, serve
from virst_engine.types import Clip, ReasonerAnswer, ReasonerRequest

PROGRAM = Path(__file__).with_name("reasoner_process.py")
SPEC = importlib.util.spec_from_file_location("reasoner_process", PROGRAM)
MODULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MODULE)
ObedientReasoner = MODULE.ObedientReasoner


def request_of(sentence, request_id=1, goal_id="goal", epoch=0, frames=3, side=4, wants_words=False):
    clip = Clip(
        steps=np.arange(frames, dtype=np.int64),
        stamps_ns=np.arange(frames, dtype=np.int64) * 100,
        frames_rgb_u8=np.zeros((frames, side, side, 3), np.uint8),
        fusion=np.zeros((frames, 2, side, side), np.float16),
    )
    return ReasonerRequest(request_id, epoch, goal_id, sentence, clip, wants_words)


def wait_until(condition, seconds=20.0):
    """The first true value of `condition`; fails the test when none comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.005)
    pytest.fail(f"nothing happened within {seconds} s")


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/reasoner"


@contextlib.contextmanager
def server_thread(endpoint, reasoner=None, **options):
    with ReasonerServer(endpoint, model="obedient", **options) as server:
        thread = threading.Thread(target=server.run, args=(reasoner or ObedientReasoner(),))
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


@contextlib.contextmanager
def connected(endpoint, **options):
    with contextlib.closing(ZmqReasonerClient(endpoint, heartbeat_s=0.05, **options)) as client:
        yield client


@contextlib.contextmanager
def raw_peer(endpoint):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 10_000
        socket.connect(endpoint)
        yield socket


@contextlib.contextmanager
def reasoner_process(endpoint):
    process = subprocess.Popen([sys.executable, PROGRAM, endpoint], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_answer_comes_back_with_its_prompts(endpoint):
    with server_thread(endpoint), connected(endpoint) as client:
        client.submit(request_of("the red ball", request_id=7, goal_id="g", epoch=3))
        (answer,) = wait_until(client.poll)
        assert (answer.request_id, answer.goal_id, answer.epoch, answer.error) == (7, "g", 3, "")
        assert [(prompt.step, prompt.stamp_ns) for prompt in answer.prompts] == [(0, 0), (1, 100), (2, 200)]
        np.testing.assert_array_equal(answer.prompts[2].embeddings, np.full((2, 3), 2.0))
        assert "queue" in answer.timings_ms
        wait_until(lambda: client.status() == "")


def test_a_question_comes_back_with_words_beside_the_prompts_of_a_goal(endpoint):
    with server_thread(endpoint), connected(endpoint) as client:
        client.submit(request_of("the red ball", request_id=1))
        client.submit(request_of("what can roll", request_id=2, goal_id="\x1fquestion_1", wants_words=True))
        answers = []
        wait_until(lambda: answers.extend(client.poll()) or len(answers) == 2)
        assert [(answer.request_id, bool(answer.prompts), answer.words) for answer in answers] == [
            (1, True, ""),
            (2, False, "you said: what can roll"),
        ]
        assert client.status() == ""


@pytest.mark.parametrize(("order", "wants_words"), [("mask", True), ("talk", False)])
def test_prompts_for_a_question_and_words_for_a_goal_are_dropped(endpoint, order, wants_words, caplog):
    with server_thread(endpoint), connected(endpoint) as client:
        client.submit(request_of(order, wants_words=wants_words))
        (answer,) = wait_until(client.poll)
        assert (answer.prompts, answer.words) == ((), "")
        assert "of no use: words" in answer.error
        assert f"request 1 wants {'words' if wants_words else 'prompts'}" in caplog.text
        assert client.dropped == 1


def test_the_socket_is_for_its_owner_only_and_goes_with_the_server(endpoint):
    path = Path(endpoint.removeprefix("ipc://"))
    with server_thread(endpoint):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


@pytest.mark.parametrize(
    ("sentence", "error"),
    [("refuse", "no word of it is known"), ("crash", "ZeroDivisionError: broken"), ("nan", "finite")],
)
def test_a_reasoner_that_fails_answers_with_the_reason_and_goes_on(endpoint, sentence, error):
    with server_thread(endpoint), connected(endpoint) as client:
        client.submit(request_of(sentence))
        (answer,) = wait_until(client.poll)
        assert error in answer.error
        assert answer.prompts == ()
        client.submit(request_of("the red ball", request_id=2))
        (answer,) = wait_until(client.poll)
        assert answer.error == ""


@pytest.mark.parametrize("what", ["request", "goal", "epoch", "frames"])
def test_an_answer_to_something_that_was_not_asked_is_dropped(endpoint, what, caplog):
    """Whoever asked is told, and need not wait: nothing better will come. Of a foreign id nobody is."""
    with server_thread(endpoint), connected(endpoint) as client:
        request, answers = request_of(f"forge {what}"), []
        client.submit(request)
        wait_until(lambda: answers.extend(client.poll()) or "dropped a message" in caplog.text)
        assert client.dropped == 1
        told = [(answer.request_id, answer.goal_id, answer.epoch, answer.prompts) for answer in answers]
        assert told == ([] if what == "request" else [(1, request.goal_id, request.epoch, ())])
        client.submit(request_of("the red ball", request_id=2))
        assert [answer.request_id for answer in wait_until(client.poll)] == [2]


def test_a_reasoner_may_leave_frames_of_the_clip_out(endpoint):
    with server_thread(endpoint), connected(endpoint) as client:
        client.submit(request_of("leave"))
        (answer,) = wait_until(client.poll)
        assert (answer.error, [prompt.step for prompt in answer.prompts]) == ("", [1, 2])
        assert client.dropped == 0


def test_an_answer_of_an_old_epoch_passes_untouched(endpoint):
    with server_thread(endpoint), connected(endpoint) as client:
        client.submit(request_of("sleep 0.2", request_id=1, epoch=4))
        client.submit(request_of("the red ball", request_id=2, epoch=5, goal_id="other"))
        answers = []
        wait_until(lambda: len(answers.extend(client.poll()) or answers) == 2)
        assert [(answer.request_id, answer.epoch) for answer in answers] == [(1, 4), (2, 5)]


def test_only_the_newest_waiting_request_of_a_goal_is_computed(endpoint):
    reasoner = ObedientReasoner()
    with server_thread(endpoint, reasoner), connected(endpoint) as client:
        client.submit(request_of("sleep 0.5", request_id=1, goal_id="slow"))
        wait_until(lambda: client.poll() or reasoner.sentences)
        for request_id in range(2, 12):
            client.submit(request_of(f"number {request_id}", request_id=request_id))
            client.poll()
            time.sleep(0.01)
        answers = []
        wait_until(lambda: 11 in [answer.request_id for answer in answers.extend(client.poll()) or answers])
    assert reasoner.sentences == ["sleep 0.5", "number 11"]


def test_a_cancelled_request_is_not_computed(endpoint):
    reasoner = ObedientReasoner()
    with server_thread(endpoint, reasoner), connected(endpoint) as client:
        client.submit(request_of("sleep 1.0", request_id=1, goal_id="slow"))
        wait_until(lambda: client.poll() or reasoner.sentences)
        client.submit(request_of("never", request_id=2))
        client.cancel("goal")
        client.submit(request_of("last", request_id=3, goal_id="third"))
        answers = []
        wait_until(lambda: 3 in [answer.request_id for answer in answers.extend(client.poll()) or answers])
    assert reasoner.sentences == ["sleep 1.0", "last"]


def test_heartbeats_go_on_while_the_reasoner_computes(endpoint):
    with server_thread(endpoint), connected(endpoint, silent_after_s=0.5) as client:
        wait_until(lambda: client.status() == "")
        client.submit(request_of("spin 1.5"))
        complaints = set()
        wait_until(lambda: complaints.add(client.status()) or client.poll())
        assert complaints == {""}


def test_an_endless_computation_is_reported(endpoint):
    with server_thread(endpoint), connected(endpoint, busy_after_s=0.2) as client:
        client.submit(request_of("sleep 1.0"))
        wait_until(lambda: "worked on one request" in client.status())
        wait_until(client.poll)
        wait_until(lambda: client.status() == "")


def test_garbage_is_refused_counted_and_harms_nobody(endpoint, caplog):
    caplog.set_level(logging.WARNING)
    good = [bytes(part) for part in wire.encode(request_of("the red ball"))]
    garbage = [
        [b"\x80\x04\x95pickle"],
        [b""],
        [b""] * 500,
        good[:2],
        [msgpack.packb({"version": 1, "kind": "hello", "tensors": []})],
        [bytes(part) for part in wire.encode(wire.Heartbeat("x", 0.0, 0))],
    ]
    with server_thread(endpoint), raw_peer(endpoint) as peer, connected(endpoint) as client:
        for number, parts in enumerate(garbage, start=1):
            peer.send_multipart(parts)
            assert isinstance(wire.decode(peer.recv_multipart()), wire.Refusal)
            peer.send_multipart(wire.encode(wire.Hello()))
            assert wire.decode(peer.recv_multipart()) == wire.Heartbeat("obedient", 0.0, number, process_name())
        client.submit(request_of("the red ball"))
        wait_until(client.poll)
    assert "dropped a message" in caplog.text


class GatedReasoner(ObedientReasoner):
    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def answer(self, request):
        answer = super().answer(request)
        self.gate.wait(60)
        return answer


def test_who_asks_too_much_is_refused_and_others_are_not(endpoint):
    reasoner = GatedReasoner()
    with server_thread(endpoint, reasoner), raw_peer(endpoint) as peer, connected(endpoint) as client:
        peer.send_multipart(wire.encode(request_of("first", goal_id="first")))
        wait_until(lambda: reasoner.sentences)
        for number in range(260):
            peer.send_multipart(wire.encode(request_of("much", request_id=number, goal_id=str(number))))
        refused = [wire.decode(peer.recv_multipart()) for _ in range(4)]
        assert {answer.error for answer in refused} == {
            "the reasoner is overloaded, 256 requests wait; set fewer goals or start a pool of reasoners"
        }
        assert [answer.request_id for answer in refused] == [256, 257, 258, 259]
        client.submit(request_of("little"))
        wait_until(lambda: client.status() == "" and client.heartbeat().busy_s > 0)
        client.submit(request_of("little, again"))
        assert isinstance(wire.decode(peer.recv_multipart()), ReasonerAnswer)  # a fifth had to give way
        reasoner.gate.set()
        wait_until(client.poll)
        assert reasoner.sentences[:2] == ["first", "much"]
        assert reasoner.sentences[2].startswith("little")  # in turns


def test_garbage_from_a_reasoner_is_dropped_and_reported(endpoint, caplog):
    valid = [bytes(part) for part in wire.encode(wire.Heartbeat("x", 0.0, 0))]
    other_version = [msgpack.packb({"version": 1, "kind": "heartbeat", "tensors": []})]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, connected(endpoint) as client:
        router.linger = 0
        router.bind(endpoint)
        wait_until(lambda: client.poll() or router.poll(0))
        name = router.recv_multipart()[0]
        for parts, problem in (
            ([b"garbage"], "header"),
            ([bytes(part) for part in wire.encode(wire.Hello())], "Hello"),
            (other_version, "install the same virst_ros"),
        ):
            router.send_multipart([name, *parts])
            wait_until(lambda problem=problem: problem in client.status())
            assert client.poll() == []
            router.send_multipart([name, *valid])
            wait_until(lambda: client.status() == "")


def test_a_heartbeat_right_behind_garbage_does_not_hide_it(endpoint):
    """Who asks is told once: an answer may have been dropped, and its request must not wait until its time is over."""
    valid = [bytes(part) for part in wire.encode(wire.Heartbeat("x", 0.0, 0))]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, connected(endpoint) as client:
        router.linger = 0
        router.bind(endpoint)
        wait_until(lambda: client.poll() or router.poll(0))
        name = router.recv_multipart()[0]
        router.send_multipart([name, b"garbage"])
        router.send_multipart([name, *valid])
        wait_until(lambda: client.poll() or client.heartbeat())
        assert "header" in client.status()
        router.send_multipart([name, *valid])
        wait_until(lambda: client.status() == "")


def test_nobody_listens_and_nobody_waits(endpoint):
    with connected(endpoint) as client:
        start = time.monotonic()
        for request_id in range(200):
            client.submit(request_of("the red ball", request_id=request_id, frames=8, side=128))
            assert client.poll() == []
        assert client.status() == f"no reasoner answers at {endpoint}; start virst-reasoner"
        assert time.monotonic() - start < 2.0  # 200 calls; they take microseconds each, on a busy machine as well
        reasoner = ObedientReasoner()
        with server_thread(endpoint, reasoner):  # started late: gets the newest request only
            assert [answer.request_id for answer in wait_until(client.poll)] == [199]
        wait_until(lambda: "no reasoner answers" in client.status())


def test_a_reasoner_with_other_weights_is_told_and_one_with_the_same_is_listened_to(endpoint):
    with connected(endpoint, model="tabletop-tiny 0123") as client:
        with server_thread(endpoint):
            wait_until(
                lambda: "runs other weights (obedient) than the segmenter (tabletop-tiny 0123)" in client.status()
            )
            assert "restart it with --weights" in client.status()
        wait_until(lambda: "no reasoner answers" in client.status())
        with server_thread(endpoint) as server:
            server.model = "tabletop-tiny 0123"
            wait_until(lambda: client.status() == "")


def test_the_process_names_the_weights_that_it_loaded(endpoint):
    with connected(endpoint, model="obedient") as client, reasoner_process(endpoint):
        wait_until(lambda: client.status() == "", seconds=60)
        assert client._heartbeat.model == "obedient"


def test_a_request_beyond_the_bounds_is_an_error_of_the_caller(endpoint):
    with connected(endpoint) as client, pytest.raises(WireError, match="goal_id"):
        client.submit(request_of("the red ball", goal_id="g" * 5000))


def test_a_closed_client_is_quiet(endpoint):
    client = ZmqReasonerClient(endpoint)
    client.close()
    client.close()
    client.submit(request_of("the red ball"))
    client.cancel("goal")
    assert client.poll() == []
    assert "closed" in client.status()


def test_killed_in_the_middle_of_a_request_and_started_again(endpoint):
    with connected(endpoint) as client:
        with reasoner_process(endpoint) as process:
            wait_until(lambda: client.status() == "", seconds=60)
            client.submit(request_of("sleep 600", request_id=1))
            wait_until(
                lambda: client.poll() or "busy" if client._heartbeat and client._heartbeat.busy_s > 0 else client.poll()
            )
            process.kill()
            wait_until(lambda: "no reasoner answers" in client.status())
            assert client.poll() == []
        assert Path(endpoint.removeprefix("ipc://")).exists()  # what a killed process leaves behind
        with reasoner_process(endpoint):
            client.submit(request_of("the red ball", request_id=2))
            assert [answer.request_id for answer in wait_until(client.poll, seconds=60)] == [2]
            wait_until(lambda: client.status() == "")


def test_a_hung_process_is_reported_until_it_comes_back(endpoint):
    with reasoner_process(endpoint) as process, connected(endpoint, silent_after_s=0.3) as client:
        wait_until(lambda: client.status() == "", seconds=60)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: "hangs, silent for" in client.status())
        for request_id in range(20):
            client.submit(request_of(f"number {request_id}", request_id=request_id, frames=8, side=128))
            assert client.poll() == []
        with pytest.raises(EndpointError, match=f"served already, by process {process.pid}"):
            ReasonerServer(endpoint)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: client.status() == "")
        answers = []
        wait_until(lambda: 19 in [answer.request_id for answer in answers.extend(client.poll()) or answers])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly(endpoint, number):
    with reasoner_process(endpoint) as process, connected(endpoint) as client:
        wait_until(lambda: client.status() == "", seconds=60)
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert not Path(endpoint.removeprefix("ipc://")).exists()


def test_a_signal_that_another_thread_takes_ends_the_waiting_too(endpoint):
    def interrupt():
        time.sleep(0.3)  # long enough for the main thread to wait for messages
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    def load():
        threading.Thread(target=interrupt).start()
        return ObedientReasoner()

    earlier = signal.getsignal(signal.SIGTERM)
    assert serve(load, endpoint)
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_a_second_server_on_one_endpoint_is_refused_and_the_first_goes_on(endpoint):
    with server_thread(endpoint), connected(endpoint) as client:
        with pytest.raises(EndpointError, match="is served already, by process"):
            ReasonerServer(endpoint)
        client.submit(request_of("the red ball"))
        wait_until(client.poll)


def test_a_file_in_the_place_of_the_socket_is_left_alone(endpoint):
    path = Path(endpoint.removeprefix("ipc://"))
    path.write_text("precious")
    with pytest.raises(EndpointError, match="is not a socket"):
        ReasonerServer(endpoint)
    assert path.read_text() == "precious"
    path.unlink()
    with server_thread(endpoint):  # the failed one has let go of the lock
        assert path.is_socket()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tcp://127.0.0.1:5555", "tcp:// needs CURVE keys"),
        ("ipc://relative", "an address is"),
        ("ipc://@abstract", "an address is"),
        ("udp://127.0.0.1:5555", "an address is"),
        ("", "an address is"),
        ("ipc:///" + "x" * 200, "longer than 107 bytes"),
    ],
)
def test_an_address_that_cannot_work_is_refused_on_both_sides(address, reason):
    with pytest.raises(EndpointError, match=reason):
        ZmqReasonerClient(address)
    with pytest.raises(EndpointError, match=reason):
        ReasonerServer(address)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(EndpointError, match="there is no folder"):
        ReasonerServer(f"ipc://{tmp_path}/missing/reasoner")


def free_port():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


def test_tcp_answers_those_who_have_the_keys_and_nobody_else(tmp_path):
    endpoint, keys, other_keys = f"tcp://127.0.0.1:{free_port()}", tmp_path / "keys", tmp_path / "other"
    for folder in (keys, other_keys):
        make_curve_keys(folder)
    assert stat.S_IMODE((keys / "server.key_secret").stat().st_mode) == 0o600
    (other_keys / "server.key").write_bytes((keys / "server.key").read_bytes())  # knows the server, is not known

    with server_thread(endpoint, curve_keys=str(keys)):
        with connected(endpoint, curve_keys=str(keys)) as client:
            client.submit(request_of("the red ball"))
            wait_until(client.poll)
        with connected(endpoint, curve_keys=str(other_keys)) as stranger:
            stranger.submit(request_of("the red ball"))
            wait_until(lambda: "does not accept our keys" in stranger.status())
            assert stranger.poll() == []
        with raw_peer(endpoint) as eavesdropper:
            eavesdropper.rcvtimeo = 500
            eavesdropper.send_multipart(wire.encode(wire.Hello()))
            with pytest.raises(zmq.Again):
                eavesdropper.recv_multipart()
        with pytest.raises(EndpointError, match="in use"):
            ReasonerServer(endpoint, curve_keys=str(keys))


def test_keys_are_never_overwritten_and_missing_ones_are_named(tmp_path):
    make_curve_keys(tmp_path / "keys")
    with pytest.raises(EndpointError, match="not empty"):
        make_curve_keys(tmp_path / "keys")
    for make in (ZmqReasonerClient, ReasonerServer):
        with pytest.raises(EndpointError, match="no usable CURVE key"):
            make("tcp://127.0.0.1:5555", curve_keys=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--weights", "/nowhere.safetensors"], 1, "no file /nowhere.safetensors"),
        (["--endpoint", "tcp://127.0.0.1:5555"], 1, "tcp:// needs CURVE keys"),
        (["--model", "unheard-of"], 1, "model.name must be one of"),
        (["--top-k", "3"], 1, "--top-k is for --method tempvrs"),
        (["--reasoner-weights", "x"], 1, "--reasoner-weights is for --method visa or tempvrs"),
        (["--method", "visa", "--reasoner-weights", "/nowhere"], 1, "no file /nowhere"),
        (["--method", "tempvrs", "--top-k", "9"], 1, "top_k must be 1 to 8"),
        (["--log-level", "loud"], 2, "log-level"),
    ],
)
def test_the_program_names_what_is_wrong_and_ends(endpoint, monkeypatch, capsys, options, code, message):
    monkeypatch.setattr(sys, "argv", ["virst-reasoner", "--nice", "0", "--endpoint", endpoint, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert message in capsys.readouterr().err
    with server_thread(endpoint):  # nothing keeps the address
        pass


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_program_explains_itself(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["virst-reasoner", option])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--endpoint" in capsys.readouterr().out


def test_the_program_makes_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["virst-reasoner", "--nice", "0", "--make-curve-keys", str(tmp_path / "keys")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert {path.name for path in (tmp_path / "keys").iterdir()} == {
        f"{name}.{kind}" for name in ("server", "client", "reasoner") for kind in ("key", "key_secret")
    }


def test_a_reasoner_stays_on_the_cpus_that_it_is_given() -> None:
    code = "import os; from virst_engine.slow.zmq_server import stay_on; stay_on('{}'); print(os.sched_getaffinity(0))"
    first = min(os.sched_getaffinity(0))
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    done = run([sys.executable, "-c", code.format(first)])
    assert done.stdout.strip() == str({first})
    for wrong in ("9999", "two", ""):
        refused = run([sys.executable, "-c", code.format(wrong)])
        assert "this process may use" in refused.stderr, wrong
