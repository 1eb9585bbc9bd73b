# SPDX-License-Identifier: Apache-2.0
"""`virst build` compiles what was exported and nothing else, once, and with the attention that was asked for.

TensorRT 10 and 11 are fakes that follow the documented interfaces; TensorRT-RTX is the real one, which compiles
without a GPU.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.backends.exports import attention_layers, small_sam2, write_fake_export
from tests.engine.backends.fake_tensorrt import AttentionNetwork, HostMemory, fake_tensorrt, graph_of, read_graph
from virst_engine.backends.engine_store import EngineRecord, read_record, record_of
from virst_engine.backends.manifest import (
    STAGES,
    Manifest,
    StageSpec,
    TensorSpec,
    file_sha256,
    read_manifest,
    write_manifest,
)
from virst_engine.backends.tensorrt_api import TensorRt
from virst_engine.errors import BackendError, ExportError
from virst_engine.export import tensorrt as building
from virst_engine.export.tensorrt import BuiltEngine, build_engines, compile_stage, require_fused_attention

TARGETS = ("SM86", "SM89")
FLAVOURS = [("tensorrt", "10.3.0"), ("tensorrt", "10.14.1"), ("tensorrt", "11.1.0"), ("tensorrt_rtx", "1.7.1.116")]
HAVE_ATTENTION = FLAVOURS[1:]


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself builds only where there is one."""
    monkeypatch.setattr(building, "gpu_here", lambda device: HostMemory().describe())


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: " ".join(flavour))
def trt(request: pytest.FixtureRequest) -> TensorRt:
    return TensorRt(fake_tensorrt(*request.param))


def build(folder: Path, trt: TensorRt, **options: Any) -> tuple[BuiltEngine, ...]:
    if trt.is_rtx:
        options = {"targets": TARGETS, **options}
    return build_engines(folder, tensorrt=trt, **{"objects": (1, 4), **options})


def called(trt: TensorRt, what: str) -> list[Any]:
    return [values for name, *values in trt.module.calls if name == what]


def test_one_engine_per_stage_and_number_of_objects(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2(), "fp16")
    steps = []
    built = build(tmp_path, trt, on_step=lambda done, total, what: steps.append((done, total, what)))
    names = [engine.path.name for engine in built]
    assert names == [
        "image_encoder.engine",
        *(f"{stage}-{n}.engine" for stage in STAGES[1:] for n in (1, 4)),
    ]
    assert steps[0] == (0, 7, "image_encoder")
    assert steps[2] == (2, 7, "memory_attention for 4 objects")
    assert steps[-1] == (7, 7, "done")
    for engine in built:
        assert read_record(engine.path) == engine.record
        assert not engine.kept
    plan = json.loads(next(e.path for e in built if e.path.name == "memory_attention-4.engine").read_bytes())
    assert plan["tensors"]["spatial"] == ["FLOAT", [4, 4, 16, 4, 4], "in"]
    assert plan["tensors"]["top"] == ["FLOAT", [1, 32, 4, 4], "in"]


def test_engines_name_the_gpu_or_the_targets(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    record = build(tmp_path, trt)[0].record
    assert (record.flavour, record.version) == (trt.flavour, trt.version)
    if trt.is_rtx:
        assert (record.gpu, record.targets) == ("", TARGETS)
        assert called(trt, "target")[:2] == [["SM86"], ["SM89"]]
    else:
        assert (record.gpu, record.targets) == ("Fake RTX 3080", ("SM86",))


def test_targets_may_be_written_in_small_letters(tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    trt = TensorRt(fake_tensorrt("tensorrt_rtx", "1.7.1.116"))
    assert build(tmp_path, trt, targets=("sm89", " sm86"))[0].record.targets == TARGETS


def test_valid_engines_are_kept(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2(), "bf16")
    first = build(tmp_path, trt)
    stamps = {engine.path: engine.path.stat().st_mtime_ns for engine in first}
    steps = []
    second = build(tmp_path, trt, on_step=lambda done, total, what: steps.append(what))
    assert all(engine.kept for engine in second)
    assert {engine.path: engine.path.stat().st_mtime_ns for engine in second} == stamps
    assert [engine.fused_attentions for engine in second] == [engine.fused_attentions for engine in first]
    assert steps[0] == "image_encoder: kept"
    assert len(called(trt, "build")) == 7


def test_force_builds_again(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    build(tmp_path, trt)
    assert not any(engine.kept for engine in build(tmp_path, trt, force=True))
    assert len(called(trt, "build")) == 14


def test_a_damaged_engine_is_built_again_and_a_new_number_of_objects_is_added(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    (broken, *_) = build(tmp_path, trt)
    broken.path.write_bytes(b"half")
    again = build(tmp_path, trt, objects=(1, 4, 8))
    assert [engine.path.name for engine in again if not engine.kept] == [
        "image_encoder.engine", "memory_attention-8.engine", "mask_decoder-8.engine", "memory_encoder-8.engine",
    ]  # fmt: skip


def test_another_export_is_built_beside(trt: TensorRt, tmp_path: Path) -> None:
    manifest = write_fake_export(tmp_path, small_sam2())
    old = build(tmp_path, trt)
    write_manifest(tmp_path, replace(manifest, weights_sha256="cd" * 32))
    new = build(tmp_path, trt)
    assert not any(engine.kept for engine in new)
    assert {engine.path.parent for engine in old}.isdisjoint({engine.path.parent for engine in new})


def test_memory_for_intermediate_results_can_be_limited(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    build(tmp_path, trt)
    assert called(trt, "workspace") == []
    build(tmp_path, trt, workspace_mib=512, force=True)
    assert called(trt, "workspace") == [[512 << 20]] * 7


# ---- fused attention ----


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_memory_attention_in_half_precision_is_built_fused(trt: TensorRt, tmp_path: Path, precision: str) -> None:
    write_fake_export(tmp_path, small_sam2(), precision)
    built = {engine.path.stem: engine for engine in build(tmp_path, trt)}
    can = (trt.flavour, trt.version) != ("tensorrt", "10.3.0")
    assert built["memory_attention-4"].record.attention == "fused"
    assert built["memory_attention-4"].fused_attentions == (2 if can else 0)
    assert built["mask_decoder-4"].record.attention == "free"


def test_the_products_around_each_softmax_become_one_attention(tmp_path: Path) -> None:
    module = fake_tensorrt("tensorrt", "11.1.0")
    network = parsed(attention_layers("float16"))
    assert require_fused_attention(module, network) == 2
    own, cross = network.attentions
    assert not own.decomposable
    assert not cross.decomposable
    made = {layer.get_output(0).name: layer for layer in network.layers}

    def source(tensor: Any) -> str:
        """What was reshaped or turned into it."""
        return made[tensor.name].get_input(0).name

    for attention in (own, cross):  # one head's queries dealt to two, over the same keys
        assert attention.inputs[0].shape == (1, 2, 8, 32)
    assert (source(own.inputs[0]), own.inputs[2].name, own.mask) == ("q", "v", None)
    assert (source(own.inputs[1]), own.inputs[1].shape) == ("kt", (1, 1, 16, 32))
    assert (source(cross.inputs[1]), cross.inputs[1].shape) == ("memory_kt", (1, 1, 80, 32))
    assert (cross.inputs[2].name, cross.mask.name) == ("memory_v", "bias")
    # The first one's result is the second one's query, and the second one's goes where the old product's went.
    assert source(made[source(cross.inputs[0])].get_output(0)) == "attention_0"
    last = made["out"].get_input(0)
    assert (source(last), last.shape) == ("attention_1", (1, 1, 16, 32))


@pytest.mark.parametrize(
    ("change", "query_shape"),
    [
        ({"q": [1, 2, 16, 32], "self_average": [1, 2, 16, 32]}, (1, 2, 16, 32)),  # has two heads
        ({"q": [1, 1, 15, 32], "self_average": [1, 1, 15, 32]}, (1, 1, 15, 32)),  # cannot be halved
        ({"bias": [1, 1, 16, 80]}, (1, 1, 16, 32)),  # a mask for each query
    ],
)
def test_queries_that_cannot_be_dealt_to_two_heads_stay_together(
    change: dict[str, list[int]], query_shape: tuple[int, ...]
) -> None:
    layers = attention_layers("float16")
    for layer in layers:
        layer[4] = change.get(layer[1], layer[4])
    network = parsed(layers)
    require_fused_attention(fake_tensorrt("tensorrt", "11.1.0"), network)
    assert network.attentions[1].inputs[0].shape == query_shape


def parsed(layers: list[list[Any]]) -> AttentionNetwork:
    network = AttentionNetwork(2)
    tensors = {name: TensorSpec("float32", (1,)) for name in ("top", "spatial", "spatial_valid")}
    read_graph(network, json.loads(graph_of("memory_attention", StageSpec("", "", tensors, {}), layers)))
    return network


def test_what_stands_between_softmax_and_product_is_named() -> None:
    network = parsed(attention_layers("float16", between="UNARY"))
    with pytest.raises(ExportError, match=r"softmax cannot become one .* beside isnan \(UNARY\).*again"):
        require_fused_attention(fake_tensorrt("tensorrt", "11.1.0"), network)


def test_a_shuffle_that_turns_scores_is_no_attention() -> None:
    layers = attention_layers("float16")
    same = next(layer for layer in layers if layer[1] == "same")
    same[5] = {"first_transpose": [0, 1, 3, 2, 4, 5, 6, 7]}
    with pytest.raises(ExportError, match=r"self_softmax .* beside same \(SHUFFLE\)"):
        require_fused_attention(fake_tensorrt("tensorrt", "11.1.0"), parsed(layers))


def test_scores_that_are_scaled_instead_of_shifted_are_no_attention() -> None:
    layers = attention_layers("float16")
    next(layer for layer in layers if layer[1] == "masked")[5] = {"op": "PROD"}
    with pytest.raises(ExportError, match=r"softmax .* beside masked \(ELEMENTWISE\)"):
        require_fused_attention(fake_tensorrt("tensorrt", "11.1.0"), parsed(layers))


def test_an_attention_that_nothing_reads_is_not_taken_for_fused() -> None:
    layers = attention_layers("float16")[:-1]
    with pytest.raises(ExportError, match="what it averages is an output of the whole stage"):
        require_fused_attention(fake_tensorrt("tensorrt", "11.1.0"), parsed(layers))


def test_values_of_another_width_are_no_attention() -> None:
    layers = attention_layers("float16")
    next(layer for layer in layers if layer[1] == "memory_v")[4] = [1, 1, 80, 8]
    with pytest.raises(ExportError, match="queries have 32 channels and values 8"):
        require_fused_attention(fake_tensorrt("tensorrt", "11.1.0"), parsed(layers))


@pytest.mark.parametrize("flavour", HAVE_ATTENTION, ids=" ".join)
def test_a_gpu_without_a_fused_kernel_is_named_with_the_way_out(tmp_path: Path, flavour: tuple[str, str]) -> None:
    write_fake_export(tmp_path, small_sam2(), "fp16")
    trt = TensorRt(fake_tensorrt(*flavour))
    trt.module.build_error = "decompose_composite_ops.cpp:59: CHECK(composite_op->is_decomposable()) failed."
    with pytest.raises(BackendError, match=r"cannot build image_encoder for .*decompose_composite_ops"):
        build(tmp_path, trt)  # not about attention that was required
    wanted = record(tmp_path, trt, "memory_attention")
    with pytest.raises(BackendError, match=r"no fused attention kernel for memory_attention \(fp16\).*--unfused"):
        compile_stage(trt, tmp_path / "memory_attention.onnx", wanted)
    trt.module.build_error = "the mask is not broadcastable"
    with pytest.raises(BackendError, match=r"cannot build memory_attention .*not broadcastable; with --unfused"):
        compile_stage(trt, tmp_path / "memory_attention.onnx", wanted)


def record(folder: Path, trt: TensorRt, stage: str, attention: str = "fused") -> EngineRecord:
    return record_of(read_manifest(folder), stage, 1, trt.platform("Fake RTX 3080", "SM86"), attention)


def test_fusion_can_be_left_to_tensorrt(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2(), "fp16")
    built = {engine.path.stem: engine for engine in build(tmp_path, trt, require_fused=False)}
    assert built["memory_attention-4"].record.attention == "free"
    assert all(engine.fused_attentions == 0 for engine in built.values())
    assert not any(engine.kept for engine in build(tmp_path, trt) if engine.record.stage == "memory_attention")


# ---- what is refused ----


def test_a_changed_onnx_file_is_refused_before_anything_is_built(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    with (tmp_path / "memory_encoder.onnx").open("a") as file:
        file.write(" ")
    with pytest.raises(ExportError, match="is not the memory_encoder that was exported with small"):
        build(tmp_path, trt)
    assert called(trt, "build") == []


def test_a_file_that_tensorrt_cannot_read_is_named(trt: TensorRt, tmp_path: Path) -> None:
    manifest = write_fake_export(tmp_path, small_sam2())
    rewrite(tmp_path, manifest, "image_encoder", "no graph")
    with pytest.raises(BackendError, match=r"cannot read .*image_encoder\.onnx: Failed to parse the ONNX model"):
        build(tmp_path, trt)


def rewrite(folder: Path, manifest: Manifest, stage: str, text: str) -> None:
    """Put another ONNX file in place, and let the manifest vouch for it."""
    file = folder / f"{stage}.onnx"
    file.write_text(text)
    spec = replace(manifest.stages[stage], sha256=file_sha256(file))
    write_manifest(folder, replace(manifest, stages={**manifest.stages, stage: spec}))


@pytest.mark.parametrize(
    ("side", "name", "spec", "message"),
    [
        ("in", "pixels", ["float16", [1, 3, 64, 64]], r"input pixels is float16 \[1, 3, 64, 64\] in the ONNX file"),
        ("in", "pixels", ["float32", [1, 3, 32, 32]], r"float32 \[1, 3, 64, 64\] in the manifest"),
        ("out", "other", ["float32", [1]], "output other is .* in the ONNX file, missing in the manifest"),
    ],
)
def test_tensors_that_are_not_those_of_the_manifest_are_refused(
    trt: TensorRt, tmp_path: Path, side: str, name: str, spec: list[Any], message: str
) -> None:
    manifest = write_fake_export(tmp_path, small_sam2())
    graph = json.loads((tmp_path / "image_encoder.onnx").read_text())
    graph[side][name] = spec
    rewrite(tmp_path, manifest, "image_encoder", json.dumps(graph))
    with pytest.raises(ExportError, match=message):
        build(tmp_path, trt)


@pytest.mark.parametrize(
    ("precision", "stage", "dtype", "message"),
    [
        ("fp16", "mask_decoder", "float16", "mask_decoder computes in float16, and its errors would grow"),
        ("fp16", "memory_encoder", "float16", "memory_encoder computes in float16, and its errors would grow"),
        ("fp16", "image_encoder", "bfloat16", "computes in bfloat16, and the manifest says fp16"),
        ("fp16", "image_encoder", "float32", "does not compute in fp16, as the manifest says"),
        ("bf16", "memory_encoder", "float16", "computes in float16, and the manifest says bf16"),
        ("bf16", "image_encoder", "float32", "does not compute in bf16, as the manifest says"),
        ("fp32", "image_encoder", "float16", "computes in float16, and the manifest says fp32"),
        ("fp32", "mask_decoder", "bfloat16", "computes in bfloat16, and the manifest says fp32"),
    ],
)
def test_precision_is_held_to(
    trt: TensorRt, tmp_path: Path, precision: str, stage: str, dtype: str, message: str
) -> None:
    manifest = write_fake_export(tmp_path, small_sam2(), precision)
    graph = json.loads((tmp_path / f"{stage}.onnx").read_text())
    graph["layers"] = [["CAST", "work", [next(iter(graph["in"]))], dtype, [1], {}]]
    rewrite(tmp_path, manifest, stage, json.dumps(graph))
    with pytest.raises(ExportError, match=message):
        build(tmp_path, trt)


@pytest.mark.parametrize("objects", [(), (0, 1), (-1,)])
def test_numbers_of_objects_below_one_are_refused(trt: TensorRt, tmp_path: Path, objects: tuple[int, ...]) -> None:
    write_fake_export(tmp_path, small_sam2())
    with pytest.raises(BackendError, match="numbers of objects of 1 or more"):
        build(tmp_path, trt, objects=objects)


def test_targets_are_for_rtx_and_must_be_known(trt: TensorRt, tmp_path: Path) -> None:
    write_fake_export(tmp_path, small_sam2())
    with pytest.raises(BackendError, match=r"--target is for TensorRT-RTX|has no code for SM87, only for SM75, SM80"):
        build(tmp_path, trt, targets=("SM87",))


def test_without_gpu_rtx_wants_targets_and_tensorrt_cannot_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fake_export(tmp_path, small_sam2())
    monkeypatch.undo()  # no GPU for `building` either
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no GPU here: say what to compile for with --target, one or more of SM75"):
        build_engines(tmp_path, tensorrt=TensorRt(fake_tensorrt("tensorrt_rtx", "1.7.1.116")))
    with pytest.raises(BackendError, match="need an NVIDIA GPU, and torch finds none"):
        build_engines(tmp_path, tensorrt=TensorRt(fake_tensorrt("tensorrt", "11.1.0")))


# ---- the real TensorRT-RTX ----


KERNEL = b"_gemm_mha_v2"  # in a plan: one fused attention kernel
SOFTMAX = b"MaxrSubExpSum"  # a softmax of its own, between two products that write and read the scores


def attention_onnx(
    path: Path, dtype: str, *, objects: int = 1, grid: int = 64, values: int = 256, nan_check: bool = False
) -> EngineRecord:
    """The core of SAM 2's memory attention with its key mask: 9 memories and 18 pointers; grid 64 is 1024 pixels."""
    onnx = pytest.importorskip("onnx")
    o, queries = objects, grid * grid
    keys = 9 * queries + 18 * 4
    shapes = {"q": [o, 1, queries, 256], "k": [o, 1, keys, 256], "v": [o, 1, keys, values], "bias": [o, 1, 1, keys]}
    kind = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[dtype]

    def value(name: str, shape: list[int]) -> Any:
        return onnx.helper.make_tensor_value_info(name, kind, ["objects", *shape[1:]])

    node = onnx.helper.make_node
    nodes = [
        node("Mul", ["q", "scale"], ["scaled"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["scaled", "kt"], ["scores"]),
        node("Add", ["scores", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
    ]
    if nan_check:  # as torch.onnx writes scaled_dot_product_attention with a mask of booleans
        nodes += [node("IsNaN", ["p"], ["isnan"]), node("Where", ["isnan", "zero", "p"], ["p2"])]
    nodes += [node("MatMul", ["p2" if nan_check else "p", "v"], ["average"]), node("Relu", ["average"], ["out"])]
    constants = [onnx.helper.make_tensor(name, kind, [], [x]) for name, x in (("scale", 1 / 16), ("zero", 0.0))]
    out = [o, 1, queries, values]
    graph = onnx.helper.make_graph(
        nodes, "core", [value(*item) for item in shapes.items()], [value("out", out)], constants
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path)
    return EngineRecord(
        model="core", weights_sha256="", onnx_sha256="", stage="memory_attention", objects=o,
        precision={"float32": "fp32", "float16": "fp16"}[dtype],
        inputs={name: TensorSpec(dtype, tuple(shape)) for name, shape in shapes.items()},
        outputs={"out": TensorSpec(dtype, tuple(out))},
        flavour="tensorrt_rtx", version="", gpu="", targets=TARGETS, attention="fused",
    )  # fmt: skip


@pytest.mark.parametrize("grid", [64, 48, 32, 8], ids=["1024 px", "768 px", "512 px", "128 px"])
@pytest.mark.parametrize("objects", [1, 8])
def test_rtx_has_a_fused_kernel_for_memory_attention(rtx: TensorRt, tmp_path: Path, grid: int, objects: int) -> None:
    record = attention_onnx(tmp_path / "core.onnx", "float16", objects=objects, grid=grid)
    plan, fused = compile_stage(rtx, tmp_path / "core.onnx", record)
    assert fused == 1
    assert KERNEL in plan
    assert SOFTMAX not in plan


def test_rtx_on_its_own_would_not_fuse_one_object_at_512_pixels(rtx: TensorRt, tmp_path: Path) -> None:
    """Why queries are dealt to two heads."""
    record = attention_onnx(tmp_path / "core.onnx", "float16", grid=32)
    plan, _ = compile_stage(rtx, tmp_path / "core.onnx", replace(record, attention="free"))
    assert SOFTMAX in plan


def test_rtx_refuses_what_it_would_have_to_decompose(rtx: TensorRt, tmp_path: Path) -> None:
    record = attention_onnx(tmp_path / "core.onnx", "float32")
    with pytest.raises(BackendError, match=r"no fused attention kernel for memory_attention \(fp32\) on SM86 and SM89"):
        compile_stage(rtx, tmp_path / "core.onnx", record)
    plan, fused = compile_stage(rtx, tmp_path / "core.onnx", replace(record, attention="free"))
    assert fused == 0
    assert KERNEL not in plan
    assert SOFTMAX in plan


def test_rtx_without_the_gate_takes_values_of_another_width_and_decomposes(rtx: TensorRt, tmp_path: Path) -> None:
    """Why the gate is there: nothing is said, and 150 million scores per object travel through memory."""
    record = attention_onnx(tmp_path / "core.onnx", "float16", values=64)
    with pytest.raises(ExportError, match="queries have 256 channels and values 64"):
        compile_stage(rtx, tmp_path / "core.onnx", record)
    plan, _ = compile_stage(rtx, tmp_path / "core.onnx", replace(record, attention="free"))
    assert KERNEL not in plan
    assert SOFTMAX in plan


def test_rtx_networks_are_read_as_the_fakes_are(rtx: TensorRt, tmp_path: Path) -> None:
    record = attention_onnx(tmp_path / "core.onnx", "float16", nan_check=True)
    with pytest.raises(ExportError, match=r"cannot become one fused attention: it stands beside .* \(UNARY\)"):
        compile_stage(rtx, tmp_path / "core.onnx", record)
