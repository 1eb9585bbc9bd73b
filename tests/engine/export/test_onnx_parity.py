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
    assert check_stage("scaled", file, SPEC, Scaled(0.3), free_rows=False) < 1e-7


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
    check_stage("scaled", file, StageSpec("x.onnx", "", {name: shape}, {"y": shape}), watched, free_rows=True)
    assert seen == [torch.Size((1, 4)), torch.Size((1, 2))][:runs]


@pytest.mark.parametrize("factor", [0.3001, float("nan"), float("inf")])
def test_what_differs_is_refused(tmp_path: Path, factor: float) -> None:
    file = write(tmp_path / "x.onnx", factor)
    with pytest.raises(ExportError, match=r"scaled: y of the ONNX file differs from the model by .* nothing is"):
        check_stage("scaled", file, SPEC, Scaled(0.3), free_rows=False)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    class Wider(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).repeat(1, 2)

    with pytest.raises(ExportError, match=r"y is \(1, 4\) in the ONNX file, \(1, 8\) in the model"):
        check_stage("scaled", write(tmp_path / "x.onnx", 0.3), SPEC, Wider(0.3), free_rows=False)


@pytest.mark.parametrize(("name", "dtype"), [("BFLOAT16", torch.bfloat16), ("FLOAT16", torch.float16)])
def test_half_precision_is_compared_on_any_cpu(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    file = write(tmp_path / "x.onnx", 0.3, name)
    assert has_constants_of(file, name)
    assert check_stage("scaled", file, SPEC, Scaled(0.3, dtype), free_rows=False) < 1e-7
    with pytest.raises(ExportError, match="differs"):
        check_stage("scaled", file, SPEC, Scaled(0.31, dtype), free_rows=False)
    wide = onnx.load_from_string(in_float32(file))
    assert {tensor.data_type for tensor in wide.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert {a.i for node in wide.graph.node for a in node.attribute} == {onnx.TensorProto.FLOAT}


def test_what_leaves_the_range_of_fp16_is_refused() -> None:
    """In between, too: ONNX Runtime computes fp16 in float32 on CPUs, and would not notice."""

    class ThereAndBack(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor) / self.factor

    assert 1000 < check_range("scaled", SPEC, ThereAndBack(1000.0)) < 5000
    with pytest.raises(ExportError, match=r"scaled computes with numbers up to \d{6}, fp16 ends at 65504; export with"):
        check_range("scaled", SPEC, ThereAndBack(2e5))
    with pytest.raises(ExportError, match="numbers up to nan"):
        check_range("scaled", SPEC, ThereAndBack(float("nan")))


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
    inputs = random_inputs(spec, 40, seed=0)
    assert inputs["spatial"].shape == (40, 5, 2, 3, 3)
    assert inputs["spatial_valid"].any(dim=1).all()
    assert not inputs["spatial_valid"].all()
    approved = inputs["mask_logits"][inputs["binarize"]]
    assert set(approved.unique().tolist()) == {-5.0, 7.0}
    assert len(inputs["mask_logits"][~inputs["binarize"]].unique()) > 100
    again = random_inputs(spec, 40, seed=0)
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())
