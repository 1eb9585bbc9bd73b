# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.fakes import BLUE, COLOURS, RED, SIDE, SIZES, FakeStages, Square, Video, moving_square, read_code
from virst_engine.backends.torch_backend import object_bucket
from virst_engine.config import MemoryParameters, TrackingParameters
from virst_engine.errors import BadFrame
from virst_engine.fast.postprocess import mask_at_size
from virst_engine.fast.preprocess import Preprocess
from virst_engine.fast.tracker import DecodedAnchors, Tracker, warm_up
from virst_engine.types import Frame, ImageFeatures, MemoryEntry, MemoryTensors, PromptTokens

Colour = tuple[float, float, float]


def tracker_of(stages: FakeStages | None = None, ring_steps: int = 32, **tracking: int) -> Tracker:
    return Tracker(
        FakeStages() if stages is None else stages,
        MemoryParameters(ring_steps=ring_steps),
        TrackingParameters(**{"max_objects": 3, **tracking}),
    )


def prompt(features: ImageFeatures, colour: Colour) -> torch.Tensor:
    embeddings = torch.zeros(1, 2, SIZES.channels)
    embeddings[:, :, :3] = torch.tensor(colour)
    embeddings[:, :, 3] = read_code(features)
    return embeddings


def decode(tracker: Tracker, slot: int, steps: list[int], colour: Colour = RED) -> DecodedAnchors:
    prompts = []
    for step in steps:
        features = tracker.ring.features(step)
        assert features is not None
        prompts.append(prompt(features, colour))
    anchors = tracker.decode_anchors(slot, steps, torch.cat(prompts))
    assert anchors is not None
    return anchors


def begin(tracker: Tracker, slot: int, step: int, colour: Colour = RED) -> None:
    tracker.start_over(slot, decode(tracker, slot, [step], colour), [0])
    while tracker.is_replaying(slot):
        tracker.catch_up()


def mask(tracker: Tracker, slot: int = 0) -> np.ndarray:
    sighting = tracker.sighting(slot)
    assert sighting is not None
    return mask_at_size(sighting.mask_logits.numpy(), SIDE, SIDE)


def same_memory(one: MemoryTensors, other: MemoryTensors) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in MemoryTensors.__dataclass_fields__)


@dataclass
class Remembered:
    step: int
    entry: MemoryEntry


def batch_run(video: Video, frames: int, anchor_steps: list[int], colour: Colour) -> list[torch.Tensor]:
    """Logits of every frame from the newest anchor on, as SAM 2 does it: lists that grow, as many tensors as needed.

    Written against the paper (section 3.4) and sam2_base.py, not against the tracker.
    """
    stages, preprocess = FakeStages(), Preprocess(SIDE)
    features = [stages.image_encoder(preprocess(video.frame(t).image_rgb_u8)) for t in range(frames)]
    anchors, history, logits = [], [], []
    for step in anchor_steps:
        prediction = stages.mask_decoder(features[step], None, PromptTokens(prompt(features[step], colour)))
        anchors.append(Remembered(step, stages.memory_encoder(features[step], prediction)))
    logits.append(prediction.mask_logits[0])
    for t in range(anchor_steps[-1] + 1, frames):
        near = sorted(anchors, key=lambda a: t - a.step)[:3]
        recent = history[::-1][:6]
        spatial = [a.entry.spatial for a in near] + [r.entry.spatial for r in recent]
        rows = [6] * len(near) + list(range(len(recent)))
        told = near + history[::-1][:15]
        memory = MemoryTensors(
            spatial=torch.stack(spatial, dim=1),
            spatial_tpos=torch.tensor([rows]),
            spatial_valid=torch.ones(1, len(rows), dtype=torch.bool),
            pointers=torch.stack([r.entry.pointer for r in told], dim=1),
            pointer_distance=torch.tensor([[float(t - r.step) for r in told]]),
            pointer_valid=torch.ones(1, len(told), dtype=torch.bool),
        )
        prediction = stages.mask_decoder(features[t], stages.memory_attention(features[t], memory), None)
        logits.append(prediction.mask_logits[0])
        if float(prediction.object_score_logits[0]) > 0:
            history.append(Remembered(t, stages.memory_encoder(features[t], prediction)))
    return logits


@pytest.mark.parametrize("anchor_steps", [[3], [0, 7], [0, 2, 4, 6, 8]])
def test_the_stream_gives_the_masks_of_a_batch_run(anchor_steps: list[int]) -> None:
    hidden = Square(RED, lambda t: None if 20 <= t < 26 else (2, 1 + t % 10))
    video = Video([hidden, moving_square(BLUE, row=9)], noise=6.0)
    expected = batch_run(video, 40, anchor_steps, RED)
    tracker = tracker_of()
    for t in range(40):
        tracker.step(video.frame(t))
        if t == anchor_steps[-1]:
            tracker.start_over(0, decode(tracker, 0, anchor_steps), range(len(anchor_steps)))
            tracker.catch_up()
        if t >= anchor_steps[-1]:
            sighting = tracker.sighting(0)
            assert sighting is not None
            # Same numbers, summed over fixed instead of growing buffers.
            assert torch.allclose(sighting.mask_logits, expected[t - anchor_steps[-1]], atol=1e-6, rtol=0.0)
            truth = video.truth(t)
            assert np.array_equal(mask(tracker), truth)
            assert sighting.is_present == bool(truth.any())


def test_the_comparison_would_notice_one_memory_less() -> None:
    video = Video([moving_square()], noise=6.0)
    all_of_it = batch_run(video, 12, [0, 5], RED)
    less = batch_run(video, 12, [5], RED)
    assert not torch.allclose(all_of_it[-1], less[-1], atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("delay", [1, 5, 20])
def test_a_late_anchor_and_its_replay_give_what_it_gives_at_once(delay: int) -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)], noise=6.0)
    prompt_step, end = 4, 40
    at_once, late = tracker_of(), tracker_of(replay_steps=3)
    for t in range(end):
        at_once.step(video.frame(t))
        late.step(video.frame(t))
        if t == 0:  # both track something else until then
            begin(at_once, 0, 0, BLUE)
            begin(late, 0, 0, BLUE)
        if t == prompt_step:
            begin(at_once, 0, t)
        if t == prompt_step + delay:
            late.start_over(0, decode(late, 0, [prompt_step]), [0])
        late.catch_up()
    assert not late.is_replaying(0)
    one, other = at_once.sighting(0), late.sighting(0)
    assert one is not None
    assert other is not None
    assert torch.equal(one.mask_logits, other.mask_logits)
    assert same_memory(at_once.memory.read(end, [0]), late.memory.read(end, [0]))
    for t in range(prompt_step, end):  # what was believed in past frames too
        believed = [tracker.ring.belief(t, 0) for tracker in (at_once, late)]
        if late.ring.has(t):
            assert torch.equal(*believed)  # type: ignore[arg-type]


def test_the_old_track_goes_on_until_the_new_one_takes_over_in_one_frame() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)])
    tracker = tracker_of(replay_steps=2)
    for t in range(10):
        tracker.step(video.frame(t))
        if t == 0:
            begin(tracker, 0, 0)
    tracker.start_over(0, decode(tracker, 0, [2], BLUE), [0])
    shown, taken_over = [], []
    for t in range(10, 25):
        tracker.step(video.frame(t))
        taken_over.append(tracker.catch_up() == [0])
        is_red = np.array_equal(mask(tracker), video.truth(t, 0))
        assert is_red or np.array_equal(mask(tracker), video.truth(t, 1))
        shown.append("red" if is_red else "blue")
    # Eight frames behind, gaining one each: at step 10 + k the shadow has seen 4 + 2 k.
    assert shown == ["red"] * 6 + ["blue"] * 9
    assert taken_over == [False] * 6 + [True] + [False] * 8


def test_replays_that_meet_move_as_one_batch() -> None:
    stages = FakeStages()
    video = Video([moving_square(), moving_square(BLUE, row=9)])
    tracker = tracker_of(stages, replay_steps=100)
    for t in range(10):
        tracker.step(video.frame(t))
    tracker.start_over(0, decode(tracker, 0, [2], RED), [0])
    tracker.start_over(1, decode(tracker, 1, [6], BLUE), [0])
    stages.object_batches.clear()
    assert sorted(tracker.catch_up()) == [0, 1]
    assert stages.object_batches == [1, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(mask(tracker, 0), video.truth(9, 0))
    assert np.array_equal(mask(tracker, 1), video.truth(9, 1))


def test_a_replay_that_the_ring_overtakes_goes_on_with_what_is_left() -> None:
    video = Video([moving_square()])
    tracker = tracker_of(ring_steps=4, replay_steps=2)
    for t in range(4):
        tracker.step(video.frame(t))
    tracker.start_over(0, decode(tracker, 0, [0]), [0])
    for t in range(4, 12):  # nobody replays meanwhile
        tracker.step(video.frame(t))
    assert tracker.catch_up() == []
    assert tracker.catch_up() == [0]
    assert np.array_equal(mask(tracker), video.truth(11))


def test_a_hidden_object_does_not_overwrite_what_is_remembered() -> None:
    video = Video([Square(RED, lambda t: None if 8 <= t < 60 else (2, 2))])
    tracker = tracker_of()
    for t in range(70):
        tracker.step(video.frame(t))
        if t == 0:
            begin(tracker, 0, 0)
        if 8 <= t < 60:
            assert tracker.memory.recent_steps(0) == [2, 3, 4, 5, 6, 7]
            sighting = tracker.sighting(0)
            assert sighting is not None
            assert not sighting.is_present
    assert np.array_equal(mask(tracker), video.truth(69))
    assert tracker.memory.recent_steps(0) == [64, 65, 66, 67, 68, 69]


@pytest.mark.parametrize(("iou", "remembered"), [(0.5, [1]), (0.49, []), (float("nan"), [])])
def test_a_doubtful_mask_is_not_remembered(iou: float, remembered: list[int]) -> None:
    stages, video = FakeStages(), Video([moving_square()])
    tracker = tracker_of(stages)
    tracker.step(video.frame(0))
    begin(tracker, 0, 0)
    stages.iou = iou
    tracker.step(video.frame(1))
    assert tracker.memory.recent_steps(0) == remembered
    sighting = tracker.sighting(0)
    assert sighting is not None
    assert sighting.is_present
    assert sighting.is_remembered is bool(remembered)


def test_objects_are_segmented_in_one_batch_over_shared_features() -> None:
    stages, video = FakeStages(), Video([moving_square(), moving_square(BLUE, row=9)])
    tracker = tracker_of(stages)
    tracker.step(video.frame(0))
    begin(tracker, 0, 0, RED)
    begin(tracker, 2, 0, BLUE)
    stages.calls = dict.fromkeys(stages.calls, 0)
    tracker.step(video.frame(1))
    assert stages.calls == dict.fromkeys(stages.calls, 1)
    assert stages.object_batches == [2]
    assert np.array_equal(mask(tracker, 0), video.truth(1, 0))
    assert np.array_equal(mask(tracker, 2), video.truth(1, 1))
    assert tracker.sighting(1) is None


def test_nothing_to_track_costs_the_encoder_only() -> None:
    stages = FakeStages()
    tracker = tracker_of(stages)
    tracker.step(Video([moving_square()]).frame(0))
    assert stages.calls == {"image_encoder": 1, "memory_attention": 0, "mask_decoder": 0, "memory_encoder": 0}


def test_anchors_are_compared_with_what_was_believed_in_their_own_frame() -> None:
    video = Video([Square(RED, lambda t: (2, t)), moving_square(BLUE, row=9)])
    tracker = tracker_of()
    for t in range(6):
        tracker.step(video.frame(t))
        if t == 2:
            begin(tracker, 0, 2)
    assert decode(tracker, 0, [1, 4, 5]).agreement == (None, 1.0, 1.0)
    assert decode(tracker, 0, [4, 5], BLUE).agreement == (0.0, 0.0)
    assert decode(tracker, 0, [5], COLOURS["green"]).is_present == (False,)
    assert decode(tracker, 1, [5]).agreement == (None,)  # of another object nothing was believed


def test_a_prompt_whose_frame_is_gone_is_not_used() -> None:
    video = Video([moving_square()])
    tracker = tracker_of(ring_steps=4)
    tracker.step(video.frame(0))
    old = prompt(tracker.step(video.frame(1)).features, RED)
    tracker.pin(0, [1])
    for t in range(2, 10):
        newest = prompt(tracker.step(video.frame(t)).features, RED)
    anchors = tracker.decode_anchors(0, [0, 1, 9], torch.cat((old, old, newest)))
    assert anchors is not None
    assert anchors.steps == (1, 9)
    assert anchors.is_cached == (False, True)
    assert anchors.is_present == (True, True)
    assert tracker.decode_anchors(1, [0, 1], torch.cat((old, old))) is None  # pinned for slot 0 only


def test_an_anchor_on_a_pinned_frame_is_compared_with_what_was_believed_there() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)])
    tracker = tracker_of(ring_steps=4)
    tracker.step(video.frame(0))
    begin(tracker, 0, 0)
    tracker.step(video.frame(1))
    prompts = {colour: prompt(tracker.ring.gather([1], 0), colour) for colour in (RED, BLUE)}
    tracker.pin(0, [1])
    for t in range(2, 10):
        tracker.step(video.frame(t))
    for colour, agreement in ((RED, 1.0), (BLUE, 0.0)):
        anchors = tracker.decode_anchors(0, [1], prompts[colour])
        assert anchors is not None
        assert (anchors.is_cached, anchors.agreement) == ((False,), (agreement,))


def test_a_mask_that_is_not_remembered_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    stages, video = FakeStages(), Video([moving_square()])
    tracker = tracker_of(stages)
    tracker.step(video.frame(0))
    begin(tracker, 0, 0)
    with caplog.at_level("DEBUG"):
        tracker.step(video.frame(1))
        assert caplog.messages == []
        stages.iou = 0.4
        tracker.step(video.frame(2))
    assert caplog.messages == ["slot 0, step 2: predicted IoU 0.40 is below memory.min_write_iou 0.50, not remembered"]


def test_an_object_known_by_a_pinned_anchor_only_is_found_without_replay() -> None:
    video = Video([moving_square()])
    tracker = tracker_of(ring_steps=4)
    old = prompt(tracker.step(video.frame(0)).features, RED)
    tracker.pin(0, [0])
    for t in range(1, 9):
        tracker.step(video.frame(t))
    anchors = tracker.decode_anchors(0, [0], old)
    assert anchors is not None
    tracker.jump(0, anchors, 0)
    assert tracker.sighting(0) is None
    tracker.step(video.frame(9))
    assert np.array_equal(mask(tracker), video.truth(9))


@pytest.mark.parametrize("image", [np.zeros((0, 3, 3), np.uint8)])
def test_a_bad_frame_changes_nothing(image: np.ndarray) -> None:
    video, tracker = Video([moving_square()]), tracker_of()
    tracker.step(video.frame(0))
    begin(tracker, 0, 0)
    with pytest.raises(BadFrame):
        tracker.step(Frame(image, 5))
    assert tracker.step(video.frame(1)).step == 1
    assert np.array_equal(mask(tracker), video.truth(1))


def test_forgetting_one_object_leaves_the_others() -> None:
    video, tracker = Video([moving_square(), moving_square(BLUE, row=9)]), tracker_of()
    for t in range(3):
        tracker.step(video.frame(t))
    begin(tracker, 0, 0)
    begin(tracker, 1, 0, BLUE)
    tracker.start_over(0, decode(tracker, 0, [0]), [0])
    tracker.forget(0)
    assert not tracker.is_replaying(0)
    tracker.step(video.frame(3))
    assert tracker.sighting(0) is None
    assert np.array_equal(mask(tracker, 1), video.truth(3, 1))


def test_a_restart_forgets_all_but_the_count_of_steps() -> None:
    video, tracker = Video([moving_square()]), tracker_of()
    tracker.step(video.frame(0))
    begin(tracker, 0, 0)
    tracker.restart()
    assert tracker.step(video.frame(0)).step == 1
    assert tracker.sighting(0) is None
    assert not tracker.ring.has(0)


@pytest.mark.parametrize(
    ("slots", "compiled", "warmed"),
    [
        (3, True, [1, 3]),
        (8, True, [1, 4, 8]),
        (12, True, [1, 4, 8, 12]),
        (27, True, [1, 4, 8, 16, 24, 27]),
        (27, False, [1, 4, 8, 27]),
    ],
)
def test_warming_up_meets_every_number_of_objects_that_code_is_compiled_for(
    slots: int, compiled: bool, warmed: list[int]
) -> None:
    class Counting(FakeStages):
        takes_fewer_memories = not compiled

        def memory_attention(
            self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
        ) -> torch.Tensor:
            self.object_batches.append(len(memory.spatial))
            return torch.zeros(len(memory.spatial), SIZES.channels, self.sizes.grid, self.sizes.grid)

    stages = Counting()
    warm_up([tracker_of(stages, max_objects=slots)])
    assert stages.object_batches == warmed
    buckets = {object_bucket(objects) for objects in range(1, slots + 1)}
    assert not compiled or buckets == {object_bucket(objects) for objects in warmed}
