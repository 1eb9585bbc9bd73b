# SPDX-License-Identifier: Apache-2.0
"""Damaged messages, as a broken or hostile peer might send them; the same for the same random generator."""

import random
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from virst_engine.slow import wire
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 2**63, 2**64 - 1, 1e308, float("nan"), "", "x" * 3000, "\n", [], {}, [[[]] * 100] * 100,
    ["|O8", 2**40], {"a": 1},
)  # fmt: skip
VALID_VALUES: tuple[Any, ...] = (
    0,
    1,
    7,
    0.0,
    0.5,
    "goal-1",
    "goal-2",
    "request",
    "answer",
    True,
    False,
    [0, 300_000_000],
    [1.0, 0.5],
)


def sample_messages() -> list[wire.Message]:
    """At least one of every kind, small."""
    random_values = np.random.default_rng(0)
    clip = Clip(
        steps=np.arange(2, dtype=np.int64),
        stamps_ns=np.arange(2, dtype=np.int64) * 300_000_000,
        frames_rgb_u8=random_values.integers(0, 256, (2, 4, 4, 3), np.uint8),
        fusion=random_values.normal(size=(2, 3, 2, 2)).astype(np.float16),
    )
    prompts = tuple(Prompt(step, step * 300_000_000, np.full((3, 2), step, np.float32)) for step in range(2))
    boxed = tuple(
        Prompt.of_boxes(step, step * 300_000_000, np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)) for step in range(2)
    )
    return [
        ReasonerRequest(7, 1, "goal-1", "the red ball", clip),
        ReasonerRequest(8, 0, "question-1", "what can roll", clip, wants_words=True),
        ReasonerAnswer(7, 1, "goal-1", prompts, timings_ms={"fusion": 1.5}),
        ReasonerAnswer(7, 1, "goal-1", boxed, timings_ms={"detect": 1.5}),
        ReasonerAnswer(7, 1, "goal-1", (), "why"),
        ReasonerAnswer(8, 0, "question-1", (), words="red ball"),
        wire.Hello("tabletop-tiny 0123"),
        wire.Heartbeat("tabletop-tiny 0123", 0.0, 0, "somewhere:1"),
        wire.Leave(),
        wire.Cancel("goal-1"),
        wire.Refusal("no"),
    ]


def mutate(generator: random.Random, message: Sequence[wire.Buffer]) -> list[bytearray]:
    """`message` with up to three damages: to bits, lengths, parts, header fields, descriptions of tensors."""
    parts = [bytearray(part) for part in message]
    for _ in range(generator.randint(0, 3)):
        damaged = generator.randrange(len(parts)) if parts else 0
        match generator.randrange(8):
            case 0 if parts and parts[damaged]:
                parts[damaged][generator.randrange(len(parts[damaged]))] ^= 1 << generator.randrange(8)
            case 1 if parts:
                del parts[damaged][generator.randrange(len(parts[damaged]) + 1) :]
            case 2 if parts:
                parts[damaged] += generator.randbytes(generator.randrange(64))
            case 3 if parts:
                del parts[damaged]
            case 4 if parts:
                parts.insert(damaged, bytearray(parts[generator.randrange(len(parts))]))
            case 5 if parts:
                start = generator.randrange(len(parts[0]) + 1)
                parts[0][start : start + generator.randrange(9)] = generator.randbytes(generator.randrange(9))
            case _:
                _change_header(generator, parts)
    return parts


def _change_header(generator: random.Random, parts: list[bytearray]) -> None:
    try:
        header = msgpack.unpackb(parts[0])
    except Exception:  # damaged beyond reading already
        return
    if not isinstance(header, dict) or not header:
        return
    field = generator.choice(list(header))
    tensors, values = header[field], generator.choice((ODD_VALUES, VALID_VALUES))
    if field == "tensors" and isinstance(tensors, list) and tensors and generator.random() < 0.8:
        described = generator.choice(tensors)
        if isinstance(described, list) and described:
            described[generator.randrange(len(described))] = generator.choice(values)
    else:
        header[field] = generator.choice(values)
    parts[0][:] = msgpack.packb(header)
