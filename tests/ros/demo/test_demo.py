# SPDX-License-Identifier: Apache-2.0
"""The demo's parts over real middleware: the recorded camera, the recorder, the display; and its help."""

import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from tests.ros.ros_graph import wait_until

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


def test_help_needs_no_ros():
    result = subprocess.run(
        [sys.executable, "-m", "virst_ros.demo", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0
    for option in ("--seconds", "--json", "--goal", "--interactive", "--view"):
        assert option in result.stdout


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
    from virst_ros.demo import command, report
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

    from virst_engine.errors import VirstError

    with pytest.raises(VirstError, match="no word of it is known"):
        recorder.set_goal("gibberish")


@pytest.mark.slow
@pytest.mark.ros
def test_the_whole_demo_with_a_model_that_knows_nothing(tmp_path):
    """Three processes, the recorded camera, goals through the service; figures, video, picture; nobody left behind."""
    import psutil

    from virst_engine.model.config import tabletop_tiny
    from virst_engine.model.virst import Virst
    from virst_engine.sim.expressions import VOCABULARY
    from virst_engine.weights import save_model

    weights = tmp_path / "untrained.safetensors"
    save_model(Virst(tabletop_tiny(VOCABULARY)), weights)
    command = [sys.executable, "-m", "virst_ros.demo", "--recorded", "--seconds", "4", "--weights", str(weights)]
    command += ["--goal", "the red ball", "--goal", "the purple egg", "--out", str(tmp_path)]
    command += ["--json", str(tmp_path / "figures.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["camera"] == "recorded"
    assert figures["fps_out"] > 0
    assert set(figures["age_ms"]) == {"p50", "p95", "p99"}
    assert [row["goal"] for row in figures["goals"]] == ["the red ball", "the purple egg"]
    assert [row["target_ids"] for row in figures["goals"]] == [[0], []]
    assert all(row["frames_out"] > 0 for row in figures["goals"])
    assert (tmp_path / "demo.mp4").stat().st_size > 1000
    assert (tmp_path / "demo.png").stat().st_size > 1000
    left = [p for p in psutil.process_iter(["cmdline"]) if str(weights) in " ".join(p.info["cmdline"] or ())]
    assert not left
