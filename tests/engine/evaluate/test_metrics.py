# SPDX-License-Identifier: Apache-2.0
"""J, F and R against cases computed by hand and against loops written from the definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virst_engine.evaluate import metrics


def rectangle(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def naive_boundary(mask):
    height, width = mask.shape
    edges = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            last_row, last_column = y == height - 1, x == width - 1
            neighbours = []
            if last_row and last_column:
                continue
            if not last_column:
                neighbours.append(mask[y, x + 1])
            if not last_row:
                neighbours.append(mask[y + 1, x])
            if not last_row and not last_column:
                neighbours.append(mask[y + 1, x + 1])
            edges[y, x] = any(bool(n) != bool(mask[y, x]) for n in neighbours)
    return edges


def naive_f(predicted, truth, radius):
    predicted_points = np.argwhere(naive_boundary(predicted))
    truth_points = np.argwhere(naive_boundary(truth))
    if not len(predicted_points) and not len(truth_points):
        return 1.0

    def part_near(points, others, when_no_points):
        if not len(points):
            return when_no_points
        near = sum(any((p - o) @ (p - o) <= radius**2 for o in others) for p in points)
        return near / len(points)

    precision = part_near(predicted_points, truth_points, 1.0)
    recall = part_near(truth_points, predicted_points, 1.0)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def test_j_of_hand_made_masks():
    left, right = rectangle(4, 4, 0, 0, 4, 2), rectangle(4, 4, 0, 1, 4, 3)
    assert metrics.region_similarity(left, right) == pytest.approx(4 / 12)
    assert metrics.region_similarity(left, left) == 1.0
    assert metrics.region_similarity(left, np.zeros_like(left)) == 0.0
    assert metrics.region_similarity(np.zeros_like(left), np.zeros_like(left)) == 1.0


def test_boundary_of_one_pixel_is_itself_and_its_upper_left_neighbours():
    mask = rectangle(5, 5, 2, 2, 3, 3)
    assert np.argwhere(metrics.boundary(mask)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_boundary_ignores_the_image_border():
    assert not metrics.boundary(np.ones((6, 7), dtype=bool)).any()


@pytest.mark.parametrize(("size", "radius"), [((240, 320), 4), ((480, 854), 8), ((60, 80), 1)])
def test_tolerance_is_the_rounded_up_part_of_the_diagonal(size, radius):
    assert metrics.boundary_tolerance_px(*size) == radius


def test_tolerance_of_one_and_more_is_pixels():
    assert metrics.boundary_tolerance_px(240, 320, bound_th=2.0) == 2


def test_f_forgives_a_shift_within_the_tolerance_and_no_more():
    truth = rectangle(240, 320, 100, 100, 150, 160)
    assert metrics.boundary_accuracy(np.roll(truth, 4, axis=1), truth) == 1.0
    assert metrics.boundary_accuracy(np.roll(truth, 5, axis=1), truth) < 1.0
    assert metrics.boundary_accuracy(np.roll(truth, 100, axis=1), truth) == 0.0


def test_f_of_empty_masks():
    empty, full = np.zeros((240, 320), dtype=bool), rectangle(240, 320, 10, 10, 20, 20)
    assert metrics.boundary_accuracy(empty, empty) == 1.0
    assert metrics.boundary_accuracy(full, empty) == 0.0
    assert metrics.boundary_accuracy(empty, full) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(2, 18),
    width=st.integers(2, 18),
    density=st.sampled_from([0.02, 0.2, 0.5, 0.9]),
    bound_th=st.sampled_from([0.008, 0.1, 1.0, 2.0, 3.0]),
)
def test_j_and_f_equal_the_loops_on_random_masks(seed, height, width, density, bound_th):
    rng = np.random.default_rng(seed)
    predicted, truth = (rng.random((2, height, width)) < density).astype(bool)
    assert np.array_equal(metrics.boundary(truth), naive_boundary(truth))
    radius = bound_th if bound_th >= 1 else math.ceil(bound_th * math.sqrt(height**2 + width**2))
    assert metrics.boundary_accuracy(predicted, truth, bound_th) == pytest.approx(naive_f(predicted, truth, radius))
    pixels = list(zip(predicted.ravel(), truth.ravel(), strict=True))
    union = sum(bool(p or g) for p, g in pixels)
    j = sum(bool(p and g) for p, g in pixels) / union if union else 1.0
    assert metrics.region_similarity(predicted, truth) == pytest.approx(j)


def test_r_of_ten_false_pixels_over_fifty_of_foreground_in_both_conventions():
    foreground = rectangle(20, 20, 0, 0, 5, 10)
    truth = rectangle(20, 20, 0, 0, 2, 10)
    predicted = truth | rectangle(20, 20, 10, 0, 11, 10)
    assert metrics.robustness(predicted, truth, foreground) == pytest.approx(0.8)
    assert metrics.robustness(predicted, truth, foreground, positive_value=255) == 0.0
    assert metrics.robustness(truth, truth, foreground, positive_value=255) == 1.0


def test_sequence_score_is_the_mean_over_frames():
    truth = np.stack([rectangle(240, 320, 50, 50, 90, 90)] * 2)
    predicted = truth.copy()
    predicted[1] = False
    score = metrics.score_sequence(predicted, truth, truth)
    assert (score.j, score.f, score.jf, score.frames) == (0.5, 0.5, 0.5, 2)
    assert score.r_01 == 1.0


def test_no_frames_cannot_be_scored():
    none = np.zeros((0, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match="at least one frame"):
        metrics.score_sequence(none, none, none)


def test_bootstrap_interval_holds_the_mean_and_is_repeatable():
    values = np.linspace(0, 1, 50)
    scenes = np.arange(50)
    low, high = metrics.bootstrap_interval(values, scenes)
    assert low < 0.5 < high
    assert (low, high) == metrics.bootstrap_interval(values, scenes)
    half_width = 1.96 * values.std() / math.sqrt(50)
    assert high - low == pytest.approx(2 * half_width, rel=0.15)


def test_bootstrap_draws_scenes_not_expressions():
    values = np.repeat([0.0, 1.0, 0.0, 1.0], 25)
    by_scene = metrics.bootstrap_interval(values, np.repeat(np.arange(4), 25))
    by_expression = metrics.bootstrap_interval(values, np.arange(100))
    assert by_scene[1] - by_scene[0] > 3 * (by_expression[1] - by_expression[0])


def test_bootstrap_of_nothing_is_nan_and_of_one_scene_is_its_mean():
    assert all(math.isnan(end) for end in metrics.bootstrap_interval(np.zeros(0), np.zeros(0, dtype=np.int64)))
    assert metrics.bootstrap_interval(np.array([0.2, 0.4]), np.array([7, 7])) == (
        pytest.approx(0.3),
        pytest.approx(0.3),
    )
