# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from virst_engine.fast.feature_ring import NO_STEP, FeatureRing
from virst_engine.types import ImageFeatures


def features(value: float) -> ImageFeatures:
    return ImageFeatures(*(torch.full((1, 2, side, side), value) for side in (2, 8, 4, 4)))


@pytest.fixture
def ring() -> FeatureRing:
    """Holds steps 2..5 of 0..5."""
    ring = FeatureRing(capacity=4, slots=2, owners=2, mask_side=3, pins=2)
    for step in range(6):
        ring.push(step, 100 * step, features(float(step)))
    return ring


def test_the_newest_frames_are_there_and_older_ones_are_not(ring: FeatureRing) -> None:
    assert [ring.has(step) for step in range(7)] == [False, False, True, True, True, True, False]
    assert ring.oldest_step() == 2
    assert ring.stamp_ns(3) == 300
    assert ring.stamp_ns(1) is None
    assert ring.features(1) is None
    kept = ring.features(5)
    assert kept is not None
    assert float(kept.high_res_s1.mean()) == 5.0
    assert kept.fusion.numel() == 0  # most of the bytes, and nobody reads it from here
    assert not ring.has(NO_STEP)


def test_several_frames_are_gathered_in_order_as_a_copy(ring: FeatureRing) -> None:
    both = ring.gather([5, 2], owner=0)
    ring.push(6, 600, features(6.0))
    assert both.top[:, 0, 0, 0].tolist() == [5.0, 2.0]
    with pytest.raises(KeyError):
        ring.gather([2], owner=0)


def push_more(ring: FeatureRing, first: int, last: int) -> None:
    for step in range(first, last):
        ring.push(step, 100 * step, features(float(step)))


def test_pinned_frames_outlive_the_ring_for_their_owner(ring: FeatureRing) -> None:
    ring.pin(0, [2, 3])
    push_more(ring, 6, 20)
    assert ring.has_pinned(0, 2)
    assert ring.has_pinned(0, 3)
    assert not ring.has_pinned(1, 3)
    assert not ring.has(3)
    assert ring.oldest_step() == 16
    assert ring.gather([2, 3, 19], owner=0).top[:, 0, 0, 0].tolist() == [2.0, 3.0, 19.0]
    with pytest.raises(KeyError):
        ring.gather([3], owner=1)
    ring.release_pins(0)
    assert not ring.has_pinned(0, 3)


def test_new_pins_replace_old_ones_but_may_repeat_them(ring: FeatureRing) -> None:
    ring.pin(0, [2, 3])
    push_more(ring, 6, 12)
    ring.pin(0, [3, 9])
    ring.pin(0, [3, 9])
    push_more(ring, 12, 20)
    assert [ring.has_pinned(0, step) for step in (2, 3, 9)] == [False, True, True]
    assert ring.gather([3, 9], owner=0).top[:, 0, 0, 0].tolist() == [3.0, 9.0]
    ring.pin(0, [0, 17, 18, 19])  # 0 is gone, and three are one too many
    assert [ring.has_pinned(0, step) for step in (0, 9, 17, 18, 19)] == [False, False, False, True, True]
    ring.pin(0, [1])
    assert not any(ring.has_pinned(0, step) for step in range(20))


def test_what_is_believed_of_a_pinned_frame_outlives_the_ring_and_may_change(ring: FeatureRing) -> None:
    mask, other = torch.eye(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    ring.believe(3, 0, mask)
    ring.pin(1, [3])
    ring.believe(3, 1, other)  # a shadow passes there after it was pinned
    push_more(ring, 6, 20)
    assert torch.equal(ring.belief(3, 0), mask)  # type: ignore[arg-type]
    assert torch.equal(ring.belief(3, 1), other)  # type: ignore[arg-type]
    ring.copy_slot(1, 0)
    assert torch.equal(ring.belief(3, 0), other)  # type: ignore[arg-type]
    ring.forget(0)
    assert ring.belief(3, 0) is None
    ring.release_pins(1)
    assert ring.belief(3, 1) is None


def test_beliefs_are_per_frame_and_slot(ring: FeatureRing) -> None:
    mask = torch.eye(3, dtype=torch.bool)
    ring.believe(3, 0, mask)
    ring.believe(0, 0, mask)  # gone: ignored
    believed = ring.belief(3, 0)
    assert believed is not None
    assert torch.equal(believed, mask)
    assert ring.belief(3, 1) is None
    assert ring.belief(4, 0) is None
    assert ring.belief(0, 0) is None
    ring.copy_slot(0, 1)
    ring.forget(0)
    assert ring.belief(3, 0) is None
    assert ring.belief(3, 1) is not None
    ring.push(7, 700, features(7.0))  # takes the row of step 3
    assert ring.belief(3, 1) is None
    assert ring.belief(7, 1) is None


def test_a_cleared_ring_holds_nothing(ring: FeatureRing) -> None:
    ring.pin(1, [4])
    ring.clear()
    assert ring.oldest_step() == NO_STEP
    assert not ring.has(5)
    assert not ring.has_pinned(1, 4)


def test_what_is_cached_follows_the_size_of_the_input() -> None:
    ring = FeatureRing(capacity=4, slots=2, owners=2, mask_side=8, pins=2)
    for step in range(6):
        ring.push(step, 100 * step, features(float(step)), (480, 640))
    ring.pin(1, [3])
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :2] = True
    ring.believe(3, 1, mask)
    ring.resize(4)
    assert ring.image_size(4) == (480, 640)
    small = ring.features(4)
    assert small is not None
    assert (small.top.shape[-1], small.high_res_s0.shape[-1], small.high_res_s1.shape[-1]) == (1, 4, 2)
    assert ring.gather([3, 5], owner=1).top[:, 0, 0, 0].tolist() == [3.0, 5.0]
    believed = ring.belief(3, 1)
    assert believed is not None
    assert torch.equal(believed, mask[::2, ::2])
    assert ring.belief(3, 0) is None

    ring.push(6, 600, ImageFeatures(*(torch.full((1, 2, side, side), 6.0) for side in (1, 4, 2, 2))))
    ring.resize(8)
    large = ring.features(6)
    assert large is not None
    assert large.high_res_s0.shape == (1, 2, 8, 8)
    assert float(large.high_res_s0.mean()) == 6.0
    believed = ring.belief(3, 1)
    assert believed is not None
    assert torch.equal(believed, mask)


def test_an_empty_ring_can_change_its_size() -> None:
    ring = FeatureRing(capacity=4, slots=2, owners=2, mask_side=8)
    ring.resize(4)
    ring.push(0, 0, ImageFeatures(*(torch.full((1, 2, side, side), 1.0) for side in (1, 4, 2, 2))))
    ring.believe(0, 0, torch.ones(4, 4, dtype=torch.bool))
    ring.resize(8)
    kept = ring.features(0)
    assert kept is not None
    assert kept.top.shape[-1] == 2
