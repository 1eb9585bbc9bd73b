# SPDX-License-Identifier: Apache-2.0
"""A user's box, points or mask on one frame -> the mask that the decoder makes of it.

Coordinates are scaled as in sam2's predictor (sam2_video_predictor.py, add_new_points_or_box and add_new_mask, commit
2b90b9f): squashed to the square input, aspect not kept.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from virst_engine.backends.base import Stages
from virst_engine.errors import BadPrompt
from virst_engine.model.sam2_prompts import BOX_CORNERS
from virst_engine.types import ClickPrompt, ImageFeatures, MaskPrediction, MaskPrompt

ON_OBJECT = 1  # label of a point
ABSENT_LOGIT = -10.0  # of a mask of nothing


def decode_prompt(
    stages: Stages,
    features: ImageFeatures,
    prompt: ClickPrompt | MaskPrompt,
    image_size: tuple[int, int],
    device: torch.device,
    corrects: Float[Tensor, "hm wm"] | None = None,
    *,
    as_sam2: bool = False,
) -> MaskPrediction:
    """The object (o = 1) that the prompt shows in the frame of `features` (b = 1).

    Args:
        image_size: height and width of the camera's image, pixels.
        corrects: logits of the mask that points without a box add to and take from; None: they stand alone.
        as_sam2: corners are corners, as in SAM 2's own predictor, even to a model that reads none.

    Raises:
        BadPrompt: the prompt does not fit that image.
    """
    size = stages.sizes.image_size
    if isinstance(prompt, MaskPrompt):
        return stages.mask_prediction(features, mask_input(prompt, image_size, size).to(device))
    points, labels = click_input(prompt, image_size, size)
    if corrects is None and not bool((labels > 0).any()):
        raise BadPrompt("a prompt needs a point on the object (label 1) or a box where no mask of it is seen")
    mask_logits = None if corrects is None else corrects[None].float()
    points, labels = points.to(device), labels.to(device)
    if stages.sizes.reads_boxes or as_sam2:
        return stages.mask_decoder(features, None, stages.click_tokens(points, labels, mask_logits))
    return _decode_without_corners(stages, features, points, labels, mask_logits)


def _decode_without_corners(
    stages: Stages,
    features: ImageFeatures,
    points: Float[Tensor, "o p 2"],
    labels: Int[Tensor, "o p"],
    mask_logits: Float[Tensor, "o hm wm"] | None = None,
) -> MaskPrediction:
    """What points in pixels of the model's input show to a model that reads no boxes; in all rows, the first two may be
    the corners of one.

    Then the box is the point in its middle, unless points tell the object, and what the model sees outside of it is cut
    off. The model draws one mask for every prompt: it was not trained to draw three.
    """
    corners = points[:, :2] if bool((labels[:, :1] == BOX_CORNERS[0]).all()) else None
    if corners is not None:
        points, labels = points[:, 2:], labels[:, 2:]
        if not bool((labels == ON_OBJECT).any(dim=1).all()):
            points = torch.cat((corners.mean(dim=1, keepdim=True), points), dim=1)
            labels = torch.cat((labels.new_full((len(labels), 1), ON_OBJECT), labels), dim=1)
    tokens = stages.click_tokens(points, labels, mask_logits)
    tokens = replace(tokens, multimask=torch.zeros(len(points), dtype=torch.bool, device=points.device))
    seen = stages.mask_decoder(features, None, tokens)
    if corners is None:
        return seen
    return replace(seen, mask_logits=_cut(seen.mask_logits, corners / stages.sizes.image_size))


def decode_boxes(
    stages: Stages, features: ImageFeatures, boxes: Float[np.ndarray, "o k 4"], device: torch.device
) -> MaskPrediction:
    """The objects that a detector's boxes show, each the union of what its k boxes show.

    Its predicted IoU and its pointer are those of the box whose object the decoder believes in most.

    Args:
        features: of the frame of each box (b = o x k, k rows of each object in turn).
        boxes: left, top, right, bottom in shares of the image's width and height.
    """
    objects, count = boxes.shape[:2]
    corners = torch.from_numpy(np.ascontiguousarray(boxes, np.float32)).reshape(-1, 2, 2) * stages.sizes.image_size
    labels = torch.tensor(BOX_CORNERS).expand(len(corners), 2)
    corners, labels = corners.to(device), labels.to(device)
    if stages.sizes.reads_boxes:
        each = stages.mask_decoder(features, None, stages.click_tokens(corners, labels))
    else:
        each = _decode_without_corners(stages, features, corners, labels)
    if count == 1:
        return each
    score, iou = (value.reshape(objects, count) for value in (each.object_score_logits, each.iou))
    logits = each.mask_logits.reshape(objects, count, *each.mask_logits.shape[1:])
    hidden = torch.full_like(logits, ABSENT_LOGIT)
    shown = torch.where((score > 0)[..., None, None], logits, hidden)
    best = (score.sigmoid() * iou).argmax(dim=1)
    rows = torch.arange(objects, device=best.device)
    return MaskPrediction(
        mask_logits=shown.amax(dim=1),
        iou=iou[rows, best],
        object_score_logits=score[rows, best],
        pointer=each.pointer.reshape(objects, count, -1)[rows, best],
    )


def _cut(mask_logits: Float[Tensor, "o h w"], corners: Float[Tensor, "o 2 2"]) -> Float[Tensor, "o h w"]:
    """The masks with nothing outside of their boxes, in shares of the image."""
    is_inside = []
    for axis, length in enumerate((mask_logits.shape[2], mask_logits.shape[1])):
        middles = (torch.arange(length, device=mask_logits.device) + 0.5) / length
        is_inside.append((middles >= corners[:, :1, axis]) & (middles <= corners[:, 1:, axis]))
    kept = is_inside[1][:, :, None] & is_inside[0][:, None]
    return torch.where(kept, mask_logits, mask_logits.clamp(max=ABSENT_LOGIT))


def check_prompt(prompt: ClickPrompt | MaskPrompt, image_size: tuple[int, int], most_tokens: int = 0) -> None:
    """Raises BadPrompt unless the prompt fits an image of this height and width, and a model of so many tokens."""
    if isinstance(prompt, MaskPrompt):
        mask_input(prompt, image_size, 32)
        return
    points, _ = click_input(prompt, image_size, 32)
    if most_tokens and points.shape[1] >= most_tokens:  # the padding point takes one
        raise BadPrompt(
            f"the exported stages take prompts of at most {most_tokens - 1} points, of which a box counts as two; "
            f"got {points.shape[1]}: give fewer, or set engine.backend to torch"
        )


def click_input(prompt: ClickPrompt, image_size: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Points of the model's input, shape (1, p, 2), float32, and their labels, shape (1, p); a box comes first."""
    height, width = image_size
    assert prompt.points_px is not None  # ClickPrompt fills both in
    assert prompt.labels is not None
    points, labels = prompt.points_px, prompt.labels
    if prompt.box_px is not None:
        corners = np.asarray(prompt.box_px, np.float32).reshape(2, 2)
        points, labels = np.concatenate((corners, points)), np.concatenate((BOX_CORNERS, labels))
    outside = ((points < 0) | (points > (width, height))).any(axis=1)
    if outside.any():
        x, y = points[outside.argmax()]
        raise BadPrompt(
            f"({x:g}, {y:g}) is outside the image of {width} x {height}; prompts are in pixels of the camera's image"
        )
    scaled = torch.from_numpy(points / np.array((width, height), np.float32)) * size
    return scaled[None], torch.from_numpy(labels)[None]


def mask_input(prompt: MaskPrompt, image_size: tuple[int, int], size: int) -> Float[Tensor, "1 1 size size"]:
    """The mask squashed to the model's input: 0 or 1, float32."""
    if prompt.mask.shape != image_size:
        (height, width), (high, wide) = image_size, prompt.mask.shape
        raise BadPrompt(
            f"the mask is {wide} x {high}, the camera's image {width} x {height}; a mask prompt needs the same size"
        )
    mask = torch.from_numpy(np.ascontiguousarray(prompt.mask))[None, None].float()
    if image_size == (size, size):
        return mask
    resized = F.interpolate(mask, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return (resized >= 0.5).float()
