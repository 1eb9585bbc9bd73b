# SPDX-License-Identifier: Apache-2.0
"""What is told of events at known times; how it reaches /diagnostics is tested with the node."""

import math

import numpy as np
import pytest

pytest.importorskip("diagnostic_msgs.msg")

from diagnostic_msgs.msg import DiagnosticStatus

from virst_engine import FrameResult, ObjectResult, ObjectState
from virst_ros.diagnostics import Diagnostics, RateWindow, Surroundings, resident_mib


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def diagnostics(clock):
    return Diagnostics("node", clock)


def seen(**changes):
    values = {
        "state": "active",
        "image_topic": "/image",
        "image_publishers": 1,
        "received": 0,
        "dropped": 0,
        "depth_topic": "",
        "no_image_after_s": 2.0,
        "inference_traceback": "",
        "reasoner_problem": "",
    }
    return Surroundings(**values | changes)


def subject(diagnostics, name, **changes):
    around = seen(**changes)
    told = [*diagnostics.statuses(around), diagnostics.process_status("node", around.state)]
    return next(status for status in told if status.name == f"node: {name}")


def values(status):
    return {pair.key: pair.value for pair in status.values}


def test_a_rate_is_events_per_second_of_the_last_five_seconds():
    rate = RateWindow()
    assert rate.rate_hz(0.0) == 0.0
    for n in range(100):
        rate.add(n * 0.1)
    assert rate.rate_hz(9.9) == pytest.approx(10.0)
    assert rate.rate_hz(12.9) == pytest.approx(20 / 3.0, rel=0.1), "it sinks while nothing comes"
    assert rate.rate_hz(30.0) == 0.0


def test_ages_are_given_as_percentiles_in_milliseconds(diagnostics):
    for age_ms in range(1, 101):
        diagnostics.result_published(FrameResult(0, 0, "camera", (), {}), age_ms / 1e3, overhead_ms=2.5)
    told = values(subject(diagnostics, "output"))
    assert (told["age p50 (ms)"], told["age p95 (ms)"], told["age p99 (ms)"]) == ("50.5", "95.0", "99.0")
    assert told["ROS overhead p50 (ms)"] == "2.5"


def test_what_the_deadline_leaves_out_is_a_warning(diagnostics):
    words = "frames take 85 ms, tracking.deadline_ms is 50: remembers fewer frames since step 120"
    assert values(subject(diagnostics, "output"))["degradation"] == "none"
    diagnostics.result_published(FrameResult(0, 0, "camera", (), {}, words), 0.1, overhead_ms=1.0)
    diagnostics.result_published(FrameResult(1, 1, "camera", (), {}, words), 0.1, overhead_ms=1.0)
    status = subject(diagnostics, "output", left_out=3)
    assert (status.level, status.message) == (DiagnosticStatus.WARN, words)
    assert values(status)["degradation"] == words
    assert values(status)["frames left out"] == "3"
    both = subject(diagnostics, "output", unserved="nobody fills it").message
    assert both == f"nobody fills it | {words}"
    diagnostics.result_published(FrameResult(2, 2, "camera", (), {}), 0.1, overhead_ms=1.0)
    assert subject(diagnostics, "output").level == DiagnosticStatus.OK
    diagnostics.result_published(FrameResult(3, 3, "camera", (), {}, words), 0.1, overhead_ms=1.0)
    diagnostics.reset()
    assert values(subject(diagnostics, "output"))["degradation"] == "none"


def test_a_lost_result_is_a_warning_for_a_while(diagnostics, clock):
    diagnostics.result_lost("no memory")
    status = subject(diagnostics, "output")
    assert (status.level, status.message) == (DiagnosticStatus.WARN, "1 results lost; last: no memory")
    clock.now_s += 11.0
    diagnostics.result_published(FrameResult(0, 0, "camera", (), {}), 0.1, overhead_ms=1.0)
    diagnostics.result_published(FrameResult(1, 1, "camera", (), {}), 0.1, overhead_ms=1.0)
    status = subject(diagnostics, "output")
    assert (status.level, values(status)["last lost result"]) == (DiagnosticStatus.OK, "no memory")


def test_depth_that_never_fits_in_time_is_a_warning(diagnostics):
    diagnostics.image_received()
    for number in range(20):
        diagnostics.depth_received()
        diagnostics.depth_paired(found=number % 4 == 0, gap_ns=7_000_000, slop_ns=1_000_000)
    status = subject(diagnostics, "input")
    assert status.level == DiagnosticStatus.WARN
    assert "15 of the last 20 frames found no depth" in status.message
    assert "7.0 ms away, 1.0 ms are allowed" in status.message
    assert values(status)["frames with depth"] == "5"
    for _ in range(20):
        diagnostics.depth_paired(found=True, gap_ns=0, slop_ns=0)
    assert subject(diagnostics, "input").level == DiagnosticStatus.OK


def test_what_keeps_depth_from_giving_points_is_a_warning(diagnostics):
    diagnostics.image_received()
    diagnostics.geometry_checked("no focal length")
    status = subject(diagnostics, "input")
    assert (status.level, status.message) == (DiagnosticStatus.WARN, "no focal length")
    diagnostics.geometry_checked("")
    assert subject(diagnostics, "input").level == DiagnosticStatus.OK


def test_a_bad_frame_is_a_warning_for_a_while(diagnostics, clock):
    diagnostics.image_received()
    diagnostics.frame_rejected("too short")
    assert subject(diagnostics, "input").level == DiagnosticStatus.WARN
    clock.now_s += 11.0
    diagnostics.image_received()
    status = subject(diagnostics, "input")
    assert status.level == DiagnosticStatus.OK
    assert values(status)["last bad frame"] == "too short"


def test_silence_tells_since_when(diagnostics, clock):
    clock.now_s += 3.0
    status = subject(diagnostics, "input")
    assert status.level == DiagnosticStatus.ERROR
    assert "no images on /image since activation, 3.0 s" in status.message
    diagnostics.image_received()
    clock.now_s += 4.5
    assert "no images on /image since 4.5 s" in subject(diagnostics, "input").message


def test_a_changed_size_is_told_and_counted_once(diagnostics):
    diagnostics.image_received()
    for size, changes in (("2x2 rgb8", 0), ("2x2 rgb8", 0), ("4x4 rgb8", 1), ("4x4 rgb8", 1)):
        diagnostics.image_decoded(size)
        status = subject(diagnostics, "input")
        assert values(status)["changes of size or encoding"] == str(changes)
        assert ("changed from 2x2 rgb8 to 4x4 rgb8" in status.message) == bool(changes)


def test_time_that_goes_back_is_a_warning_for_a_while(diagnostics, clock):
    diagnostics.image_received()
    diagnostics.stamp_went_back(1.5)
    status = subject(diagnostics, "input")
    assert (status.level, values(status)["time stamps went back"]) == (DiagnosticStatus.WARN, "1")
    assert "time stamps went back by 1.500 s" in status.message
    clock.now_s += 11.0
    diagnostics.image_received()
    assert subject(diagnostics, "input").level == DiagnosticStatus.OK


def test_silent_depth_is_a_warning_only_when_it_is_wanted(diagnostics, clock):
    def told():
        diagnostics.image_received()
        status = subject(diagnostics, "input", depth_topic="/depth")
        return status.message if status.level == DiagnosticStatus.WARN else ""

    clock.now_s += 1.5
    assert told() == ""
    clock.now_s += 1.5
    assert "no depth on /depth since activation, 3.0 s" in told()
    assert subject(diagnostics, "input").level == DiagnosticStatus.OK
    diagnostics.depth_received()
    assert told() == ""
    clock.now_s += 2.5
    assert "no depth on /depth since 2.5 s" in told()


def test_everything_is_stale_while_inactive(diagnostics):
    told = [*diagnostics.statuses(seen(state="inactive")), diagnostics.process_status("node", "inactive")]
    assert {status.level for status in told} == {DiagnosticStatus.STALE}


def test_stopped_inference_is_an_error_with_its_last_line(diagnostics):
    status = subject(diagnostics, "output", inference_traceback="Traceback ...\n  File x\nRuntimeError: boom\n")
    assert status.level == DiagnosticStatus.ERROR
    assert "RuntimeError: boom" in status.message


def test_the_latency_of_each_answer_counts_once(diagnostics):
    def see(*latencies_s):
        objects = tuple(
            ObjectResult(f"object {n}", f"goal_{n}", n + 1, ObjectState.TRACKING, np.zeros((2, 2), bool), 0.5, 1.0, s)
            for n, s in enumerate(latencies_s)
        )
        diagnostics.result_published(FrameResult(0, 0, "camera", objects, {}), 0.1, overhead_ms=1.0)

    assert values(subject(diagnostics, "reasoner"))["answers"] == "0"
    see(math.nan)
    for _ in range(50):
        see(0.1, math.nan)
    see(0.1, 0.9)
    see(0.5, 0.9)
    see(0.5)  # the second goal was cleared
    told = values(subject(diagnostics, "reasoner"))
    assert told["answers"] == "3"
    assert float(told["latency p50 (ms)"]) == 500
    assert float(told["latency p95 (ms)"]) == pytest.approx(860)
    assert told["latency of goal_0 (s)"] == "0.500"


@pytest.mark.parametrize(
    ("state", "latency_s", "message", "level"),
    [
        (ObjectState.TRACKING, 0.3, "", DiagnosticStatus.OK),
        (ObjectState.TRACKING, 0.3, "answered too late", DiagnosticStatus.WARN),
        (ObjectState.SEARCHING, 0.3, "not understood", DiagnosticStatus.WARN),
        (ObjectState.SEARCHING, math.nan, "waiting for the first answer", DiagnosticStatus.OK),
        (ObjectState.LOST, 0.3, "not visible at the moment", DiagnosticStatus.OK),
    ],
)
def test_an_answer_of_no_use_is_a_warning(diagnostics, state, latency_s, message, level):
    found = ObjectResult("cup", "goal_1", 1, state, np.zeros((2, 2), bool), 0.5, 1.0, latency_s, message)
    diagnostics.result_published(FrameResult(0, 0, "camera", (found,), {}), 0.1, overhead_ms=1.0)
    status = subject(diagnostics, "goals")
    assert status.level == level
    assert status.message == (f"goal_1: {message}" if level == DiagnosticStatus.WARN else "0 goal(s)")


def test_what_does_not_fit_in_quality_of_service_is_told_where_it_belongs_until_it_fits(diagnostics, clock):
    def told():
        clock.now_s += 0.1
        diagnostics.image_received()
        for _ in range(2):
            diagnostics.result_published(FrameResult(0, 0, "camera", (), {}), 0.1, overhead_ms=1.0)
        found = {name: subject(diagnostics, name) for name in ("input", "output")}
        return {name: status.message for name, status in found.items() if status.level == DiagnosticStatus.WARN}

    diagnostics.qos_incompatible("input", "/depth", "a publisher of /depth")
    diagnostics.qos_incompatible("output", "~/mask", "a subscriber of ~/mask")
    both = {"input": "a publisher of /depth", "output": "a subscriber of ~/mask"}
    assert told() == both
    assert values(subject(diagnostics, "output"))["incompatible QoS on ~/mask"] == both["output"]
    diagnostics.reset()
    assert told() == both, "it is told once, and activation changes nothing about it"
    diagnostics.settle_qos("output", lambda topic: True)
    assert told() == both, "the graph may not know of it yet"
    clock.now_s += 10.0
    diagnostics.settle_qos("input", lambda topic: topic != "/depth")
    diagnostics.settle_qos("output", lambda topic: topic == "~/mask")
    assert told() == {"input": both["input"]}
    diagnostics.forget_qos("input")
    assert told() == {}


def test_activation_starts_anew(diagnostics):
    diagnostics.frame_rejected("old")
    diagnostics.reset()
    assert values(subject(diagnostics, "input"))["bad frames"] == "0"


def test_memory_is_that_of_this_process():
    assert 10.0 < resident_mib() < 1e6
