# SPDX-License-Identifier: Apache-2.0
"""The comparison of ONNX files with the model notices what it is there for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from virst_engine.backends.manifest import OBJECTS, StageSpec, TensorSpec
from virst_engine.errors import ExportError
from virst_engine.export.onnx_graphs import StageModule
from virst_engine.export.onnx_parity import check_range, check_stage, has_constants_of, in_float32, random_inputs

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SPEC = StageSpec("x.onnx", "", {"x": TensorSpec("float32", (OBJECTS, 4))}, {"y": TensorSpec("float32", (OBJECTS, 4))})


class Scaled(StageModule):
    """y = factor * x, computed in `dtype`."""

    outputs = ("y",)

    def __init__(self, factor: float, dtype: torch.dtype = torch.float32) -> None:
        torch.nn.Module.__init__(self)
        self.factor = torch.full((4,), factor).to(dtype).float()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def write(file: Path, factor: float, dtype: str = "FLOAT") -> Path:
    kind = getattr(onnx.TensorProto, dtype)
    array = onnx.numpy_helper.from_array(np.full(4, factor, np.float32))
    values = onnx.helper.make_tensor("factor", kind, [4], onnx.numpy_helper.to_array(array).tolist())
    helper = onnx.helper
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=kind),
        helper.make_node("Mul", ["a", "factor"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [OBJECTS, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "scaled", [x], [y], [values])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(file))
    return file


def test_what_agrees_passes_and_its_difference_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "x.onnx", 0.3)
    assert check_stage("scaled", file, SPEC, Scaled(0.3), memory_frames=7, free_rows=False) < 1e-7


@pytest.mark.parametrize(("name", "runs"), [("x", 1), ("spatial", 2)])
def test_a_stage_without_rows_is_not_compared_with_fewer_of_them(tmp_path: Path, name: str, runs: int) -> None:
    """The image encoder: its largest takes a quarter of a minute for each run."""
    seen: list[torch.Size] = []

    class Watched(Scaled):
        def forward(self, **inputs: Tensor) -> Tensor:
            seen.append(inputs[name].shape)
            return super().forward(inputs[name])

    file = write(tmp_path / "x.onnx", 0.3)
    model = onnx.load(str(file))
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "rows"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "rows"
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full(1, 0.3, np.float32), "factor"))
    onnx.save(model, str(file))
    shape = TensorSpec("float32", (1, 4))
    watched = Watched(0.3)
    watched.factor = watched.factor[:1]
    check_stage(
        "scaled", file, StageSpec("x.onnx", "", {name: shape}, {"y": shape}), watched, memory_frames=7, free_rows=True
    )
    assert seen == [torch.Size((1, 4)), torch.Size((1, 2))][:runs]


@pytest.mark.parametrize("factor", [0.3001, float("nan"), float("inf")])
def test_what_differs_is_refused(tmp_path: Path, factor: float) -> None:
    file = write(tmp_path / "x.onnx", factor)
    with pytest.raises(ExportError, match=r"scaled: y of the ONNX file differs from the model by .* nothing is"):
        check_stage("scaled", file, SPEC, Scaled(0.3), memory_frames=7, free_rows=False)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    class Wider(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).repeat(1, 2)

    with pytest.raises(ExportError, match=r"y is \(1, 4\) in the ONNX file, \(1, 8\) in the model"):
        check_stage("scaled", write(tmp_path / "x.onnx", 0.3), SPEC, Wider(0.3), memory_frames=7, free_rows=False)


@pytest.mark.parametrize(("name", "dtype"), [("BFLOAT16", torch.bfloat16), ("FLOAT16", torch.float16)])
def test_half_precision_is_compared_on_any_cpu(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    file = write(tmp_path / "x.onnx", 0.3, name)
    assert has_constants_of(file, name)
    assert check_stage("scaled", file, SPEC, Scaled(0.3, dtype), memory_frames=7, free_rows=False) < 1e-7
    with pytest.raises(ExportError, match="differs"):
        check_stage("scaled", file, SPEC, Scaled(0.31, dtype), memory_frames=7, free_rows=False)
    wide = onnx.load_from_string(in_float32(file))
    assert {tensor.data_type for tensor in wide.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert {a.i for node in wide.graph.node for a in node.attribute} == {onnx.TensorProto.FLOAT}


def test_what_leaves_the_range_of_fp16_is_refused() -> None:
    """In between, too: ONNX Runtime computes fp16 in float32 on CPUs, and would not notice."""

    class ThereAndBack(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor) / self.factor

    assert 1000 < check_range("scaled", SPEC, ThereAndBack(1000.0), memory_frames=7) < 5000
    with pytest.raises(ExportError, match=r"scaled computes with numbers up to \d{6}, fp16 ends at 65504; export with"):
        check_range("scaled", SPEC, ThereAndBack(2e5), memory_frames=7)
    with pytest.raises(ExportError, match="numbers up to nan"):
        check_range("scaled", SPEC, ThereAndBack(float("nan")), memory_frames=7)


def test_inputs_leave_memories_empty_but_never_all_of_them() -> None:
    spec = StageSpec(
        "",
        "",
        {
            "spatial": TensorSpec("float32", (OBJECTS, 5, 2, 3, 3)),
            "spatial_valid": TensorSpec("bool", (OBJECTS, 5)),
            "pointer_valid": TensorSpec("bool", (OBJECTS, 5)),
            "binarize": TensorSpec("bool", (OBJECTS,)),
            "mask_logits": TensorSpec("float32", (OBJECTS, 8, 8)),
        },
        {},
    )
    inputs = random_inputs(spec, 40, seed=0, memory_frames=7)
    assert inputs["spatial"].shape == (40, 5, 2, 3, 3)
    assert inputs["spatial_valid"].any(dim=1).all()
    assert not inputs["spatial_valid"].all()
    approved = inputs["mask_logits"][inputs["binarize"]]
    assert set(approved.unique().tolist()) == {-5.0, 7.0}
    assert len(inputs["mask_logits"][~inputs["binarize"]].unique()) > 100
    again = random_inputs(spec, 40, seed=0, memory_frames=7)
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())


@pytest.mark.parametrize("memory_frames", [2, 7, 9])
def test_memories_refer_to_every_row_of_the_temporal_encoding(memory_frames: int) -> None:
    spec = StageSpec("", "", {"spatial_tpos": TensorSpec("int64", (OBJECTS, 9))}, {})
    drawn = [random_inputs(spec, 1, seed, memory_frames)["spatial_tpos"] for seed in (0, 1)]
    for rows in drawn:
        assert rows.dtype is torch.int64
        assert set(rows.flatten().tolist()) == set(range(memory_frames))
    assert random_inputs(spec, 3, 0, memory_frames)["spatial_tpos"].shape == (3, 9)


@pytest.mark.parametrize("wrong_row", range(7))
def test_a_graph_with_another_row_of_the_temporal_encoding_is_refused(tmp_path: Path, wrong_row: int) -> None:
    class Looked(StageModule):
        outputs = ("y",)

        def __init__(self, table: Tensor) -> None:
            torch.nn.Module.__init__(self)
            self.table = table

        def forward(self, spatial_tpos: Tensor) -> Tensor:
            return self.table[spatial_tpos]

    table = torch.arange(1.0, 8.0)
    changed = table.clone()
    changed[wrong_row] += 1
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "spatial_tpos"], ["y"])],
        "looked",
        [helper.make_tensor_value_info("spatial_tpos", onnx.TensorProto.INT64, [OBJECTS, 7])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [OBJECTS, 7])],
        [onnx.numpy_helper.from_array(changed.numpy(), "table")],
    )
    file = tmp_path / "x.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(file))
    spec = StageSpec(
        "x.onnx",
        "",
        {"spatial_tpos": TensorSpec("int64", (OBJECTS, 7))},
        {"y": TensorSpec("float32", (OBJECTS, 7))},
    )
    assert check_stage("looked", file, spec, Looked(changed), memory_frames=7, free_rows=False) == 0.0
    with pytest.raises(ExportError, match="looked: y of the ONNX file differs"):
        check_stage("looked", file, spec, Looked(table), memory_frames=7, free_rows=False)
