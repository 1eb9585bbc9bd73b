# SPDX-License-Identifier: Apache-2.0
"""Batches against scenes whose pixels are known: what is shown, what is asked and what is true."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.engine.data.fake_scenes import ALL, ARM, BALL, BLUE, BOX, FRAMES, NOTHING, RED, THE_BALL, THE_BOX, FakeScene
from tests.engine.model.small_models import WORDS
from virst_engine.data.clips import (
    MIN_VISIBLE_SHARE,
    Batch,
    BatchSource,
    ClipPlan,
    RecordedScene,
    anchor_frames,
    object_motion,
    propagation_frames,
    resize_frames,
    visible_objects,
)
from virst_engine.errors import SceneError
from virst_engine.model.words import END, WordTokenizer
from virst_engine.train.config import StageConfig, TrainConfig

STRIDE = 3
PLAN = ClipPlan(clips=2, sentences=3, clip_frames=4, anchors=3, stride=STRIDE)
PROPAGATION = replace(PLAN, following_frames=3)
STEPS = range(40)


def source_of(
    plan: ClipPlan, scenes: list[RecordedScene] | None = None, *, seed: tuple[int, ...] = (0,)
) -> BatchSource:
    return BatchSource(scenes or [FakeScene(0), FakeScene(1)], WordTokenizer(WORDS), plan, seed, len(STEPS))


def shown(batch: Batch) -> list[list[int]]:
    """The numbers of the frames of each clip, as they are written into their first pixel."""
    return batch.frames_rgb_u8[:, :, 0, 0, 1].tolist()


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_batch_is_a_function_of_seed_stage_and_step() -> None:
    first, again = source_of(PLAN), source_of(PLAN)
    assert len(first) == len(STEPS)
    np.random.seed(4)
    torch.manual_seed(4)
    assert all(equal(first[step], again[step]) for step in (7, 0, 3))
    assert not equal(first[0], first[1])
    assert not equal(first[0], source_of(PLAN, seed=(1,))[0])
    assert not equal(first[0], source_of(PLAN, seed=(0, 7))[0])


def test_frames_of_a_clip_are_evenly_spaced_and_the_sentence_is_about_the_newest() -> None:
    scene = FakeScene(0, [THE_BOX])  # a moving kind: the window is never cut short
    source = source_of(replace(PLAN, clips=1), [scene])
    for step in STEPS:
        scene.asked.clear()
        frames = shown(source[step])[0]
        assert np.diff(frames).tolist() == [STRIDE] * 3
        assert scene.asked == [(frames[-1], 3, (), PLAN.absent_share)]
        assert frames[0] >= 0
        assert frames[-1] < FRAMES
    newest = {shown(source[step])[0][-1] for step in range(200)}
    assert newest == set(range(3 * STRIDE, FRAMES))  # every frame that has a whole window before it


def test_the_full_size_clip_spans_2_1_seconds_of_10_hz_frames() -> None:
    scene = FakeScene(0, [THE_BOX])
    stage = StageConfig("few-image", "image", 1, 1e-3, clips=1, sentences=1, mirrored_share=0.0)
    frames = shown(source_of(stage.clip_plan(TrainConfig((stage,)).clip_stride), [scene])[0])[0]
    assert [frame - frames[0] for frame in frames] == [0, 3, 6, 9, 12, 15, 18, 21]


def test_a_mirrored_scene_is_another_scene_with_another_sentence() -> None:
    words = WordTokenizer(WORDS)
    told = replace(THE_BALL, landmark_ids=(1,))
    plain, mirrored = (
        source_of(replace(PROPAGATION, mirrored_share=share), [FakeScene(0, [told])])[3] for share in (0.0, 1.0)
    )
    assert torch.equal(mirrored.frames_rgb_u8, plain.frames_rgb_u8.flip(3))
    assert torch.equal(mirrored.instance_masks, plain.instance_masks.flip(-1))
    assert torch.equal(mirrored.truth, plain.truth.flip(-1))
    assert torch.equal(mirrored.landmark, plain.landmark.flip(-1))
    assert torch.equal(mirrored.visible, plain.visible)
    assert plain.text[plain.text_valid].tolist()[:3] == words.encode(told.text)
    assert mirrored.text[mirrored.text_valid].tolist()[:3] == words.encode("the blue ball")
    assert torch.equal(mirrored.answer, plain.answer)  # the same object, whose name has no side
    # It moves to the right, and to the left in a mirror.
    assert plain.motion[..., 0].max() > 0.5
    assert plain.motion[..., 0].min() >= 0
    assert mirrored.motion[..., 0].min() < -0.5
    assert mirrored.motion[..., 0].max() <= 0


def test_each_scene_of_a_batch_is_mirrored_with_its_own_sentences_or_not_at_all() -> None:
    words = WordTokenizer(WORDS)
    plain, mirrored = words.encode(THE_BALL.text), words.encode(THE_BALL.mirrored_text)
    seen = set()
    source = source_of(replace(PLAN, mirrored_share=0.5), [FakeScene(0, [THE_BALL])])
    for step in STEPS:
        batch = source[step]
        is_mirrored = (batch.instance_masks[:, 0, 0, 0] == ARM).tolist()  # the arm covers the last column
        seen.add(tuple(is_mirrored))
        for row, clip in enumerate(batch.clip_of_row.tolist()):
            said = batch.text[row][batch.text_valid[row]].tolist()
            assert said[: len(plain)] == (mirrored if is_mirrored[clip] else plain)
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_now_and_then_the_camera_has_just_started() -> None:
    """Then the oldest frame that was seen stands for those that were not; only where one frame is evidence enough."""
    starts = 0
    for step in range(200):
        batch = source_of(replace(PLAN, clips=1), [FakeScene(0, [THE_BALL])])[step]
        frames = shown(batch)[0]
        assert frames == sorted(frames)
        whole = [frames[-1] - STRIDE * k for k in (3, 2, 1, 0)]
        if frames != whole:
            starts += 1
            first = frames[0]
            assert frames == [max(frame, first) for frame in whole]
    assert 10 < starts < 50  # 15 %, some of them cut nothing


def test_truth_is_the_targets_share_of_every_block() -> None:
    said = (THE_BALL, THE_BOX, NOTHING, ALL)
    scenes = [FakeScene(0, said), FakeScene(1, said)]
    of_kind = {one.kind: one.target_ids for one in said}
    for step in range(10):
        batch = source_of(PROPAGATION, scenes)[step]
        rows, frames = batch.truth.shape[:2]
        assert (rows, frames) == (6, 7)
        assert batch.clip_of_row.tolist() == [0, 0, 0, 1, 1, 1]
        for row in range(rows):
            masks = batch.instance_masks[batch.clip_of_row[row]]
            target = torch.zeros(masks.shape)
            for object_number in of_kind[batch.kinds[row]]:
                target += masks == object_number + 1
            assert torch.equal(batch.truth[row], F.avg_pool2d(target, 2))
            assert batch.visible[row].tolist() == [bool(t.mean() > MIN_VISIBLE_SHARE) for t in target]


def test_masks_and_colours_belong_to_the_frames_that_are_shown() -> None:
    batch = source_of(PROPAGATION)[3]
    scenes = [FakeScene(0), FakeScene(1)]
    for clip, frames in enumerate(shown(batch)):
        scene = scenes[int(batch.frames_rgb_u8[clip, 0, 0, 0, 0])]
        assert np.array_equal(batch.frames_rgb_u8[clip].numpy(), scene.frames_rgb_u8[frames])
        assert np.array_equal(batch.instance_masks[clip].numpy(), scene.instance_masks[frames])
        sampled = scene.instance_masks[frames][:, 2::4, 2::4]  # the arm, 255, has no colour and no shape
        colour, shape = np.zeros_like(sampled), np.zeros_like(sampled)
        for value, colour_label, shape_label in ((1, RED, BALL), (2, BLUE, BOX)):
            colour[sampled == value], shape[sampled == value] = colour_label, shape_label
        assert np.array_equal(batch.colour[clip].numpy(), colour)
        assert np.array_equal(batch.shape[clip].numpy(), shape)


def test_an_object_that_has_left_or_never_was_is_not_visible() -> None:
    scene = FakeScene(0, [THE_BOX])  # above the image from frame 16 on
    batch = source_of(replace(PLAN, clips=8), [scene])[0]
    for row in range(len(batch.clip_of_row)):
        frames = shown(batch)[int(batch.clip_of_row[row])]
        assert batch.visible[row].tolist() == [32 - 2 * frame > 0 for frame in frames]
    nothing = source_of(PLAN, [FakeScene(0, [NOTHING])])[0]
    assert not bool(nothing.visible.any())
    assert float(nothing.truth.sum()) == 0.0


def test_sentences_are_padded_on_the_left_and_answers_end() -> None:
    batch = source_of(PLAN, [FakeScene(0, [THE_BALL, ALL])])[0]
    tokenizer = WordTokenizer(WORDS)
    said = {one.kind: one for one in (THE_BALL, ALL)}
    assert set(batch.kinds) == set(said)
    for row, kind in enumerate(batch.kinds):
        text = tokenizer.encode(said[kind].text)
        assert batch.text[row, -len(text) :].tolist() == text
        assert batch.text_valid[row].tolist() == [False] * (batch.text.shape[1] - len(text)) + [True] * len(text)
        answer = [*tokenizer.encode(said[kind].answer), END]
        assert batch.answer[row, batch.answer_valid[row]].tolist()[-len(answer) :] == answer
        assert not bool(batch.answer_valid[row].diff().sum() > 1)  # one run of words, then padding


def test_labels_of_a_target_are_those_of_all_its_objects() -> None:
    said = {one.kind: one for one in (THE_BOX, ALL, NOTHING)}
    batch = source_of(replace(PLAN, clips=8), [FakeScene(0, list(said.values()))])[0]
    assert set(batch.kinds) == set(said)
    for row, kind in enumerate(batch.kinds):
        for labels, of_object in ((batch.target_colour, (RED, BLUE)), (batch.target_shape, (BALL, BOX))):
            wanted = [of_object[i] for i in said[kind].target_ids]
            assert labels[row].tolist() == wanted + [0] * (labels.shape[1] - len(wanted))


def test_anchors_are_distinct_frames_of_the_clip_with_the_newest_among_them() -> None:
    """Algorithm 1, made causal: what is asked of the model is a mask of now."""
    source = source_of(PLAN)
    seen = set()
    for step in STEPS:
        anchors = source[step].anchors
        assert len(anchors) == 3
        assert list(anchors) == sorted(set(anchors))
        assert anchors[0] >= 0
        assert anchors[-1] == 3
        seen.update(anchors)
    assert seen == {0, 1, 2, 3}
    assert source_of(replace(PLAN, anchors=9))[0].anchors == (0, 1, 2, 3)
    oldest = [anchor_frames(8, 2, np.random.default_rng(seed))[0] == 0 for seed in range(400)]
    assert 0.48 < np.mean(oldest) < 0.66  # every other time, and by chance: 1/2 + 1/14
    assert source_of(replace(PLAN, anchors=1))[0].anchors == (3,)


def test_propagation_frames_come_after_the_clip_in_order() -> None:
    source = source_of(PROPAGATION, [FakeScene(0, [THE_BOX])])
    strides = set()
    for step in STEPS:
        batch = source[step]
        assert batch.clip_frames == 4
        for frames in shown(batch):
            query, after = frames[3], frames[4:]
            assert len(after) == 3
            assert query < after[0]
            assert after == sorted(after)
            assert after[-1] < FRAMES
            if after[-1] < FRAMES - 1:
                assert len(set(np.diff([query, *after]).tolist())) == 1
            strides.add(after[0] - query)
    assert strides == {1, 2, 3}


def test_propagation_frames_stop_at_the_end_of_the_recording() -> None:
    for seed in range(20):
        frames = propagation_frames(10, 4, 12, np.random.default_rng(seed))
        assert frames in ([11, 12, 12, 12], [12, 12, 12, 12])


def test_only_the_stages_kinds_are_asked_for() -> None:
    scene = FakeScene(0)
    _ = source_of(replace(PLAN, kinds=("attribute", "relation"), absent_share=0.4), [scene])[0]
    assert {(kinds, absent_share) for _, _, kinds, absent_share in scene.asked} == {(("attribute", "relation"), 0.4)}


def test_the_landmark_is_shown_in_the_frames_of_the_clip() -> None:
    """The red ball is told by the blue box; the sentences that name no other object have no landmark."""
    told = replace(THE_BALL, kind=THE_BOX.kind, landmark_ids=(1,))
    batch = source_of(PLAN, [FakeScene(0, [told])])[0]
    boxes = source_of(PLAN, [FakeScene(0, [THE_BOX])])[0]
    assert torch.equal(batch.landmark, boxes.truth[:, : PLAN.clip_frames])
    assert float(batch.landmark.sum()) > 0
    assert float(boxes.landmark.sum()) == 0


def test_object_motion_is_the_shift_of_the_centroid() -> None:
    masks = np.zeros((3, 16, 16), np.uint8)
    masks[0, 2:4, 2:4], masks[1, 2:4, 4:6], masks[2, 3:5, 8:10] = 1, 1, 1  # x + 2, then x + 4 and y + 1
    masks[:, 10:12, 10:12], masks[:, 0, 0] = 2, 255
    motion = object_motion(masks)
    assert motion[0, 2, 2].tolist() == [2.0, 0.0]
    assert motion[1, 3, 5].tolist() == [3.0, 0.5]
    assert motion[2, 4, 9].tolist() == [4.0, 1.0]
    assert not motion[masks != 1].any()


def test_an_object_that_was_out_of_view_has_no_motion() -> None:
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[1, 4:6, 4:6] = 1
    assert not object_motion(masks).any()


def test_pretraining_takes_objects_that_the_first_frame_shows() -> None:
    plan = replace(PLAN, is_wordless=True)
    scene = FakeScene(0)
    for step in range(20):
        batch = source_of(plan, [scene])[step]
        assert bool(batch.visible[:, 0].all())
        assert set(batch.kinds) == {"object"}
    assert scene.asked == []


def test_visible_objects_leave_out_background_arm_and_specks() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:10, :10], mask[20:30, :10], mask[:, -1], mask[40, 40] = 1, 4, 255, 2
    rng = np.random.default_rng(0)
    assert {o.target_ids for o in visible_objects(mask, 2, rng)} == {(0,), (3,)}  # no repeats while there are enough
    assert {o.target_ids for o in visible_objects(mask, 30, rng)} == {(0,), (3,)}
    assert [o.target_ids for o in visible_objects(np.zeros((64, 64), np.uint8), 3, rng)] == [(0,)] * 3


def test_resized_frames_are_averages() -> None:
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    frames[0, :2, :2, 1] = [[10, 20], [30, 40]]
    small = resize_frames(frames, 2)
    assert small.shape == (1, 2, 2, 3)
    assert small[0, :, :, 1].tolist() == [[25, 0], [0, 0]]


def test_a_scene_that_is_too_short_is_named() -> None:
    scene = FakeScene(0)
    with pytest.raises(SceneError, match=r"24 frames.*clips of 4 frames.*at least 70"):
        source_of(replace(PLAN, stride=23), [scene])[0]
