# SPDX-License-Identifier: Apache-2.0
import tracemalloc
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from virst_engine.errors import WireError
from virst_engine.slow import wire
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

# The type checker picks entries of collections at random, also where strategies build dataclasses.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

INTEGERS = st.integers(0, wire.MAX_INT)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def small_request(sentence="the red ball", frames=2, goal_id="goal-1"):
    generator = np.random.default_rng(0)
    clip = Clip(
        steps=np.arange(frames, dtype=np.int64),
        stamps_ns=np.arange(frames, dtype=np.int64) * 300_000_000,
        frames_rgb_u8=generator.integers(0, 256, (frames, 4, 4, 3), np.uint8),
        fusion=generator.normal(size=(frames, 3, 2, 2)).astype(np.float16),
    )
    return ReasonerRequest(request_id=7, epoch=1, goal_id=goal_id, sentence=sentence, clip=clip)


def small_answer(frames=2, **changes):
    embeddings = np.arange(frames * 6, dtype=np.float32).reshape(frames, 3, 2)
    prompts = tuple(Prompt(step, step * 10, embeddings[step], 1.0 / (1 + step)) for step in range(frames))
    return replace(ReasonerAnswer(7, 1, "goal-1", prompts, timings_ms={"fusion": 1.5}), **changes)


def travel(message):
    """What arrives: the parts as ZeroMQ hands them over, in memory of their own."""
    return [memoryview(bytes(part)) for part in wire.encode(message)]


def with_header(parts, **changes):
    """`parts` with other header fields; a value of `...` removes the field."""
    header = msgpack.unpackb(parts[0]) | changes
    return [msgpack.packb({name: value for name, value in header.items() if value is not ...}), *parts[1:]]


@st.composite
def requests(draw):
    t = draw(st.integers(1, 9))
    times = st.lists(INTEGERS, min_size=t, max_size=t)
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    side, channels = st.integers(1, 5), st.integers(1, 4)
    clip = Clip(
        steps=np.array(draw(times), np.int64),
        stamps_ns=np.array(draw(times), np.int64),
        frames_rgb_u8=draw(arrays.arrays(np.uint8, (t, draw(side), draw(side), 3))),
        fusion=draw(arrays.arrays(dtype, (t, draw(channels), draw(side), draw(side)))),
        camera=draw(NAMES),
    )
    sentence = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
    return ReasonerRequest(draw(INTEGERS), draw(INTEGERS), draw(NAMES), sentence, clip, draw(st.booleans()))


def boxed(boxes):
    return Prompt.of_boxes(0, 0, np.array(boxes, np.float32))


@st.composite
def answers(draw):
    identity = (draw(INTEGERS), draw(INTEGERS), draw(NAMES))
    timings = draw(st.dictionaries(NAMES, FLOATS, max_size=4))
    if draw(st.booleans()):
        text = draw(NAMES.filter(bool))
        return (
            ReasonerAnswer(*identity, (), "", timings, text)
            if draw(st.booleans())
            else ReasonerAnswer(*identity, (), text, timings)
        )
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    finite = arrays.arrays(np.float32, shape, elements=st.floats(-(2.0**99), 2.0**99, width=32))
    prompts = st.builds(Prompt, step=INTEGERS, stamp_ns=INTEGERS, embeddings=finite, confidence=st.floats(0.0, 1.0))
    if draw(st.booleans()):
        low = arrays.arrays(np.float32, (shape[0], 2), elements=st.floats(0, 0.5, width=32))
        boxes = low.map(lambda corner: np.concatenate((corner, corner + np.float32(0.25)), axis=1))
        prompts = st.builds(Prompt.of_boxes, step=INTEGERS, stamp_ns=INTEGERS, boxes=boxes, confidence=st.floats(0, 1))
    return ReasonerAnswer(*identity, tuple(draw(st.lists(prompts, min_size=1, max_size=9))), "", timings)


@given(requests())
@settings(max_examples=60, deadline=None)
def test_requests_arrive_as_they_left(request_):
    arrived = wire.decode(travel(request_))

    assert replace(arrived, clip=request_.clip) == request_
    assert arrived.clip.camera == request_.clip.camera
    for name in ("steps", "stamps_ns", "frames_rgb_u8", "fusion"):
        sent, got = getattr(request_.clip, name), getattr(arrived.clip, name)
        assert (got.dtype, got.shape, got.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


@given(answers())
@settings(max_examples=60, deadline=None)
def test_answers_arrive_as_they_left(answer):
    arrived = wire.decode(travel(answer))

    assert replace(arrived, prompts=()) == replace(answer, prompts=())
    named = [[(p.step, p.stamp_ns, p.confidence) for p in each.prompts] for each in (arrived, answer)]
    assert named[0] == named[1]
    for got, sent in zip(arrived.prompts, answer.prompts, strict=True):
        assert (got.embeddings.dtype, got.embeddings.tobytes()) == (np.float32, sent.embeddings.tobytes())
        assert (got.boxes is None) == (sent.boxes is None)
        if sent.boxes is not None:
            assert (got.boxes.dtype, got.boxes.shape, got.boxes.tobytes()) == (
                np.float32,
                sent.boxes.shape,
                sent.boxes.tobytes(),
            )


@pytest.mark.parametrize(
    "message",
    [wire.Hello(), wire.Heartbeat("tabletop-tiny", 0.25, 3), wire.Cancel("goal-1"), wire.Refusal("no")],
)
def test_small_messages_arrive_as_they_left(message):
    assert wire.decode(travel(message)) == message


def test_tensors_are_not_copied():
    request = small_request()
    parts = wire.encode(request)
    assert np.shares_memory(np.frombuffer(parts[2], np.uint8), request.clip.frames_rgb_u8)

    clip = wire.decode(parts).clip
    assert np.shares_memory(clip.frames_rgb_u8, request.clip.frames_rgb_u8)
    assert np.shares_memory(clip.fusion, request.clip.fusion)
    with pytest.raises(ValueError, match="read-only"):
        clip.frames_rgb_u8[0] = 0


def test_arrays_in_another_order_or_alignment_arrive_right():
    request = small_request()
    fortran = replace(request.clip, fusion=np.asfortranarray(request.clip.fusion))
    parts = travel(replace(request, clip=fortran))
    parts[3] = memoryview(b"x" + bytes(parts[3]))[1:]  # an odd address
    fusion = wire.decode(parts).clip.fusion
    assert fusion.flags.aligned
    assert not fusion.flags.writeable
    np.testing.assert_array_equal(fusion, request.clip.fusion)


def test_a_long_error_is_shortened_but_sent():
    arrived = wire.decode(travel(small_answer(prompts=(), error="x" * 5000 + "\ud800")))
    assert len(arrived.error) == wire.MAX_ERROR_CHARACTERS


REQUEST, ANSWER = travel(small_request()), travel(small_answer())
WORDS = travel(small_answer(prompts=(), words="red ball"))


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([], "header"),
        ([b""], "header"),
        ([b"\xc1"], "header"),
        ([msgpack.packb([1, 2])], "header"),
        ([b"x" * (wire.MAX_HEADER_BYTES + 1)], "header"),
        ([msgpack.packb({b"version": 3})], "header"),
        ([msgpack.packb({"version": 3, "kind": "hello", "tensors": [], "more": b"raw"})], "header"),
        ([b"\x91" * 2000], "header"),  # 2000 lists in each other
        ([b"\xdd\xff\xff\xff\xff"], "header"),  # a list of four billion entries
        (with_header(REQUEST, version=1), "version.*install the same virst_ros"),
        (with_header(REQUEST, version=...), "version"),
        (with_header(REQUEST, version=True), "version"),
        (with_header(REQUEST, kind="python"), "kind"),
        (with_header(REQUEST, kind=1), "kind"),
        (with_header(REQUEST, epoch=...), "epoch"),
        (with_header(REQUEST, epoch=-1), "epoch"),
        (with_header(REQUEST, epoch=2**63), "epoch"),
        (with_header(REQUEST, request_id=1.0), "request_id"),
        (with_header(REQUEST, request_id=True), "request_id"),
        (with_header(REQUEST, goal_id="g" * 2000), "goal_id"),
        (with_header(REQUEST, camera=None), "camera"),
        (with_header(REQUEST, colour="red"), "colour"),
        (with_header(REQUEST, steps=[0]), "stamps_ns: 2 entries for 1 steps"),
        (with_header(REQUEST, steps=[0, 1, 2], stamps_ns=[0, 1, 2]), "frames: 2 entries for 3 steps"),
        (with_header(REQUEST, steps=[0, "1"]), "steps"),
        (with_header(REQUEST, stamps_ns={}), "stamps_ns"),
        (with_header(REQUEST, tensors=[]), "tensors"),
        (with_header(REQUEST, tensors=None), "tensors"),
        (with_header(REQUEST, tensors=[[], [], []]), "sentence"),
        (REQUEST[:-1], "tensors"),
        ([*REQUEST, b""], "tensors"),
        ([REQUEST[0], REQUEST[1], REQUEST[3], REQUEST[2]], "frames"),
        ([*REQUEST[:3], REQUEST[3][:-1]], "fusion: 48 bytes expected"),
        ([REQUEST[0], b"\xff" * len(REQUEST[1]), *REQUEST[2:]], "sentence: not UTF-8"),
        (with_header(ANSWER, steps=[], stamps_ns=[]), "prompts: an answer has either"),
        (with_header(ANSWER, error="broken"), "prompts: an answer has either"),
        (with_header(ANSWER, words="red ball"), "prompts: an answer has either"),
        (with_header(WORDS, error="broken"), "prompts: an answer has either"),
        (with_header(WORDS, words=""), "prompts: an answer has either"),
        (with_header(WORDS, words=...), "words"),
        (with_header(WORDS, words=["red", "ball"]), "words: a text"),
        (with_header(WORDS, words="x" * 2001), "words: 2001 characters, at most 2000"),
        (with_header(WORDS, confidences=[1.0]), "confidences: 1 entries for 0"),
        (with_header(REQUEST, wants_words=...), "wants_words"),
        (with_header(REQUEST, wants_words=1), "wants_words: true or false"),
        (with_header(REQUEST, wants_words="yes"), "wants_words: true or false"),
        (with_header([ANSWER[0]], error="broken", steps=[], stamps_ns=[], tensors=[]), "confidences: 2 entries for 0"),
        (with_header(ANSWER, steps=[0], stamps_ns=[0]), "prompts: 2 entries for 1 steps"),
        (with_header(ANSWER, confidences=[1.0]), "confidences: 1 entries for 2 steps"),
        (with_header(ANSWER, confidences=[1.0, -0.1]), "confidences: numbers from 0 to 1"),
        (with_header(ANSWER, confidences=[1.0, "sure"]), "confidences"),
        (with_header(ANSWER, confidences={}), "confidences: a list"),
        (with_header(ANSWER, confidences=...), "confidences"),
        (with_header(ANSWER, timings_ms={"fusion": "long"}), "timings_ms"),
        (with_header(ANSWER, timings_ms={"fusion": float("nan")}), "timings_ms"),
        ([ANSWER[0], np.full(12, np.nan, np.float32).tobytes()], "prompts: embeddings must be finite"),
    ],
)
def test_a_violation_names_its_field(parts, field):
    with pytest.raises(WireError, match=field):
        wire.decode(parts)


@pytest.mark.parametrize(
    "spec",
    [
        ["fusion", "|O8", [2, 3, 2, 2]],
        ["fusion", "<f8", [2, 3, 2, 2]],
        ["fusion", ["<f2"], [2, 3, 2, 2]],
        ["fusion", "<f2", [2, 12]],
        ["fusion", "<f2", [2, 3, 2, -2]],
        ["fusion", "<f2", [2, 3, 2, 2.0]],
        ["fusion", "<f2", [2, 3, 2, True]],
        ["fusion", "<f2", [2, 0, 2, 2]],
        ["fusion", "<f2", [2, 2**62, 2, 2]],
        ["fusion", "<f2", [100, 4096, 512, 512]],
        ["fusion", "<f2", 24],
        ["frames", "<f2", [2, 3, 2, 2]],
        "fusion",
    ],
)
def test_a_tensor_outside_its_declared_bounds_is_rejected(spec):
    tensors = msgpack.unpackb(REQUEST[0])["tensors"]
    with pytest.raises(WireError, match="fusion"):
        wire.decode(with_header(REQUEST, tensors=[*tensors[:2], spec]))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (small_request("\ud800"), "sentence"),
        (small_request(""), "sentence"),
        (small_request("a" * (wire.MAX_SENTENCE_BYTES + 1)), "sentence"),
        (small_request(goal_id="\ud800"), "goal_id"),
        (small_request(frames=101), "steps"),
        (replace(small_request(), epoch=-1), "epoch"),
        (small_answer(prompts=()), "prompts"),
        (small_answer(words="red ball"), "prompts: an answer has either"),
        (small_answer(prompts=(), words="x" * 2001), "words: 2001 characters"),
        (small_answer(prompts=(), words="\ud800"), "words: not valid Unicode"),
        (small_answer(prompts=(Prompt(0, 0, np.full((1, 2), np.inf, np.float32)),)), "finite"),
        (small_answer(prompts=(Prompt(0, 0, np.zeros((1, 2), np.float32), 1.5),)), "confidences: numbers from 0 to 1"),
        (small_answer(prompts=(Prompt(0, 0, np.zeros((1, 2), np.float32), np.nan),)), "confidences"),
        (
            small_answer(prompts=tuple(Prompt(n, n, np.zeros((n, 2), np.float32)) for n in (1, 2))),
            "prompts: all embeddings",
        ),
    ],
)
def test_what_the_other_side_would_drop_is_not_encoded(message, field):
    with pytest.raises(WireError, match=field):
        wire.encode(message)


def test_a_header_of_nothing_but_lists_allocates_little():
    header = b"\x81\xa1x" + b"\xdc\x00\x64" + (b"\xdc\x00\x64" + b"\x90" * 100) * 100  # 100 lists of 100 empty lists
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="version"):
            wire.decode([header])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 128 * wire.MAX_HEADER_BYTES
