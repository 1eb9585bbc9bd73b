# SPDX-License-Identifier: Apache-2.0
"""The bytes between the session and the reasoner process: a msgpack header, then raw tensor buffers.

A message is a list of buffers (one ZeroMQ multipart message). The first is a msgpack map of at most MAX_HEADER_BYTES:

    {"version": 5, "kind": "request", <the kind's own fields>, "tensors": [[name, dtype, shape], ...]}

and each tensor follows as one buffer, C order, little endian. A request's sentence is a tensor too (UTF-8 bytes), which
keeps the header small. Everything is declared below and checked before anything is allocated; decoded arrays are
read-only views of the received buffers. Nothing is ever unpickled. Any violation is a WireError that names the field.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack
import numpy as np

from virst_engine.errors import WireError
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

PROTOCOL_VERSION = 5
MAX_HEADER_BYTES = 32 * 1024
MAX_TENSOR_BYTES = 256 * 1024 * 1024
MAX_TENSORS = 3
MAX_PARTS = 1 + MAX_TENSORS
MAX_FRAMES = 100
MAX_BOXES = 64  # of one frame
MAX_NAME_CHARACTERS = 1024  # goal ids, cameras, models, reasoners
MAX_ERROR_CHARACTERS = 2000
MAX_WORDS_CHARACTERS = 2000  # of an answer in words
MAX_SENTENCE_BYTES = 400_000  # goal.max_length at its highest, in UTF-8
MAX_TIMINGS = 32
MAX_TIMING_CHARACTERS = 64
MAX_INT = 2**63 - 1

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Hello:
    """Client to reasoner, first and every now and then: are you there? Answered with a Heartbeat at once.

    A pool says it to its reasoners too, which send heartbeats without being asked.
    """

    model: str = ""  # identity of the weights whose answers the client can use; empty = any


@dataclass(frozen=True)
class Heartbeat:
    """Reasoner to client or pool, also while it computes; pool to client."""

    model: str  # identity of the weights that answer, see `weights_identity`; empty = not told
    busy_s: float  # for how long the running request has been computed; 0 when idle. A pool: the client's oldest one
    dropped: int  # messages from anyone that broke the protocol, since the start
    name: str = ""  # of the process, for people
    reasoners: int = 1  # a pool: how many of its reasoners are well and run what the client can use


@dataclass(frozen=True)
class Leave:
    """Reasoner to pool: give what I work on to another one, I am stopping."""


@dataclass(frozen=True)
class Cancel:
    """Client to reasoner: drop the waiting request of this goal. An empty goal id means all goals of this client."""

    goal_id: str


@dataclass(frozen=True)
class Refusal:
    """Reasoner to client: your last message was dropped, because `error`."""

    error: str


Message: TypeAlias = Hello | Heartbeat | Leave | Cancel | Refusal | ReasonerRequest | ReasonerAnswer


@dataclass(frozen=True)
class _Tensor:
    """What one tensor of a kind may look like: any of `dtypes`, every dimension within its (low, high)."""

    name: str
    dtypes: tuple[str, ...]
    bounds: tuple[tuple[int, int], ...]


_SENTENCE = _Tensor("sentence", ("|u1",), ((1, MAX_SENTENCE_BYTES),))
_FRAMES = _Tensor("frames", ("|u1",), ((1, MAX_FRAMES), (1, 2048), (1, 2048), (3, 3)))
_FUSION = _Tensor("fusion", ("<f2", "<f4"), ((1, MAX_FRAMES), (1, 4096), (1, 512), (1, 512)))
_PROMPTS = _Tensor("prompts", ("<f4",), ((1, MAX_FRAMES), (1, 256), (1, 8192)))
_BOXES = _Tensor("boxes", ("<f4",), ((1, MAX_FRAMES), (1, MAX_BOXES), (4, 4)))  # in place of `prompts`


def encode(message: Message) -> list[Buffer]:
    """The buffers of `message`; tensors are views of its arrays, which must not be written until they are sent.

    Raises:
        WireError: the message breaks a declared bound, so the other side would drop it.
    """
    match message:
        case Hello():
            _text("model", message.model, MAX_NAME_CHARACTERS)
            return _pack("hello", vars(message))
        case Heartbeat():
            _number("busy_s", message.busy_s)
            _integer("dropped", message.dropped)
            _integer("reasoners", message.reasoners)
            _text("model", message.model, MAX_NAME_CHARACTERS)
            _text("name", message.name, MAX_NAME_CHARACTERS)
            return _pack("heartbeat", vars(message))
        case Leave():
            return _pack("leave", {})
        case Cancel():
            _text("goal_id", message.goal_id, MAX_NAME_CHARACTERS)
            return _pack("cancel", vars(message))
        case Refusal():
            return _pack("refusal", {"error": _shorten(message.error)})
        case ReasonerRequest():
            return _encode_request(message)
        case ReasonerAnswer():
            return _encode_answer(message)


def decode(parts: Sequence[Buffer]) -> Message:
    """The message in `parts`. Its arrays are read-only views that keep the buffers alive.

    Raises:
        WireError: any violation of the protocol; the message must be dropped.
    """
    if not parts:
        raise WireError("header: the message is empty")
    header = _unpack(parts[0])
    decoder = _DECODERS.get(header["kind"])
    if decoder is None:
        raise WireError(f"kind: unknown message {_show(header['kind'])}")
    return decoder(header, parts[1:])


def _encode_request(request: ReasonerRequest) -> list[Buffer]:
    clip = request.clip
    header = _identity(request.request_id, request.epoch, request.goal_id) | {
        "camera": _text("camera", clip.camera, MAX_NAME_CHARACTERS),
        "steps": _times("steps", clip.steps.tolist()),
        "stamps_ns": _times("stamps_ns", clip.stamps_ns.tolist()),
        "wants_words": _flag("wants_words", request.wants_words),
    }
    try:
        sentence = request.sentence.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"sentence: not valid Unicode ({error.reason} at character {error.start})") from error
    tensors = {
        _SENTENCE: np.frombuffer(sentence, np.uint8),
        _FRAMES: clip.frames_rgb_u8,
        _FUSION: clip.fusion,
    }
    _same_length(header, frames=len(clip.frames_rgb_u8), fusion=len(clip.fusion))
    return _pack("request", header, tensors)


def _decode_request(header: dict[str, Any], buffers: Sequence[Buffer]) -> ReasonerRequest:
    _fields(header, "request_id", "epoch", "goal_id", "camera", "steps", "stamps_ns", "wants_words")
    identity = _identity(header["request_id"], header["epoch"], header["goal_id"])
    camera = _text("camera", header["camera"], MAX_NAME_CHARACTERS)
    steps, stamps_ns = _times("steps", header["steps"]), _times("stamps_ns", header["stamps_ns"])
    wants_words = _flag("wants_words", header["wants_words"])
    sentence, frames, fusion = _tensors(header["tensors"], buffers, (_SENTENCE, _FRAMES, _FUSION))
    _same_length(header, frames=len(frames), fusion=len(fusion))
    try:
        text = sentence.tobytes().decode()
    except UnicodeDecodeError as error:
        raise WireError(f"sentence: not UTF-8 ({error.reason} at byte {error.start})") from error
    clip = Clip(np.array(steps, np.int64), np.array(stamps_ns, np.int64), frames, fusion, camera)
    return ReasonerRequest(**identity, sentence=text, clip=clip, wants_words=wants_words)


def _encode_answer(answer: ReasonerAnswer) -> list[Buffer]:
    header = _identity(answer.request_id, answer.epoch, answer.goal_id) | {
        "error": _shorten(answer.error),
        "timings_ms": _timings({stage: float(spent_ms) for stage, spent_ms in answer.timings_ms.items()}),
        "steps": _times("steps", [int(prompt.step) for prompt in answer.prompts]),
        "stamps_ns": _times("stamps_ns", [int(prompt.stamp_ns) for prompt in answer.prompts]),
        "confidences": _confidences([float(prompt.confidence) for prompt in answer.prompts]),
        "words": _text("words", answer.words, MAX_WORDS_CHARACTERS),
    }
    _one_of(len(answer.prompts), answer.words, answer.error)
    if not answer.prompts:
        return _pack("answer", header)
    boxes = [prompt.boxes for prompt in answer.prompts if prompt.boxes is not None]
    if len(boxes) not in (0, len(answer.prompts)):
        raise WireError("prompts: an answer has either embeddings or boxes")
    rows = boxes or [prompt.embeddings for prompt in answer.prompts]
    if len({each.shape for each in rows}) > 1:
        raise WireError(f"prompts: all {'boxes' if boxes else 'embeddings'} of an answer must have the same shape")
    stacked = np.stack(rows)
    return _pack("answer", header, {_BOXES: _proper(stacked)} if boxes else {_PROMPTS: _finite(stacked)})


def _decode_answer(header: dict[str, Any], buffers: Sequence[Buffer]) -> ReasonerAnswer:
    _fields(
        header, "request_id", "epoch", "goal_id", "error", "timings_ms", "steps", "stamps_ns", "confidences", "words"
    )
    identity = _identity(header["request_id"], header["epoch"], header["goal_id"])
    error = _text("error", header["error"], MAX_ERROR_CHARACTERS)
    timings_ms = _timings(header["timings_ms"])
    steps, stamps_ns = _times("steps", header["steps"]), _times("stamps_ns", header["stamps_ns"])
    confidences = _confidences(header["confidences"])
    words = _text("words", header["words"], MAX_WORDS_CHARACTERS)
    _one_of(len(steps), words, error)
    prompts: tuple[Prompt, ...] = ()
    if steps:
        has_boxes = _names_first(header["tensors"], _BOXES)
        (rows,) = _tensors(header["tensors"], buffers, (_BOXES if has_boxes else _PROMPTS,))
        _same_length(header, prompts=len(rows), confidences=len(confidences))
        make = Prompt.of_boxes if has_boxes else Prompt
        (_proper if has_boxes else _finite)(rows)
        prompts = tuple(make(*of_frame) for of_frame in zip(steps, stamps_ns, rows, confidences, strict=True))
    else:
        _tensors(header["tensors"], buffers, ())
        _same_length(header, confidences=len(confidences))
    return ReasonerAnswer(**identity, prompts=prompts, error=error, timings_ms=timings_ms, words=words)


def _decode_hello(header: dict[str, Any], buffers: Sequence[Buffer]) -> Hello:
    _fields(header, "model")
    _tensors(header["tensors"], buffers, ())
    return Hello(_text("model", header["model"], MAX_NAME_CHARACTERS))


def _decode_heartbeat(header: dict[str, Any], buffers: Sequence[Buffer]) -> Heartbeat:
    _fields(header, "model", "busy_s", "dropped", "name", "reasoners")
    _tensors(header["tensors"], buffers, ())
    return Heartbeat(
        model=_text("model", header["model"], MAX_NAME_CHARACTERS),
        busy_s=_number("busy_s", header["busy_s"]),
        dropped=_integer("dropped", header["dropped"]),
        name=_text("name", header["name"], MAX_NAME_CHARACTERS),
        reasoners=_integer("reasoners", header["reasoners"]),
    )


def _decode_leave(header: dict[str, Any], buffers: Sequence[Buffer]) -> Leave:
    _fields(header)
    _tensors(header["tensors"], buffers, ())
    return Leave()


def _decode_cancel(header: dict[str, Any], buffers: Sequence[Buffer]) -> Cancel:
    _fields(header, "goal_id")
    _tensors(header["tensors"], buffers, ())
    return Cancel(_text("goal_id", header["goal_id"], MAX_NAME_CHARACTERS))


def _decode_refusal(header: dict[str, Any], buffers: Sequence[Buffer]) -> Refusal:
    _fields(header, "error")
    _tensors(header["tensors"], buffers, ())
    return Refusal(_text("error", header["error"], MAX_ERROR_CHARACTERS))


_DECODERS: Mapping[str, Callable[[dict[str, Any], Sequence[Buffer]], Message]] = {
    "hello": _decode_hello,
    "heartbeat": _decode_heartbeat,
    "leave": _decode_leave,
    "cancel": _decode_cancel,
    "refusal": _decode_refusal,
    "request": _decode_request,
    "answer": _decode_answer,
}


def _pack(kind: str, fields: Mapping[str, Any], tensors: Mapping[_Tensor, np.ndarray] | None = None) -> list[Buffer]:
    specs, buffers = [], []
    for declared, array in (tensors or {}).items():
        dtype = array.dtype.newbyteorder("<").str
        _check_tensor(declared, dtype, array.shape)
        specs.append([declared.name, dtype, list(array.shape)])
        buffers.append(np.ascontiguousarray(array, dtype).data.cast("B"))
    header = msgpack.packb({"version": PROTOCOL_VERSION, "kind": kind, **fields, "tensors": specs})
    return [header, *buffers]


def _unpack(part: Buffer) -> dict[str, Any]:
    size = memoryview(part).nbytes
    if size > MAX_HEADER_BYTES:
        raise WireError(f"header: {size} bytes, at most {MAX_HEADER_BYTES} are allowed")
    try:
        # strict_map_key: only text as keys. No raw bytes and no extension types exist in this protocol.
        header = msgpack.unpackb(
            part, max_bin_len=0, max_ext_len=0, max_array_len=MAX_FRAMES, max_map_len=MAX_TIMINGS, strict_map_key=True
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"header: not the msgpack map that was expected ({error or type(error).__name__})") from error
    if not isinstance(header, dict):
        raise WireError(f"header: a map was expected, got {type(header).__name__}")
    version = header.get("version")
    if isinstance(version, bool) or version != PROTOCOL_VERSION:
        raise WireError(
            f"version: the other side speaks {_show(version)}, this side {PROTOCOL_VERSION}; "
            "install the same virst_ros on both"
        )
    if not isinstance(header.get("kind"), str):
        raise WireError(f"kind: a text was expected, got {_show(header.get('kind'))}")
    return header


def _fields(header: Mapping[str, Any], *names: str) -> None:
    expected = {"version", "kind", "tensors", *names}
    if missing := expected - header.keys():
        raise WireError(f"{min(missing)}: missing in a message of kind {_show(header['kind'])}")
    if unknown := header.keys() - expected:
        raise WireError(f"{_show(min(map(str, unknown)))}: unknown in a message of kind {_show(header['kind'])}")


def _tensors(specs: Any, buffers: Sequence[Buffer], declared: Sequence[_Tensor]) -> list[np.ndarray]:
    if not isinstance(specs, list) or len(specs) != len(declared) or len(buffers) != len(declared):
        described = len(specs) if isinstance(specs, list) else _show(specs)
        raise WireError(f"tensors: {len(declared)} expected, {described} described, {len(buffers)} sent")
    return [_tensor(*item) for item in zip(specs, buffers, declared, strict=True)]


def _names_first(specs: Any, declared: _Tensor) -> bool:
    return isinstance(specs, list) and bool(specs) and isinstance(specs[0], list) and specs[0][:1] == [declared.name]


def _tensor(spec: Any, buffer: Buffer, declared: _Tensor) -> np.ndarray:
    if not isinstance(spec, list) or len(spec) != 3 or spec[0] != declared.name:
        raise WireError(f"{declared.name}: [name, dtype, shape] expected, got {_show(spec)}")
    _, dtype, shape = spec
    _check_tensor(declared, dtype, shape)
    expected, sent = math.prod(shape) * np.dtype(dtype).itemsize, memoryview(buffer).nbytes
    if sent != expected:
        raise WireError(f"{declared.name}: {expected} bytes expected for {dtype} {shape}, got {sent}")
    array = np.frombuffer(memoryview(buffer).toreadonly(), dtype).reshape(shape)
    # torch reads unaligned memory slowly or not at all
    return array if array.flags.aligned else _read_only(array.copy())


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _check_tensor(declared: _Tensor, dtype: Any, shape: Any) -> None:
    name, rank = declared.name, len(declared.bounds)
    if not isinstance(dtype, str) or dtype not in declared.dtypes:
        raise WireError(f"{name}: dtype {_show(dtype)}, allowed {' or '.join(declared.dtypes)}")
    if not isinstance(shape, list | tuple) or len(shape) != rank:
        raise WireError(f"{name}: {rank} dimensions expected, got shape {_show(shape)}")
    for size, (low, high) in zip(shape, declared.bounds, strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or not low <= size <= high:
            raise WireError(f"{name}: dimensions must be within {list(declared.bounds)}, got shape {_show(shape)}")
    if math.prod(shape) * np.dtype(dtype).itemsize > MAX_TENSOR_BYTES:
        raise WireError(f"{name}: more than {MAX_TENSOR_BYTES} bytes, shape {_show(shape)}")


def _identity(request_id: Any, epoch: Any, goal_id: Any) -> dict[str, Any]:
    return {
        "request_id": _integer("request_id", request_id),
        "epoch": _integer("epoch", epoch),
        "goal_id": _text("goal_id", goal_id, MAX_NAME_CHARACTERS),
    }


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INT:
        raise WireError(f"{name}: an integer from 0 to 2^63 - 1 was expected, got {_show(value)}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise WireError(f"{name}: true or false was expected, got {_show(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise WireError(f"{name}: a finite float was expected, got {_show(value)}")
    return value


def _text(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise WireError(f"{name}: a text was expected, got {_show(value)}")
    if len(value) > most:
        raise WireError(f"{name}: {len(value)} characters, at most {most} are allowed")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise WireError(f"{name}: not valid Unicode")
    return value


def _times(name: str, values: Any) -> list[int]:
    if not isinstance(values, list) or len(values) > MAX_FRAMES:
        raise WireError(f"{name}: a list of at most {MAX_FRAMES} integers was expected, got {_show(values)}")
    return [_integer(name, value) for value in values]


def _confidences(values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) > MAX_FRAMES:
        raise WireError(f"confidences: a list of at most {MAX_FRAMES} floats was expected, got {_show(values)}")
    if wrong := [value for value in values if not 0.0 <= _number("confidences", value) <= 1.0]:
        raise WireError(f"confidences: numbers from 0 to 1 were expected, got {_show(wrong[0])}")
    return values


def _timings(timings_ms: Any) -> dict[str, float]:
    if not isinstance(timings_ms, dict) or len(timings_ms) > MAX_TIMINGS:
        raise WireError(f"timings_ms: a map of at most {MAX_TIMINGS} floats was expected, got {_show(timings_ms)}")
    return {
        _text("timings_ms", stage, MAX_TIMING_CHARACTERS): _number("timings_ms", milliseconds)
        for stage, milliseconds in timings_ms.items()
    }


def _same_length(header: Mapping[str, Any], **tensors: int) -> None:
    """`steps` names the frames; everything else of the message must have as many."""
    frames = len(header["steps"])
    for name, length in {"stamps_ns": len(header["stamps_ns"]), **tensors}.items():
        if length != frames:
            raise WireError(f"{name}: {length} entries for {frames} steps")


def _one_of(prompts: int, words: str, error: str) -> None:
    if [prompts > 0, words != "", error != ""].count(True) != 1:
        raise WireError("prompts: an answer has either prompts, or words, or an error")


def _finite(embeddings: np.ndarray) -> np.ndarray:
    if not np.isfinite(embeddings).all():
        raise WireError("prompts: embeddings must be finite, got NaN or infinity")
    return embeddings


def _proper(boxes: np.ndarray) -> np.ndarray:
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    inside = np.all((boxes >= 0.0) & (boxes <= 1.0))  # False for NaN
    if not inside or not np.all((left < right) & (top < bottom)):
        raise WireError("boxes: left < right and top < bottom within 0 and 1 were expected")
    return boxes


def _shorten(error: str) -> str:
    valid = error.encode(errors="replace").decode()
    return valid if len(valid) <= MAX_ERROR_CHARACTERS else valid[: MAX_ERROR_CHARACTERS - 1] + "…"


def _show(value: Any) -> str:
    """`value` for an error message, however large or strange it is."""
    if isinstance(value, list | tuple | dict) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
