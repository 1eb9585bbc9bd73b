# SPDX-License-Identifier: Apache-2.0
"""The session's end of the border to the reasoner process. Nothing here ever waits for the other side.

There is no thread: each call moves whatever can be moved right now. ZeroMQ's own thread does the sending, and connects
again by itself when the reasoner was killed. A request that was under way then is lost; the session asks again. Whether
one reasoner answers or a pool of them makes no difference here.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from virst_engine.errors import WireError
from virst_engine.slow import wire
from virst_engine.slow.process import RareWarnings
from virst_engine.slow.reasoner import are_frames_of
from virst_engine.slow.zmq_endpoint import (
    REFUSED,
    Connection,
    Role,
    bound_memory,
    check_endpoint,
    receive,
    use_own_keys,
)
from virst_engine.types import ReasonerAnswer, ReasonerRequest

logger = logging.getLogger(__name__)

REMEMBERED_REQUESTS = 64  # answers to older ones are dropped
MESSAGES_PER_CALL = 16  # bounds the work of one call when garbage pours in


@dataclass(frozen=True)
class _Asked:
    """What the answer to a request must repeat."""

    epoch: int
    goal_id: str
    frames: tuple[tuple[int, int], ...]  # (step, stamp_ns)
    wants_words: bool


def _what_is_wrong(answer: ReasonerAnswer, asked: _Asked) -> str:
    """Why an answer is not one to the request of its id; empty when it is."""
    if (answer.epoch, answer.goal_id) != (asked.epoch, asked.goal_id):
        return f"goal_id: request {answer.request_id} was about goal {asked.goal_id}, epoch {asked.epoch}"
    if not are_frames_of(answer.prompts, asked.frames):
        return f"steps: the answer to request {answer.request_id} is about other frames"
    if not answer.error and bool(answer.words) != asked.wants_words:
        return f"words: request {answer.request_id} wants {'words' if asked.wants_words else 'prompts'}"
    return ""


class ZmqReasonerClient:
    """A ReasonerClient over ZeroMQ. Safe to call from several threads."""

    def __init__(
        self,
        endpoint: str,
        *,
        curve_keys: str = "",
        model: str = "",
        heartbeat_s: float = 0.5,
        silent_after_s: float = 2.0,
        busy_after_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start connecting. `status` complains of silence after `silent_after_s` and of one endless request after
        `busy_after_s`; also of a reasoner with other weights than `model` (see `weights_identity`; empty = any).
        Raises EndpointError for an address or keys that can never work.
        """
        curve_keys = check_endpoint(endpoint, curve_keys)
        self._endpoint, self._model = endpoint, model
        self._heartbeat_s, self._silent_after_s, self._busy_after_s = heartbeat_s, silent_after_s, busy_after_s
        self._clock = clock
        self.dropped = 0  # messages that broke the protocol, or answered what was not asked
        self._complaints = RareWarnings(logger)
        self._lock = threading.Lock()
        self._unsent: dict[str, list[wire.Buffer]] = {}  # requests by goal
        self._cancelled: dict[str, None] = {}  # goals whose cancelling has not been sent yet; a dict keeps their order
        self._asked: OrderedDict[int, _Asked] = OrderedDict()  # by request id
        self._answers: list[ReasonerAnswer] = []
        self._is_connected = False
        self._has_said_hello = False  # since it connected; a pool must know us before it takes requests
        self._problem = ""  # what the other side said or did wrong; cleared by a heartbeat after it was told
        self._problem_is_told = False  # or one that comes right behind an answer that was dropped would hide it
        self._heartbeat: wire.Heartbeat | None = None
        self._next_hello_s = clock()
        self._unheard_since_s: float | None = None  # the first hello that nothing has followed yet
        self._is_closed = False
        self._context = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
            bound_memory(self._socket, messages=1)
            if curve_keys:
                use_own_keys(self._socket, curve_keys, Role.ROBOT)
            self._connection = Connection(self._socket, endpoint, clock=clock)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def submit(self, request: ReasonerRequest) -> None:
        """Leave a request; it replaces an unsent one of the same goal. The clip's arrays must not change any more.

        Raises:
            WireError: the request breaks a bound of the protocol.
        """
        parts = wire.encode(request)
        clip = request.clip
        frames = tuple(zip(clip.steps.tolist(), clip.stamps_ns.tolist(), strict=True))
        with self._lock:
            if self._is_closed:
                return
            self._asked[request.request_id] = _Asked(request.epoch, request.goal_id, frames, request.wants_words)
            while len(self._asked) > REMEMBERED_REQUESTS:
                self._asked.popitem(last=False)
            self._unsent[request.goal_id] = parts
            self._exchange()

    def cancel(self, goal_id: str) -> None:
        """The goal is gone: its waiting request is dropped, here and in the reasoner."""
        with self._lock:
            self._unsent.pop(goal_id, None)
            if not self._is_closed:
                self._exchange()
                if self._is_connected:  # nobody else has its requests
                    self._cancelled[goal_id] = None
                    if len(self._cancelled) > REMEMBERED_REQUESTS:  # a hung reasoner reads none of them
                        del self._cancelled[next(iter(self._cancelled))]
                    self._send_all()

    def poll(self) -> list[ReasonerAnswer]:
        """The answers that came since the last call. Only answers to requests of this client come through."""
        with self._lock:
            if not self._is_closed:
                self._exchange()
            answers, self._answers = self._answers, []
            return answers

    def status(self) -> str:
        """Empty when a reasoner listens, else why not and what to do."""
        with self._lock:
            if self._is_closed:
                return "the connection to the reasoner is closed"
            self._exchange()
            if self._problem:
                self._problem_is_told = True
                return self._problem
            if not self._is_connected:
                return f"no reasoner answers at {self._endpoint}; start virst-reasoner"
            silent_s = 0.0 if self._unheard_since_s is None else self._clock() - self._unheard_since_s
            if self._heartbeat is None:
                return f"the reasoner at {self._endpoint} is there but has not answered for {silent_s:.1f} s (loading?)"
            if self._heartbeat.reasoners == 0 and self._heartbeat.model == "":
                return f"no reasoner has joined the pool at {self._endpoint}; start virst-reasoner --join for it"
            if self._model and self._heartbeat.model != self._model:
                return (
                    f"the reasoner at {self._endpoint} runs other weights ({self._heartbeat.model or 'not named'}) "
                    f"than the segmenter ({self._model}): restart it with --weights as in the segmenter's model.weights"
                )
            if silent_s > self._silent_after_s:
                return f"the reasoner at {self._endpoint} hangs, silent for {silent_s:.1f} s; restart virst-reasoner"
            if self._heartbeat.reasoners == 0:
                return f"all reasoners of the pool at {self._endpoint} hang or are overdue; restart them, see its log"
            if self._heartbeat.busy_s > self._busy_after_s:
                return (
                    f"the reasoner at {self._endpoint} has worked on one request for {self._heartbeat.busy_s:.0f} s; "
                    "restart virst-reasoner, or give it a faster device"
                )
            return ""

    def heartbeat(self) -> wire.Heartbeat | None:
        """The newest of the reasoner or pool; None before the first one since it connected."""
        with self._lock:
            if not self._is_closed:
                self._exchange()
            return self._heartbeat

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._send(wire.encode(wire.Cancel("")))
            self._is_closed = True
            self._unsent.clear()
            self._connection.close()
            self._socket.close(linger=50)  # ms, so that the farewell can leave
            self._context.term()

    def _exchange(self) -> None:
        self._watch_connection()
        self._receive_messages()
        if self._is_connected and self._clock() >= self._next_hello_s:
            self._next_hello_s = self._clock() + self._heartbeat_s
            if self._unheard_since_s is None:
                self._unheard_since_s = self._clock()
            self._has_said_hello = self._send(wire.encode(wire.Hello(self._model))) or self._has_said_hello
        self._send_all()

    def _send_all(self) -> None:
        for goal_id in list(self._cancelled):  # first: the goal may have been set again since
            if not self._send(wire.encode(wire.Cancel(goal_id))):
                return
            del self._cancelled[goal_id]
        for goal_id in list(self._unsent) if self._has_said_hello else ():
            if not self._send(self._unsent[goal_id]):
                return
            del self._unsent[goal_id]

    def _watch_connection(self) -> None:
        for event in self._connection.events():
            was_connected, self._is_connected = self._is_connected, event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._heartbeat = self._unheard_since_s = None
            self._has_said_hello = False
            self._cancelled.clear()
            self._next_hello_s = self._clock()
            if self._is_connected or was_connected:
                self._problem = ""
            if event & REFUSED:
                self._complain(
                    f"the reasoner at {self._endpoint} does not accept our keys; set reasoner.curve_keys to the folder "
                    "that it was started with"
                )

    def _receive_messages(self) -> None:
        for _ in range(MESSAGES_PER_CALL):
            try:
                parts = receive(self._socket)
            except zmq.Again:
                return
            self._unheard_since_s = None
            try:
                self._accept(wire.decode(parts))
            except WireError as error:
                self.dropped += 1
                self._complaints.warning("dropped a message of the reasoner: %s", error)
                self._complain(f"the reasoner at {self._endpoint} sends what we do not understand: {error}")

    def _accept(self, message: wire.Message) -> None:
        match message:
            case wire.Heartbeat():
                self._heartbeat = message
                if self._problem_is_told:
                    self._problem = ""
            case ReasonerAnswer():
                self._take_answer(message)
            case wire.Refusal():
                self._complaints.warning("the reasoner refused a message: %s", message.error)
                self._complain(f"the reasoner at {self._endpoint} refuses our messages: {message.error}")
            case _:
                raise WireError(f"kind: a reasoner does not send {type(message).__name__}")

    def _complain(self, problem: str) -> None:
        self._problem, self._problem_is_told = problem, False

    def _take_answer(self, answer: ReasonerAnswer) -> None:
        asked = self._asked.pop(answer.request_id, None)
        if asked is None:
            raise WireError(f"request_id: {answer.request_id} was not asked, or answered before")
        wrong = _what_is_wrong(answer, asked)
        if wrong:  # nothing better will come: whoever asked need not wait until the request is given up
            error = f"the reasoner's answer was of no use: {wrong}"
            answer = ReasonerAnswer(answer.request_id, asked.epoch, asked.goal_id, prompts=(), error=error)
        self._answers.append(answer)
        if wrong:
            raise WireError(wrong)

    def _send(self, parts: list[wire.Buffer]) -> bool:
        """Whether ZeroMQ took the message; it does not while nobody is connected or an earlier one is stuck."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True
