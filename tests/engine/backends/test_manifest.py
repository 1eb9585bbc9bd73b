# SPDX-License-Identifier: Apache-2.0
"""An export folder is taken for what its manifest says, or not at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.backends.exports import small_sam2, write_fake_export
from virst_engine.backends.manifest import FILE, STAGES, Manifest, read_manifest, stage_path, write_manifest
from virst_engine.errors import ExportError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_fake_export(tmp_path_factory.mktemp("small"), small_sam2())


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    write_manifest(tmp_path, manifest)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / FILE).read_text())
    edit(values)
    (folder / FILE).write_text(json.dumps(values))


def test_what_was_written_is_read(manifest: Manifest, folder: Path) -> None:
    assert read_manifest(folder) == manifest
    assert [path.name for path in folder.iterdir()] == [FILE]  # nothing half-written stays


def test_sizes_come_from_the_tensors(manifest: Manifest) -> None:
    assert manifest.sizes == replace(small_sam2().sizes, prompt_tokens=manifest.prompt_tokens)


def test_only_the_image_encoder_has_no_object_axis(manifest: Manifest) -> None:
    assert [name for name in STAGES if not manifest.stages[name].has_objects] == ["image_encoder"]
    spec = manifest.stages["memory_attention"]
    assert spec.inputs["spatial"].for_objects(3)[0] == 3
    assert spec.inputs["top"].for_objects(3)[0] == 1


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no export folder: it has no manifest\.json\. Make one: virst export"):
        read_manifest(tmp_path)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda m: m.update(format="virst-stages-9"), "format 'virst-stages-9', this version reads"),
    "a stage less": (lambda m: m["stages"].pop("mask_decoder"), "lacks the stage mask_decoder"),
    "no precision": (lambda m: m.pop("precision"), "cannot be read .*precision"),
    "an unknown precision": (lambda m: m.update(precision="int8"), "must be one of fp32, bf16, fp16, got 'int8'"),
    "an unknown dtype": (lambda m: m["stages"]["mask_decoder"]["inputs"]["sparse"].update(dtype="int4"), "'int4'"),
    "a size below one": (lambda m: m["stages"]["mask_decoder"]["outputs"]["iou"].update(shape=[0]), r"got \(0,\)"),
    "another folder": (lambda m: m["stages"]["mask_decoder"].update(file="../x.onnx"), "in the export folder itself"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_we_cannot_use_is_refused(folder: Path, edit: str) -> None:
    change(folder, EDITS[edit][0])
    with pytest.raises(ExportError, match=EDITS[edit][1]) as refusal:
        read_manifest(folder)
    assert "virst export" in str(refusal.value)


def test_text_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / FILE).write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        read_manifest(folder)


def test_a_changed_or_foreign_file_is_refused(tmp_path: Path) -> None:
    manifest = write_fake_export(tmp_path, small_sam2())
    assert stage_path(tmp_path, manifest, "mask_decoder") == tmp_path / "mask_decoder.onnx"
    with (tmp_path / "mask_decoder.onnx").open("a") as file:
        file.write(" ")
    with pytest.raises(ExportError, match=r"is not the mask_decoder that was exported with small: .*export it again"):
        stage_path(tmp_path, manifest, "mask_decoder")
    (tmp_path / "mask_decoder.onnx").unlink()
    with pytest.raises(ExportError, match="is missing"):
        stage_path(tmp_path, manifest, "mask_decoder")
