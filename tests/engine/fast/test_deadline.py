# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virst_engine.fast.deadline import (
    FAILED_WITHIN_FRAMES,
    FIRST_FRAMES,
    FORGOTTEN_AFTER_STEPS,
    LATE_FRAMES,
    MARGIN,
    RETURN_AFTER_FRAMES,
    SETTLING_FRAMES,
    STEADY_FRAMES,
    Deadline,
    Level,
    levels,
    smaller_sizes,
)

DEADLINE_S = 0.05
ALL = levels(128, fewer_memories=True, smaller=[96])  # nothing, memories, input, every 2nd, 3rd, 4th


def run(
    policy: Deadline,
    step_s: Callable[[int, Level], float],
    frames: int,
    *,
    deadline_s: float = DEADLINE_S,
    first: int = 0,
    waited: bool = True,
    may_skip: bool = True,
) -> list[int]:
    """The level of each frame; `step_s` tells how long frame t takes at a level."""
    numbers = []
    for t in range(first, first + frames):
        numbers.append(policy.number)
        policy.note(step_s(t, policy.level), deadline_s, t, waited=waited, may_skip=may_skip)
    return numbers


def changes(numbers: list[int]) -> list[int]:
    return [t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1]]


def machine(*costs_s: float) -> Callable[[int, Level], float]:
    """A step's time at each of the levels of `ALL`, skipping excepted: that makes no step shorter."""

    def step_s(t: int, level: Level) -> float:
        return costs_s[(level.recall is not None) + (level.image_size != 0)]

    return step_s


def test_levels_leave_out_ever_more() -> None:
    assert [level.takes_every for level in ALL] == [1, 1, 1, 2, 3, 4]
    assert [level.image_size for level in ALL] == [0, 0, 96, 96, 96, 96]
    assert [level.recall is not None for level in ALL] == [False, True, True, True, True, True]
    assert ALL[0].words == ""
    assert ALL[3].words == "remembers fewer frames, sees images of 96 px instead of 128, takes one frame of 2"


def test_what_a_backend_cannot_leave_out_is_passed_over() -> None:
    assert [level.takes_every for level in levels(128, fewer_memories=False, smaller=[])] == [1, 2, 3, 4]
    assert all(level.recall is None for level in levels(128, fewer_memories=False, smaller=[96]))
    assert all(level.image_size == 0 for level in levels(128, fewer_memories=True, smaller=[]))


@pytest.mark.parametrize(("own", "expected"), [(1024, [768, 512]), (512, [384, 256]), (128, [96]), (96, []), (32, [])])
def test_smaller_inputs_fill_the_grid(own: int, expected: list[int]) -> None:
    assert smaller_sizes(own) == expected


def test_late_frames_degrade_and_the_words_say_why() -> None:
    policy = Deadline(ALL)
    numbers = run(policy, machine(0.085, 0.045, 0.03), 100)
    assert changes(numbers) == [FIRST_FRAMES + LATE_FRAMES]
    assert policy.number == 1
    step = FIRST_FRAMES + LATE_FRAMES - 1
    assert policy.words == f"frames take 85 ms, tracking.deadline_ms is 50: remembers fewer frames since step {step}"


def test_frames_on_time_change_nothing() -> None:
    policy = Deadline(ALL)
    assert set(run(policy, machine(0.049, 0.04, 0.03), 1000)) == {0}
    assert policy.words == ""


def test_without_a_deadline_nothing_is_ever_left_out() -> None:
    policy = Deadline(ALL)
    assert set(run(policy, machine(9.0, 9.0, 9.0), 200, deadline_s=0.0)) == {0}


def test_a_deadline_that_is_taken_away_brings_everything_back_at_once() -> None:
    policy = Deadline(ALL)
    run(policy, machine(0.2, 0.2, 0.2), 100)
    assert policy.number
    assert policy.note(0.2, 0.0, 100)
    assert policy.number == 0
    assert policy.words == ""
    assert not policy.note(0.2, 0.0, 101)


def test_slow_first_frames_do_not_count() -> None:
    policy = Deadline(ALL)
    assert set(run(policy, lambda t, level: 3.0 if t < FIRST_FRAMES else 0.04, 200)) == {0}


def test_skipping_counts_per_frame_of_the_camera() -> None:
    policy = Deadline(ALL)
    run(policy, machine(0.12, 0.12, 0.12), 400)
    assert policy.level.takes_every == 3  # 40 ms for each frame of the camera
    assert "frames take 120 ms" in policy.words


def test_nobody_who_does_not_ask_is_counted_on_to_skip() -> None:
    policy = Deadline(ALL)
    run(policy, machine(0.12, 0.12, 0.12), 400, may_skip=False)
    assert policy.level.takes_every == 1
    assert policy.words.endswith("there is no more to leave out")


def test_frames_that_do_not_wait_for_each_other_are_not_skipped() -> None:
    policy = Deadline(ALL)
    run(policy, machine(0.12, 0.12, 0.12), 400, waited=False)
    assert policy.level.takes_every == 1


def test_frames_are_skipped_where_most_of_them_wait() -> None:
    for waits, every in ((lambda t: t % 4 > 0, 3), (lambda t: t % 4 == 0, 1)):
        policy = Deadline(ALL)
        for t in range(400):
            policy.note(0.12, DEADLINE_S, t, waited=waits(t), may_skip=True)
        assert policy.level.takes_every == every


LEFT, RIGHT = ("left",), ("right",)
BOTH = LEFT + RIGHT


def run_cameras(
    policy: Deadline, step_s: Callable[[int, Level], float], cameras: Callable[[int], tuple[str, ...]], steps: range
) -> list[int]:
    """The level of each step; one with two frames takes 1.5 times as long as one with one frame."""
    numbers = []
    for t in steps:
        numbers.append(policy.number)
        seen = cameras(t)
        times = (1 + len(seen)) / 2
        policy.note(step_s(t, policy.level) * times, DEADLINE_S, t, cameras=seen, may_skip=True)
    return numbers


@pytest.mark.parametrize("phase_steps", [1, 4, 15, 100, 400])
def test_cameras_in_and_out_of_step_do_not_make_the_level_flip(phase_steps: int) -> None:
    """One frame is in time at each level, two are late at the first: 40 and 60 ms; then 31 and 46.5."""
    policy = Deadline(ALL)
    in_turn: Callable[[int], tuple[str, ...]] = lambda t: BOTH if t // phase_steps % 2 else (LEFT, RIGHT)[t % 2]  # noqa: E731
    numbers = run_cameras(policy, machine(0.04, 0.031, 0.02), in_turn, range(2000))
    assert len(changes(numbers)) == 1
    assert policy.number == 1


def test_two_frames_in_a_step_now_and_then_are_not_late() -> None:
    policy = Deadline(ALL)
    steps = run_cameras(policy, machine(0.04, 0.03, 0.02), lambda t: LEFT if t % 12 else BOTH, range(2000))
    assert set(steps) == {0}


def test_a_camera_that_stops_is_forgotten_and_its_load_with_it() -> None:
    policy = Deadline(ALL)
    costs = machine(0.04, 0.028, 0.02)
    run_cameras(policy, costs, lambda t: BOTH, range(100))
    assert policy.number == 1
    numbers = run_cameras(policy, costs, lambda t: LEFT, range(100, 100 + FORGOTTEN_AFTER_STEPS + 100))
    assert policy.number == 0
    assert len(changes(numbers)) == 1


def test_a_saving_is_that_of_steps_of_as_many_frames() -> None:
    """Two cameras until it is late, one from then on: what is saved at the level is not what the camera had taken."""
    policy = Deadline(ALL[:2])
    costs = machine(0.04, 0.036, 0.036)
    run_cameras(policy, costs, lambda t: BOTH, range(FIRST_FRAMES + LATE_FRAMES))
    assert policy.number == 1
    run_cameras(policy, costs, lambda t: LEFT, range(100, 100 + SETTLING_FRAMES + RETURN_AFTER_FRAMES))
    assert policy.number == 0  # not 54 ms / 36 ms times as slow


def test_skipping_counts_the_steps_of_other_cameras() -> None:
    """60 ms for each of two cameras that are never in one step: of three frames one, not of two."""
    skips = levels(128, fewer_memories=False, smaller=[])
    for cameras, every in ((lambda t: (LEFT, RIGHT)[t % 2], 3), (lambda t: LEFT, 2)):
        policy = Deadline(skips)
        run_cameras(policy, machine(0.06, 0.06, 0.06), cameras, range(400))
        assert policy.level.takes_every == every
        assert "frames take 60 ms" in policy.words


def test_the_end_of_what_can_be_left_out_is_said_once_and_taken_back() -> None:
    policy = Deadline(levels(128, fewer_memories=False, smaller=[]))
    said = [policy.note(0.12, DEADLINE_S, t) for t in range(100)]
    assert sum(said) == 1
    assert policy.words == "frames take 120 ms, tracking.deadline_ms is 50: there is no more to leave out"
    said = [policy.note(0.03, DEADLINE_S, t) for t in range(100)]
    assert sum(said) == 1
    assert policy.words == ""


def test_comes_back_when_the_load_is_gone() -> None:
    policy = Deadline(ALL)
    busy = machine(0.1, 0.08, 0.06)
    numbers = run(policy, busy, 200)
    assert max(numbers) == 3
    numbers = run(policy, machine(0.03, 0.025, 0.02), 400, first=200)
    assert policy.number == 0
    assert policy.words == ""
    down = changes(numbers)
    assert all(later - earlier >= RETURN_AFTER_FRAMES for earlier, later in pairwise(down))


def test_stays_where_the_better_level_would_be_late() -> None:
    policy = Deadline(ALL)
    numbers = run(policy, machine(0.06, 0.044, 0.03), 1500)
    assert changes(numbers) == [FIRST_FRAMES + LATE_FRAMES]


def test_a_saving_that_was_measured_wrong_does_not_hold_for_ever() -> None:
    """The load goes while the level changes: the level looks ten times as cheap as it is."""
    policy = Deadline(ALL)
    step_s: Callable[[int, Level], float] = lambda t, level: 0.3 if t < FIRST_FRAMES + LATE_FRAMES else 0.03  # noqa: E731
    numbers = run(policy, step_s, 1500)
    assert max(numbers) == 1
    assert numbers[-1] == 0


def test_a_try_that_fails_is_repeated_ever_later() -> None:
    """The saving is hidden: everything looks equal right after a change, so that each prediction is wrong."""
    policy = Deadline(ALL[:2])
    since = {"change": 0, "level": 0}

    def step_s(t: int, level: Level) -> float:
        number = int(level.recall is not None)
        if number != since["level"]:
            since.update(change=t, level=number)
        if number:
            return 0.05 if t - since["change"] < SETTLING_FRAMES + LATE_FRAMES else 0.04
        return 0.055

    tries = changes(run(policy, step_s, 4000))[1::2]
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert len(pauses) >= 4
    assert pauses[0] < pauses[1] == pauses[2]


@given(
    st.floats(0.01, 0.5),
    st.tuples(st.floats(0.45, 1.0), st.floats(0.4, 1.0)),
    st.lists(st.floats(0.97, 1.03), min_size=7, max_size=7),
)
@settings(max_examples=40, deadline=None)
def test_does_not_oscillate_on_a_steady_machine(full_s: float, parts: tuple[float, float], noise: list[float]) -> None:
    steady = machine(full_s, full_s * parts[0], full_s * parts[0] * parts[1])
    policy = Deadline(ALL)
    numbers = run(policy, lambda t, level: steady(t, level) * noise[t % len(noise)], 2000)
    settled = numbers[len(ALL) * (FIRST_FRAMES + LATE_FRAMES) :]
    # Down at once; then, as estimates of savings grow old, a try of a better level now and then.
    assert len(changes(settled)) <= 4
    on_time = [n for n, level in enumerate(ALL) if steady(0, level) / level.takes_every <= 0.95 * DEADLINE_S]
    late = [n for n in settled if steady(0, ALL[n]) / ALL[n].takes_every > 1.03 * DEADLINE_S]
    if on_time:
        assert len(late) <= 4 * (LATE_FRAMES + SETTLING_FRAMES)
    assert max(numbers) <= min(on_time, default=len(ALL) - 1)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_few_slow_frames_never_degrade(data: st.DataObject) -> None:
    """However slow: as long as fewer than half of any LATE_FRAMES are."""
    policy = Deadline(ALL)
    late: list[bool] = []
    for t in range(200):
        may_be_late = sum(late[-(LATE_FRAMES - 1) :]) < LATE_FRAMES // 2
        is_late = may_be_late and data.draw(st.booleans())
        late.append(is_late)
        policy.note(data.draw(st.floats(0.06, 100.0)) if is_late else 0.03, DEADLINE_S, t, may_skip=True)
        # Half of them may be late: the median is between a slow one and one in time.
        if sum(late[-LATE_FRAMES:]) * 2 < LATE_FRAMES:
            assert policy.number == 0 or any(sum(late[i : i + LATE_FRAMES]) * 2 >= LATE_FRAMES for i in range(t + 1))


@given(st.lists(st.floats(0.0, 10.0), min_size=0, max_size=400), st.floats(0.001, 1.0), st.booleans())
@settings(max_examples=100, deadline=None)
def test_goes_one_level_at_a_time_and_not_too_soon(times_s: list[float], deadline_s: float, may_skip: bool) -> None:
    policy = Deadline(ALL)
    last_change, before = -1, 0
    for t, step_s in enumerate(times_s):
        told = policy.note(step_s, deadline_s, t, may_skip=may_skip)
        moved = policy.number - before
        assert abs(moved) <= 1
        if moved:
            assert told
            least = RETURN_AFTER_FRAMES if moved < 0 else LATE_FRAMES
            assert t - last_change >= least
            last_change, before = t, policy.number
        assert bool(policy.words) or policy.number == 0
    assert FAILED_WITHIN_FRAMES > RETURN_AFTER_FRAMES > STEADY_FRAMES
    assert 0 < MARGIN < 1
