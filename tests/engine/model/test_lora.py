# SPDX-License-Identifier: Apache-2.0
"""Adapters: a merged weight acts as the weight and its adapter side by side."""

import pytest
import torch

from virst_engine.model.lora import ADAPTED, SCALE, adapter_of, merge_adapter, plain_name


def test_a_merged_weight_acts_as_weight_and_adapter_side_by_side() -> None:
    weight, a, b, x = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.randn(3, 5)
    merged = merge_adapter(weight, a, b, SCALE)
    assert SCALE == 16 / 64
    assert torch.allclose(x @ merged.T, x @ weight.T + 0.25 * ((x @ a.T) @ b.T), atol=1e-5)


def test_the_sum_is_rounded_once_and_the_source_stays() -> None:
    weight = torch.randn(64, 64).bfloat16()
    a, b = torch.randn(8, 64).bfloat16(), torch.randn(64, 8).bfloat16()
    before = weight.clone()
    merged = merge_adapter(weight, a, b, 0.25)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight.float() + 0.25 * (b.float() @ a.float())).bfloat16())
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.self_attn.q_proj.lora_A.default.weight", ("layers.0.self_attn.q_proj.weight", "A")),
        ("layers.0.mlp.up_proj.lora_B.default.weight", ("layers.0.mlp.up_proj.weight", "B")),
        ("layers.0.mlp.up_proj.lora_B.weight", ("layers.0.mlp.up_proj.weight", "B")),
        ("layers.0.mlp.up_proj.weight", None),
    ],
)
def test_adapters_are_told_by_their_names(name: str, expected: tuple[str, str] | None) -> None:
    assert adapter_of(name) == expected


def test_weights_beside_adapters_have_two_names() -> None:
    assert plain_name("q_proj.base_layer.weight") == plain_name("q_proj.weight") == "q_proj.weight"
    assert len(ADAPTED) == 7
