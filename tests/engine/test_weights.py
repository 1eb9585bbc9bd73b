# SPDX-License-Identifier: Apache-2.0
"""Weights go to disk and back unharmed, and nothing else is taken for weights."""

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.engine.model.small_models import SMALL, small_virst
from virst_engine import weights
from virst_engine.backends.base import Stages
from virst_engine.config import EngineParameters, ModelParameters
from virst_engine.errors import WeightsError
from virst_engine.model.config import VirstConfig
from virst_engine.model.sam2 import Sam2
from virst_engine.model.virst import Virst
from virst_engine.slow.reasoner import Reasoner
from virst_engine.weights import (
    FORMAT,
    load_model,
    load_reasoner,
    load_stages,
    read_card,
    save_model,
    stages_of,
    weights_identity,
    weights_path,
)

CARD = {"command": "virst train --seed 3", "steps": {"alignment": 7}, "finished": True}


@pytest.fixture(scope="module")
def model() -> Virst:
    return small_virst(seed=3)


@pytest.fixture
def path(model: Virst, tmp_path: Path) -> Path:
    file = tmp_path / "folder" / "small.safetensors"
    save_model(model, file, CARD)
    return file


def test_training_goes_on_from_weights_of_before_occ_predictor(
    path: Path, model: Virst, caplog: pytest.LogCaptureFixture
) -> None:
    def age(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        for name in ("occ_predictor.weight", "occ_predictor.bias"):
            del tensors[name]
        metadata["config"] = metadata["config"].replace(', "predicts_presence": false', "")

    rewrite(path, age)
    assert "lacks 2 tensors, for example occ_predictor.bias" in refused(path)
    loaded = load_model(path, train_on=True)
    assert "occ_predictor starts from nothing" in caplog.text
    assert loaded.config.fusion.predicts_presence
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half().float())
    assert not load_model_config(path).fusion.predicts_presence


def load_model_config(path: Path) -> VirstConfig:
    return VirstConfig.from_json(parts_of(path)[1]["config"])


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    tensors, metadata = parts_of(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def refused(path: Path) -> str:
    """The message with which a file is refused; it names the file and what to do."""
    with pytest.raises(WeightsError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "virst train" in message
    assert "model.weights" in message
    return message


def test_a_model_comes_back_as_float16_stored_it(model: Virst, path: Path) -> None:
    loaded = load_model(path)
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected), name
        assert loaded.state_dict()[name].dtype == value.dtype
    tensors, _ = parts_of(path)
    assert {str(t.dtype) for t in tensors.values()} == {"torch.float16", "torch.int64"}  # int64: BatchNorm's counters
    assert not list(path.parent.glob("*.partial"))


def test_saving_what_was_loaded_changes_nothing(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_model(load_model(path), again, CARD)
    one, other = parts_of(path)[0], parts_of(again)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_card_comes_back(model: Virst, path: Path, tmp_path: Path) -> None:
    assert read_card(path) == CARD
    bare = tmp_path / "bare.safetensors"
    save_model(model, bare)
    assert read_card(bare) == {}


def test_a_card_that_cannot_be_read_is_named(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update(card="{"))
    with pytest.raises(WeightsError, match="model card"):
        read_card(path)
    load_model(path)  # the weights are none the worse for it


def test_weights_too_large_for_float16_are_not_written(tmp_path: Path) -> None:
    model = small_virst()
    with torch.no_grad():
        model.lm_head.weight[2, 3] = 70_000.0
    file = tmp_path / "large.safetensors"
    with pytest.raises(WeightsError, match=r"not finite in float16, for example lm_head\.weight.*checkpoint"):
        save_model(model, file)
    assert not file.exists()


def test_a_missing_file_is_named() -> None:
    for parameters in (ModelParameters(weights="/nowhere/x.safetensors"), ModelParameters(weights="~/no such file")):
        with pytest.raises(WeightsError, match=r"tabletop-tiny are missing: no file /.*virst train.*model\.weights"):
            weights_path(parameters)
        with pytest.raises(WeightsError, match="are missing"):
            load_stages(parameters)
        with pytest.raises(WeightsError, match="are missing"):
            load_reasoner(parameters)


def test_a_given_file_is_taken_and_a_folder_is_not(path: Path) -> None:
    assert weights_path(ModelParameters(weights=str(path))) == path
    with pytest.raises(WeightsError, match="are missing"):
        weights_path(ModelParameters(weights=str(path.parent)))
    refused(path.parent)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    assert "no readable safetensors file" in refused(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\0" * 64, b"\xff" * 64, b"version https://git-lfs.github"])
def test_a_file_that_is_no_safetensors_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "no readable safetensors file" in refused(path)


def spring() -> None:
    Trap.sprung = True


class Trap:
    """Unpickling it executes code."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


@pytest.mark.parametrize("write", [lambda trap, file: file.write_bytes(pickle.dumps(trap)), torch.save])
def test_a_pickle_by_the_name_of_safetensors_is_refused_and_never_executed(
    path: Path, write: Callable[[Trap, Path], object]
) -> None:
    write(Trap(), path)
    assert "no readable safetensors file" in refused(path)
    with pytest.raises(WeightsError):
        read_card(path)
    assert not Trap.sprung


def test_safetensors_of_somebody_else_are_refused(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)
    assert f"format none, wanted {FORMAT}" in refused(path)
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    assert f"format pt, wanted {FORMAT}" in refused(path)


def test_another_version_of_the_format_is_refused(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update(format="virst-weights-2"))
    assert f"format virst-weights-2, wanted {FORMAT}" in refused(path)


def test_missing_extra_and_misshapen_tensors_are_named(path: Path) -> None:
    original = path.read_bytes()
    rewrite(path, lambda tensors, _: tensors.pop("seg_model.no_obj_ptr"))
    assert "lacks 1 tensors, for example seg_model.no_obj_ptr" in refused(path)
    path.write_bytes(original)
    rewrite(path, lambda tensors, _: tensors.update(surplus=torch.zeros(2)))
    assert "has unknown 1 tensors, for example surplus" in refused(path)
    path.write_bytes(original)
    rewrite(path, lambda tensors, _: tensors.update({"lm_head.weight": torch.zeros(2, 2)}))
    assert "has wrong shapes for 1 tensors, for example lm_head.weight" in refused(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(path: Path, value: float) -> None:
    rewrite(path, lambda tensors, _: tensors["st_embedding"][0, 0].fill_(value))
    assert "1 tensors are not finite, for example st_embedding" in refused(path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("sam2", {"channels": "many"}),
        ("sam2", {"channels": -4}),
        ("sam2", {"embed_dim": -1}),
        ("sam2", {"stages": [1]}),
        ("sam2", {"magic": 1}),
        ("video", {"heads": 5}),
        ("video", {"pool": None}),
        ("language", {"heads": 0}),
        ("fusion", {"initial_heads": 7}),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(path: Path, part: str, change: dict[str, object]) -> None:
    def damage(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        config[part] |= change
        metadata["config"] = json.dumps(config)

    rewrite(path, damage)
    refused(path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '"x"', "{"])
def test_a_configuration_that_is_none_is_refused(path: Path, text: str) -> None:
    rewrite(path, lambda _, metadata: metadata.update(config=text))
    assert "configuration that we cannot build" in refused(path)


def test_a_device_that_is_not_there_is_named(path: Path) -> None:
    for device in ("cuda:93", "abacus"):
        with pytest.raises(WeightsError, match=rf"cannot run on device '{device}'.*model\.device"):
            load_model(path, device=device)


def test_stages_and_reasoner_are_made_of_the_file(path: Path, model: Virst) -> None:
    parameters = ModelParameters(weights=str(path))
    stages, reasoner = load_stages(parameters), load_reasoner(parameters)
    assert isinstance(stages, Stages)
    assert isinstance(reasoner, Reasoner)
    assert stages.sizes == stages_of(model).sizes
    assert stages.sizes.video_size == SMALL.video.image_size
    pixels = torch.randn(1, 3, 64, 64)
    features = stages.image_encoder(pixels)
    assert features.fusion.shape[-1] == 16  # fusion.feature_level 0 is the stride-4 level
    assert torch.allclose(features.top, stages_of(load_model(path)).image_encoder(pixels).top)


@pytest.mark.parametrize("backend", ["auto", "torch", "onnxruntime", "tensorrt"])
def test_weights_of_another_checksum_are_refused_whatever_runs_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Exported stages run without a look at the weights file, so it is looked at before they are chosen."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "choose_stages", lambda *args, torch_stages, **named: torch_stages(0))
    engine = EngineParameters(backend=backend, path=str(tmp_path))
    for right in (digest, digest.upper()):
        assert load_stages(ModelParameters(weights=str(path), sha256=right), engine)
    wrong = ModelParameters(weights=str(path), sha256="ab" * 32)
    with pytest.raises(WeightsError, match=rf"SHA-256 {digest}, model\.sha256 asks for abab.*model\.weights"):
        load_stages(wrong)
    monkeypatch.setattr(weights, "choose_stages", lambda *args, **named: pytest.fail("the stages were chosen"))
    with pytest.raises(WeightsError, match=rf"SHA-256 {digest}, model\.sha256 asks for abab.*model\.weights"):
        load_stages(wrong, engine)


def test_torch_takes_the_size_that_it_is_given_in_place_of_the_parameters(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = weights.load_segmenter

    def load(parameters: ModelParameters) -> tuple[Sam2, int]:
        seen.append(parameters.image_size)
        return real(parameters)

    monkeypatch.setattr(weights, "load_segmenter", load)
    monkeypatch.setattr(weights, "choose_stages", lambda *args, torch_stages, **named: torch_stages(64))
    assert load_stages(ModelParameters(weights=str(path))).sizes.image_size == 64
    assert seen == [64]


def test_the_number_of_threads_is_the_parameters(path: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_stages(ModelParameters(weights=str(path), threads=before + 1))
        assert torch.get_num_threads() == before + 1
        load_stages(ModelParameters(weights=str(path), threads=0))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_identity_is_that_of_the_contents(model: Virst, path: Path, tmp_path: Path) -> None:
    def identity(file: Path) -> str:
        return weights_identity(ModelParameters(weights=str(file)))

    copy, changed = tmp_path / "copy.safetensors", tmp_path / "changed.safetensors"
    copy.write_bytes(path.read_bytes())
    changed.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert identity(copy) == identity(path)
    assert identity(changed) != identity(path)
    assert identity(path).startswith("tabletop-tiny ")
    with pytest.raises(WeightsError, match="no file"):
        identity(tmp_path / "missing")
