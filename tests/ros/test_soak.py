# SPDX-License-Identifier: Apache-2.0
"""virst soak: each kind of violation is counted, and a short run of real processes is clean."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from virst_engine import cli
from virst_ros.soak import command as soak_command
from virst_ros.soak.checker import (
    EXCEPTIONS,
    FOREIGN_PIXELS,
    GOALS_LOST,
    GOALS_NOT_SET,
    IDS_REUSED,
    KINDS,
    STAMPS_NOT_INCREASING,
    UNKNOWN_STAMPS,
    Checker,
    Seen,
)
from virst_ros.soak.command import ProgressLine
from virst_ros.soak.logs import LogWatch
from virst_ros.soak.memory import WARM_UP_S, MemorySamples, growth_percent, resident_mib

BALL, CAN = Seen("goal_1", "ball", 1, is_tracked=True), Seen("goal_2", "can", 2, is_tracked=True)


class Story:
    """A checker and what happens to it, at times that the test chooses."""

    def __init__(self, *cameras):
        self.cameras = cameras or ("left", "right")
        self.checker = Checker(self.cameras)

    def set_goal(self, seen, asked_ns, set_ns, cameras=None, named=True):
        life = self.checker.ask(asked_ns, seen.object_id if named else "", cameras)
        self.checker.was_set(life, set_ns, seen.goal_id, seen.object_id)
        return life

    def end(self, life, asked_ns, ended_ns):
        self.checker.ask_end([life], asked_ns)
        self.checker.has_ended([life], ended_ns)

    def frame(self, camera, stamp_ns, objects, values=None, received_ns=None):
        """An image, its mask and its `objects`."""
        self.checker.image_sent(camera, stamp_ns)
        tracked = [seen.instance_id for seen in objects if seen.is_tracked]
        self.checker.mask_came(camera, stamp_ns, {0, *(tracked if values is None else values)})
        self.checker.objects_came(camera, stamp_ns, objects, stamp_ns + 5 if received_ns is None else received_ns)

    @property
    def found(self):
        """The kinds that were counted, with how often."""
        return {kind: count for kind, count in self.checker.counts().items() if count}


@pytest.fixture
def story():
    return Story()


class TestGoals:
    def test_a_life_without_faults_is_clean(self, story):
        ball = story.set_goal(BALL, 100, 110)
        story.set_goal(CAN, 120, 130, cameras=("left",))
        for stamp_ns in range(140, 200, 10):
            story.frame("left", stamp_ns, [BALL, CAN])
            story.frame("right", stamp_ns, [BALL])
        story.checker.listed([BALL, CAN], 201, 202)
        story.end(ball, 210, 220)
        story.frame("left", 230, [CAN])
        story.frame("right", 230, [])
        story.checker.listed([CAN], 240, 241)
        assert story.found == {}
        assert story.checker.masks_compared == 14
        assert (story.checker.goals_set, story.checker.goals_cleared) == (2, 1)

    def test_one_that_is_missing_in_objects_is_lost_once(self, story):
        story.set_goal(BALL, 100, 110)
        for stamp_ns in range(120, 200, 10):
            story.frame("left", stamp_ns, [BALL])
            story.frame("right", stamp_ns, [])
        assert story.found == {GOALS_LOST: 1}
        assert "goal_1/ball" in story.checker.details[0]
        assert "objects of right at 120" in story.checker.details[0]

    def test_one_that_is_missing_in_the_list_is_lost(self, story):
        story.set_goal(BALL, 100, 110)
        story.checker.listed([], 120, 121)
        assert story.found == {GOALS_LOST: 1}

    @pytest.mark.parametrize(
        ("stamp_ns", "received_ns", "objects", "fault"),
        [
            (105, 108, [BALL], {}),  # while it is set: it may be there
            (105, 108, [], {}),
            (109, 500, [], {}),  # an image from before its answer, received much later
            (111, 500, [], {}),  # received after its end was asked for
            (111, 199, [], {GOALS_LOST: 1}),  # made before that, of an image from after its answer
            (205, 215, [], {}),  # while it ends: it may be gone
            (205, 500, [BALL], {}),
            (211, 215, [BALL], {GOALS_NOT_SET: 1}),  # an image from after that answer
        ],
    )
    def test_what_crosses_on_its_way_is_judged_only_when_it_is_certain(
        self, story, stamp_ns, received_ns, objects, fault
    ):
        story.end(story.set_goal(BALL, 100, 110), 200, 210)
        story.frame("left", stamp_ns, objects, received_ns=received_ns)
        assert story.found == fault

    @pytest.mark.parametrize(
        ("asked_ns", "answered_ns", "listed", "fault"),
        [
            (105, 108, [], {}),
            (105, 115, [], {}),
            (111, 199, [], {GOALS_LOST: 1}),
            (111, 205, [], {}),
            (205, 300, [BALL], {}),
            (211, 300, [BALL], {GOALS_NOT_SET: 1}),
        ],
    )
    def test_so_is_a_list(self, story, asked_ns, answered_ns, listed, fault):
        story.end(story.set_goal(BALL, 100, 110), 200, 210)
        story.checker.listed(listed, asked_ns, answered_ns)
        assert story.found == fault

    def test_nobody_may_be_there_who_was_never_set(self, story):
        story.frame("left", 100, [CAN])
        story.checker.listed([CAN], 110, 111)
        assert story.found == {GOALS_NOT_SET: 2}

    def test_a_goal_of_one_camera_may_not_be_seen_by_another(self, story):
        story.set_goal(BALL, 100, 110, cameras=("left",))
        story.frame("right", 120, [BALL])
        assert story.found == {GOALS_NOT_SET: 1}

    def test_until_its_answer_a_goal_without_a_name_may_be_anybody(self, story):
        life = story.checker.ask(100)
        story.frame("left", 105, [BALL])
        assert story.found == {}
        story.checker.was_set(life, 110, "goal_2", "can")
        story.frame("left", 120, [BALL, CAN])
        assert story.found == {GOALS_NOT_SET: 1}

    def test_a_refused_goal_may_not_be_there(self, story):
        story.checker.was_refused(story.checker.ask(100, "ball"))
        story.frame("left", 120, [BALL])
        assert story.found == {GOALS_NOT_SET: 1}

    def test_an_object_whose_goal_is_not_told_is_known_by_its_name(self, story):
        life = story.checker.ask(100, "ball", ("left",))
        story.checker.was_set(life, 110)
        story.frame("left", 120, [BALL])
        assert story.found == {}
        story.frame("left", 130, [Seen("goal_1", "egg", 1)])
        assert set(story.found) == {GOALS_LOST, GOALS_NOT_SET, IDS_REUSED}

    def test_those_that_ended_long_ago_are_forgotten(self, story):
        for n in range(100):
            story.end(story.set_goal(BALL, n * 10**9, n * 10**9 + 1), n * 10**9 + 2, n * 10**9 + 3)
        assert len(story.checker._lives) == 60
        assert story.checker.lives() == []


class TestIds:
    @pytest.mark.parametrize(
        "objects",
        [
            [BALL, Seen("goal_2", "can", 1)],  # there twice, and the second has the value of the first
            [BALL, CAN, Seen("goal_3", "can", 3)],  # there twice, and the third has the name of the second
        ],
    )
    def test_two_in_one_message_with_the_same(self, story, objects):
        story.set_goal(BALL, 100, 110)
        story.set_goal(CAN, 100, 110)
        story.checker.ask(100, "can")
        story.frame("left", 120, objects)
        assert story.found[IDS_REUSED] == 2

    def test_a_value_that_changes_while_its_object_lives(self, story):
        story.set_goal(BALL, 100, 110)
        story.frame("left", 120, [BALL])
        story.frame("left", 130, [Seen("goal_1", "ball", 7)])
        story.frame("left", 140, [Seen("goal_1", "ball", 7)])
        assert story.found == {IDS_REUSED: 1}

    def test_an_object_has_the_same_value_in_all_cameras(self, story):
        story.set_goal(BALL, 100, 110)
        story.frame("left", 120, [BALL])
        story.frame("right", 120, [Seen("goal_1", "ball", 2)])
        assert story.found == {IDS_REUSED: 1}

    def test_a_value_that_another_gets_while_its_owner_lives(self, story):
        story.set_goal(BALL, 100, 110, cameras=("left",))
        story.frame("left", 120, [BALL])
        story.set_goal(CAN, 130, 140, cameras=("right",))
        story.frame("right", 150, [Seen("goal_2", "can", BALL.instance_id)])
        assert story.found == {IDS_REUSED: 1}

    def test_instances_come_and_go_while_their_goal_lives(self, story):
        """Three values in turn for three instances; one that has gone gives its value to another object."""
        life = story.checker.ask(100, "balls", is_split=True)
        story.checker.was_set(life, 110, "goal_1", "balls")
        union = Seen("goal_1", "balls", 1)
        first, second = Seen("goal_1", "balls.1", 2, part_of="balls"), Seen("goal_1", "balls.2", 3, part_of="balls")
        story.frame("left", 120, [union, first, second])
        story.frame("left", 130, [union, second])
        story.set_goal(Seen("goal_2", "can", 2), 140, 150)
        story.frame("left", 160, [union, Seen("goal_2", "can", 2), second])
        assert story.found == {}
        assert story.checker.instances_found == 2
        story.frame("left", 170, [union, Seen("goal_2", "can", 2), Seen("goal_1", "balls.2", 4, part_of="balls")])
        assert story.found == {IDS_REUSED: 1}, "one that stays keeps its value"

    def test_an_instance_that_was_removed_does_not_come_back_and_its_goal_stays(self, story):
        life = story.checker.ask(100, "balls", is_split=True)
        story.checker.was_set(life, 110, "goal_1", "balls")
        union, first = Seen("goal_1", "balls", 1), Seen("goal_1", "balls.1", 2, part_of="balls")
        story.frame("left", 120, [union, first])
        story.checker.instance_removed("goal_1", "balls.1", 130)
        story.frame("left", 125, [union, first])
        story.frame("left", 140, [union])
        assert story.found == {}
        story.frame("left", 150, [union, first])
        assert story.found == {GOALS_NOT_SET: 1}

    @pytest.mark.parametrize(
        ("comes_s", "what", "lost"),
        [
            (2, "", 1),  # in the same message
            (4, "", 1),
            (15, "", 0),  # so much later that it is another thing
            (1, "", 0),  # there were two
            (99, "", 0),
            (3, "removed", 0),
            (2, "disturbed", 0),
            (9, "disturbed", 0),  # the first went while it was disturbed, whatever comes then
            (3, "another disturbed", 1),
        ],
    )
    def test_ids_of_instances_that_vanish_and_are_replaced_are_counted(self, story, comes_s, what, lost):
        """The first instance goes after two seconds; `comes_s`: when the second one comes."""
        life = story.checker.ask(0, "balls", is_split=True)
        story.checker.was_set(life, 1, "goal_1", "balls")
        other = story.set_goal(CAN, 0, 1, cameras=("right",))
        union = Seen("goal_1", "balls", 1)
        first, second = Seen("goal_1", "balls.1", 3, part_of="balls"), Seen("goal_1", "balls.2", 4, part_of="balls")
        for tenth in range(1, 200):
            now_ns = tenth * 10**8
            if tenth == 19 and what == "disturbed":
                story.checker.is_disturbed(now_ns)
            if tenth == 19 and what == "another disturbed":
                story.checker.is_disturbed(now_ns, [other])
            if tenth == 21 and what == "removed":
                story.checker.instance_removed("goal_1", "balls.1", now_ns)
            found = [first] * (tenth < 20) + [second] * (tenth >= 10 * comes_s)
            story.frame("left", now_ns, [union, *found])
            story.frame("right", now_ns, [union, CAN])
        assert story.checker.instance_ids_lost == lost
        assert story.found == {}

    def test_an_instance_that_comes_back_under_its_id_is_not_lost(self, story):
        life = story.checker.ask(0, "balls", is_split=True)
        story.checker.was_set(life, 1, "goal_1", "balls")
        union, first = Seen("goal_1", "balls", 1), Seen("goal_1", "balls.1", 3, part_of="balls")
        for second in (1, 2, 20, 21):
            story.frame("left", second * 10**9, [union, *([first] if second != 2 else [])])
        assert story.checker.instance_ids_lost == 0

    def test_a_goal_that_is_not_split_has_no_instances(self, story):
        story.set_goal(BALL, 100, 110)
        story.frame("left", 120, [BALL, Seen("goal_1", "ball.1", 5, part_of="ball")])
        assert story.found == {GOALS_NOT_SET: 1}

    def test_a_value_may_come_back_when_its_owner_has_gone(self, story):
        story.end(story.set_goal(BALL, 100, 110), 120, 130)
        story.set_goal(CAN, 140, 150)
        story.frame("left", 160, [Seen("goal_2", "can", BALL.instance_id)])
        assert story.found == {}


class TestMasks:
    def test_a_value_of_nobody(self, story):
        story.set_goal(BALL, 100, 110)
        story.frame("left", 120, [BALL], values=[1, 9])
        assert story.found == {FOREIGN_PIXELS: 1}
        assert "[9]" in story.checker.details[0]

    def test_a_value_of_an_object_that_is_not_tracked(self, story):
        story.set_goal(BALL, 100, 110)
        story.frame("left", 120, [Seen("goal_1", "ball", 1)], values=[1])
        assert story.found == {FOREIGN_PIXELS: 1}

    def test_masks_and_objects_may_come_in_any_order(self, story):
        story.set_goal(BALL, 100, 110)
        story.checker.image_sent("left", 120)
        story.checker.objects_came("left", 120, [BALL], 125)
        assert story.checker.masks_compared == 0
        story.checker.mask_came("left", 120, {0, 1, 3})
        assert story.checker.masks_compared == 1
        assert story.found == {FOREIGN_PIXELS: 1}

    def test_a_stamp_that_no_image_of_the_camera_had(self, story):
        story.checker.image_sent("right", 120)
        story.checker.mask_came("left", 120, {0})
        story.checker.objects_came("left", 121, [], 130)
        assert story.found == {UNKNOWN_STAMPS: 2}

    def test_stamps_that_do_not_go_on(self, story):
        story.frame("left", 120, [])
        story.frame("right", 110, [])  # each camera has its own order
        story.frame("left", 120, [])
        story.checker.mask_came("left", 120, {0})
        assert story.found == {STAMPS_NOT_INCREASING: 3}


def test_exceptions_are_counted_by_kind():
    checker = Checker(("camera",))
    checker.failed("log", "[ERROR] one")
    checker.failed("log", "[ERROR] two")
    checker.failed("no answer", "set_goal")
    assert checker.counts()[EXCEPTIONS] == 3
    assert checker.exceptions_by_kind == {"log": 2, "no answer": 1}
    assert checker.details[0] == "exceptions: log: [ERROR] one"


def test_details_are_bounded():
    checker = Checker(("camera",))
    for n in range(10_000):
        checker.failed("log", "x" * 10_000)
        checker.image_sent("camera", n + 1)
        checker.mask_came("camera", n + 1, {0})
    assert sum(map(len, checker.details)) < 50 * 600
    assert len(checker._sent["camera"]) == 4096
    assert len(checker._values["camera"]) == 64


class TestMemory:
    def test_growth_is_that_of_the_medians_after_the_warm_up(self):
        times_s = [float(n) for n in range(600)]
        grown = [500.0 if t < WARM_UP_S else 600.0 + 0.1 * t for t in times_s]
        begin, end = 600 + 0.1 * (60 + 26.5), 600 + 0.1 * (599 - 26.5)
        assert growth_percent(times_s, grown) == pytest.approx(100 * (end / begin - 1), abs=0.02)

    def test_a_few_wild_samples_change_nothing(self):
        times_s = [float(n) for n in range(600)]
        values = [600.0] * 600
        for spike in (61, 70, 300, 580, 599):
            values[spike] = 5000.0
        assert growth_percent(times_s, values) == 0.0

    def test_shrinking_is_told_as_well(self):
        assert growth_percent([float(n) for n in range(600)], [600.0] * 300 + [540.0] * 300) == pytest.approx(-10.0)

    def test_of_a_short_run_the_second_half_counts(self):
        times_s = [n * 0.5 for n in range(40)]
        assert growth_percent(times_s, [100.0] * 20 + [200.0] * 20) == 0.0

    def test_too_few_samples_tell_nothing(self):
        assert math.isnan(growth_percent([], []))
        assert math.isnan(growth_percent([0.0, 1.0, 2.0], [1.0, 1.0, math.nan]))

    @pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
    def test_children_are_counted_and_processes_that_are_gone_are_not(self):
        large = "x = bytearray(b'1' * 60_000_000); input()"
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {large!r}])"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
            deadline_s = time.monotonic() + 20
            while resident_mib(parent.pid) < 65 and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert resident_mib(parent.pid) > 65
            parent.communicate(b"\n")
        assert math.isnan(resident_mib(parent.pid))

    def test_samples_stay_few_however_long_it_takes(self):
        samples = MemorySamples({"me": os.getpid()})
        for n in range(20_000):
            samples.sample(n * 0.5)
        assert len(samples.times_s) <= 4096
        assert samples.times_s[-1] > 9000
        assert len(samples.mib["me"]) == len(samples.times_s)
        thinned = samples.thinned(100)
        assert len(thinned["seconds"]) == len(thinned["me_mib"]) <= 100


def test_a_log_is_read_as_it_grows(tmp_path):
    path = tmp_path / "node.log"
    log = LogWatch(path)
    assert log.failures() == []
    path.write_text("[INFO] [1.5] [segmenter]: all is well\n[ERROR] [2.5] [segmenter]: no\nTraceback (most rec")
    assert log.failures() == ["[ERROR] [2.5] [segmenter]: no"]
    with path.open("a") as file:
        file.write("ent call last):\n  File x\nValueError: y\n2026-11-25 20:44:17,678 ERROR virst_engine: bad\n")
        file.write("[FATAL] [3.5] [segmenter]: end\nFatal Python error: Aborted\nCRITICAL root: x\n")
        file.write("[WARN] [4.5] [segmenter]: goal rejected: ERROR is no word\n")
        file.write("2026-11-25 20:44:17,678 INFO virst_engine: an ERROR was avoided\n")
    told = log.failures()
    assert [line.split()[0] for line in told] == ["Traceback", "2026-11-25", "[FATAL]", "Fatal", "CRITICAL"]
    assert log.failures() == []


def test_bounds_are_named_when_they_are_broken():
    pytest.importorskip("rclpy")
    from virst_ros.soak.run import broken_bounds

    good = dict.fromkeys(KINDS, 0) | {
        "rss_growth_percent": 1.9,
        "reasoner_rss_growth_percent": -1.9,
        "most_growth_percent": 2.0,
        "frames": 10,
    }
    assert broken_bounds(good) == []
    for kind in KINDS:
        assert broken_bounds(good | {kind: 3}) == [f"{kind} is 3, not 0"]
    assert "rss_growth_percent is -2.10" in broken_bounds(good | {"rss_growth_percent": -2.1})[0]
    assert "is unknown" in broken_bounds(good | {"reasoner_rss_growth_percent": None})[0]
    assert broken_bounds(good | {"frames": 0}) == ["no frame was processed"]


def test_progress_is_one_line_on_a_terminal_and_one_a_minute_in_a_file():
    def at(elapsed_s):
        return SimpleNamespace(
            elapsed_s=elapsed_s, frames=5, goals=2, segmenter_mib=600.0, reasoner_mib=400.0, violations=0
        )

    file = io.StringIO()
    line = ProgressLine(1800.0, 30_000, file)
    for second in range(125):
        line.show(at(float(second)))
    assert len(file.getvalue().splitlines()) == 3
    assert file.getvalue().startswith("0.0/30 min, 5/30000 frames, 2 goals set, segmenter 600 MiB, reasoner 400 MiB, 0")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    line = ProgressLine(1800.0, 30_000, terminal)
    line.show(at(0.0))
    line.show(at(1.0))
    line.end()
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().count("\n") == 1


def test_the_command_writes_its_files_and_its_status_tells_of_broken_bounds(tmp_path, monkeypatch):
    pytest.importorskip("rclpy")
    from virst_ros.soak import run

    result = dict.fromkeys(KINDS, 0) | {
        "rss_growth_percent": 0.5,
        "reasoner_rss_growth_percent": None,
        "most_growth_percent": 2.0,
        "frames": 7,
        "minutes": 30.0,
        "goals_set": 3,
        "goals_cleared": 2,
        "masks_compared": 6,
        "instances_found": 1,
        "instance_ids_lost": 4,
        "requests": {"set_goal": 3},
        "cameras": {"left": {"images": 8, "frames": 7, "rate_hz": 9.9, "age_ms": None}},
        "details": ["x: y"],
        "device": "a computer",
        "command": "virst soak",
        "complete": True,
        "broken": [],
    }
    monkeypatch.setattr(run, "run_soak", lambda settings, on_progress: result)
    soak = cli._make_command("soak", soak_command)

    def status(**changes):
        result.update(changes)
        files = ["--json", str(tmp_path / "sub" / "soak.json"), "--report", str(tmp_path / "soak.md")]
        return soak.main(files, standalone_mode=False)

    assert status() in (0, None)
    assert json.loads((tmp_path / "sub" / "soak.json").read_text())["frames"] == 7
    page = (tmp_path / "soak.md").read_text()
    assert "| +0.50 % | ±2 % |" in page
    assert "| unknown | ±2 % |" in page
    assert "- x: y" in page
    assert "(4 ids of instances vanished and were replaced)" in page
    assert status(broken=["goals_lost is 1, not 0"]) == 1
    assert status(broken=[], complete=False) == 130


@pytest.mark.ros
@pytest.mark.slow
class TestForReal:
    """Processes over the real middleware, with the shipped weights."""

    def start(self, tmp_path, *options):
        code = "from virst_engine import cli; from virst_ros.soak import command; import sys; "
        code += "sys.exit(cli._make_command('soak', command)())"
        command = [sys.executable, "-c", code, "--json", str(tmp_path / "soak.json"), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def figures(self, tmp_path):
        return json.loads((tmp_path / "soak.json").read_text())

    def test_twenty_seconds_of_two_cameras_are_clean(self, tmp_path):
        pytest.importorskip("virst_msgs.msg")
        # Memory still grows so early; that it is measured is what counts here.
        options = ["--minutes", "0.34", "--frames", "30", "--rate", "4", "--growth", "1000", "--cameras", "2"]
        with self.start(tmp_path, *options) as soak:
            out, told = soak.communicate(timeout=240)
        assert soak.returncode == 0, told + out
        result = self.figures(tmp_path)
        assert {kind: result[kind] for kind in KINDS} == dict.fromkeys(KINDS, 0), result["details"]
        assert result["complete"]
        assert result["frames"] >= 30
        assert result["masks_compared"] > 0
        assert list(result["cameras"]) == ["left", "right"]
        assert all(camera["frames"] and camera["age_ms"]["p50"] > 0 for camera in result["cameras"].values())
        assert result["goals_set"] > 8
        assert result["goals_cleared"] > 8
        assert {"set_goal", "clear_goal", "add_objects", "enable", "reset", "segment"} <= result["requests"].keys()
        assert isinstance(result["rss_growth_percent"], float)
        assert isinstance(result["reasoner_rss_growth_percent"], float)
        assert len(result["rss"]["seconds"]) == len(result["rss"]["segmenter_mib"]) > 10
        assert "python" in result["versions"]

    def test_of_one_camera_what_was_measured_is_written_when_the_run_is_ended_early(self, tmp_path):
        pytest.importorskip("virst_msgs.msg")
        with self.start(tmp_path, "--growth", "1000", "--cameras", "1", "--rate", "4") as soak:
            line = soak.stderr.readline()  # the first progress: it runs
            assert "/30 min" in line, line + soak.stderr.read()
            time.sleep(5.0)
            soak.send_signal(signal.SIGINT)
            out, told = soak.communicate(timeout=60)
        assert soak.returncode == 130, told + out
        result = self.figures(tmp_path)
        assert not result["complete"]
        assert result["minutes"] < 1
        assert result["exceptions"] == 0, result["details"]
