# SPDX-License-Identifier: Apache-2.0
import logging
import os
import select
import signal
from types import SimpleNamespace

import pytest

from virst_engine.slow import process
from virst_engine.slow.process import RareWarnings, Waker, process_name, stopped_by_signals


def test_warnings_that_others_cause_come_once_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: now_s))
    warnings = RareWarnings(logging.getLogger("rare"))
    for number in range(12):
        warnings.warning("number %d", number)
        now_s += 0.25
    assert caplog.messages == ["number 0", "number 4", "number 8"]


def test_a_waker_is_readable_until_it_is_cleared_however_often_it_was_woken() -> None:
    waker = Waker()
    assert select.select([waker], [], [], 0)[0] == []
    for _ in range(100_000):  # more than its buffer holds
        waker.wake()
    while select.select([waker], [], [], 0)[0]:
        waker.clear()
    os.write(waker.wakeup_fd, b"\0")  # as signal.set_wakeup_fd does
    assert select.select([waker], [], [], 0)[0] == [waker]
    waker.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_a_server_and_are_as_before_afterwards(number: signal.Signals) -> None:
    earlier = signal.getsignal(number)
    waker, stopped = Waker(), []
    with stopped_by_signals(SimpleNamespace(wakeup_fd=waker.wakeup_fd, stop=lambda: stopped.append(number))):
        signal.raise_signal(number)
        assert stopped == [number]
        assert select.select([waker], [], [], 1)[0] == [waker]
    assert signal.getsignal(number) is earlier
    assert signal.set_wakeup_fd(-1) == -1
    waker.close()


def test_a_process_has_a_name_for_people() -> None:
    assert process_name().endswith(f":{os.getpid()}")
