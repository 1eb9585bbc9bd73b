# SPDX-License-Identifier: Apache-2.0
"""The terms of VIRST's objective (equation 15) and two that short training needs; all means, all differentiable."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from virst_engine.model.words import PAD
from virst_engine.types import MaskPrediction


def mask_losses(
    prediction: MaskPrediction, truth: Float[Tensor, "o ht wt"], visible: Bool[Tensor, " o"]
) -> dict[str, Float[Tensor, ""]]:
    """BCE and Dice where the object is visible, presence and predicted IoU everywhere.

    `truth`: share of each cell that the object covers, 0..1, at any resolution of the logits or finer.
    """
    logits = F.interpolate(
        prediction.mask_logits[:, None].float(), truth.shape[-2:], mode="bilinear", align_corners=False
    )
    logits = logits[:, 0]
    weight = visible.float()
    count = weight.sum().clamp(min=1.0)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum((1, 2)) + 1.0
    dice = 1 - overlap / (probability.sum((1, 2)) + truth.sum((1, 2)) + 1.0)
    with torch.no_grad():
        predicted, actual = logits > 0, truth > 0.5
        union = (predicted | actual).sum((1, 2)).clamp(min=1)
        iou = (predicted & actual).sum((1, 2)) / union
    return {
        "bce": (bce * weight).sum() / count,
        "dice": (dice * weight).sum() / count,
        "occlusion": F.binary_cross_entropy_with_logits(prediction.object_score_logits.float(), weight),
        "iou": ((prediction.iou.float() - iou).abs() * weight).sum() / count,
    }


def token_loss(logits: Float[Tensor, "b n vocabulary"], answer: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Next-token cross-entropy of the answer; padding does not count."""
    return F.cross_entropy(logits.float().flatten(0, 1), answer.flatten(), ignore_index=PAD)


def attention_loss(
    logits: Float[Tensor, "b heads n t t2 hd wd"], cells: Float[Tensor, "b t hd wd"]
) -> Float[Tensor, ""]:
    """Cross-entropy between where frame t's queries look and the target's cells in that frame.

    `cells`: share of each cell that the target covers; frames without the target do not count.
    """
    probability = logits.float().flatten(4).softmax(-1).mean((1, 2)).unflatten(2, logits.shape[4:])  # b t t2 hd wd
    own = probability.diagonal(dim1=1, dim2=2).movedim(-1, 1)  # b t hd wd: the part on the query's own frame
    mass = cells.sum((2, 3), keepdim=True)
    target = cells / mass.clamp(min=1e-6)
    loss = -(target * (own + 1e-6).log()).sum((2, 3))
    seen = (mass[..., 0, 0] > 0).float()
    return (loss * seen).sum() / seen.sum().clamp(min=1.0)


def attribute_loss(logits: Float[Tensor, "b classes h w"], labels: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross-entropy of a per-cell label; -1 marks cells that do not count. Background weighs a tenth."""
    weight = torch.ones(logits.shape[1], device=logits.device)
    weight[0] = 0.1
    # One row per cell: torch 2.13's two-dimensional form corrupts memory on channels-last logits on a CPU.
    rows = logits.float().movedim(1, -1).flatten(0, -2).contiguous()
    return F.cross_entropy(rows, labels.flatten(), weight=weight, ignore_index=-1)
