# SPDX-License-Identifier: Apache-2.0
"""What a caller of `add_objects` pointed at: boxes, points and masks, sorted by object and checked."""

import math
from dataclasses import dataclass, field

import numpy as np
from virst_msgs.srv import AddObjects

from virst_engine.errors import BadFrame, BadGoal
from virst_ros import conversions
from virst_ros.parameters import LimitParameters

LONGEST_ID = 128  # characters, as of the engine's ids
MOST_POINTS = 64  # of one call: the prompt encoder's work grows with them


@dataclass
class PromptedObject:
    """Everything that one call says of one object, in pixels of the camera's image; x to the right, y down."""

    object_id: str
    box_px: tuple[float, float, float, float] | None = None  # left, top, right, bottom
    points_px: list[tuple[float, float]] = field(default_factory=list)  # x, y
    labels: list[int] = field(default_factory=list)  # 1: on the object, 0: not on it; as many as points
    mask: np.ndarray | None = None  # bool (height, width)


def prompted_objects(
    request: AddObjects.Request, limits: LimitParameters | None = None
) -> tuple[int, list[PromptedObject]]:
    """The stamp (ns, 0 = the newest image) and the objects in the order of their first mention.

    Raises:
        BadGoal: lists of different lengths, no object, no name, not a box, labels other than 0 and 1, numbers that are
            not finite, a mask besides a box or points, or more of anything than `limits` allow.
    """
    _check_lengths(request)
    _check_limits(request, LimitParameters() if limits is None else limits)
    found: dict[str, PromptedObject] = {}

    def the(object_id: str) -> PromptedObject:
        if not object_id.strip():
            raise BadGoal("an object id is empty: name each object, the answer tells its value in the mask by it")
        return found.setdefault(object_id, PromptedObject(object_id))

    for object_id, box in zip(request.bbox_object_ids, request.bbox_coords, strict=True):
        middle, wide, high = box.center.position, box.size_x, box.size_y
        if box.center.theta != 0.0:
            raise BadGoal(f"the box of {object_id[:40]!r} is turned (theta {box.center.theta:g}): theta must be 0")
        if not all(math.isfinite(value) for value in (middle.x, middle.y, wide, high)) or wide <= 0 or high <= 0:
            raise BadGoal(
                f"the box of {object_id[:40]!r} is not one: centre ({middle.x:g}, {middle.y:g}), size {wide:g} x "
                f"{high:g}; give pixels, and a size above 0"
            )
        if the(object_id).box_px is not None:
            raise BadGoal(f"{object_id[:40]!r} has two boxes: give one")
        the(object_id).box_px = (middle.x - wide / 2, middle.y - high / 2, middle.x + wide / 2, middle.y + high / 2)
    labels = list(request.point_labels) or [1] * len(request.point_object_ids)
    for object_id, point, label in zip(request.point_object_ids, request.point_coords, labels, strict=True):
        if not (math.isfinite(point.x) and math.isfinite(point.y)) or label not in (0, 1):
            raise BadGoal(
                f"a point of {object_id[:40]!r} is ({point.x:g}, {point.y:g}) with label {label}: give pixels, and 1 "
                "for on the object or 0 for not on it"
            )
        the(object_id).points_px.append((point.x, point.y))
        the(object_id).labels.append(int(label))
    for object_id, image in zip(request.mask_object_ids, request.masks, strict=True):
        try:
            mask = conversions.mask(image)
        except BadFrame as error:
            raise BadGoal(f"the mask of {object_id[:40]!r}: {error}") from error
        thing = the(object_id)
        if thing.mask is not None or thing.box_px is not None or thing.points_px:
            raise BadGoal(f"{object_id[:40]!r} has a mask and something else: a mask says it all, give it alone")
        thing.mask = mask
    if not found:
        raise BadGoal("nothing was pointed at: give a box, a point or a mask, with the id of its object")
    return conversions.stamp_ns(request.request_header.stamp), list(found.values())


def _check_lengths(request: AddObjects.Request) -> None:
    labels = len(request.point_labels) or len(request.point_object_ids)
    for ids, other, names in (
        (len(request.bbox_object_ids), len(request.bbox_coords), "bbox_object_ids and bbox_coords"),
        (len(request.point_object_ids), len(request.point_coords), "point_object_ids and point_coords"),
        (len(request.point_object_ids), labels, "point_object_ids and point_labels"),
        (len(request.mask_object_ids), len(request.masks), "mask_object_ids and masks"),
    ):
        if ids != other:
            raise BadGoal(f"{names} must have the same length, got {ids} and {other}")
    if len(request.point_coords) > MOST_POINTS:
        raise BadGoal(f"{len(request.point_coords)} points in one call, at most {MOST_POINTS} are taken")


def _check_limits(request: AddObjects.Request, limits: LimitParameters) -> None:
    """Before anything of the request is converted."""
    ids = {*request.bbox_object_ids, *request.point_object_ids, *request.mask_object_ids}
    longest = max(map(len, ids), default=0)
    if longest > LONGEST_ID:
        raise BadGoal(f"an object id has {longest} characters, at most {LONGEST_ID} are taken: choose a shorter one")
    if len(ids) > limits.objects_per_request:
        raise BadGoal(
            f"{len(ids)} objects in one call, at most {limits.objects_per_request} are taken: call several times, or "
            "raise limits.objects_per_request"
        )
    pixels = sum(image.width * image.height for image in request.masks)
    if pixels > limits.image_pixels:
        raise BadGoal(
            f"the masks have {pixels} pixels together, at most {limits.image_megapixels:g} million are taken: call "
            "several times, or raise limits.image_megapixels"
        )
