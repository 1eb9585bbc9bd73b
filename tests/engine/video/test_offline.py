# SPDX-License-Identifier: Apache-2.0
"""Whole-video inference on the fake network: which frames are anchors, what each frame attends to, both directions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fakes import (
    GREEN,
    RED,
    FakeReasoner,
    FakeStages,
    ReusedBuffers,
    Square,
    Video,
    moving_square,
    small_config,
)
from virst_engine.config import MemoryParameters
from virst_engine.errors import BadFrame, VideoError
from virst_engine.fast.postprocess import mask_at_size
from virst_engine.types import Frame, MemoryEntry
from virst_engine.video import offline

CONFIG = small_config()


def entry(value):
    return MemoryEntry(torch.full((1, 4, 4, 4), float(value)), torch.full((1, 8), float(value)))


@pytest.mark.parametrize(("frames", "anchors"), [(1, [0]), (4, [0]), (8, [0, 7]), (32, [0, 4, 9, 13, 18, 22, 27, 31])])
def test_a_quarter_of_the_clip_is_anchors(frames, anchors):
    assert offline.anchor_frames(frames) == anchors


def test_clips_span_the_video():
    assert offline.uniform_frames(48, 8) == [0, 7, 13, 20, 27, 34, 40, 47]
    assert offline.uniform_frames(3, 8) == [0, 0, 1, 1, 1, 1, 2, 2]


def test_nearest_anchors_lie_before_and_after():
    assert offline.nearest_anchors(10, [0, 4, 9, 13, 18], 3) == [9, 13, 4]


def test_memory_holds_future_anchors_and_recent_frames_with_their_ages():
    parameters = MemoryParameters(anchors_attended=2)
    anchors, recent = {0: entry(1), 9: entry(2)}, {3: entry(3), 4: entry(4)}
    memory = offline.assemble_memory(5, anchors, recent, parameters, FakeStages.sizes, backwards=False)
    seen = {
        (float(memory.spatial[0, slot, 0, 0, 0]), int(memory.spatial_tpos[0, slot]))
        for slot in range(memory.spatial.shape[1])
        if memory.spatial_valid[0, slot]
    }
    assert seen == {(1.0, 6), (2.0, 6), (4.0, 0), (3.0, 1)}
    told = {
        (float(memory.pointers[0, row, 0]), float(memory.pointer_distance[0, row]))
        for row in range(memory.pointers.shape[1])
        if memory.pointer_valid[0, row]
    }
    assert told == {(1.0, 5.0), (4.0, 1.0), (3.0, 2.0)}  # the pointer of the future anchor is left out


def test_backwards_the_past_is_the_future():
    anchors, recent = {9: entry(2)}, {6: entry(6), 4: entry(4)}
    memory = offline.assemble_memory(5, anchors, recent, MemoryParameters(), FakeStages.sizes, backwards=True)
    values = memory.spatial[0, memory.spatial_valid[0], 0, 0, 0].tolist()
    assert values == [2.0, 6.0]
    assert memory.pointers[0, memory.pointer_valid[0], 0].tolist() == [2.0, 6.0]


def test_an_anchor_too_far_to_be_chosen_counts_as_a_recent_frame():
    parameters = MemoryParameters(anchors_attended=1)
    anchors = {3: entry(3), 6: entry(6)}
    memory = offline.assemble_memory(5, anchors, {}, parameters, FakeStages.sizes, backwards=False)
    slots = memory.spatial_valid[0].nonzero().flatten().tolist()
    assert [(float(memory.spatial[0, s, 0, 0, 0]), int(memory.spatial_tpos[0, s])) for s in slots] == [
        (6.0, 6),
        (3.0, 1),
    ]


def test_every_frame_of_the_video_is_segmented_for_each_goal():
    video = Video([moving_square(RED, row=2), moving_square(GREEN, row=10)], scale=(3, 4))
    frames = [video.frame(t) for t in range(20)]
    sentences = ["the red square", "the green square", "the blue square"]
    masks = offline.segment_whole_video(FakeStages(), FakeReasoner(), frames, sentences, CONFIG)
    assert masks.shape == (3, 20, 96, 128)
    for t in range(20):
        for goal in (0, 1):
            truth = mask_at_size(video.truth(t, goal).astype(np.float32) - 0.5, 96, 128)
            overlap = np.count_nonzero(masks[goal, t] & truth) / np.count_nonzero(masks[goal, t] | truth)
            assert overlap > 0.8
    assert not masks[2].any()


def test_masks_spread_backwards_from_an_anchor_in_the_middle(monkeypatch):
    monkeypatch.setattr(offline, "anchor_frames", lambda clip_frames: [4])
    video = Video([moving_square(RED)])
    frames = [video.frame(t) for t in range(15)]
    masks = offline.segment_whole_video(FakeStages(), FakeReasoner(), frames, ["red"], CONFIG)
    assert all(np.count_nonzero(mask) >= 40 for mask in masks[0])


class Choosy(FakeReasoner):
    """Leaves so many of the oldest frames out as the sentence ends with."""

    def answer(self, request):
        answer = super().answer(request)
        left_out = int(request.sentence.split()[-1])
        return replace(answer, prompts=answer.prompts[left_out:])


def test_a_reasoner_may_leave_frames_out_and_a_prompt_stays_on_its_own():
    """The fake decoder refuses a prompt of another frame."""
    video = Video([moving_square(RED), Square(GREEN, lambda t: (10, 3))])
    frames = [video.frame(t) for t in range(20)]
    sentences = ["red 3", "green 3"]
    masks = offline.segment_whole_video(FakeStages(), Choosy(), frames, sentences, CONFIG)
    assert all(np.count_nonzero(mask) >= 40 for goal in masks for mask in goal)
    with pytest.raises(VideoError, match=r"chooses other frames for each sentence.*one goal at a time"):
        offline.segment_whole_video(FakeStages(), Choosy(), frames, ["red 3", "green 2"], CONFIG)


def test_an_object_out_of_view_has_no_mask():
    video = Video([Square(RED, lambda t: None if 5 <= t < 9 else (3, 3))])
    frames = [video.frame(t) for t in range(15)]
    masks = offline.segment_whole_video(FakeStages(), FakeReasoner(), frames, ["red"], CONFIG)
    assert [bool(mask.any()) for mask in masks[0]] == [not 5 <= t < 9 for t in range(15)]


def test_first_anchor_only_decodes_one_prompt():
    video = Video([moving_square(RED)])
    frames = [video.frame(t) for t in range(10)]
    decoded = []

    class Stages(FakeStages):
        def mask_decoder(self, features, conditioned, prompts):
            decoded.append(prompts is not None)
            return super().mask_decoder(features, conditioned, prompts)

    offline.segment_whole_video(Stages(), FakeReasoner(), frames, ["red"], CONFIG, first_anchor_only=True)
    assert sum(decoded) == 1
    assert len(decoded) == 10


def test_stages_may_reuse_their_buffers():
    """An engine's output is good until its next call; anchors and memories have to outlive many."""
    video = Video([moving_square(RED, row=2), moving_square(GREEN, row=10)])
    frames = [video.frame(t) for t in range(20)]
    plain, reused = (
        offline.segment_whole_video(stages, FakeReasoner(), frames, ["red", "green"], CONFIG)
        for stages in (FakeStages(), ReusedBuffers())
    )
    assert plain.any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(plain, reused)


def test_a_long_video_is_read_in_order_and_not_held(monkeypatch):
    """Twice the clip's frames, else once each; memories as old as no frame attends to are dropped."""
    video = Video([moving_square(RED)])
    asked, held = [], []

    class Frames:
        def __len__(self):
            return 60

        def __getitem__(self, number):
            asked.append(number)
            return video.frame(number)

    real = offline.assemble_memory
    monkeypatch.setattr(
        offline,
        "assemble_memory",
        lambda t, anchors, recent, *rest: (held.append(len(recent)), real(t, anchors, recent, *rest))[1],
    )
    numbers = [
        seen.number for seen in offline.propagate_whole_video(FakeStages(), FakeReasoner(), Frames(), ["red"], CONFIG)
    ]
    assert numbers == list(range(60))
    assert asked == [*offline.uniform_frames(60, 8), *range(60)]
    assert max(held) == CONFIG.memory.pointers


def test_a_bad_image_is_refused():
    bad = Frame(np.zeros((0, 4, 3), dtype=np.uint8), 0)
    with pytest.raises(BadFrame):
        offline.segment_whole_video(FakeStages(), FakeReasoner(), [bad], ["red"], CONFIG)
