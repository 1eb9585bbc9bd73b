# SPDX-License-Identifier: Apache-2.0
"""An engine runs only where everything that it was built from and for is the same."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.backends.exports import small_sam2, write_fake_export
from virst_engine.backends.engine_store import (
    EngineRecord,
    engine_roots,
    folder_key,
    read_engine,
    read_record,
    record_of,
    save_engine,
    usable_engines,
    writable_root,
)
from virst_engine.backends.manifest import STAGES, Manifest
from virst_engine.backends.tensorrt_api import Platform
from virst_engine.errors import BackendError, EngineMismatch

ORIN = Platform("tensorrt", "10.3.0", "Orin", ("SM87",))
RTX_BUILD = Platform("tensorrt_rtx", "1.7.1.116", "", ("SM86", "SM89"))


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_fake_export(tmp_path / "export", small_sam2())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "export"


def store(folder: Path, manifest: Manifest, platform: Platform, objects: tuple[int, ...] = (1, 4)) -> Path:
    """Engines of all stages, as `virst build` keeps them; their bytes mean nothing."""
    root = writable_root(folder) / folder_key(manifest, platform)
    for stage in STAGES:
        for n in objects:
            record = record_of(manifest, stage, n, platform, attention="free")
            save_engine(root, record, f"{stage} {n}".encode())
    return root


def refused(folder: Path, manifest: Manifest, here: Platform) -> str:
    with pytest.raises(EngineMismatch) as refusal:
        usable_engines(folder, manifest, here)
    rtx = " --rtx" if here.flavour == "tensorrt_rtx" else ""
    assert str(refusal.value).endswith(f". Build it: virst build {folder}{rtx}")
    assert str(refusal.value).count("Build it") == 1
    return str(refusal.value)


def test_engines_of_this_machine_are_found(folder: Path, manifest: Manifest) -> None:
    root = store(folder, manifest, ORIN)
    found = usable_engines(folder, manifest, ORIN)
    assert found["image_encoder"] == {0: root / "image_encoder.engine"}
    assert found["mask_decoder"] == {1: root / "mask_decoder-1.engine", 4: root / "mask_decoder-4.engine"}
    assert read_engine(found["memory_encoder"][4]) == b"memory_encoder 4"
    assert not list(root.glob("*.partial*"))


def test_the_record_says_in_clear_what_the_engine_was_made_from(folder: Path, manifest: Manifest) -> None:
    root = store(folder, manifest, ORIN)
    values = json.loads((root / "memory_attention-4.json").read_text())
    wanted = {"stage": "memory_attention", "objects": 4, "gpu": "Orin", "version": "10.3.0", "precision": "fp32"}
    assert {name: values[name] for name in wanted} == wanted
    assert values["weights_sha256"] == manifest.weights_sha256
    assert values["onnx_sha256"] == manifest.stages["memory_attention"].sha256
    assert values["inputs"]["spatial"] == {"dtype": "float32", "shape": [4, 4, 16, 4, 4]}
    assert values["engine_bytes"] == len(b"memory_attention 4")


def test_without_engines_the_message_says_where_they_would_be(folder: Path, manifest: Manifest) -> None:
    assert "there is none in" in refused(folder, manifest, ORIN)


def test_engines_of_another_gpu_are_refused(folder: Path, manifest: Manifest) -> None:
    store(folder, manifest, ORIN)
    here = replace(ORIN, gpu="NVIDIA H100 PCIe", targets=("SM90",))
    assert "was built for Orin (SM87), this is NVIDIA H100 PCIe (SM90)" in refused(folder, manifest, here)
    # A 16 and a 64 GB Orin have the same name and the same kernels; what counts is what the driver says.
    assert usable_engines(folder, manifest, ORIN)


@pytest.mark.parametrize("version", ["10.3.1", "10.4.0", "11.1.0"])
def test_engines_of_another_version_are_refused(folder: Path, manifest: Manifest, version: str) -> None:
    store(folder, manifest, ORIN)
    message = refused(folder, manifest, replace(ORIN, version=version))
    assert f"was built for tensorrt 10.3.0, this is tensorrt {version}" in message


def test_engines_of_the_other_tensorrt_are_refused(folder: Path, manifest: Manifest) -> None:
    store(folder, manifest, RTX_BUILD)
    here = Platform("tensorrt", "11.1.0", "NVIDIA RTX A4000", ("SM86",))
    assert "was built for tensorrt_rtx 1.7.1.116, this is tensorrt 11.1.0" in refused(folder, manifest, here)


def test_the_remedy_builds_for_the_tensorrt_that_is_here(folder: Path, manifest: Manifest) -> None:
    here = replace(RTX_BUILD, gpu="NVIDIA A100", targets=("SM80",))
    assert "there is none in" in refused(folder, manifest, here)
    path = store(folder, manifest, RTX_BUILD) / "mask_decoder-1.engine"
    path.write_bytes(b"mask_dec")
    with pytest.raises(EngineMismatch, match=r"is damaged.* virst build DIR --rtx$"):
        read_engine(path)
    for record in path.parent.glob("*.json"):
        record.write_text("{}")
    assert "is no record of an engine" in refused(folder, manifest, here)
    assert "is no record of an engine" in refused(folder, manifest, ORIN)


def test_rtx_engines_run_on_every_gpu_that_they_were_compiled_for(folder: Path, manifest: Manifest) -> None:
    store(folder, manifest, RTX_BUILD)
    for gpu, target in (("NVIDIA GeForce RTX 3080", "SM86"), ("NVIDIA L4", "SM89")):
        assert usable_engines(folder, manifest, replace(RTX_BUILD, gpu=gpu, targets=(target,)))
    here = replace(RTX_BUILD, gpu="NVIDIA A100", targets=("SM80",))
    assert "was built for SM86 and SM89, this is NVIDIA A100 (SM80)" in refused(folder, manifest, here)


CHANGES = {
    "weights": ({"weights_sha256": "cd" * 32}, "was built for weights abababababab, this is weights cdcdcdcdcdcd"),
    "model": ({"model": "large"}, "was built for small, this is large"),
    "precision": ({"precision": "bf16"}, "was built for fp32, this is bf16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_engines_of_another_model_are_refused(folder: Path, manifest: Manifest, change: str) -> None:
    store(folder, manifest, ORIN)
    assert CHANGES[change][1] in refused(folder, replace(manifest, **CHANGES[change][0]), ORIN)


def test_engines_of_an_older_export_are_refused(folder: Path, manifest: Manifest) -> None:
    store(folder, manifest, ORIN)
    newer = replace(manifest.stages["mask_decoder"], sha256="ef" * 32)
    message = refused(folder, replace(manifest, stages={**manifest.stages, "mask_decoder": newer}), ORIN)
    assert "no engine runs mask_decoder here" in message
    assert "this is export efefefefefef" in message


def test_the_nearest_engine_is_the_one_that_is_named(folder: Path, manifest: Manifest) -> None:
    store(folder, replace(manifest, model="other", precision="bf16"), replace(ORIN, version="8.6.1"))
    store(folder, manifest, replace(ORIN, version="10.7.0"))
    assert "was built for tensorrt 10.7.0, this is tensorrt 10.3.0" in refused(folder, manifest, ORIN)


def test_half_an_engine_is_never_read(folder: Path, manifest: Manifest) -> None:
    root = store(folder, manifest, ORIN)
    path = root / "mask_decoder-1.engine"
    path.write_bytes(b"mask_dec")  # as a copy that was cut off leaves it
    with pytest.raises(EngineMismatch, match=r"mask_decoder-1\.engine is damaged"):
        read_engine(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(EngineMismatch, match="is no record of an engine"):
        read_record(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "virst-engine-9"}'])
def test_a_record_that_is_none_is_refused(folder: Path, manifest: Manifest, text: str) -> None:
    path = store(folder, manifest, ORIN) / "mask_decoder-1.engine"
    path.with_suffix(".json").write_text(text)
    with pytest.raises(EngineMismatch, match="is no record of an engine"):
        read_record(path)


def test_a_record_that_was_made_to_fit_is_refused(folder: Path, manifest: Manifest) -> None:
    path = store(folder, manifest, ORIN) / "mask_decoder-1.engine"
    values = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**values, "gpu": "NVIDIA H100 PCIe"}))
    with pytest.raises(EngineMismatch, match="changed by hand"):
        read_record(path)


def test_a_record_of_before_a_fact_was_kept_is_refused(folder: Path, manifest: Manifest) -> None:
    path = store(folder, manifest, ORIN) / "mask_decoder-1.engine"
    values = json.loads(path.with_suffix(".json").read_text())
    del values["fused_attentions"]
    path.with_suffix(".json").write_text(json.dumps(values))
    with pytest.raises(EngineMismatch, match="does not say fused_attentions"):
        read_record(path)


def test_an_interrupted_write_leaves_the_engine_of_before(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store(folder, manifest, ORIN)
    record = record_of(manifest, "mask_decoder", 1, ORIN, attention="free")

    def fails(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        save_engine(root, record, b"a new one")
    assert read_engine(root / record.file_name) == b"mask_decoder 1"
    assert not list(root.glob("*.partial*"))


def test_a_folder_that_cannot_be_written_to_uses_the_cache(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, cache = engine_roots(folder)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != own and real(path, mode))
    root = store(folder, manifest, ORIN)
    assert root.parent == cache
    assert usable_engines(folder, manifest, ORIN)["image_encoder"][0].parent == root
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BackendError, match="can be written to; make one of them writable"):
        writable_root(folder)


def test_every_field_changes_the_key(folder: Path, manifest: Manifest) -> None:
    record = record_of(manifest, "mask_decoder", 1, ORIN, attention="free")
    others: list[EngineRecord] = [
        replace(record, **{name: value})
        for name, value in (
            ("model", "x"), ("weights_sha256", "x"), ("onnx_sha256", "x"), ("stage", "x"), ("objects", 2),
            ("precision", "x"), ("inputs", {}), ("outputs", {}), ("flavour", "x"), ("version", "x"), ("gpu", "x"),
            ("targets", ()), ("attention", "fused"),
        )
    ]  # fmt: skip
    assert len({record.key, *(other.key for other in others)}) == len(others) + 1
