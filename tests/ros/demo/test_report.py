# SPDX-License-Identifier: Apache-2.0
"""What the demo makes of recorded masks: figures worked out by hand, a table, a video, a picture. No ROS needed."""

import json
import math

import cv2
import numpy as np
import pytest
from rich.console import Console

from virst_engine.errors import VirstError
from virst_engine.types import ObjectState
from virst_ros.demo import report
from virst_ros.demo.report import GoalRun, MaskedFrame

HEIGHT, WIDTH = 60, 80
SECOND = 1_000_000_000


def rectangle(left, value=1):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[10:30, left : left + 20] = value
    return mask


def frame(number, mask, truth, state=ObjectState.TRACKING, latency_s=0.2, age_ms=40.0):
    image = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    return MaskedFrame(
        stamp_ns=SECOND + number * SECOND // 10,
        mask_png=report.encode_mask(mask),
        instance_id=5,
        state=state,
        score=0.8,
        reasoner_latency_s=latency_s,
        age_ms=age_ms,
        frames_in=100 + number + number // 2,  # every third image was dropped
        image_jpeg=report.encode_image(image),
        truth_png=report.encode_mask(truth),
    )


def ball_run():
    """Two frames of searching, a right mask, a mask that covers half."""
    empty = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    searching = [frame(t, empty, rectangle(20, 3), ObjectState.SEARCHING, math.nan) for t in (0, 1)]
    right = frame(2, rectangle(20, 5), rectangle(20, 3), age_ms=50.0)
    half = frame(3, rectangle(30, 5), rectangle(20, 3), latency_s=0.3, age_ms=60.0)
    return GoalRun("the red ball", "goal_1", (2,), frames=[*searching, right, half])


def test_figures_start_with_the_first_answer():
    figures = report.goal_figures(ball_run())
    assert figures["J"] == pytest.approx(100 * (1 + 1 / 3) / 2, abs=0.01)
    assert figures["JF"] == pytest.approx((figures["J"] + figures["F"]) / 2, abs=0.01)
    assert figures["frames_scored"] == 2
    assert (figures["frames_in"], figures["frames_out"], figures["fps_out"]) == (5, 4, 10.0)
    assert figures["first_answer_s"] == 0.2
    assert figures["state"] == "TRACKING"
    assert figures["reasoner_latency_ms"]["p50"] == 250.0
    assert figures["age_ms"] == {"p50": 45.0, "p95": 58.5, "p99": 59.7}


def test_an_absent_target_is_right_when_nothing_is_marked():
    empty = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    run = GoalRun("the egg", "goal_2", (), [frame(0, empty, rectangle(20), ObjectState.NOT_FOUND)])
    figures = report.goal_figures(run)
    assert (figures["J"], figures["F"], figures["state"]) == (100.0, 100.0, "NOT_FOUND")


def test_other_objects_in_the_mask_image_do_not_count():
    both = rectangle(20, 5) | rectangle(50, 9)
    run = GoalRun("the red ball", "goal_1", (2,), [frame(0, both, rectangle(20, 3))])
    assert report.goal_figures(run)["J"] == 100.0


@pytest.mark.parametrize(("targets", "frames"), [(None, 1), ((2,), 0)])
def test_without_truth_or_frames_there_is_no_score(targets, frames):
    run = GoalRun("hm", "goal_1", targets, [frame(0, rectangle(20, 5), rectangle(20, 3))] * frames)
    figures = report.goal_figures(run)
    assert (figures["J"], figures["F"], figures["JF"]) == (None, None, None)


def test_summary_is_json_and_a_table():
    result = report.summary([ball_run(), GoalRun("nothing", "goal_2")])
    assert json.loads(json.dumps(result)) == result
    assert result["fps_out"] == 10.0
    assert result["fps_in"] == 12.5
    assert len(result["goals"]) == 2
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(result))
    text = console.export_text()
    assert "the red ball" in text
    assert "66.7" in text


def test_video_shows_every_frame_twice_as_large(tmp_path):
    path = tmp_path / "deep" / "demo.mp4"
    assert report.write_video(path, [ball_run()])
    video = cv2.VideoCapture(str(path))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 4
    assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (2 * WIDTH, 2 * HEIGHT)
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10.0, abs=0.1)


def test_video_without_ffmpeg(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path = tmp_path / "demo.mp4"
    assert report.write_video(path, [ball_run()])
    assert int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) == 4


@pytest.mark.parametrize("has_ffmpeg", [True, False])
def test_a_video_that_does_not_fit_on_the_disk_is_told_and_deleted(tmp_path, monkeypatch, has_ffmpeg):
    import resource
    import sys

    if not has_ffmpeg:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path, before = tmp_path / "demo.mp4", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(VirstError, match=r"demo.mp4.*make room"):
            report.write_video(path, [ball_run()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()


def test_picture_has_a_row_per_goal(tmp_path):
    path = tmp_path / "demo.png"
    assert report.write_picture(path, [ball_run(), ball_run()])
    assert cv2.imread(str(path)).shape == (2 * HEIGHT, 4 * WIDTH, 3)


def test_nothing_is_written_when_no_image_was_kept(tmp_path):
    assert not report.write_video(tmp_path / "demo.mp4", [GoalRun("x", "goal_1")])
    assert not report.write_picture(tmp_path / "demo.png", [GoalRun("x", "goal_1")])
    assert not list(tmp_path.iterdir())


def test_one_latency_per_answer():
    values = [math.nan, 0.2, 0.2, 0.3, 0.3, 0.2]
    empty = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    frames = [frame(t, empty, empty, latency_s=value) for t, value in enumerate(values)]
    assert report.latencies_ms(frames) == [200.0, 300.0, 200.0]
