# SPDX-License-Identifier: Apache-2.0
"""Fewer damaged messages than `python -m virst_engine.slow.zmq_fuzz` sends to every end; and that it would tell."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from virst_engine.errors import WireError
from virst_engine.slow import wire, zmq_fuzz
from virst_engine.slow.msgpack_mutations import mutate, sample_messages
from virst_engine.slow.zmq_fuzz import DECODE_BOUND, ENDS, FuzzFailure, fuzz, main, table

MESSAGES = 4000  # to each end


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_damaged_messages_harm_no_end(end: str, capsys: pytest.CaptureFixture[str]) -> None:
    (figures,) = fuzz(MESSAGES, seed=20, ends=(end,))  # a failure names its seed
    with capsys.disabled():
        print(f"\n{table([figures]).splitlines()[-1]}", end="")
    assert figures.refused + figures.accepted == figures.messages
    assert figures.refused > 0.5 * figures.messages
    assert figures.peak_bytes <= figures.bound_bytes


def test_the_same_seed_damages_in_the_same_way_and_every_kind_is_among_them() -> None:
    originals = [[bytes(part) for part in wire.encode(message)] for message in sample_messages()]
    kinds = {type(wire.decode(parts)).__name__ for parts in originals}
    assert kinds == {
        "ReasonerRequest", "ReasonerAnswer", "Hello", "Heartbeat", "Leave", "Cancel", "Refusal"
    }  # fmt: skip
    once, again = (
        [mutate(generator, originals[number % len(originals)]) for number in range(500)]
        for generator in (random.Random(3), random.Random(3))
    )
    assert once == again
    assert any(len(parts) > wire.MAX_PARTS for parts in once)
    assert any(not parts for parts in once)


def test_an_error_that_is_no_wire_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(parts: Sequence[wire.Buffer]) -> wire.Message:
        raise KeyError("epoch")

    monkeypatch.setattr(zmq_fuzz.wire, "decode", decode)
    with pytest.raises(FuzzFailure, match=r"decode: message 0 raised KeyError.*again with .*--ends decode --seed 5"):
        fuzz(10, seed=5, ends=("decode",))


def test_an_allocation_beyond_the_bound_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(parts: Sequence[wire.Buffer]) -> wire.Message:
        bytes(2 * DECODE_BOUND)
        raise WireError("too late")

    monkeypatch.setattr(zmq_fuzz.wire, "decode", decode)
    with pytest.raises(FuzzFailure, match=r"decode: allocated \d+ bytes, 4194304 are allowed; again with"):
        fuzz(10, ends=("decode",))


def test_a_process_that_ends_is_a_failure_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = lambda self, name: "ipc://relative"  # noqa: E731
    monkeypatch.setattr(zmq_fuzz._Bench, "socket", lambda self, kind, address: None)
    monkeypatch.setattr(zmq_fuzz._Bench, "robot", lambda self, address: _Silent())
    monkeypatch.setattr(zmq_fuzz._Bench, "address", wrong)
    with pytest.raises(
        FuzzFailure, match=r"(?s)server: the process ended with 1: .*an address is ipc:///absolute/path"
    ):
        fuzz(10, ends=("server",))


def test_a_process_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_fuzz, "HANGS_AFTER_S", 0.2)
    monkeypatch.setattr(zmq_fuzz._Bench, "robot", lambda self, address: _Silent())
    with pytest.raises(FuzzFailure, match=r"server: hangs: the start did not happen within 0 s"):
        fuzz(10, ends=("server",))


class _Silent:
    def heartbeat(self) -> None:
        return None


def test_the_command_prints_and_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["zmq_fuzz", "--messages", "50", "--ends", "decode", "--json", str(file)])
    main()
    assert "| decode | 50 |" in capsys.readouterr().out
    (written,) = json.loads(file.read_text())
    assert written["end"] == "decode"
    assert written["refused"] + written["accepted"] == written["messages"] == 50
    monkeypatch.setattr(sys, "argv", ["zmq_fuzz", "--ends", "front"])
    with pytest.raises(SystemExit, match="no end is called front; there are decode, server"):
        main()
