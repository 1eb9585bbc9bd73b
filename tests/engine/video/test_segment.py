# SPDX-License-Identifier: Apache-2.0
"""`virst segment` on the fake network, and what it writes; on a simulated scene with the shipped model."""

import json
import resource
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fakes import GREEN, RED, FakeReasoner, FakeStages, Square, Video, moving_square, small_config
from virst_engine import cli
from virst_engine.errors import BadGoal, VideoError
from virst_engine.types import ObjectState
from virst_engine.video.recordings import open_recording
from virst_engine.video.results import SegmentWriter
from virst_engine.video.segment import measure_delay, segment_offline, segment_stream

VIDEO = Video([moving_square(RED, row=2), moving_square(GREEN, row=10)])
FRAMES = [VIDEO.frame(t) for t in range(16)]
CONFIG = small_config(period_s=0.5, clip_spacing_s=0.1, clip_frames=4)


def stream(sentences=("red", "green"), frames=FRAMES, **options):
    return list(segment_stream(FakeStages(), FakeReasoner(), frames, list(sentences), CONFIG, **options))


def overlap(mask, truth):
    return np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth)


@pytest.mark.parametrize("offline", [False, True])
def test_each_frame_has_the_masks_of_all_goals(offline):
    segmented = (
        list(segment_offline(FakeStages(), FakeReasoner(), FRAMES, ["red", "green"], CONFIG)) if offline else stream()
    )
    assert [seen.number for seen in segmented] == list(range(16))
    for seen in segmented:
        assert seen.result.stamp_ns == FRAMES[seen.number].stamp_ns
        assert [goal.sentence for goal in seen.goals] == ["red", "green"]
        for square, found in enumerate(seen.result.objects):
            assert found.goal_id == seen.goals[square].goal_id
            assert found.instance_id == seen.goals[square].instance_id == square + 1
            if seen.number:  # the answer to the first frame begins its replay there
                assert overlap(found.mask, VIDEO.truth(seen.number, square)) > 0.8


def test_the_stream_looks_at_nothing_before_its_time():
    taken = []

    def frames():
        for frame in FRAMES:
            taken.append(frame.stamp_ns)
            yield frame

    for seen in segment_stream(FakeStages(), FakeReasoner(), frames(), ["red"], CONFIG):
        assert taken[-1] == seen.frame.stamp_ns


def test_late_answers_begin_late():
    def first(delay_s):
        return next(seen.number for seen in stream(["red"], delay_s=delay_s) if seen.result.objects[0].mask.any())

    assert first(0.35) >= first(0.0) + 3


def test_the_delay_is_measured_on_the_reasoner_alone():
    reasoner = FakeReasoner()
    delay_s = measure_delay(FakeStages(), reasoner, FRAMES[0], "red", CONFIG)
    assert 0.0 < delay_s < 60.0
    assert len(reasoner.requests) == 4
    assert {request.sentence for request in reasoner.requests} == {"red"}


def test_offline_tells_where_an_object_is_not_seen():
    video = Video([Square(RED, lambda t: None if 5 <= t < 9 else (3, 3))])
    frames = [video.frame(t) for t in range(15)]
    segmented = list(segment_offline(FakeStages(), FakeReasoner(), frames, ["red"], CONFIG))
    states = [seen.result.objects[0].state for seen in segmented]
    assert states == [ObjectState.LOST if 5 <= t < 9 else ObjectState.TRACKING for t in range(15)]
    assert all((seen.result.objects[0].score > 0) == (not 5 <= seen.number < 9) for seen in segmented)


@pytest.mark.parametrize("offline", [False, True])
def test_more_goals_than_there_is_room_for_are_refused(offline):
    run = segment_offline if offline else segment_stream
    with pytest.raises(BadGoal, match="3 goals are set"):
        list(run(FakeStages(), FakeReasoner(), FRAMES, ["red", "green", "blue", "red"], CONFIG))


def write(folder, segmented, **options):
    with SegmentWriter(folder, rate_hz=10.0, description={"model": "fake"}, **options) as writer:
        for seen in segmented:
            writer.add(seen.number, seen.frame, seen.result, seen.goals)


def test_masks_overlay_and_figures_are_written(tmp_path):
    segmented = stream()
    write(tmp_path, segmented)
    figures = json.loads((tmp_path / "segments.json").read_text())
    assert figures["model"] == "fake"
    assert figures["is_complete"] is True
    assert [goal["sentence"] for goal in figures["goals"]] == ["red", "green"]
    assert len(figures["frames"]) == len(list((tmp_path / "masks").iterdir())) == 16
    for t, described in enumerate(figures["frames"]):
        mask = cv2.imread(str(tmp_path / described["mask"]), cv2.IMREAD_UNCHANGED)
        assert mask.dtype == np.uint8
        assert mask.shape == (32, 32)
        assert described["stamp_ns"] == FRAMES[t].stamp_ns
        for found in described["objects"]:
            own = mask == found["instance_id"]
            assert own.sum() == found["area_px"]
            if found["box_px"] is None:
                assert not own.any()
                continue
            left, top, right, bottom = found["box_px"]
            assert own[top:bottom, left:right].sum() == found["area_px"]
            assert own[top].any()
            assert own[bottom - 1].any()
            assert own[:, left].any()
            assert own[:, right - 1].any()
        assert t == 0 or described["timings_ms"]
    overlay = open_recording(tmp_path / "overlay.mp4")
    assert overlay.rate_hz == pytest.approx(10.0)
    assert [frame.image_rgb_u8.shape for frame in overlay] == [(256, 256, 3)] * 16


def test_the_overlay_has_the_videos_order_whatever_comes_first(tmp_path):
    """A whole video is computed from an anchor to the end, then backwards."""
    segmented = stream()
    write(tmp_path / "forwards", segmented)
    write(tmp_path / "both", [*segmented[6:], *reversed(segmented[:6])])
    write(tmp_path / "broken", [*segmented[6:], *reversed(segmented[3:6])])  # ended before the others came
    pictures = {
        name: [frame.image_rgb_u8.astype(int) for frame in open_recording(tmp_path / name / "overlay.mp4")]
        for name in ("forwards", "both", "broken")
    }
    for name, wanted in (("both", pictures["forwards"]), ("broken", pictures["forwards"][3:])):
        found = pictures[name]
        assert len(found) == len(wanted)
        # Nearest to itself: the square moves, and codecs lose some detail.
        away = np.array([[np.abs(ours - theirs).mean() for theirs in wanted] for ours in found])
        assert list(away.argmin(axis=1)) == list(range(len(wanted)))


def test_what_was_done_is_written_when_the_run_breaks_off(tmp_path):
    def broken():
        yield from stream()[:5]
        raise VideoError("damaged")

    with pytest.raises(VideoError, match="damaged"):
        write(tmp_path, broken())
    figures = json.loads((tmp_path / "segments.json").read_text())
    assert figures["is_complete"] is False
    assert len(figures["frames"]) == 5


@contextmanager
def no_file_beyond(size):
    """What a full disk does to files, without one. Python has SIGXFSZ ignored: writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_overlay_that_does_not_fit_is_told_and_the_rest_can_be_read(tmp_path):
    segmented = stream()
    write(tmp_path / "whole", segmented)
    room = (tmp_path / "whole" / "segments.json").stat().st_size
    assert room < (tmp_path / "whole" / "overlay.mp4").stat().st_size, "or this test limits the wrong file"
    with no_file_beyond(room + 100), pytest.raises(VideoError, match=r"overlay.mp4, so it is deleted .*make room"):
        write(tmp_path / "cut", segmented)
    figures = json.loads((tmp_path / "cut" / "segments.json").read_text())
    assert figures["is_complete"] is False
    assert len(figures["frames"]) == 16
    for described in figures["frames"]:
        mask = cv2.imread(str(tmp_path / "cut" / described["mask"]), cv2.IMREAD_UNCHANGED)
        whole = cv2.imread(str(tmp_path / "whole" / described["mask"]), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(mask, whole)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["masks", "segments.json"]


def test_figures_that_do_not_fit_are_told_and_leave_no_part(tmp_path):
    segmented = stream()
    with no_file_beyond(2000), pytest.raises(VideoError, match=r"cannot write .*segments.json .*16 masks are written"):
        write(tmp_path, segmented, overlay=False)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]
    assert len(list((tmp_path / "masks").iterdir())) == 16


def test_a_mask_that_does_not_fit_ends_the_run_with_its_name(tmp_path):
    segmented = stream()
    with no_file_beyond(10), pytest.raises(VideoError, match=r"masks/000000.png \(File too large\); .*make room"):
        write(tmp_path, segmented)
    assert list((tmp_path / "masks").iterdir()) == []


def test_results_are_replaced_only_when_asked(tmp_path):
    write(tmp_path, stream())
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(VideoError, match="holds results already"):
        write(tmp_path, [])
    write(tmp_path, stream()[:3], replace=True, overlay=False)
    assert len(list((tmp_path / "masks").iterdir())) == 3
    assert not (tmp_path / "overlay.mp4").exists()
    assert other.read_text() == "mine"


def test_odd_and_changing_sizes_are_drawn(tmp_path):
    frames = [VIDEO.frame(t, scale=(8, 8 + t % 2)) for t in range(4)]
    frames = [type(f)(f.image_rgb_u8[: 255 - t, :251].copy(), f.stamp_ns) for t, f in enumerate(frames)]
    write(tmp_path, stream(frames=frames))
    assert [frame.image_rgb_u8.shape for frame in open_recording(tmp_path / "overlay.mp4")] == [(254, 250, 3)] * 4


def run(*arguments):
    return CliRunner().invoke(cli.app, ["segment", *map(str, arguments)])


def test_wrong_usage_is_told(tmp_path):
    goal = ("--goal", "the red ball", "--out", tmp_path / "out")
    assert run(tmp_path, *goal, "--delay-ms", "5").exit_code == 2
    assert run(tmp_path, *goal, "--offline", "--answers", "realtime").exit_code == 2
    assert run(tmp_path, "--out", tmp_path).exit_code == 2
    for arguments, said in (
        ((tmp_path / "gone.mp4", *goal), "there is no"),
        ((tmp_path, *goal), "holds no images"),
    ):
        assert said in str(run(*arguments).exception)
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((8, 8, 3), np.uint8))
    refused = run(tmp_path, "--goal", "xyzzy", "--out", tmp_path / "out").exception
    assert isinstance(refused, BadGoal)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A folder of images of a scene that no training saw, its sentences, and the truth."""
    from virst_engine.evaluate.cases import load_case
    from virst_engine.evaluate.settings import EvaluationSettings

    case = load_case(EvaluationSettings(), 1_000_003)
    folder = tmp_path_factory.mktemp("clip")
    for t, frame in enumerate(case.frames[:32]):
        cv2.imwrite(str(folder / f"frame{t}.png"), frame.image_rgb_u8[..., ::-1])
    return folder, case


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--offline",), ("--answers", "realtime", "--delay-ms", "200")], ids=str)
def test_a_simulated_clip_end_to_end(simulated, tmp_path, mode):
    folder, case = simulated
    meant = [question for question in case.questions if question.target_ids]
    goals = [part for question in meant for part in ("--goal", question.sentence)]
    result = run(folder, *goals, "--out", tmp_path / "out", "--rate", 10, "--threads", 1, *mode)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "segments.json").read_text())
    assert figures["is_complete"]
    assert len(figures["frames"]) == 32
    for number, question in enumerate(meant, start=1):
        overlaps = []
        for described in figures["frames"][case.goal_frame :]:
            mask = cv2.imread(str(tmp_path / "out" / described["mask"]), cv2.IMREAD_UNCHANGED) == number
            truth = np.isin(case.instance_mask[described["frame"]], [k + 1 for k in question.target_ids])
            overlaps.append(overlap(mask, truth))
        assert np.mean(overlaps) > 0.8, question.sentence
