# SPDX-License-Identifier: Apache-2.0
"""Every term of the objective on tensors whose value is worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from virst_engine.model.words import PAD
from virst_engine.train.losses import attention_loss, attribute_loss, mask_losses, token_loss
from virst_engine.types import MaskPrediction


def predicted(logits: Tensor, score: list[float], iou: list[float]) -> MaskPrediction:
    rows = logits.shape[0]
    return MaskPrediction(logits, torch.tensor(iou), torch.tensor(score), torch.zeros(rows, 4))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_mask_losses_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.5, -3.0]]])
    truth = torch.tensor([[[1.0, 0.0], [0.0, 0.25]]])
    losses = mask_losses(predicted(logits, [1.5], [0.7]), truth, torch.tensor([True]))

    bce = (softplus(-2.0) + softplus(-1.0) + softplus(0.5) + 0.25 * softplus(3.0) + 0.75 * softplus(-3.0)) / 4
    assert float(losses["bce"]) == pytest.approx(bce, rel=1e-5)

    p = [1 / (1 + math.exp(-x)) for x in (2.0, -1.0, 0.5, -3.0)]
    dice = 1 - (2 * (p[0] + 0.25 * p[3]) + 1) / (sum(p) + 1.25 + 1)
    assert float(losses["dice"]) == pytest.approx(dice, rel=1e-5)

    assert float(losses["occlusion"]) == pytest.approx(softplus(-1.5), rel=1e-5)
    assert float(losses["iou"]) == pytest.approx(abs(0.7 - 1 / 2), rel=1e-5)  # two cells predicted, one of them right


def test_hidden_objects_count_for_presence_only() -> None:
    logits = torch.tensor([[[1.0]], [[4.0]]])
    truth, visible = torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([True, False])
    losses = mask_losses(predicted(logits, [2.0, 3.0], [1.0, 0.0]), truth, visible)
    alone = mask_losses(predicted(logits[:1], [2.0], [1.0]), truth[:1], visible[:1])
    for name in ("bce", "dice", "iou"):
        assert float(losses[name]) == pytest.approx(float(alone[name]))
    assert float(losses["occlusion"]) == pytest.approx((softplus(-2.0) + softplus(3.0)) / 2, rel=1e-5)


def test_nothing_visible_gives_zero_and_a_gradient_that_is_finite() -> None:
    logits = torch.zeros(2, 4, 4, requires_grad=True)
    losses = mask_losses(predicted(logits, [0.0, 0.0], [0.5, 0.5]), torch.zeros(2, 4, 4), torch.zeros(2).bool())
    assert [losses[name].item() for name in ("bce", "dice", "iou")] == [0.0, 0.0, 0.0]
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_masks_are_compared_at_the_resolution_of_the_truth() -> None:
    logits = torch.full((1, 2, 2), 20.0)
    logits[:, :, 1] = -20.0
    truth = torch.zeros(1, 8, 8)
    truth[:, :, :4] = 1.0
    losses = mask_losses(predicted(logits, [5.0], [1.0]), truth, torch.tensor([True]))
    assert float(losses["iou"]) == 0.0
    assert float(losses["bce"]) < 0.05
    mirrored = mask_losses(predicted(logits, [5.0], [1.0]), truth.flip(2), torch.tensor([True]))
    assert float(mirrored["bce"]) > 10


def test_the_predicted_iou_learns_and_the_actual_one_does_not() -> None:
    logits = torch.ones(1, 2, 2, requires_grad=True)
    iou = torch.tensor([0.3], requires_grad=True)
    prediction = MaskPrediction(logits, iou, torch.tensor([1.0]), torch.zeros(1, 4))
    mask_losses(prediction, torch.ones(1, 2, 2), torch.tensor([True]))["iou"].backward()
    assert iou.grad is not None
    assert float(iou.grad) == -1.0
    assert logits.grad is None


def test_token_loss_is_the_cross_entropy_of_the_words_and_ignores_padding() -> None:
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]]]))
    answer = torch.tensor([[3, 1, PAD]])
    assert float(token_loss(logits, answer)) == pytest.approx(-(math.log(0.4) + math.log(0.25)) / 2, rel=1e-5)
    other = logits.clone()
    other[:, 2] = torch.tensor([-5.0, 3.0, 2.0, 9.0])
    assert float(token_loss(other, answer)) == float(token_loss(logits, answer))


def attention(frames: int, side: int, peaks: dict[int, tuple[int, int, int]]) -> Tensor:
    """Logits of one head and one token; frame t's query looks at `peaks[t]` = (frame, y, x)."""
    logits = torch.zeros(1, 1, 1, frames, frames, side, side)
    for t, peak in peaks.items():
        logits[(0, 0, 0, t, *peak)] = 12.0
    return logits


def test_attention_loss_wants_each_frames_query_on_its_own_target() -> None:
    cells = torch.zeros(1, 2, 2, 2)
    cells[0, 0, 0, 1] = 1.0
    cells[0, 1, 1, 0] = 0.5
    right = attention_loss(attention(2, 2, {0: (0, 0, 1), 1: (1, 1, 0)}), cells)
    assert float(right) < 0.01
    for wrong in ({0: (0, 1, 0), 1: (1, 1, 0)}, {0: (1, 0, 1), 1: (1, 1, 0)}, {0: (0, 0, 1), 1: (0, 1, 0)}):
        assert float(attention_loss(attention(2, 2, wrong), cells)) > 3.0
    even = attention_loss(attention(2, 2, {}), cells)
    assert float(even) == pytest.approx(math.log(8), rel=1e-3)  # one of 2 frames x 2 x 2 cells


def test_attention_loss_averages_heads_and_tokens_and_skips_frames_without_the_target() -> None:
    cells = torch.zeros(1, 2, 1, 2)
    cells[0, 1, 0, 1] = 0.3
    logits = torch.zeros(1, 2, 1, 2, 2, 1, 2)
    logits[0, 0, 0, 1, 1, 0, 1] = 30.0  # one head is right, the other looks everywhere
    assert float(attention_loss(logits, cells)) == pytest.approx(-math.log((1 + 0.25) / 2), rel=1e-3)
    assert float(attention_loss(logits, torch.zeros(1, 2, 1, 2))) == 0.0


def test_attribute_loss_by_hand() -> None:
    # Two classes besides background; cells: background, class 2, one that does not count.
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]).clamp(min=1e-9)
    logits = p.log().T.reshape(1, 3, 1, 3)
    labels = torch.tensor([[[0, 2, -1]]])
    expected = -(0.1 * math.log(0.5) + 1.0 * math.log(0.7)) / 1.1
    assert float(attribute_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_attribute_loss_takes_channels_last_logits() -> None:
    """As convolutions of channels-last pixels give them; torch 2.13's own two-dimensional form writes out of bounds."""
    logits = torch.randn(2, 5, 6, 7)
    labels = torch.randint(-1, 5, (2, 6, 7))
    last = logits.to(memory_format=torch.channels_last).requires_grad_()
    loss = attribute_loss(last, labels)
    assert loss.item() == pytest.approx(attribute_loss(logits, labels).item(), rel=1e-6)
    loss.backward()
    assert last.grad is not None
    assert float(last.grad.movedim(1, -1)[labels == -1].abs().sum()) == 0.0
