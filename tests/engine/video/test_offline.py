# SPDX-License-Identifier: Apache-2.0
"""Whole-video inference on the fake network: which frames are anchors, what each frame attends to, both directions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fakes import (
    BLUE,
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
from virst_engine.errors import BadFrame
from virst_engine.fast.postprocess import mask_at_size
from virst_engine.types import Frame, MemoryEntry, Prompt
from virst_engine.video import offline

CONFIG = small_config()
CHOOSING = replace(CONFIG, reasoner=replace(CONFIG.reasoner, method="tempvrs"))  # whose answers name the frames


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

    offline.segment_whole_video(
        Stages(), FakeReasoner(), frames, ["red"], CONFIG, strategy=offline.AnchorStrategy("first-frame")
    )
    assert sum(decoded) == 1
    assert len(decoded) == 10


def prompts_of(confidences):
    return [Prompt(step, step, np.zeros((2, 8), np.float32), confidence) for step, confidence in enumerate(confidences)]


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        (offline.AnchorStrategy(), [0, 7]),
        (offline.AnchorStrategy(count=8), [0, 1, 2, 3, 4, 5, 6, 7]),
        (offline.AnchorStrategy(count=3), [0, 4, 7]),
        (offline.AnchorStrategy("first-frame"), [0]),
        (offline.AnchorStrategy("guided"), [5]),
        (offline.AnchorStrategy("uniform-3"), [0, 4, 7]),
    ],
)
def test_anchors_of_a_clip(strategy, steps):
    prompts = prompts_of([0.1, 0.2, 0.3, 0.2, 0.1, 0.9, 0.9, 0.3])
    assert [prompt.step for prompt in strategy.choose(prompts)] == steps


def test_random_anchors_are_three_and_depend_on_the_seed_alone():
    chosen = [
        [prompt.step for prompt in offline.AnchorStrategy("random-3", seed=seed).choose(prompts_of([1.0] * 8))]
        for seed in (*range(20), 0)
    ]
    assert all(len(set(steps)) == 3 and steps == sorted(steps) for steps in chosen)
    assert chosen[0] == chosen[20]
    assert {step for steps in chosen for step in steps} == set(range(8))


def test_a_method_that_names_the_frames_itself_has_chosen():
    named = prompts_of([0.3, 0.8, 0.5])
    assert offline.AnchorStrategy().choose(named, has_chosen=True) == named
    assert offline.AnchorStrategy().choose(named) == named[:1]  # VIRST at the start of a video
    assert offline.AnchorStrategy("guided").choose(named, has_chosen=True) == [named[1]]
    assert offline.AnchorStrategy().choose([], has_chosen=True) == []


@pytest.mark.parametrize("wrong", [{"name": "last"}, {"count": -1}, {"name": "guided", "count": 2}])
def test_impossible_strategies_are_refused(wrong):
    with pytest.raises(ValueError, match="anchors"):
        offline.AnchorStrategy(**wrong)


class Names(FakeReasoner):
    """Answers for the frames of the clip that are given for a colour word, surest of the last."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def answer(self, request):
        answer = super().answer(request)
        word = next(word for word in request.sentence.split() if word in self.positions)
        named = [answer.prompts[position] for position in self.positions[word]]
        sure = [replace(prompt, confidence=number / 10) for number, prompt in enumerate(named)]
        return replace(answer, prompts=tuple(sure))


@pytest.mark.parametrize("stages", [FakeStages, ReusedBuffers])
def test_sentences_may_have_different_anchors(stages):
    video = Video([moving_square(RED, row=2), moving_square(GREEN, row=10)])
    frames = [video.frame(t) for t in range(20)]
    reasoner = Names({"red": (3, 5), "green": (0,), "blue": ()})
    sentences = ["the green square", "the blue square", "the red square"]
    masks = offline.segment_whole_video(stages(), reasoner, frames, sentences, CHOOSING)
    for t in range(20):
        for goal, square in ((0, 1), (2, 0)):
            truth = video.truth(t, square)
            overlap = np.count_nonzero(masks[goal, t] & truth) / np.count_nonzero(masks[goal, t] | truth)
            assert overlap > 0.8
    assert not masks[1].any()


@pytest.mark.parametrize("stages", [FakeStages, ReusedBuffers])
def test_sentences_with_anchors_of_their_own_are_answered_as_if_alone(stages):
    """Exactly: the video is noisy, and what a frame recalls is a mean over all that is remembered."""
    video = Video([moving_square(RED, row=2), moving_square(GREEN, row=10), moving_square(BLUE, row=6)])
    frames = [video.frame(t) for t in range(20)]

    def logits_of(sentences):
        reasoner = Names({"red": (3, 5), "green": (0,), "blue": (6,), "black": ()})
        seen = list(_copied(offline.propagate_whole_video(stages(), reasoner, frames, sentences, CHOOSING)))
        assert sorted(number for number, _, _ in seen) == list(range(20))
        return {number: logits for number, logits, _ in seen}

    def _copied(found):
        for each in found:
            is_alone, is_anchor = len(each.prediction.mask_logits) == 1, each.number in (0, 3, 5, 6)
            assert is_alone or is_anchor or "memory_attention" in each.timings_ms
            yield each.number, each.prediction.mask_logits.clone(), each.timings_ms

    # The last one has the anchors of the first: they are one group, and come apart again.
    sentences = [*(f"the {colour} square" for colour in ("blue", "green", "black", "red")), "the blue one"]
    together = logits_of(sentences)
    for goal, sentence in enumerate(sentences):
        alone = logits_of([sentence])
        assert all(torch.equal(together[t][goal], alone[t][0]) for t in range(20)), sentence


def test_frames_between_first_anchors_come_once_both_directions_have_met():
    video = Video([moving_square(RED, row=2), moving_square(GREEN, row=10)])
    frames = [video.frame(t) for t in range(20)]
    reasoner = Names({"red": (3,), "green": (0,)})
    seen = offline.propagate_whole_video(FakeStages(), reasoner, frames, ["the green one", "the red one"], CHOOSING)
    assert [each.number for each in seen] == [*range(3, 20), 2, 1, 0]


def test_a_guided_anchor_is_where_the_reasoner_is_surest():
    video = Video([moving_square(RED)])
    frames = [video.frame(t) for t in range(15)]
    decoded = []

    class Stages(FakeStages):
        def mask_decoder(self, features, conditioned, prompts):
            if prompts is not None:
                decoded.append(round(float(prompts.sparse[0, 0, 3]) * 255))
            return super().mask_decoder(features, conditioned, prompts)

    reasoner = Names({"red": tuple(range(8))})  # all frames of the clip, the last one surest
    guided = offline.AnchorStrategy("guided")
    masks = offline.segment_whole_video(Stages(), reasoner, frames, ["red"], CONFIG, strategy=guided)
    assert decoded == [14]
    assert all(np.count_nonzero(mask) >= 40 for mask in masks[0])


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
