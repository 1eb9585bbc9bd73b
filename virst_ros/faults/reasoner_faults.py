# SPDX-License-Identifier: Apache-2.0
"""What reasoners do: die, hang, come late or not at all, answer wrongly, or belong to another model."""

import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import zmq

from virst_ros.faults.fault import Fault, FaultError, Inject, Masks, Reasoner
from virst_ros.faults.harness import Harness, end_process
from virst_ros.faults.scripted_reasoner import Change, Parts, field_of, rewritten
from virst_ros.faults.segmenter import Segmenter, wait_until

TICKS_AT_WORK = 3  # of CPU time (10 ms each) within 100 ms: it computes
FLOOD_S = 3.0


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _is_computing(pid: int) -> bool:
    before = _cpu_ticks(pid)
    time.sleep(0.1)
    return _cpu_ticks(pid) - before >= TICKS_AT_WORK


@contextmanager
def _killed(harness: Harness) -> Iterator[None]:
    process = harness.reasoner
    if not wait_until(lambda: _is_computing(process.pid), 20.0):
        raise FaultError("the reasoner has not been at work for 20 s, so it cannot be killed then")
    process.kill()
    process.wait()
    yield
    harness.start_reasoner()


@contextmanager
def _ended(harness: Harness) -> Iterator[None]:
    end_process(harness.reasoner)
    yield
    harness.start_reasoner()


@contextmanager
def _hung(harness: Harness) -> Iterator[None]:
    process = harness.reasoner
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


@contextmanager
def _with_other_weights(harness: Harness) -> Iterator[None]:
    """Weights of the same model that were trained otherwise: one number of the shipped file differs."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from virst_engine.config import ModelParameters
    from virst_engine.weights import weights_path

    other = harness.folder / "other.safetensors"
    with safe_open(weights_path(ModelParameters()), framework="numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    first = min(tensors)
    tensors[first] = (tensors[first] * np.float16(1.5)).astype(tensors[first].dtype)
    save_file(tensors, other, metadata)
    harness.end_reasoner()
    harness.start_reasoner(str(other))
    yield
    harness.end_reasoner()
    harness.start_reasoner()


@contextmanager
def _socket_removed(harness: Harness) -> Iterator[None]:
    """As cleaners of /tmp do; then the reasoner is restarted."""
    Path(harness.endpoint.removeprefix("ipc://")).unlink()
    time.sleep(1.0)
    end_process(harness.reasoner)
    yield
    harness.start_reasoner()


@contextmanager
def _flooded(harness: Harness) -> Iterator[None]:
    """Another program of this user sends garbage to the reasoner's address, as fast as it can."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger, socket.sndhwm = 0, 10
    socket.connect(harness.endpoint)
    end_s = time.monotonic() + FLOOD_S
    while time.monotonic() < end_s:
        try:
            socket.send_multipart([os.urandom(64), os.urandom(64)], zmq.NOBLOCK)
        except zmq.Again:
            time.sleep(0.001)
    yield
    socket.close()
    context.term()


@contextmanager
def _absent_at_start(harness: Harness) -> Iterator[Segmenter]:
    endpoint = f"{harness.endpoint}_late"
    spare = harness.start_spare(reasoner__endpoint=endpoint)
    harness.set_base_goal(spare)
    yield spare
    harness.run_reasoner(endpoint)


def _scripted(change: Change) -> Inject:
    """Answers become what `change` makes of them."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[None]:
        with harness.scripted.answering(change):
            yield

    return inject


def _each(change: Callable[[Parts], Parts]) -> Inject:
    return _scripted(lambda parts: [(0.0, change(parts))])


def _beating(change: Callable[[Parts], Parts]) -> Inject:
    @contextmanager
    def inject(harness: Harness) -> Iterator[None]:
        with harness.scripted.beating(lambda parts: [(0.0, change(parts))]):
            yield

    return inject


@contextmanager
def _garbage(harness: Harness) -> Iterator[None]:
    with harness.scripted.answering(lambda _: [(0.0, [harness.random.randbytes(200), harness.random.randbytes(50)])]):
        yield


@contextmanager
def _garbage_flood(harness: Harness) -> Iterator[None]:
    messages = [[harness.random.randbytes(100)] for _ in range(16)]
    with harness.scripted.flooding(messages):
        yield


@contextmanager
def _mute(harness: Harness) -> Iterator[None]:
    with harness.scripted.mute():
        yield


@contextmanager
def _of_a_cleared_goal(harness: Harness) -> Iterator[None]:
    """The answer of a goal that is cleared meanwhile comes a second later."""
    from virst_msgs.srv import ClearGoal

    with harness.scripted.answering(lambda parts: [(1.0, parts)]):
        response = harness.set_goal("the blue can")
        time.sleep(0.6)
        harness.call(ClearGoal, "clear_goal", ClearGoal.Request(goal_id=response.goal_id))
        time.sleep(1.5)
        yield


def _with_nan(parts: Parts) -> Parts:
    """The first embedding becomes NaN; encode() would refuse to."""
    if len(parts) < 2:
        return parts
    return [parts[0], struct.pack("<f", float("nan")) + parts[1][4:], *parts[2:]]


def _narrow(parts: Parts) -> Parts:
    """Embeddings of half the channels, correct as a message."""
    if len(parts) < 2:
        return parts
    ((name, dtype, shape),) = field_of(parts, "tensors")
    half = np.frombuffer(parts[1], dtype).reshape(shape)[..., : shape[-1] // 2]
    return [rewritten(parts, tensors=[[name, dtype, list(half.shape)]])[0], half.tobytes()]


def _surer_than_sure(parts: Parts) -> Parts:
    return rewritten(parts, confidences=[7.0] * len(field_of(parts, "confidences")))


def _of_older_frames(parts: Parts) -> Parts:
    return rewritten(parts, steps=[max(0, step - 1) for step in field_of(parts, "steps")])


def _failing(parts: Parts) -> Parts:
    """As zmq_server answers when its model raises."""
    error = "the reasoner failed (MemoryError: out of memory); see its log"
    return rewritten(parts, error=error, steps=[], stamps_ns=[], confidences=[], tensors=[])[:1]


def _claiming_too_much(parts: Parts) -> Parts:
    """A tensor of 200 GB, in words."""
    if len(parts) < 2:
        return parts
    return [rewritten(parts, tensors=[["prompts", "<f4", [100, 65536, 8192]]])[0], parts[1]]


NOT_UNDERSTOOD = "sends what we do not understand"

PROCESS_FAULTS = (
    Fault(
        "reasoner_killed",
        "kill -9 while it computes an answer; then it is started again",
        _killed,
        Masks.OF_GOAL,
        log="no reasoner answers at",
        diagnostics="no reasoner answers at .*; start virst-reasoner",
        least_s=2.0,
        refreshes=True,
    ),
    Fault(
        "reasoner_ended",
        "the reasoner is stopped properly, and started again",
        _ended,
        Masks.OF_GOAL,
        log="no reasoner answers at",
        diagnostics="no reasoner answers at",
        refreshes=True,
    ),
    Fault(
        "reasoner_hangs",
        "SIGSTOP; then it goes on",
        _hung,
        Masks.OF_GOAL,
        log="hangs, silent for",
        diagnostics="hangs, silent for .*; restart virst-reasoner",
        refreshes=True,
    ),
    Fault(
        "reasoner_flooded",
        "another program sends it random messages for 3 s",
        _flooded,
        Masks.OF_GOAL,
        least_s=FLOOD_S,
        refreshes=True,
    ),
    Fault(
        "reasoner_socket_removed",
        "the socket is deleted under /tmp, and the reasoner restarted",
        _socket_removed,
        Masks.OF_GOAL,
        log="no reasoner answers at",
        diagnostics="no reasoner answers at",
        refreshes=True,
    ),
    Fault(
        "reasoner_of_other_weights",
        "a reasoner with other weights takes its place; then the right one again",
        _with_other_weights,
        Masks.OF_GOAL,
        log="runs other weights",
        diagnostics="runs other weights .* restart it with",
        refreshes=True,
    ),
    Fault(
        "reasoner_absent_at_start",
        "there is none when the segmenter starts and gets its goal",
        _absent_at_start,
        Masks.COME,
        log="no reasoner answers at",
        diagnostics="no reasoner answers at",
        least_s=2.0,
        refreshes=True,
    ),
)

SCRIPTED_FAULTS = (
    Fault(
        "reasoner_slow",
        "every answer comes 30 s late",
        _scripted(lambda parts: [(30.0, parts)]),
        Masks.OF_GOAL,
        log="no answer of the reasoner for 5 s",
        diagnostics="no answer of the reasoner for 5 s",
        least_s=31.0,
        refreshes=True,
    ),
    Fault(
        "reasoner_garbage",
        "answers are random bytes",
        _garbage,
        Masks.OF_GOAL,
        log="dropped a message of the reasoner: header",
        diagnostics=f"{NOT_UNDERSTOOD}: header",
        refreshes=True,
    ),
    Fault(
        "reasoner_garbage_flood",
        "random messages between the answers, as fast as they are read",
        _garbage_flood,
        Masks.OF_GOAL,
        log="dropped a message of the reasoner: header",
        diagnostics=f"{NOT_UNDERSTOOD}: header",
        least_s=3.0,
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_twice",
        "every answer comes twice",
        _scripted(lambda parts: [(0.0, parts), (0.05, parts)]),
        Masks.OF_GOAL,
        log="was not asked, or answered before",
        diagnostics="was not asked, or answered before",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_old_epoch",
        "answers carry an older epoch",
        _each(lambda parts: rewritten(parts, epoch=max(0, field_of(parts, "epoch") - 1))),
        Masks.OF_GOAL,
        log="request .* was about goal",
        diagnostics="request .* was about goal",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_other_goal",
        "answers name another goal",
        _each(lambda parts: rewritten(parts, goal_id="goal_999")),
        Masks.OF_GOAL,
        log="request .* was about goal",
        diagnostics="request .* was about goal",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_other_frames",
        "answers are about other frames than were sent",
        _each(_of_older_frames),
        Masks.OF_GOAL,
        log="is about other frames",
        diagnostics="is about other frames",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_unasked",
        "answers carry a request id that was never used",
        _each(lambda parts: rewritten(parts, request_id=2**40)),
        Masks.OF_GOAL,
        log="was not asked, or answered before",
        diagnostics="was not asked, or answered before",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_nan",
        "embeddings hold NaN",
        _each(_with_nan),
        Masks.OF_GOAL,
        log="embeddings must be finite",
        diagnostics="embeddings must be finite",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_narrow",
        "embeddings have half the channels",
        _each(_narrow),
        Masks.OF_GOAL,
        log="the reasoner's prompts have shapes",
        diagnostics="the reasoner's prompts have shapes",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_confidence",
        "confidences are 7",
        _each(_surer_than_sure),
        Masks.OF_GOAL,
        log="numbers from 0 to 1 were expected",
        diagnostics="numbers from 0 to 1 were expected",
        refreshes=True,
    ),
    Fault(
        "reasoner_answers_huge",
        "an answer claims 200 GB of embeddings",
        _each(_claiming_too_much),
        Masks.OF_GOAL,
        log="dimensions must be within",
        diagnostics="dimensions must be within",
        refreshes=True,
    ),
    Fault(
        "reasoner_out_of_memory",
        "its model fails on every request",
        _each(_failing),
        Masks.OF_GOAL,
        log="the reasoner failed .MemoryError",
        diagnostics="the reasoner failed .MemoryError",
        refreshes=True,
    ),
    Fault(
        "reasoner_mute",
        "it is connected, but neither answers nor beats",
        _mute,
        Masks.OF_GOAL,
        log="hangs, silent for",
        diagnostics="hangs, silent for",
        refreshes=True,
    ),
    Fault(
        "reasoner_speaks_other_version",
        "heartbeats are of protocol version 2",
        _beating(lambda parts: rewritten(parts, version=2)),
        Masks.OF_GOAL,
        log="the other side speaks 2",
        diagnostics="the other side speaks 2",
        refreshes=True,
    ),
    Fault(
        "reasoner_busy_for_ever",
        "heartbeats say that one request has been computed for ten minutes",
        _beating(lambda parts: rewritten(parts, busy_s=600.0)),
        Masks.OF_GOAL,
        log="has worked on one request for 600 s",
        diagnostics="has worked on one request for 600 s",
        refreshes=True,
    ),
    Fault(
        "goal_cleared_before_its_answer",
        "a goal is cleared while its answer is on its way",
        _of_a_cleared_goal,
        Masks.OF_GOAL,
        refreshes=True,
    ),
)
FAULTS = (*PROCESS_FAULTS, *(replace(fault, reasoner=Reasoner.SCRIPTED) for fault in SCRIPTED_FAULTS))
