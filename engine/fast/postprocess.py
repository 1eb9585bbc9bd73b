# SPDX-License-Identifier: Apache-2.0
"""Low-resolution logits -> masks at the camera's size, and several masks -> one image of instance ids."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from virst_engine.types import ObjectResult, ObjectState


def mask_at_size(logits: Float[np.ndarray, "hm wm"], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Where the bilinearly enlarged logits are > 0. cv2's INTER_LINEAR samples as torch's align_corners=False."""
    return cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR) > 0.0


def empty_mask(height: int, width: int) -> Bool[np.ndarray, "height width"]:
    return np.zeros((height, width), dtype=np.bool_)


def instance_map(objects: Sequence[ObjectResult], height: int, width: int) -> UInt8[np.ndarray, "height width"]:
    """One image of instance ids, 0 where there is nothing. Where masks overlap, the object of the highest score wins.

    Instances win over unions: of a goal that is split, the union shows where it has no instance. Of equal scores the
    one that comes first in `objects` wins. Only what is TRACKING is shown. Two goals may mean the same thing, so the
    masks themselves stay as they are. Raises IndexError for a mask of another size.
    """
    ids = np.zeros((height, width), dtype=np.uint8)
    for obj in sorted(objects, key=lambda o: (bool(o.part_of), o.score), reverse=True)[::-1]:  # painted last = on top
        if obj.state is ObjectState.TRACKING:
            ids[obj.mask] = obj.instance_id
    return ids
