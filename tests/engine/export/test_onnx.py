# SPDX-License-Identifier: Apache-2.0
"""Exported folders are complete, correct, and only then there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.backends.exports import small_sam2
from tests.engine.model.small_models import SMALL_SAM2
from virst_engine.backends.manifest import STAGES, Manifest, read_manifest, stage_path
from virst_engine.config import MemoryParameters, ModelParameters
from virst_engine.errors import BackendError, ExportError
from virst_engine.export import onnx as export
from virst_engine.export.onnx import NEVER, OPSET, PROMPT_TOKENS, export_stages
from virst_engine.model.config import sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.weights import load_segmenter, weights_sha256

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def export_small(sam2: Sam2, folder: Path, **options: object) -> Manifest:
    sizes = {"anchors_attended": 2, "recent_frames": 2, "pointers": 4, "prompt_tokens": 6}
    return export_stages(sam2, folder, name="small", weights_sha256="ab" * 32, **(sizes | options))


class Stop(Exception):
    """Ends an export that has shown what it had to."""


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    with pytest.raises(ExportError, match="no export folder"):
        read_manifest(folder)


def test_the_manifest_says_what_the_files_are(exported: Callable[[str], Path]) -> None:
    folder = exported("fp32")
    manifest, memory = read_manifest(folder), MemoryParameters()
    config = load_segmenter(ModelParameters())[0].config
    assert manifest.model == "tabletop-tiny"
    assert manifest.weights_sha256 == weights_sha256(ModelParameters())
    assert (manifest.image_size, manifest.opset, manifest.precision, manifest.values) == (128, OPSET, "fp32", "after")
    assert manifest.memory_slots == memory.anchors_attended + memory.recent_frames
    assert manifest.pointer_rows == memory.anchors_attended + memory.pointers - 1
    assert manifest.prompt_tokens == PROMPT_TOKENS
    assert manifest.multimask_prompted == config.multimask_prompted
    assert {"torch", "onnx", "onnxscript", "onnxruntime"} <= manifest.versions.keys()
    assert manifest.stages["image_encoder"].outputs["fusion"].shape == (1, 128, 32, 32)  # ST-Fusion reads level 0
    for stage in STAGES:
        model = onnx.load(str(stage_path(folder, manifest, stage)))
        onnx.checker.check_model(model, full_check=True)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert facts["stage"] == stage
        assert facts["model"] == "tabletop-tiny"
        assert facts["git_version"] == manifest.git_version
        for name in ("image_size", "memory_slots", "pointer_rows", "prompt_tokens", "precision", "weights_sha256"):
            assert facts[name] == str(getattr(manifest, name))
        operators = {node.op_type for node in model.graph.node}
        assert not operators & set(NEVER)
        assert not {entry.name for entry in model.graph.initializer} & {x.name for x in model.graph.input}
        assert [x.name for x in model.graph.input] == list(manifest.stages[stage].inputs)
        assert [x.name for x in model.graph.output] == list(manifest.stages[stage].outputs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_valid_and_where_it_may_be(exported: Callable[[str], Path], precision: str) -> None:
    folder = exported(precision)
    manifest = read_manifest(folder)
    assert manifest.values == "before"
    half = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}[precision]
    for stage in STAGES:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(stage_path(folder, manifest, stage))))
        onnx.checker.check_model(model, full_check=True)  # each operator takes these types in this opset
        borders = [*model.graph.input, *model.graph.output]
        assert half not in {x.type.tensor_type.elem_type for x in borders}
        kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        is_half = precision == "bf16" or stage in ("image_encoder", "memory_attention")
        for node in model.graph.node:
            if node.op_type in ("MatMul", "Gemm") and node.input[1] in kinds:
                # The age of pointers is counted in float32; its projection is in half as all others.
                assert (kinds[node.input[1]] == half) == is_half, (stage, node.name)
        free = {d.dim_param for x in model.graph.input for d in x.type.tensor_type.shape.dim if d.dim_param}
        assert free <= {"objects"}


@pytest.mark.slow
def test_attention_is_written_so_that_tensorrt_fuses_it(exported: Callable[[str], Path]) -> None:
    """MatMul, (Add), Softmax, MatMul with nothing in between, and queries, keys and values of one width."""
    folder = exported("fp16")
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(folder / "memory_attention.onnx"))).graph
    made = {name: node for node in graph.node for name in node.output}
    shapes = {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.value_info}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 4
    masked = 0
    for softmax in softmaxes:
        scores = made[softmax.input[0]]
        if scores.op_type == "Add":
            masked += 1
            scores = made[scores.input[0]]
        assert scores.op_type == "MatMul"
        (average,) = [node for node in graph.node if softmax.output[0] in node.input]
        assert average.op_type == "MatMul"
        assert shapes[scores.input[0]][-1] == shapes[average.input[1]][-1] == 128
    assert masked == 2


def test_a_mismatch_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """A weight changes between export and check."""
    sam2 = small_sam2()

    def change(done: int, total: int, what: str) -> None:
        if what == "check image_encoder":
            sam2.image_encoder.trunk.blocks[0].mlp.layers[0].weight.data[0] += 0.5

    with pytest.raises(ExportError, match=r"image_encoder: \w+ of the ONNX file differs from the model by"):
        export_small(sam2, tmp_path, on_step=change)
    assert_nothing_left(tmp_path)


def test_an_export_that_was_there_stays_until_the_new_one_is_good(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("fp32")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def stop(done: int, total: int, what: str) -> None:
        if what == "check image_encoder":
            raise Stop

    with pytest.raises(Stop):
        export_small(small_sam2(), folder, on_step=stop)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_a_killed_export_left_is_removed_and_one_under_way_is_not(tmp_path: Path) -> None:
    left, other = tmp_path / ".partial-abcdefgh", tmp_path / "partial-notes"
    for folder in (left, other):
        folder.mkdir()
        (folder / "image_encoder.onnx").write_bytes(b"half of a graph")
    seen: list[set[str]] = []

    def look(done: int, total: int, what: str) -> None:
        """The first export is under way here, and a second one starts."""
        seen.append({folder.name for folder in tmp_path.iterdir()})
        if len(seen) == 1:
            with pytest.raises(Stop):
                export_small(small_sam2(), tmp_path, on_step=look)
            seen.append({folder.name for folder in tmp_path.iterdir()})
        raise Stop

    with pytest.raises(Stop):
        export_small(small_sam2(), tmp_path, on_step=look)
    first, both, after = seen
    assert len(first) == 2
    assert left.name not in first
    assert len(both) == 3
    assert both > first == after
    assert {folder.name for folder in tmp_path.iterdir()} == {other.name}
    assert (other / "image_encoder.onnx").exists()


def test_a_killed_process_leaves_what_the_next_export_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from virst_engine.export.onnx import _partial_folder; "
        "_partial_folder(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120, check=False, env=environment)
    assert run.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    folder, lock = export._partial_folder(tmp_path)
    os.close(lock)
    assert list(tmp_path.iterdir()) == [folder] != [left]


@pytest.mark.slow
def test_every_step_is_told_and_pooled_keys_are_exported(tmp_path: Path) -> None:
    sam2 = small_sam2()
    sam2.pool_memory(2)
    steps: list[tuple[int, int, str]] = []
    manifest = export_small(sam2, tmp_path, on_step=lambda *step: steps.append(step))
    assert manifest.memory_pool == 2
    assert manifest == read_manifest(tmp_path)
    assert [done for done, _, _ in steps] == list(range(9))
    assert {total for _, total, _ in steps} == {8}
    assert steps[0][2] == "export image_encoder"
    assert steps[-1][2] == "done"
    assert "fusion" not in manifest.stages["image_encoder"].outputs


@pytest.mark.parametrize(
    ("score_bytes", "precision", "stages"),
    [(1, "fp32", 6), (1, "fp16", 4), (None, "fp32", 4)],
    ids=["large scores", "half precision", "small scores"],
)
def test_memory_attention_for_one_object_is_written_where_it_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score_bytes: int | None, precision: str, stages: int
) -> None:
    if score_bytes is not None:
        monkeypatch.setattr(export, "LARGE_SCORE_BYTES", score_bytes)
    totals = []

    def stop(done: int, total: int, what: str) -> None:
        totals.append(total)
        raise Stop

    with pytest.raises(Stop):
        export_small(small_sam2(), tmp_path, precision=precision, on_step=stop)
    assert totals == [2 * stages]


def test_scores_of_one_object_are_counted() -> None:
    sam2 = Sam2(SMALL_SAM2)
    cells, splits = SMALL_SAM2.grid**2, SMALL_SAM2.channels // SMALL_SAM2.memory_channels
    assert export._score_bytes(sam2, 4, 5) == 4 * cells * (4 * cells + 5 * splits)
    sam2.pool_memory(2)
    assert export._score_bytes(sam2, 4, 5) == cells * (4 * cells + 4 * 5 * splits)
    assert export._score_bytes(Sam2(sam2_1("tiny", 512)), 7, 16) > export.LARGE_SCORE_BYTES


def test_values_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    sam2 = small_sam2()
    with pytest.raises(ExportError, match="precision must be one of fp32, bf16, fp16, got 'int8'"):
        export_small(sam2, tmp_path, precision="int8")
    with pytest.raises(ExportError, match="before or after the average, got 'during'"):
        export_small(sam2, tmp_path, values="during")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export_small(sam2, tmp_path / "file")
    with torch.device("meta"):
        elsewhere = Sam2(SMALL_SAM2)
    with pytest.raises(ExportError, match="export from the CPU: the model is on meta"):
        export_small(elsewhere, tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=f"package {package} cannot be imported .* pip install"):
        export_small(small_sam2(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot_do_is_told_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"cannot export image_encoder \(RuntimeError: no such operator\)"):
        export_small(small_sam2(), tmp_path)
    assert_nothing_left(tmp_path)


def test_the_manifest_is_json_that_people_can_read(exported: Callable[[str], Path]) -> None:
    values = json.loads((exported("fp32") / "manifest.json").read_text())
    assert values["stages"]["memory_attention"]["inputs"]["spatial"] == {
        "dtype": "float32",
        "shape": ["objects", 9, 64, 8, 8],
    }
