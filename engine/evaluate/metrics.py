# SPDX-License-Identifier: Apache-2.0
"""How right a mask is: region similarity J, boundary accuracy F, robustness R, and how sure a mean of them is.

J and F follow the DAVIS 2017 convention that MeViS, ReVOS and VIRST report (boundary tolerance 0.008 of the image
diagonal, a disk as structuring element); unlike DAVIS's own semi-supervised protocol all frames count. Everything here
is a fraction 0..1; reports multiply by 100.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int

BOUND_TH = 0.008


@dataclass(frozen=True)
class SequenceScore:
    """The means over the frames of one expression; all 0..1."""

    j: float
    f: float
    r_01: float  # robustness with masks as 0/1 (Sa2VA's tool)
    r_0255: float  # robustness with masks as 0/255 (the tool of VISA, VRS-HQ and VIRST)
    frames: int

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2


def region_similarity(predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """J: intersection over union; 1.0 when both masks are empty."""
    union = np.count_nonzero(predicted | truth)
    return 1.0 if union == 0 else np.count_nonzero(predicted & truth) / union


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """One-pixel boundary: true where a pixel differs from its right, lower or lower right neighbour.

    DAVIS's rule at the image border: the last row compares with the right neighbour only, the last column with the
    lower one only, and the corner is never boundary.
    """
    right, below, diagonal = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    diagonal[:-1, :-1] = mask[1:, 1:]
    edges: np.ndarray = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    edges[-1] = mask[-1] ^ right[-1]
    edges[:, -1] = mask[:, -1] ^ below[:, -1]
    edges[-1, -1] = False
    return edges


def boundary_tolerance_px(height: int, width: int, bound_th: float = BOUND_TH) -> int:
    """Radius of the disk within which boundaries match; `bound_th` is pixels from 1 on, else a part of the diagonal."""
    return int(bound_th) if bound_th >= 1 else math.ceil(bound_th * math.hypot(height, width))


def boundary_accuracy(
    predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], bound_th: float = BOUND_TH
) -> float:
    """F: harmonic mean of boundary precision and recall, 0..1; 1.0 when neither mask has a boundary."""
    predicted_edges, truth_edges = boundary(predicted), boundary(truth)
    n_predicted, n_truth = np.count_nonzero(predicted_edges), np.count_nonzero(truth_edges)
    if n_predicted == 0 and n_truth == 0:
        return 1.0
    if n_predicted == 0 or n_truth == 0:
        return 0.0  # precision and recall are then (1, 0) or (0, 1)
    disk = _disk(boundary_tolerance_px(truth.shape[0], truth.shape[1], bound_th))
    near_truth = cv2.dilate(truth_edges.astype(np.uint8), disk).astype(bool)
    near_predicted = cv2.dilate(predicted_edges.astype(np.uint8), disk).astype(bool)
    precision = np.count_nonzero(predicted_edges & near_truth) / n_predicted
    recall = np.count_nonzero(truth_edges & near_predicted) / n_truth
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def robustness(
    predicted: Bool[np.ndarray, "h w"],
    truth: Bool[np.ndarray, "h w"],
    foreground: Bool[np.ndarray, "h w"],
    positive_value: int = 1,
) -> float:
    """ReVOS's R of one frame: 1 minus the false positives over the foreground pixels, never below 0.

    Args:
        foreground: the union of all objects of the scene, meant or not.
        positive_value: what a mask pixel counts. 1 as in Sa2VA's tool; 255 as in the tools of VISA, VRS-HQ and VIRST,
            which read PNG files as they are, so one false pixel weighs 255 times. Compare only within one convention.
    """
    false_positives = np.count_nonzero(predicted & ~truth) * positive_value
    return max(1.0 - false_positives / (np.count_nonzero(foreground) + 1e-6), 0.0)


def score_sequence(
    predicted: Bool[np.ndarray, "t h w"], truth: Bool[np.ndarray, "t h w"], foreground: Bool[np.ndarray, "t h w"]
) -> SequenceScore:
    """Score one expression: the mean of every figure over all frames.

    Raises:
        ValueError: there is no frame.
    """
    return mean_score(score_frames(predicted, truth, foreground))


def score_frames(
    predicted: Bool[np.ndarray, "t h w"], truth: Bool[np.ndarray, "t h w"], foreground: Bool[np.ndarray, "t h w"]
) -> Float[np.ndarray, "t 4"]:
    """Every figure of every frame: columns J, F, R with masks as 0/1, R with masks as 0/255."""
    per_frame = [
        (
            region_similarity(p, g),
            boundary_accuracy(p, g),
            robustness(p, g, fg, positive_value=1),
            robustness(p, g, fg, positive_value=255),
        )
        for p, g, fg in zip(predicted, truth, foreground, strict=True)
    ]
    return np.array(per_frame, dtype=np.float64).reshape(-1, 4)


def mean_score(per_frame: Float[np.ndarray, "t 4"]) -> SequenceScore:
    """The score of a stretch out of `score_frames`. Raises ValueError where there is no frame."""
    if len(per_frame) == 0:
        raise ValueError("a score needs at least one frame, got 0")
    j, f, r_01, r_0255 = (float(value) for value in per_frame.mean(axis=0))
    return SequenceScore(j, f, r_01, r_0255, len(per_frame))


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    scenes: Int[np.ndarray, " n"],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, drawing whole scenes: expressions of one scene are not independent.

    Args:
        values: one figure per expression.
        scenes: the scene that each belongs to.

    Returns:
        Lower and upper end; both NaN when there are no values, both the mean when there is one scene.
    """
    if len(values) == 0:
        return math.nan, math.nan
    _, scene_row = np.unique(scenes, return_inverse=True)
    sums, counts = np.bincount(scene_row, weights=values), np.bincount(scene_row)
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def _disk(radius: int) -> np.ndarray:
    along = np.arange(-radius, radius + 1)
    return (along[:, None] ** 2 + along[None, :] ** 2 <= radius**2).astype(np.uint8)
