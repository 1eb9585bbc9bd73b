# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virst_engine.slow.frame_window import FrameWindow, choose_frames


def window_of(
    stamps_s: list[float], clip_frames: int = 4, spacing_s: float = 0.3, *, on_grid: bool = False
) -> FrameWindow:
    window = FrameWindow(clip_frames, spacing_s, on_grid=on_grid)
    for step, stamp_s in enumerate(stamps_s):
        frame = np.full((2, 2, 3), step % 256, np.uint8)
        window.push(step, round(stamp_s * 1e9), frame, np.full((1, 2, 2), step, np.float32))
    return window


def test_frames_are_spaced_by_their_stamps_and_end_in_the_newest() -> None:
    clip = window_of([0.1 * i for i in range(20)]).clip()
    assert clip.steps.tolist() == [10, 13, 16, 19]
    assert clip.stamps_ns.tolist() == [1_000_000_000, 1_300_000_000, 1_600_000_000, 1_900_000_000]
    assert clip.frames_rgb_u8[:, 0, 0, 0].tolist() == [10, 13, 16, 19]
    assert clip.fusion.dtype == np.float16
    assert clip.fusion[:, 0, 0, 0].tolist() == [10.0, 13.0, 16.0, 19.0]


def test_a_short_window_repeats_its_oldest_frame_at_the_front() -> None:
    window = window_of([0.1 * i for i in range(6)])
    clip = window.clip()
    assert clip.steps.tolist() == [0, 0, 2, 5]
    assert not window.is_full(clip)
    assert window_of([0.0]).clip().steps.tolist() == [0, 0, 0, 0]
    full = window_of([0.1 * i for i in range(10)])
    assert full.clip().steps.tolist() == [0, 3, 6, 9]
    assert full.is_full(full.clip())


def test_a_pause_starts_the_window_anew() -> None:
    before = [5.65 + 0.1 * i for i in range(4)]
    window = window_of([*before, 601.0])
    assert window.clip().steps.tolist() == [4, 4, 4, 4]
    assert not window.is_full(window.clip())
    window = window_of([*before, *(601.0 + 0.1 * i for i in range(10))])
    assert window.clip().steps.tolist() == [4, 7, 10, 13]
    assert window.is_full(window.clip())


def test_a_window_with_a_short_pause_is_kept_but_not_full() -> None:
    window = window_of([5.0, 5.15, 5.3, 7.0])  # 1.7 s is less than twice the 0.9 s of a clip
    assert window.clip().steps.tolist() == [0, 1, 2, 3]
    assert not window.is_full(window.clip())


def test_a_window_that_is_nearly_long_enough_is_not_full() -> None:
    assert not (window := window_of([0.0, 0.2, 0.4, 0.7])).is_full(window.clip())
    assert (window := window_of([0.0, 0.25, 0.5, 0.8])).is_full(window.clip())
    assert (window := window_of([0.0, 1.0, 50.0, 51.0], spacing_s=0.0)).is_full(
        window.clip()
    )  # without spacing, time says nothing


def test_a_slow_camera_gives_different_frames() -> None:
    assert window_of([0.0, 1.0, 2.0, 3.0, 4.0]).clip().steps.tolist() == [1, 2, 3, 4]


def test_irregular_stamps_give_the_nearest_frames() -> None:
    # 1.0, 0.7, 0.4 and 0.1 are wanted
    assert choose_frames([0, 80, 390, 420, 650, 760, 1000], 4, 300) == [1, 2, 4, 6]


def test_without_spacing_the_newest_frames_are_taken() -> None:
    assert window_of([0.1 * i for i in range(9)], 3, 0.0).clip().steps.tolist() == [6, 7, 8]


def test_one_frame_is_the_newest() -> None:
    assert window_of([0.1 * i for i in range(9)], 1).clip().steps.tolist() == [8]


@pytest.mark.parametrize("rate_hz", [5.0, 10.0, 20.0, 30.0, 60.0, 240.0])
def test_the_store_is_bounded_and_spans_the_clip_at_any_rate(rate_hz: float) -> None:
    window = window_of([i / rate_hz for i in range(round(8 * rate_hz))], 8, 0.3)
    clip = window.clip()
    assert len(window) <= 7 * 8 + 2
    wanted_s = clip.stamps_ns[-1] / 1e9 - 0.3 * np.arange(7, -1, -1)
    assert np.abs(clip.stamps_ns / 1e9 - wanted_s).max() <= 0.3 / 8 + 0.5 / rate_hz
    assert window.is_full(clip)


def test_a_clip_is_a_copy_and_clear_forgets() -> None:
    window = window_of([0.0])
    clip = window.clip()
    window.clear("left")
    assert len(window) == 0
    with pytest.raises(ValueError, match="no frame"):
        window.clip()
    window.push(9, 0, np.full((2, 2, 3), 9, np.uint8), np.full((1, 2, 2), 9.0, np.float32))
    assert clip.frames_rgb_u8.max() == 0
    assert window.clip().camera == "left"


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=60), st.integers(1, 10), st.integers(0, 10**9))
def test_chosen_frames_are_in_order_distinct_but_for_the_front(stamps: list[int], count: int, spacing: int) -> None:
    stamps.sort()
    chosen = choose_frames(stamps, count, spacing)
    assert len(chosen) == count
    assert chosen[-1] == len(stamps) - 1
    own = chosen[chosen.count(chosen[0]) - 1 :]  # without the repetitions
    assert own == sorted(set(own))
    assert chosen.count(chosen[0]) == 1 or chosen[0] == 0


# --- on a grid -----------------------------------------------------------------------------------------------------


def grid_window(stamps_s: list[float], clip_frames: int = 4) -> FrameWindow:
    return window_of(stamps_s, clip_frames, on_grid=True)


def test_on_a_grid_a_clip_has_the_first_frame_of_each_cell_and_the_newest() -> None:
    # Cells begin at 0.0, 0.3, 0.6, 0.9: frames at 0.0, 0.31, 0.61, 0.91 are the first of theirs.
    stamps = [0.0, 0.1, 0.2, 0.31, 0.41, 0.51, 0.61, 0.71, 0.81]
    assert grid_window(stamps).clip().steps.tolist() == [0, 3, 6, 8]
    assert grid_window([*stamps, 0.91]).clip().steps.tolist() == [0, 3, 6, 9]  # the newest is the first of its cell
    assert grid_window([*stamps, 0.91, 1.01]).clip().steps.tolist() == [3, 6, 9, 10]


def test_on_a_grid_a_short_window_repeats_its_oldest_frame_at_the_front() -> None:
    assert grid_window([0.2]).clip().steps.tolist() == [0, 0, 0, 0]
    window = grid_window([0.2, 0.25, 0.31])
    assert window.clip().steps.tolist() == [0, 0, 0, 2]
    assert not window.is_full(window.clip())


def test_on_a_grid_a_slow_camera_gives_every_frame() -> None:
    window = grid_window([0.0, 0.5, 1.0, 1.5, 2.0])
    assert window.clip().steps.tolist() == [1, 2, 3, 4]
    assert window.is_full(window.clip())


def test_on_a_grid_a_pause_starts_the_window_anew() -> None:
    assert grid_window([0.0, 0.3, 0.6, 9.0, 9.1]).clip().steps.tolist() == [3, 3, 3, 4]


def test_a_grid_without_spacing_is_none() -> None:
    window = window_of([0.1 * i for i in range(9)], 3, 0.0, on_grid=True)
    assert window.clip().steps.tolist() == [6, 7, 8]


@pytest.mark.parametrize("rate_hz", [5.0, 20.0, 30.0, 240.0])
def test_on_a_grid_the_store_holds_one_frame_of_each_cell(rate_hz: float) -> None:
    window = grid_window([i / rate_hz for i in range(round(8 * rate_hz))], 8)
    clip = window.clip()
    assert len(window) <= 9
    cells = (clip.stamps_ns // 300_000_000).tolist()
    assert cells[:-1] == list(range(cells[0], cells[0] + 7))
    assert window.is_full(clip)


def test_clips_on_a_grid_share_all_but_the_newest_frames() -> None:
    """Ten minutes at 30 Hz with jitter and lost frames, asked about every second and a little more."""
    rng = np.random.default_rng(7)
    window, by_default = FrameWindow(32, 0.3, on_grid=True), FrameWindow(32, 0.3)
    stamps = np.sort(np.arange(18_000) / 30 + rng.uniform(-0.012, 0.012, 18_000))
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    asked_s, new, new_by_default = 0.0, [], []
    newest_before_ns = 0
    for step, stamp_s in enumerate(stamps.tolist()):
        if rng.random() < 0.05:
            continue
        for each in (window, by_default):
            each.push(step, round((100 + stamp_s) * 1e9), np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1, 1)))
        if stamp_s < asked_s + 1.0:
            continue
        asked_s = stamp_s
        clip, other = window.clip(), by_default.clip()
        fresh = [i for i, each in enumerate(clip.steps.tolist()) if each not in seen[True]]
        if step > 600:
            new.append(len(fresh))
            new_by_default.append(len(set(other.steps.tolist()) - seen[False]))
            assert fresh == list(range(32 - len(fresh), 32))  # they are the last ones
            before_last = clip.stamps_ns[fresh[:-1]]
            # No frame of a cell that the clip before could have had: each is the first of one that began since then.
            assert (before_last // 300_000_000 > newest_before_ns // 300_000_000).all()
        seen[True] |= set(clip.steps.tolist())
        seen[False] |= set(other.steps.tolist())
        newest_before_ns = int(clip.stamps_ns[-1])
    assert len(new) > 500
    assert max(new) == 5  # at most four cells begin in 1.03 s, and the newest frame
    assert np.mean(new_by_default) > 3 * np.mean(new)


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 10**9))
def test_frames_on_a_grid_are_the_first_of_their_cells(stamps: list[int], count: int, spacing_ns: int) -> None:
    stamps.sort()
    window = FrameWindow(count, spacing_ns / 1e9, on_grid=True)
    held: list[int] = []
    for step, stamp_ns in enumerate(stamps):
        if held and stamp_ns - stamps[step - 1] > 2 * (count - 1) * spacing_ns > 0:
            held = []  # a pause
        if not held or stamp_ns // spacing_ns > stamps[step - 1] // spacing_ns:
            held.append(step)
        window.push(step, stamp_ns, np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1, 1)))
        clip = window.clip()
        expected = held if held[-1] == step else [*held, step]
        expected = expected[-count:]
        assert clip.steps.tolist() == [expected[0]] * (count - len(expected)) + expected
