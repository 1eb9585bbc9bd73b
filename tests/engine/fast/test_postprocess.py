# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from virst_engine.fast.postprocess import empty_mask, instance_map, mask_at_size
from virst_engine.types import ObjectResult, ObjectState


def found(instance_id: int, mask: np.ndarray, score: float, state: ObjectState = ObjectState.TRACKING) -> ObjectResult:
    return ObjectResult("o", "g", instance_id, state, mask, score, 0.0, 0.0)


def test_masks_are_enlarged_as_torch_does() -> None:
    logits = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(logits)[None, None], (48, 64), mode="bilinear", align_corners=False)
    differs = mask_at_size(logits, 48, 64) != (expected[0, 0] > 0).numpy()
    assert differs.mean() < 1e-3  # rounding where the logit is 0


def test_overlapping_pixels_go_to_the_higher_score_and_to_the_first_of_equals() -> None:
    left, right = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    left[:, :3], right[:, 1:] = True, True
    assert instance_map([found(7, left, 0.4), found(9, right, 0.8)], 2, 4)[0].tolist() == [7, 9, 9, 9]
    assert instance_map([found(7, left, 0.8), found(9, right, 0.4)], 2, 4)[0].tolist() == [7, 7, 7, 9]
    assert instance_map([found(7, left, 0.5), found(9, right, 0.5)], 2, 4)[0].tolist() == [7, 7, 7, 9]
    assert instance_map([found(9, right, 0.5), found(7, left, 0.5)], 2, 4)[0].tolist() == [7, 9, 9, 9]
    lost = found(7, left, 0.8, ObjectState.LOST)
    assert instance_map([lost, found(9, right, 0.4)], 2, 4)[0].tolist() == [0, 9, 9, 9]


def test_instances_lie_on_their_union_whatever_the_scores() -> None:
    everything, part = np.array([[1, 1, 1, 0]], bool), np.array([[0, 1, 0, 0]], bool)
    instance = replace(found(9, part, 0.3), part_of="o")
    assert instance_map([found(7, everything, 0.9), instance], 1, 4)[0].tolist() == [7, 9, 7, 0]


def test_no_object_is_background() -> None:
    assert not instance_map([], 3, 5).any()
    assert not instance_map([found(1, empty_mask(3, 5), 0.9)], 3, 5).any()
