# SPDX-License-Identifier: Apache-2.0
"""The demo's parts over real middleware: the recorded camera, the recorder, the display; and its help."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.ros.ros_graph import wait_until
from virst_engine.errors import VirstError
from virst_ros.demo import command
from virst_ros.demo.child_processes import ChildFailed

DEMO_TARGETS = {
    "the red ball": (0,),
    "the box left of the blue can": (2,),
    "the object moving to the left": (4,),
    "the thing that can roll": (0,),
    "the purple egg": (),
}


@pytest.fixture(scope="module")
def run():
    from virst_ros.demo.recorded_run import load_recording

    return load_recording()


def test_the_recorded_run_that_ships_is_complete(run):
    assert run.images_rgb_u8.shape[1:] == (240, 320, 3)
    assert len(run) == len(run.instance_masks) == len(run.numbers["position_m"]) >= 200
    ids = set(np.unique(run.instance_masks).tolist())
    assert ids == set(range(len(run.spec.objects) + 1))
    ball = run.instance_masks[0] == 1
    red, green, _ = run.images_rgb_u8[0][ball].mean(axis=0)
    assert red > 2 * green


def test_a_damaged_recording_says_how_to_make_it_again(tmp_path):
    from virst_engine.errors import SceneError
    from virst_ros.demo.recorded_run import load_recording

    path = tmp_path / "broken.npz"
    path.write_bytes(b"nonsense")
    with pytest.raises(SceneError, match="recorded_run FILE"):
        load_recording(path)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_needs_no_ros(option):
    result = subprocess.run(
        [sys.executable, "-m", "virst_ros.demo", option], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0
    for name in ("--seconds", "--json", "--goal", "--interactive", "--view"):
        assert name in result.stdout


def settings_of(monkeypatch, *options):
    """What the command line makes of its options."""
    given = []
    monkeypatch.setattr(command, "run_demo", lambda settings: given.append(settings) or {})
    result = CliRunner().invoke(command.app, list(options))
    assert result.exit_code == 0, result.output
    return given[0]


def test_relative_paths_begin_where_the_demo_was_called(monkeypatch, tmp_path):
    here, there = tmp_path / "repository", tmp_path / "caller"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("VIRST_CALLED_FROM", str(there))
    settings = settings_of(monkeypatch, "--out", "seen", "--weights", "my.safetensors", "--json", "deep/figures.json")
    assert settings.out == there / "seen"
    assert settings.weights == str(there / "my.safetensors")
    assert (there / "deep" / "figures.json").is_file()
    assert command._as_typed(settings.out / "demo.mp4") == "seen/demo.mp4"

    settings = settings_of(monkeypatch, "--weights", "/my.safetensors")
    assert (settings.out, settings.weights) == (here / "out", "/my.safetensors")
    assert command._as_typed(settings.out) == str(here / "out")
    assert settings_of(monkeypatch).weights == ""

    monkeypatch.delenv("VIRST_CALLED_FROM")
    assert settings_of(monkeypatch, "--out", "seen").out == here / "seen"


def test_the_script_says_where_it_was_called(tmp_path):
    scripts, caller = tmp_path / "repository" / "scripts", tmp_path / "caller"
    python = tmp_path / "venv" / "bin" / "python"
    for folder in (scripts, caller, python.parent):
        folder.mkdir(parents=True)
    shutil.copy(Path(__file__).parents[3] / "scripts" / "demo", scripts)
    (scripts / "env").touch()
    for program, text in ((scripts / "setup", ""), (python, 'echo "$PWD|$VIRST_CALLED_FROM|$*"\n')):
        program.write_text(f"#!/bin/sh\n{text}")
        program.chmod(0o755)
    result = subprocess.run(
        [str(scripts / "demo"), "--out", "seen"],
        cwd=caller,
        env={**os.environ, "VIRST_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{scripts.parent}|{caller}|-m virst_ros.demo --out seen\n"


class FakeChildren:
    failure = None

    def check(self):
        if self.failure is not None:
            raise self.failure


def typed_goals(tmp_path, children, *goals):
    settings = command.DemoSettings(1.0, goals, True, False, True, tmp_path, "", 20.0)
    return command._typed_goals(settings, children)


def test_a_waiting_goal_ends_the_one_before_only_after_some_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the blue can\n"))
    goals = typed_goals(tmp_path, FakeChildren(), "the red ball")
    for expected in ("the red ball", "the blue can"):
        sentence, left_s = next(goals)
        assert sentence == expected
        wait_until(lambda left_s=left_s: left_s(0.0) == command.TYPED_GOAL_S)
        assert left_s(command.TYPED_GOAL_S) == 0.0
    with pytest.raises(StopIteration):
        next(goals)


def test_waiting_for_a_line_notices_a_process_that_ends(monkeypatch, tmp_path):
    reading, writing = os.pipe()
    with os.fdopen(reading) as nothing_typed, os.fdopen(writing, "w"):
        monkeypatch.setattr(sys, "stdin", nothing_typed)
        children = FakeChildren()
        goals = typed_goals(tmp_path, children, "the red ball")
        _, left_s = next(goals)
        assert math.isnan(left_s(1000.0))
        children.failure = ChildFailed("camera ended")
        with pytest.raises(ChildFailed, match="camera ended"):
            next(goals)


def test_displays_show_rates_and_reasons():
    from virst_ros.demo.display import LiveTable, PlainLines, Shown

    shown = Shown("the red ball", 3.0, 10, 9, (40.0, 50.0), "SEARCHING", 0.0, float("nan"), "waiting")
    for make in (PlainLines, LiveTable):
        console = Console(record=True, width=100, force_terminal=make is LiveTable)
        display = make(console)
        display.show(shown)
        display.close()
        if make is PlainLines:  # the live table removes itself when it is closed
            text = console.export_text()
            assert "searching" in text
            assert "waiting" in text


def test_rates_are_those_of_the_last_seconds():
    from virst_ros.demo.display import Rates

    rates = Rates()
    rates.update(0, 0, now_s=0.0)
    for second in range(1, 11):
        rate_in, rate_out = rates.update(20 * second, 10 * second, now_s=float(second))
    assert (rate_in, rate_out) == (20.0, 10.0)


def test_no_window_without_a_display(monkeypatch):
    from virst_ros.demo.display import Window

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "no display" in Window.open()


def test_recorder_joins_what_belongs_to_one_stamp(graph, run):
    """Recorded camera -> a segmenter that knows the truth -> recorder: every mask is scored 100 on its own frame."""
    from sensor_msgs.msg import Image
    from virst_msgs.msg import SegmentedObject, SegmentedObjectArray, StageTimings
    from virst_msgs.srv import SetGoal

    from virst_engine.types import ObjectState
    from virst_ros import conversions, qos
    from virst_ros.demo import report
    from virst_ros.demo.recorded_camera import RecordedCamera
    from virst_ros.demo.recorder import DemoRecorder

    recorder = graph.add(DemoRecorder)
    masks = graph.publisher(Image, "/segmenter/mask")
    objects = graph.publisher(SegmentedObjectArray, "/segmenter/objects", qos.LATCHED)
    goals = []

    def set_goal(request, response):
        goals.append(request)
        response.success = request.goal != "gibberish"
        response.message = "" if response.success else "no word of it is known"
        response.goal_id = f"goal_{len(goals)}"
        return response

    graph.node.create_service(SetGoal, "/segmenter/set_goal", set_goal)

    def segment(message):
        ids = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width)
        mask = np.where(ids == 1, 7, 0).astype(np.uint8)
        found = SegmentedObject(goal_id=f"goal_{len(goals)}", instance_id=7, state=SegmentedObject.TRACKING, score=0.9)
        found.reasoner_latency = 0.1
        array = SegmentedObjectArray(header=message.header, objects=[found] if goals else [])
        array.timings = StageTimings(age_ms=12.5, frames_in=1)
        objects.publish(array)
        masks.publish(conversions.image_message(message.header, mask, "mono8"))

    graph.node.create_subscription(Image, "/camera/truth/mask", segment, 100)
    graph.add(lambda **rest: RecordedCamera(run, **rest))

    wait_until(lambda: (window := recorder.window(run.spec)) is not None and len(window) == 22)
    for sentence, targets in DEMO_TARGETS.items():
        assert command._meaning(recorder.window(run.spec), sentence) == targets
    assert command._meaning(recorder.window(run.spec), "whatever is about to sing") is None

    goal_run = recorder.set_goal("the red ball")
    assert goals[0].replace
    goal_run.target_ids = (0,)
    wait_until(lambda: len(goal_run.frames) >= 5)
    recorder.finish()
    figures = report.goal_figures(goal_run)
    assert figures["frames_scored"] >= 5
    assert figures["J"] == 100.0
    assert figures["age_ms"]["p99"] == 12.5
    assert goal_run.frames[-1].image_jpeg is not None
    stamps = [frame.stamp_ns for frame in goal_run.frames]
    assert stamps == sorted(set(stamps))
    assert recorder.moment().state is ObjectState.TRACKING
    assert json.loads(json.dumps(figures)) == figures

    with pytest.raises(VirstError, match="no word of it is known"):
        recorder.set_goal("gibberish")


@pytest.fixture(scope="module")
def whole_demo(tmp_path_factory):
    """Runs the demo as a program, with a model that knows nothing; gives what it printed and its figures."""
    import psutil

    from virst_engine.model.config import tabletop_tiny
    from virst_engine.model.virst import Virst
    from virst_engine.sim.expressions import VOCABULARY
    from virst_engine.weights import save_model

    folder = tmp_path_factory.mktemp("demo")
    weights = folder / "untrained.safetensors"
    save_model(Virst(tabletop_tiny(VOCABULARY)), weights)

    def run_whole_demo(out, *options, typed="", **environment):
        command = [sys.executable, "-m", "virst_ros.demo", *options, "--weights", str(weights)]
        command += ["--out", str(out), "--json", str(out / "figures.json")]
        result = subprocess.run(
            command,
            input=typed,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | environment,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        left = [p for p in psutil.process_iter(["cmdline"]) if str(weights) in " ".join(p.info["cmdline"] or ())]
        assert not left
        return result.stdout, json.loads((out / "figures.json").read_text())

    return run_whole_demo


def skip_without_opengl():
    from virst_engine.errors import SceneError
    from virst_engine.sim.live import LiveTabletop, demo_scene
    from virst_engine.sim.mujoco_world import close_all

    try:
        with LiveTabletop(spec=demo_scene()) as tabletop:
            tabletop.render(depth=False)
    except SceneError as error:
        pytest.skip(str(error))
    finally:
        close_all()  # other tests draw from other threads


NO_OPENGL = "There is no OpenGL here"


@pytest.mark.slow
@pytest.mark.ros
@pytest.mark.parametrize(
    ("options", "environment", "camera", "says_no_opengl"),
    [
        pytest.param(["--recorded"], {}, "recorded", False, id="recorded"),
        pytest.param([], {"MUJOCO_GL": "disabled"}, "recorded", True, id="no OpenGL"),
        pytest.param([], {}, "simulated", False, id="live"),
    ],
)
def test_the_whole_demo(whole_demo, tmp_path, options, environment, camera, says_no_opengl):
    """Three processes, goals through the service; figures, video, picture; nobody left behind."""
    if camera == "simulated":
        skip_without_opengl()
    goals = ("the red ball", "the purple egg")
    options = [*options, "--seconds", "4", *(word for goal in goals for word in ("--goal", goal))]
    printed, figures = whole_demo(tmp_path, *options, **environment)
    assert (NO_OPENGL in printed) == says_no_opengl
    assert figures["camera"] == camera
    assert figures["fps_out"] > 0
    assert set(figures["age_ms"]) == {"p50", "p95", "p99"}
    assert [row["goal"] for row in figures["goals"]] == list(goals)
    assert [row["target_ids"] for row in figures["goals"]] == [[0], []]
    assert all(row["frames_out"] > 0 for row in figures["goals"])
    assert (tmp_path / "demo.mp4").stat().st_size > 1000
    assert (tmp_path / "demo.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.ros
def test_goals_that_come_all_at_once_are_all_watched(whole_demo, tmp_path):
    options = ["--recorded", "--interactive", "--goal", "the red ball"]
    _, figures = whole_demo(tmp_path, *options, typed="the purple egg\n")
    assert [row["goal"] for row in figures["goals"]] == ["the red ball", "the purple egg"]
    assert all(row["frames_out"] > 0 for row in figures["goals"])
