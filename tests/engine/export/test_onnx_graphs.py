# SPDX-License-Identifier: Apache-2.0
"""What is changed about a model before its export changes none of its numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.engine.backends.exports import small_sam2
from tests.engine.model.small_models import SMALL_SAM2
from virst_engine.backends.manifest import STAGES
from virst_engine.errors import ExportError
from virst_engine.export.onnx import _specs
from virst_engine.export.onnx_graphs import (
    CONVOLUTIONS,
    ExportableFunctions,
    StageModule,
    for_export,
    rounded,
    stage_dtype,
    stage_module,
    with_tables,
)
from virst_engine.export.onnx_parity import random_inputs
from virst_engine.model.config import sam2_1
from virst_engine.model.sam2 import Sam2

LEVELS_APART = replace(SMALL_SAM2, top_down_levels=(2, 3))
ALL_LEVELS = replace(SMALL_SAM2, top_down_levels=(0, 1, 2, 3))


def outputs(module: StageModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = module(**inputs)
    return dict(zip(module.outputs, found if isinstance(found, tuple) else (found,), strict=True))


@pytest.mark.parametrize("values", ["before", "after"])
@pytest.mark.parametrize("fusion_level", [None, 0, 1])
@pytest.mark.parametrize("config", [LEVELS_APART, ALL_LEVELS], ids=["sam2's FPN", "FPN down to level 0"])
def test_what_is_computed_once_gives_the_same_numbers(config: object, fusion_level: int | None, values: str) -> None:
    sam2 = small_sam2(config)
    specs = _specs(sam2, 4, 5, 6, fusion_level)
    baked = for_export(with_tables(sam2), values=values, fusion_level=fusion_level)
    for stage in specs:
        inputs = random_inputs(specs[stage], 3, seed=1, memory_frames=sam2.config.memory_frames)
        wanted = outputs(stage_module(sam2, stage, torch.float32, fusion_level), inputs)
        with ExportableFunctions(torch.float32):
            found = outputs(stage_module(baked, stage, torch.float32, fusion_level), inputs)
        assert found.keys() == wanted.keys()
        assert list(found) == list(specs[stage].outputs)
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, atol=2e-5 * float(tensor.abs().max())), (stage, name)


def test_two_convolutions_in_a_row_become_one_where_nobody_looks_in_between() -> None:
    def folded(config: object, fusion_level: int | None) -> list[bool]:
        decoder = for_export(
            with_tables(small_sam2(config)), values="before", fusion_level=fusion_level
        ).sam_mask_decoder
        return [isinstance(layer, nn.Identity) for layer in (decoder.conv_s0, decoder.conv_s1)]

    assert folded(LEVELS_APART, None) == [True, True]
    assert folded(LEVELS_APART, 0) == [False, True]
    assert folded(LEVELS_APART, 1) == [True, False]
    assert folded(ALL_LEVELS, None) == [False, False]
    assert folded(replace(SMALL_SAM2, top_down_levels=(1, 2, 3)), None) == [True, False]
    assert folded(replace(SMALL_SAM2, top_down_levels=(0, 2, 3)), None) == [False, False]  # 0 adds what 1 is


def test_the_model_itself_stays_as_it_is() -> None:
    sam2 = small_sam2()
    before = {name: value.clone() for name, value in sam2.state_dict().items()}
    rounded(for_export(with_tables(sam2), values="after"), torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in sam2.state_dict().items())
    assert all(layer.self_attn.projects_values_first for layer in sam2.memory_attention.layers)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_only_the_stages_that_may_compute_in_half(precision: str) -> None:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    sam2 = small_sam2()
    specs = _specs(sam2, 4, 5, 6, None)
    for stage in STAGES:
        dtype = stage_dtype(stage, precision)
        assert dtype is (torch.float32 if precision == "fp16" and stage.startswith("mask") else dtype)
        baked = rounded(for_export(with_tables(sam2), values="before"), dtype)
        inputs = random_inputs(specs[stage], 2, seed=2, memory_frames=sam2.config.memory_frames)
        with ExportableFunctions(dtype):
            found = outputs(stage_module(baked, stage, dtype), inputs)
        wanted = outputs(stage_module(rounded(with_tables(sam2), dtype).float(), stage, torch.float32), inputs)
        for name, tensor in found.items():
            assert tensor.dtype is torch.float32, "borders are float32"
            assert torch.isfinite(tensor).all()
            assert tensor.shape == wanted[name].shape
    assert [stage_dtype(stage, "fp16") for stage in STAGES] == [torch.float16, torch.float16] + [torch.float32] * 2
    assert {stage_dtype(stage, "bf16") for stage in STAGES} == {torch.bfloat16}
    modules = rounded(with_tables(sam2), half).modules()
    kinds = {p.dtype for m in modules if isinstance(m, CONVOLUTIONS) for p in m.parameters()}
    assert kinds == {torch.float32 if precision == "bf16" else half}  # opset 18 has no convolution in bfloat16


def test_distances_of_pointers_are_exact_in_half_precision() -> None:
    """bfloat16 counts 256, 258, 260: a memory of 257 steps ago must not look like one of 256."""
    sam2 = Sam2(replace(sam2_1("tiny", 64), pointer_distance_limit=0)).eval()
    module = stage_module(
        rounded(for_export(with_tables(sam2), values="before"), torch.bfloat16), "memory_attention", torch.bfloat16
    )
    seen: list[Tensor] = []
    module.sam2.obj_ptr_tpos_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    inputs = random_inputs(
        _specs(sam2, 3, 4, 6, None)["memory_attention"], 1, seed=0, memory_frames=sam2.config.memory_frames
    )
    inputs["pointer_distance"] = torch.tensor([[256.0, 257.0, 258.0, 259.0]])
    with ExportableFunctions(torch.bfloat16):
        outputs(module, inputs)
    rows = seen[0][0]
    assert all(not torch.equal(rows[i], rows[i + 1]) for i in range(3))


def test_attention_that_has_no_exportable_form_is_refused() -> None:
    q = torch.randn(1, 1, 4, 8)
    with ExportableFunctions(torch.float32), pytest.raises(ExportError, match="bias of floats"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, torch.ones(4, 4, dtype=torch.bool))
