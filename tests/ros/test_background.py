# SPDX-License-Identifier: Apache-2.0
import logging
import threading

from tests.ros.ros_graph import TIMEOUT_S, wait_until
from virst_ros.background import Background


def test_the_newest_item_wins_and_nobody_waits():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def work(item):
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        done.append(item)

    background = Background("work", work)
    background.offer(1)
    assert begun.wait(TIMEOUT_S)
    for item in (2, 3, 4):
        background.offer(item)
    go_on.set()
    wait_until(lambda: done == [1, 4])
    assert background.stop(TIMEOUT_S)


def test_a_failure_is_told_once_and_the_work_goes_on(caplog):
    done = []

    def work(item):
        if item < 0:
            raise ValueError("negative")
        done.append(item)

    background = Background("work", work)
    with caplog.at_level(logging.ERROR, "virst_ros"):
        for number in range(1, 4):
            background.offer(-1)
            wait_until(lambda: background._inbox._items == {"": None})
            background.offer(number)
            wait_until(lambda number=number: number in done)
    assert background.stop(TIMEOUT_S)
    assert [record.message for record in caplog.records] == ["work failed"]


def test_stopping_says_when_it_takes_too_long():
    begun, go_on = threading.Event(), threading.Event()

    def work(item):
        begun.set()
        go_on.wait(TIMEOUT_S)

    background = Background("work", work)
    background.offer(1)
    assert begun.wait(TIMEOUT_S)
    assert not background.stop(0.05)
    go_on.set()
    assert background.stop(TIMEOUT_S)
    background.offer(2)  # after the end it is dropped
