# SPDX-License-Identifier: Apache-2.0
"""The table of faults, a few of them for real, and that the harness notices a segmenter that does not survive."""

import dataclasses
import json
import math
import re
import signal
from contextlib import contextmanager

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.action")

import typer

from virst_ros.faults.catalogue import FAULTS
from virst_ros.faults.command import choose
from virst_ros.faults.fault import Fault, Masks, Reasoner, SeenMask, Verdict
from virst_ros.faults.harness import Harness
from virst_ros.faults.pair_faults import undisturbed
from virst_ros.faults.process_faults import why_not_readable
from virst_ros.faults.report import figures, slowest, table
from virst_ros.faults.trial import _judge_masks, try_fault

pytestmark = pytest.mark.ros

# Quick ones of each kind: image, stamps, size, goals, action, readers.
QUICK = (
    "short_data",
    "stamp_zero",
    "resolution_changes",
    "goal_huge",
    "goal_emoji",
    "clear_unknown",
    "action_cancelled",
    "pair_clock_backwards",
)


# The table


def test_there_are_at_least_forty_faults_of_different_names():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 40
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_says_what_is_done_and_what_is_expected(fault):
    assert len(fault.what) >= 10
    for pattern in (fault.log, fault.diagnostics, fault.answer):
        re.compile(pattern)
    assert fault.least_s > 0
    assert fault.most_s > 0


def test_few_faults_are_none_that_the_node_could_name():
    silent = [fault.name for fault in FAULTS if not (fault.log or fault.diagnostics or fault.ends is not None)]
    assert len(silent) <= len(FAULTS) // 5, silent


def test_every_fault_of_the_issue_is_there():
    names = {fault.name for fault in FAULTS}
    assert {
        "reasoner_killed",
        "reasoner_hangs",
        "reasoner_slow",
        "reasoner_garbage",
        "reasoner_answers_twice",
        "reasoner_answers_old_epoch",
        "camera_stops",
        "resolution_changes",
        "encoding_changes",
        "flood",
        "black",
        "saturated",
        "grey",
        "wrong_step",
        "short_data",
        "bayer",
        "yuv422",
        "clock_backwards",
        "depth_stops",
        "depth_nan",
        "depth_of_other_shape",
        "disk_full",
        "disk_full_recording",
        "parameter_nonsense",
        "goal_huge",
        "goal_emoji",
        "goal_other_scripts",
        "goal_empty",
        "goals_hundred",
        "sigterm_during_configure",
    } <= names


def test_faults_are_chosen_by_name_or_beginning():
    assert [fault.name for fault in choose(FAULTS, "black,short_data")] == ["black", "short_data"]
    assert {fault.name.partition("_")[0] for fault in choose(FAULTS, "depth_*")} == {"depth"}
    assert choose(FAULTS, "") == FAULTS
    with pytest.raises(typer.BadParameter, match="no fault 'nonsense'"):
        choose(FAULTS, "nonsense")


# The report


def test_the_report_counts_and_names_what_was_not_survived():
    good = Verdict("one", "something", recovery_s=0.5, masks="go on", goals="stay", diagnostics="input: a | b")
    bad = Verdict("two", "something worse", problems=["the segmenter has died"])
    ended = Verdict("three", "never began", recovers=False)
    told = figures([good, bad], 12.3, 0)
    assert (told["tried"], told["survived"]) == (2, 1)
    assert (told["slowest_recovery_s"], told["never_recovered"]) == (None, ["two"])
    assert slowest(told) == "no recovery from two"
    assert figures([good, ended], 12.3, 0)["slowest_recovery_s"] == 0.5
    assert slowest(figures([good, ended], 12.3, 0)) == "slowest recovery 0.5 s"
    assert json.loads(json.dumps(told))["faults"][1]["recovery_s"] is None
    rows = table([good, ended, bad]).splitlines()
    assert "| `one` | something | input: a \\| b | go on | stay | 0.5 |" in rows
    assert any("**not survived:** the segmenter has died" in row and row.endswith("**never** |") for row in rows)
    assert rows[-1].startswith("Without recovery: `two`.")


def seen(iou, at_s):
    return SeenMask(at_s, int(at_s * 1e9), "camera", (320, 240), is_known=True, iou=iou)


@pytest.mark.parametrize(
    ("iou", "expected", "problem"),
    [
        (0.9, Masks.OF_GOAL, ""),
        (0.1, Masks.OF_GOAL, "the object was lost"),
        (math.nan, Masks.OF_GOAL, "no mask could be judged"),
        (math.nan, Masks.COME, ""),
    ],
)
def test_masks_of_the_goal_are_demanded_where_they_are_expected(iou, expected, problem):
    fault = Fault("one", "something", nothing_wrong, expected)
    masks = [seen(iou, number / 10) for number in range(10)]
    problems = _judge_masks(fault, masks, 0.0, 1.0, Verdict("one", "something"))
    assert len(problems) == bool(problem)
    assert problem in " ".join(problems)


def test_a_camera_that_is_disturbed_by_the_other_one_is_noticed():
    good = [seen(0.9, 1 + number / 10) for number in range(20)]
    assert undisturbed(good) == ""
    assert "only 5 masks" in undisturbed(good[:5])
    assert "went back" in undisturbed([*good, good[3]])
    assert "changed their size" in undisturbed([*good, dataclasses.replace(seen(0.9, 4.0), size=(640, 480))])


def test_what_is_left_of_a_recording_must_be_readable(tmp_path):
    (tmp_path / "masks").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "masks" / f"{number:06d}.png"), np.zeros((8, 8), np.uint8))
    figures = {"is_complete": False, "frames": [{}, {}, {}]}
    (tmp_path / "segments.json").write_text(json.dumps(figures))
    assert why_not_readable(tmp_path, 3) == ""
    assert "3 masks of 4" in why_not_readable(tmp_path, 4)
    (tmp_path / "overlay.mp4").write_bytes(b"\0" * 4096)
    assert "cannot be played" in why_not_readable(tmp_path, 3)
    (tmp_path / "overlay.mp4").unlink()
    (tmp_path / "segments.json").write_text(json.dumps(figures | {"is_complete": True}))
    assert "says is_complete True" in why_not_readable(tmp_path, 3)
    (tmp_path / "segments.json").write_text(json.dumps(figures)[:-5])
    assert "segments.json cannot be read" in why_not_readable(tmp_path, 3)
    (tmp_path / "masks" / "000001.png").write_bytes(b"\x89PNG")
    assert "no images: 000001.png" in why_not_readable(tmp_path, 3)


def test_one_camera_of_two_is_stopped_changed_flooded_set_back_and_garbled():
    of_pair = [fault for fault in FAULTS if fault.two_cameras]
    assert {fault.name for fault in of_pair} == {
        "pair_camera_stops",
        "pair_resolution_changes",
        "pair_flood",
        "pair_clock_backwards",
        "pair_garbage",
    }
    for fault in of_pair:
        assert fault.masks is Masks.OF_GOAL
        assert fault.check is undisturbed
        # How much of a flood arrives depends on the machine; `flood` demands its name.
        assert fault.log.startswith("left: ") or fault.name == "pair_flood"


# Against real processes


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    with Harness(tmp_path_factory.mktemp("faults")) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_real_segmenter_survives(harness, name):
    (fault,) = choose(FAULTS, name)
    verdict = try_fault(harness, fault)
    assert verdict.problems == []
    assert verdict.recovery_s < 5.0
    assert verdict.goals == "stay"
    assert not fault.log or re.search(fault.log, verdict.log_line)
    assert not fault.diagnostics or re.search(fault.diagnostics, verdict.diagnostics)


@contextmanager
def nothing_wrong(_):
    yield


@contextmanager
def killed(harness):
    harness.segmenter.process.send_signal(signal.SIGKILL)
    harness.segmenter.process.wait()
    yield


@contextmanager
def camera_stopped(harness):
    harness.camera.unplug()
    yield
    harness.camera.plug_in()


@contextmanager
def goal_taken_away(harness):
    harness.clear_goals()
    yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault("unsaid", "nothing", nothing_wrong, Masks.ANY, log="never said", most_s=1.0), "no word .* in the log"),
        (
            Fault("untold", "nothing", nothing_wrong, Masks.ANY, diagnostics="never told", most_s=1.0),
            "no word .* in the diagnostics",
        ),
        (
            Fault("unanswered", "nothing", nothing_wrong, Masks.ANY, answer="never"),
            "the answer does not name the cause",
        ),
        (Fault("unmasked", "the camera stops", camera_stopped, Masks.OF_GOAL, least_s=3.0), "masks did not go on"),
        (Fault("goalless", "its goal is cleared", goal_taken_away, Masks.ANY, most_s=1.0), "no recovery|is gone"),
        (Fault("killed", "SIGKILL", killed, Masks.ANY), "has died"),
        (Fault("killed_in_the_end", "SIGKILL", killed, Masks.ANY, ends=0), "status -9, not 0"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_what_is_not_survived_is_reported(harness, monkeypatch, fault, problem):
    monkeypatch.setattr("virst_ros.faults.trial.LONGEST_RECOVERY_S", 3.0)
    verdict = try_fault(harness, fault)
    assert not verdict.survived
    assert re.search(problem, " ".join(verdict.problems))


def test_who_answers_is_said_by_the_table():
    scripted = [fault for fault in FAULTS if fault.reasoner is Reasoner.SCRIPTED]
    assert {"reasoner_answers_twice", "reasoner_garbage"} <= {fault.name for fault in scripted}
    assert "reasoner_killed" not in {fault.name for fault in scripted}
