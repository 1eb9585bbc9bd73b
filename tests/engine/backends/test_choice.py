# SPDX-License-Identifier: Apache-2.0
"""Which backend runs the stages, and what is refused; the backends themselves have tests of their own."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.backends.exports import small_sam2, write_fake_export
from tests.fakes import FakeStages
from virst_engine.backends import choice
from virst_engine.backends.manifest import read_manifest, write_manifest
from virst_engine.config import EngineParameters, MemoryParameters, ModelParameters
from virst_engine.errors import BackendError, ExportError

MODEL = ModelParameters(name="tabletop-tiny")
DIGEST = "ab" * 32
SMALL = MemoryParameters(anchors_attended=2, anchor_slots=2, recent_frames=2, pointers=4)  # what the fake export holds


class Built(FakeStages):
    """Stands for the stages of one backend."""

    def __init__(self, name: str, image_size: int = -1) -> None:
        """`image_size`: what torch was asked for."""
        super().__init__()
        self.name, self.asked_size = name, image_size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifest = write_fake_export(tmp_path, small_sam2())
    write_manifest(tmp_path, replace(manifest, model="tabletop-tiny", weights_sha256=DIGEST))
    return tmp_path


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception | None]:
    """Backend -> the error with which it refuses; taken in the order of this dictionary's use."""
    refusals: dict[str, Exception | None] = {"tensorrt": None, "onnxruntime": None}

    def backend(name: str) -> Any:
        def build(folder: Path, model: ModelParameters, video_size: int) -> Built:
            refusal = refusals[name]
            if refusal is not None:
                raise refusal
            return Built(name)

        return build

    for name in refusals:
        monkeypatch.setattr(choice, f"_{name}", backend(name))
    return refusals


def choose(
    engine: EngineParameters, model: ModelParameters = MODEL, digest: str = DIGEST, memory: MemoryParameters = SMALL
) -> Built:
    stages = choice.choose_stages(
        model,
        engine,
        memory,
        weights_sha256=digest,
        video_size=128,
        torch_stages=lambda image_size: Built("torch", image_size),
    )
    assert isinstance(stages, Built)
    return stages


def chosen(
    engine: EngineParameters, model: ModelParameters = MODEL, digest: str = DIGEST, memory: MemoryParameters = SMALL
) -> str:
    return choose(engine, model, digest, memory).name


def test_without_exported_stages_it_is_torch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(EngineParameters()) == "torch"
    assert "no stages are exported (engine.path)" in caplog.text


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "tensorrt"])
def test_the_one_that_is_asked_for(folder: Path, tried: dict[str, Exception | None], name: str) -> None:
    assert chosen(EngineParameters(backend=name, path=str(folder))) == name


@pytest.mark.parametrize(("device", "expected"), [("cpu", "onnxruntime"), ("cuda:0", "tensorrt")])
def test_auto_takes_what_fits_the_device(
    folder: Path,
    tried: dict[str, Exception | None],
    caplog: pytest.LogCaptureFixture,
    device: str,
    expected: str,
) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(EngineParameters(path=str(folder)), replace(MODEL, device=device)) == expected
    assert str(folder) in caplog.text


def test_auto_goes_on_to_the_next_one_and_says_why(
    folder: Path, tried: dict[str, Exception | None], caplog: pytest.LogCaptureFixture
) -> None:
    tried["tensorrt"] = BackendError("the engines are of another GPU; build them: virst build DIR")
    with caplog.at_level(logging.INFO):
        assert chosen(EngineParameters(path=str(folder)), replace(MODEL, device="cuda:0")) == "onnxruntime"
    assert "the engines are of another GPU" in caplog.text
    tried["onnxruntime"] = BackendError("the package onnxruntime is missing")
    assert chosen(EngineParameters(path=str(folder)), replace(MODEL, device="cuda:0")) == "torch"
    assert "the package onnxruntime is missing" in caplog.text


@pytest.mark.parametrize("image_size", [0, 64])
def test_auto_falls_back_to_torch_at_the_size_of_the_export(
    folder: Path, tried: dict[str, Exception | None], caplog: pytest.LogCaptureFixture, image_size: int
) -> None:
    """0 alone would mean what the model was trained at: SAM 2.1 exported at 512 px would go on at 1024."""
    tried["onnxruntime"] = BackendError("the package onnxruntime is missing")
    exported = read_manifest(folder).image_size
    model = replace(MODEL, image_size=image_size)
    assert exported == 64
    assert choose(EngineParameters(path=str(folder)), model).asked_size == exported
    assert f"torch on cpu at {exported} px" in caplog.text
    # What is asked for by name, or has no export, is as the parameters say.
    for engine in (EngineParameters(backend="torch", path=str(folder)), EngineParameters()):
        assert choose(engine, model).asked_size == image_size


def test_a_backend_that_was_asked_for_is_not_replaced(folder: Path, tried: dict[str, Exception | None]) -> None:
    tried["tensorrt"] = BackendError("no CUDA device")
    with pytest.raises(BackendError, match="no CUDA device"):
        chosen(EngineParameters(backend="tensorrt", path=str(folder)))


def test_stages_of_another_model_weights_or_size_are_refused(folder: Path, tried: dict[str, Exception | None]) -> None:
    engine = EngineParameters(path=str(folder))
    with pytest.raises(ExportError, match=r"holds the stages of tabletop-tiny, not of sam2\.1-tiny; export this one"):
        chosen(engine, replace(MODEL, name="sam2.1-tiny"))
    with pytest.raises(ExportError, match="was exported from weights abababababab, the model has cdcdcdcdcdcd"):
        chosen(engine, digest="cd" * 32)
    with pytest.raises(ExportError, match=r"model\.image_size is 512"):
        chosen(engine, replace(MODEL, image_size=512))


def test_a_memory_that_does_not_fit_the_stages_is_refused_at_the_start(
    folder: Path, tried: dict[str, Exception | None]
) -> None:
    with pytest.raises(ExportError, match=r"room for 4 memories and 5 object pointers, .* ask for 9 and 18"):
        chosen(EngineParameters(path=str(folder)), memory=MemoryParameters())


def test_fp16_stages_are_not_for_cpus(folder: Path, tried: dict[str, Exception | None]) -> None:
    write_manifest(folder, replace(read_manifest(folder), precision="fp16"))
    assert chosen(EngineParameters(path=str(folder))) == "torch"
    assert chosen(EngineParameters(path=str(folder)), replace(MODEL, device="cuda:0")) == "tensorrt"


def test_a_folder_that_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no export folder"):
        chosen(EngineParameters(path=str(tmp_path / "none")))


def test_the_configuration_asks_for_a_folder() -> None:
    with pytest.raises(ValueError, match=r"engine\.backend tensorrt needs engine\.path"):
        EngineParameters(backend="tensorrt")
