# SPDX-License-Identifier: Apache-2.0
"""The policy alone: masks in, decisions out."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virst_engine.fast.instances import DUPLICATE_STEPS, LONGER, SPILT_STEPS, Changes, Instances, Mask, components

SIDE, CONFIRM = 40, 4


def box(top: int, left: int, height: int = 8, width: int = 8) -> Mask:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + height, left : left + width] = True
    return mask


LEFT, RIGHT, LOW = box(4, 2), box(4, 24), box(28, 12)
NOTHING = np.zeros((SIDE, SIDE), bool)


def two() -> Instances:
    """Number 1 is on the left, number 2 on the right."""
    policy = Instances(CONFIRM)
    policy.add(1, LEFT)
    policy.add(2, RIGHT)
    return policy


def watch(policy: Instances, frames: int, union: Mask | None, *seen: Mask | None) -> list[Changes]:
    masks = dict(zip(policy.numbers, seen, strict=True))
    return [policy.watch(union, masks) for _ in range(frames)]


def same(mask: Mask | None, other: Mask | None) -> bool:
    return mask is other if mask is None or other is None else np.array_equal(mask, other)


def begun(changes: Sequence[Changes]) -> list[int]:
    return [len(each.begin) for each in changes]


def test_parts_that_are_seen_apart_for_some_frames_are_instances_largest_first() -> None:
    policy = Instances(CONFIRM)
    small = box(28, 12, 4, 6)
    changes = watch(policy, CONFIRM, small | RIGHT)
    assert begun(changes) == [0] * (CONFIRM - 1) + [2]
    assert same(changes[-1].begin[0], RIGHT)
    assert same(changes[-1].begin[1], small)


def test_specks_are_no_instances() -> None:
    policy = Instances(CONFIRM)
    assert sum(begun(watch(policy, CONFIRM, LEFT | box(30, 30, 1, 2)))) == 1
    assert components(NOTHING) == []


def test_a_part_that_flickers_needs_to_be_there_for_long_enough_and_one_that_stays_away_begins_anew() -> None:
    policy = Instances(CONFIRM)
    seen = [LEFT, LEFT, NOTHING, LEFT, NOTHING, LEFT]
    assert begun([policy.watch(union, {}) for union in seen]) == [0, 0, 0, 0, 0, 1]
    policy = Instances(CONFIRM)
    assert begun([policy.watch(union, {}) for union in [LEFT, LEFT, LEFT, *[NOTHING] * 3, LEFT, LEFT, LEFT]]) == [0] * 9


def test_nothing_begins_while_the_union_is_not_sure() -> None:
    policy = two()
    for changes in watch(policy, 20, None, LEFT, RIGHT):
        assert same(changes.shown[1], LEFT)
        assert changes.begin == []


def test_what_touches_an_instance_is_not_a_new_one_until_it_is_apart() -> None:
    policy = Instances(CONFIRM)
    policy.add(1, LEFT)
    assert sum(begun(watch(policy, 20, LEFT | box(4, 10), LEFT))) == 0
    assert sum(begun(watch(policy, CONFIRM, LEFT | RIGHT, LEFT))) == 1


def test_two_that_touch_stay_two_though_each_memory_takes_both_for_its_own() -> None:
    policy, both = two(), box(4, 10) | box(4, 18)
    left, right = box(4, 10), box(4, 18)
    watch(policy, 1, left | right, left, right)
    for changes in watch(policy, SPILT_STEPS, both, both, both):
        assert same(changes.shown[1], left)
        assert same(changes.shown[2], right)
        assert changes.drop == changes.begin == []
    assert same(changes.move[1], left)
    assert same(changes.move[2], right)


def test_a_memory_that_finds_its_twin_while_it_is_hidden_shows_nothing_and_is_told_when_its_own_comes_back() -> None:
    policy = two()
    hidden = watch(policy, 30, RIGHT, RIGHT, RIGHT)
    assert all(changes.shown[1] is None and same(changes.shown[2], RIGHT) for changes in hidden)
    assert [changes.purge for changes in hidden[:3]] == [[], [], [1]]
    assert all(changes.drop == changes.begin == [] for changes in hidden)
    back = watch(policy, CONFIRM, RIGHT | LOW, RIGHT, RIGHT)
    assert same(back[-1].move[1], LOW)
    assert same(back[-1].shown[1], LOW)
    assert sum(begun(back)) == 0


def test_a_part_waits_longer_while_an_instance_is_hidden_that_its_memory_may_find_there() -> None:
    policy = two()
    watch(policy, 5, RIGHT, None, RIGHT)
    waiting = watch(policy, LONGER * CONFIRM - 1, RIGHT | LOW, None, RIGHT)
    assert sum(begun(waiting)) == 0
    found = policy.watch(RIGHT | LOW, {1: LOW, 2: RIGHT})
    assert same(found.shown[1], LOW)
    assert found.begin == []
    watch(policy, 5, RIGHT, None, RIGHT)
    assert sum(begun(watch(policy, LONGER * CONFIRM, RIGHT | LEFT, None, RIGHT))) == 1


def test_an_instance_that_was_two_things_is_told_which_it_is_when_they_have_parted() -> None:
    policy = Instances(CONFIRM)
    policy.add(1, LEFT | box(4, 10))
    apart = LEFT | box(4, 20, 6, 8)
    changes = watch(policy, LONGER * CONFIRM, apart, apart)
    assert all(not each.move for each in changes[:-1])
    assert same(changes[-1].move[1], LEFT)


def test_two_ids_of_one_thing_become_one_and_the_older_stays() -> None:
    policy = Instances(CONFIRM)
    policy.add(1, box(4, 2, 8, 6))
    policy.add(2, box(4, 8, 8, 6))
    whole = box(4, 2, 8, 12)
    changes = watch(policy, DUPLICATE_STEPS, whole, whole, whole)
    assert [each.drop for each in changes] == [[]] * (DUPLICATE_STEPS - 1) + [[2]]


def test_what_the_union_does_not_mean_any_more_is_hidden_and_comes_back_with_it() -> None:
    policy = two()
    changes = watch(policy, LONGER * CONFIRM + 1, RIGHT, LEFT, RIGHT)
    assert same(changes[0].shown[1], LEFT)
    assert changes[-1].shown[1] is None
    assert same(watch(policy, 1, LEFT | RIGHT, LEFT, RIGHT)[0].shown[1], LEFT)


def test_another_union_takes_away_what_is_not_in_it_and_what_cannot_be_told() -> None:
    policy = two()
    policy.add(3, LOW)
    watch(policy, 1, LEFT | RIGHT, LEFT, RIGHT, None)
    assert policy.retain(LEFT | LOW) == [2, 3]
    assert policy.numbers == [1]


masks = st.builds(box, st.integers(0, 36), st.integers(0, 36), st.integers(1, 20), st.integers(1, 20))
unions = st.lists(masks, max_size=4).map(lambda parts: np.logical_or.reduce([NOTHING, *parts]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.none() | unions, st.lists(st.none() | unions, min_size=6, max_size=6)), max_size=25))
def test_whatever_is_seen(frames: list[tuple[Mask | None, list[Mask | None]]]) -> None:
    """No pixel is shown twice or without a memory, and nothing begins on an instance."""
    policy, last = Instances(1), 0
    for union, seen in frames:
        sightings = dict(zip(policy.numbers, seen, strict=False))
        changes = policy.watch(union, sightings)
        assert changes.shown.keys() == set(policy.numbers)
        shown = {number: mask for number, mask in changes.shown.items() if mask is not None}
        assert all(mask.any() for mask in shown.values())
        claims = sum((mask.astype(int) for mask in shown.values()), np.zeros((SIDE, SIDE), int))
        assert claims.max() <= 1
        for number, mask in shown.items():
            origin = sightings.get(number)
            assert number in changes.move or (origin is not None and not (mask & ~origin).any())
        for begin in changes.begin:
            assert union is not None
            assert not (begin & ~union).any()
            assert begin.any()
            assert not claims[begin].any()
        for number in set(changes.drop):
            policy.remove(number)
        for begin in changes.begin:
            if len(policy.numbers) < 6:
                last += 1
                policy.add(last, begin)


@pytest.mark.parametrize("height", [1, 3, 8])
def test_holes_are_fine(height: int) -> None:
    ring = box(10, 10, 12, 12) & ~box(12, 12, height, 8)
    assert len(components(ring)) == 1
