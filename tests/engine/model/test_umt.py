# SPDX-License-Identifier: Apache-2.0
"""UMT-L against its definition written out once more, plainly: loops over patches, tokens and heads."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.engine.model.small_models import liven
from virst_engine.model.umt import UmtEncoder, sine_position
from virst_engine.model.virst_7b_config import UmtConfig

SMALL = UmtConfig(
    image_size=12, patch_size=4, channels=8, layers=2, heads=2, feedforward=12, clip_frames=2, trained_grid=2
)


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def encoder_of(config: UmtConfig = SMALL) -> UmtEncoder:
    torch.manual_seed(0)
    encoder = UmtEncoder(config)
    liven(encoder)
    return encoder


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def plain(encoder: UmtEncoder, frames: Tensor) -> Tensor:
    """One short clip, t 3 size size -> tokens c."""
    config, tokens = encoder.config, []
    kernel, bias = encoder.patch_embed["proj"].weight[:, :, 0], encoder.patch_embed["proj"].bias
    for frame in frames:
        for y in range(config.grid):
            for x in range(config.grid):
                p = config.patch_size
                patch = frame[:, y * p : (y + 1) * p, x * p : (x + 1) * p]
                tokens.append((kernel * patch).sum(dim=(1, 2, 3)) + bias)
    xs = [token + position for token, position in zip(tokens, encoder.position, strict=True)]
    d = config.channels // config.heads
    for block in encoder.blocks:
        wq, wk, wv = block.attn.qkv.weight.chunk(3)
        seen = [normed(x, block.norm1) for x in xs]
        qs, ks = [wq @ s + block.attn.q_bias for s in seen], [wk @ s for s in seen]  # keys have no bias
        vs = [wv @ s + block.attn.v_bias for s in seen]
        attended = []
        for q in qs:
            parts = []
            for head in range(config.heads):
                own = slice(head * d, (head + 1) * d)
                weights = torch.stack([q[own] @ k[own] for k in ks]).div(math.sqrt(d)).softmax(0)
                parts.append(sum(w * v[own] for w, v in zip(weights, vs, strict=True)))
            attended.append(block.attn.proj(torch.cat(parts)))
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        for i, x in enumerate(xs):
            hidden = block.mlp.fc1(normed(x, block.norm2))
            xs[i] = x + block.mlp.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return torch.stack([normed(x, encoder.vision_layernorm) for x in xs])


def test_the_encoder_is_a_pre_norm_transformer_over_all_patches_of_a_short_clip() -> None:
    encoder, frames = encoder_of(), torch.randn(2, 2, 3, 12, 12)
    out = encoder(frames)
    assert out.shape == (2, 2 * 9, 8)
    for row in range(2):
        assert torch.allclose(out[row], plain(encoder, frames[row]), atol=1e-5)


def test_frames_of_a_short_clip_see_each_other_and_no_other_clip() -> None:
    encoder, frames = encoder_of(), torch.randn(2, 2, 3, 12, 12)
    before = encoder(frames)
    frames[0, 1] += 1.0
    after = encoder(frames)
    assert bool(((after[0] - before[0]).abs().amax(dim=1) > 1e-5).all())
    assert torch.allclose(after[1], before[1], atol=1e-6)


def test_the_position_is_a_running_number_in_sines_and_cosines() -> None:
    table = sine_position(replace(SMALL, image_size=8))  # the grid that it was made for
    assert table.shape == (2 * 4, 8)
    for number, row in enumerate(table):
        for i in range(4):
            angle = number * 10000 ** -(2 * i / 8)
            assert float(row[2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(row[2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_larger_grid_gets_each_frames_map_enlarged() -> None:
    table = sine_position(UmtConfig()).unflatten(0, (4, 28, 28))
    trained = sine_position(UmtConfig(image_size=224)).unflatten(0, (4, 14, 14))
    assert table.shape == (4, 28, 28, 1024)
    # The slow channels are near linear in the running number, so enlarging keeps their mean; frames do not mix.
    assert torch.allclose(table[..., 700:].mean(dim=(1, 2)), trained[..., 700:].mean(dim=(1, 2)), atol=1e-3)
    # The middle of four cells of the enlarged map is the corner between cells, away from the border: bicubic weights.
    w = torch.tensor([-0.10546875, 0.87890625, 0.26171875, -0.03515625])  # a = -0.75, a quarter past the second cell
    at = trained[2, 3:7, 3:7]  # cells 3..6; output row 9 lies at 9.5 / 2 - 0.5 = 4.25
    assert torch.allclose(table[2, 9, 9], torch.einsum("y,x,yxc->c", w, w, at), atol=1e-5)


def test_images_must_be_cut_into_whole_patches() -> None:
    with pytest.raises(ValueError, match=r"multiple of vision.patch_size"):
        UmtConfig(image_size=450)
    with pytest.raises(ValueError, match=r"multiple of vision.heads"):
        UmtConfig(channels=1000)


def test_full_size_has_the_parameters_of_umt_l() -> None:
    with torch.device("meta"):
        encoder = UmtEncoder(UmtConfig())
    assert len(encoder.state_dict()) == 23 * 13 + 4  # and no position: it is computed
    assert encoder.position.device.type == "cpu"
    assert sum(p.numel() for p in encoder.parameters()) == 23 * (12 * 1024**2 + 12 * 1024) + 3 * 256 * 1024 + 3 * 1024
