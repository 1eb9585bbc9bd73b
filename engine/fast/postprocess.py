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
    masks themselves stay as they are. Raises ValueError for a mask of another size.
    """
    shown = [obj for obj in objects if obj.state is ObjectState.TRACKING]
    for obj in shown:
        if obj.mask.shape != (height, width):
            raise ValueError(f"the mask of {obj.object_id!r} is {obj.mask.shape}, the image is {(height, width)}")
    lowest_first = sorted(shown, key=lambda o: (bool(o.part_of), o.score), reverse=True)[::-1]  # painted last = on top
    if not lowest_first:
        return np.zeros((height, width), dtype=np.uint8)
    # A product is several times as fast as writing where a mask is, and most pictures have one object or few.
    ids = lowest_first[0].mask.view(np.uint8) * np.uint8(lowest_first[0].instance_id)
    for obj in lowest_first[1:]:
        np.copyto(ids, np.uint8(obj.instance_id), where=obj.mask)
    return ids
