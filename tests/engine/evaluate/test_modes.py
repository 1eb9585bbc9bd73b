# SPDX-License-Identifier: Apache-2.0
"""The three modes and their ablations on the fake network, and the frames that real time drops."""

import numpy as np
import pytest

from tests.fakes import RED, FakeReasoner, FakeStages, Video, moving_square, small_config
from virst_engine.evaluate.modes import System, processed_frames, run_mode
from virst_engine.evaluate.settings import EvaluationSettings

VIDEO = Video([moving_square(RED)])
FRAMES = [VIDEO.frame(t) for t in range(16)]
GOAL_FRAME = 6


def run(reasoner=None, sentences=("the red square",), **settings):
    reasoner = reasoner or FakeReasoner()
    config = small_config(period_s=0.5, clip_spacing_s=0.1, clip_frames=4)
    system = System(FakeStages(), reasoner, config)
    return run_mode(system, EvaluationSettings(**settings), FRAMES, GOAL_FRAME, list(sentences)), reasoner


def overlap(mask, t):
    truth = VIDEO.truth(t)
    return np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth)


@pytest.mark.parametrize("mode", ["offline", "stream", "realtime"])
def test_each_mode_scores_from_the_goal_to_the_end(mode):
    masks, _ = run(mode=mode)
    assert masks.shape == (1, 10, 32, 32)
    assert all(overlap(masks[0, t - GOAL_FRAME], t) > 0.8 for t in range(GOAL_FRAME, 16))


@pytest.mark.parametrize("mode", ["stream", "realtime"])
def test_more_goals_than_one_session_holds(mode):
    masks, _ = run(mode=mode, sentences=["red", "blue", "red", "red", "blue"])
    assert masks.shape[0] == 5
    assert [bool(mask.any()) for mask in masks] == [True, False, True, True, False]


def test_streaming_looks_at_no_frame_before_its_time():
    _, reasoner = run(mode="stream")
    newest = [int(request.clip.stamps_ns[-1]) for request in reasoner.requests]
    assert newest[0] == FRAMES[GOAL_FRAME].stamp_ns
    assert newest == [FRAMES[GOAL_FRAME].stamp_ns, FRAMES[GOAL_FRAME + 5].stamp_ns]


def test_real_time_is_empty_until_the_reasoner_has_answered():
    masks, _ = run(mode="realtime", reasoner_delay_s=0.25)
    found = [bool(mask.any()) for mask in masks[0]]
    assert found[:3] == [False, False, False]
    assert all(found[4:])


def test_real_time_judges_a_dropped_frame_by_the_newest_mask_that_was_there():
    """Every third frame is dropped; when it comes, the one before it is still being processed."""
    masks, _ = run(mode="realtime", frame_time_s=0.15)
    taken = [number for number, _ in processed_frames([frame.stamp_ns / 1e9 for frame in FRAMES], 0.15)]
    dropped = [number for number in range(GOAL_FRAME + 3, 16) if number not in taken]
    assert dropped
    for number in dropped:
        assert np.array_equal(masks[0, number - GOAL_FRAME], masks[0, number - 2 - GOAL_FRAME])
        assert not np.array_equal(masks[0, number - GOAL_FRAME], masks[0, number - 1 - GOAL_FRAME])


@pytest.mark.parametrize(
    ("frame_time_s", "taken"),
    [(0.0, [0, 1, 2, 3, 4, 5]), (0.1, [0, 1, 2, 3, 4, 5]), (0.15, [0, 1, 3, 4]), (0.25, [0, 2, 5])],
)
def test_the_newest_frame_wins(frame_time_s, taken):
    numbers = [number for number, _ in processed_frames([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], frame_time_s)]
    assert numbers[: len(taken)] == taken


def test_a_frame_waits_for_its_turn():
    turns = processed_frames([0.0, 0.1, 0.2, 0.3], 0.15)
    assert [number for number, _ in turns] == [0, 1, 3]
    assert [start_s for _, start_s in turns] == pytest.approx([0.0, 0.15, 0.3])


def test_without_refresh_there_is_one_answer_with_all_its_anchors():
    masks, refreshed = run(mode="stream")
    assert len(refreshed.requests) == 2
    masks, reasoner = run(mode="stream", no_refresh=True)
    assert len(reasoner.requests) == 1
    assert masks[0].any(axis=(1, 2)).all()


@pytest.mark.parametrize("mode", ["stream", "realtime"])
def test_first_anchor_only_decodes_the_goal_frame_alone(mode):
    decoded = []

    class Stages(FakeStages):
        def mask_decoder(self, features, conditioned, prompts):
            if prompts is not None:
                decoded.append(len(prompts.sparse))
            return super().mask_decoder(features, conditioned, prompts)

    config = small_config(period_s=0.2, clip_spacing_s=0.1, clip_frames=8)
    for settings, expected in (({}, 2), ({"first_anchor_only": True}, 1)):
        decoded.clear()
        system = System(Stages(), FakeReasoner(), config)
        run_mode(system, EvaluationSettings(mode=mode, **settings), FRAMES, GOAL_FRAME, ["red"])
        assert decoded[0] == expected
        assert len(decoded) == 1 if settings else len(decoded) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"family": "rich"}, "family must be one of plain, full"),
        ({"mode": "batch"}, "mode must be one of"),
        ({"first_scene": 5, "last_scene": 5}, "FIRST < LAST"),
        ({"per_scene": 0}, "per_scene"),
        ({"mode": "offline", "no_refresh": True}, "no_refresh"),
        ({"frame_time_s": -1.0}, ">= 0"),
        ({"top_k": 3}, "top_k is for the method tempvrs"),
        ({"reasoner_weights": "x"}, "reasoner_weights are for visa, tempvrs"),
        ({"method": "visa", "mode": "offline", "anchors": "uniform-3"}, "visa chooses its anchors itself"),
        ({"method": "tempvrs", "first_anchor_only": True}, "tempvrs chooses its anchors itself"),
        ({"method": "visa", "no_second_fusion": True}, "a part of virst"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**wrong)
