# SPDX-License-Identifier: Apache-2.0
"""`virst train` as a person runs it, with every stage cut down to a step."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.engine.data.fake_scenes import two_scenes
from virst_engine.config import METHOD_WINDOWS, ModelParameters
from virst_engine.data.clips import RecordedScene
from virst_engine.errors import SceneError, WeightsError
from virst_engine.model.config import tabletop_tiny
from virst_engine.model.methods import load_method, read_method_config
from virst_engine.model.virst import Virst
from virst_engine.sim.expressions import VOCABULARY
from virst_engine.slow.transformers_detector import load_detector
from virst_engine.train import command
from virst_engine.train.config import Method, TrainConfig, detector_training, method_training, tabletop_tiny_training
from virst_engine.weights import load_model, read_card, save_model, weights_sha256


def short(scale: float = 1.0) -> TrainConfig:
    config = tabletop_tiny_training(0.0001)
    stages = tuple(replace(stage, clips=1, sentences=1, propagation_frames=2) for stage in config.stages)
    return replace(config, stages=stages, clip_stride=2, bf16=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenes(folder: Path) -> list[RecordedScene]:
        return two_scenes()

    monkeypatch.setattr(command, "tabletop_tiny_training", short)
    monkeypatch.setattr(command, "open_scenes", scenes)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # of the whole test process


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in ("--workers", 0, *arguments)]
    return CliRunner().invoke(command.train_app, words, catch_exceptions=False, env={"COLUMNS": "200"})


def test_all_stages_end_in_weights_with_a_card(tmp_path: Path) -> None:
    file = tmp_path / "weights" / "tiny.safetensors"
    result = run("--out", tmp_path, "--export", file, "--seed", 3)
    assert result.exit_code == 0, result.output
    for stage in short().stages:
        assert f"{stage.name} 1/1 loss" in result.output
    card = read_card(file)
    assert card["finished"] is True
    assert card["seed"] == 3
    assert card["scenes"] == 2
    assert card["steps"] == {stage.name: 1 for stage in short().stages}
    assert str(card["command"]).startswith("virst train")
    loaded = load_model(file)
    assert loaded.config == tabletop_tiny(VOCABULARY)
    assert (tmp_path / "checkpoint.pt").is_file()
    assert list((tmp_path / "curves").glob("events*"))


def test_a_run_that_was_stopped_is_resumed(tmp_path: Path) -> None:
    first = run("--out", tmp_path, "--minutes", 1e-9, "--stages", "segmenter,alignment")
    assert "segmenter 1/1" in first.output
    assert "alignment" not in first.output
    second = run("--out", tmp_path, "--resume", "--stages", "segmenter,alignment")
    assert "segmenter" not in second.output
    assert "alignment 1/1" in second.output
    with pytest.raises(WeightsError, match="other stages"):
        run("--out", tmp_path, "--resume", "--stages", "few-image")


def test_training_goes_on_from_weights_at_another_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = tmp_path / "start.safetensors"
    save_model(Virst(tabletop_tiny(VOCABULARY[1:])), start)
    with caplog.at_level(logging.WARNING):
        model = command._start_model(start, 160)
    assert f"does not know 1 words of the sentences, for example {VOCABULARY[0]!r}" in caplog.text
    assert model.config.sam2.image_size == 160
    assert torch.equal(model.lm_head.weight, load_model(start).lm_head.weight)
    features = model.eval().seg_model.encode_image(torch.zeros(1, 3, 160, 160))
    assert features.top.shape[-2:] == (10, 10)


def test_windows_tile_every_grid_and_the_default_is_that_of_tabletop_tiny() -> None:
    tiny = tabletop_tiny(("ball",)).sam2
    assert command._sized(tiny, 128) == tiny
    for size in (96, 160, 192, 224, 256):
        resized = command._sized(tiny, size)
        for level, window in enumerate(resized.window_spec):
            assert size // 4 // 2**level % window == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stages", "alignment,graduation"), "no stage graduation; there are video-encoder"),
        (("--size", 144), "must be a multiple of 32, got 144"),
        (("--device", "cuda:93"), "'cuda:93' cannot be used"),
        (("--device", "abacus"), "'abacus' cannot be used"),
        (("--seed", -1), "Invalid value for '--seed'"),
    ],
)
def test_arguments_that_make_no_sense_are_named(tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    result = run("--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_missing_weights_and_missing_scenes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="no readable safetensors"):
        run("--out", tmp_path, "--init", tmp_path / "none.safetensors")
    monkeypatch.undo()
    with pytest.raises(SceneError, match="virst scenes write"):
        run("--out", tmp_path, "--clips", tmp_path)


def test_the_card_tells_the_command_without_the_folders_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new.safetensors"
    said = ["virst", "train", "--init", "/home/me/old.safetensors", f"--out={tmp_path}/run", "--export", str(file)]
    monkeypatch.setattr(sys, "argv", said)  # the runner of tests does not
    assert run("--out", tmp_path, "--export", file).exit_code == 0
    assert read_card(file)["command"] == "virst train --init old.safetensors --out=run --export new.safetensors"


@pytest.mark.parametrize("method", ["visa", "tempvrs"])
def test_another_method_goes_on_from_weights_whose_segmenter_it_names(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_method(method: Method, scale: float) -> TrainConfig:
        config = method_training(method, 0.0001)
        return replace(config, stages=(replace(config.stages[0], clips=1, sentences=1),), bf16=False)

    monkeypatch.setattr(command, "method_training", short_method)
    init = tmp_path / "init.safetensors"
    torch.manual_seed(0)
    virst = Virst(tabletop_tiny(VOCABULARY))
    save_model(virst, init)
    file = tmp_path / "reasoner.safetensors"
    result = run("--method", method, "--init", init, "--out", tmp_path / "run", "--export", file)
    assert result.exit_code == 0, result.output
    assert f"{method} 1/1 loss" in result.output
    config = read_method_config(file)
    assert config.segmenter == weights_sha256(ModelParameters(weights=str(init)))
    assert config.window_frames == METHOD_WINDOWS[method][0]
    assert file.stat().st_size < 30e6
    loaded = load_method(file)
    assert torch.allclose(
        loaded.state_dict()["video_encoder.space_embedding"], virst.video_encoder.space_embedding, atol=1e-3
    )


def test_the_ablations_of_tempvrs_are_in_its_configuration(tmp_path: Path) -> None:
    init = tmp_path / "init.safetensors"
    save_model(Virst(tabletop_tiny(VOCABULARY)), init)
    reasoner = command._start_method("tempvrs", init, "frame", several_seg=False).reasoner
    assert (reasoner.config.supervision, reasoner.config.several_seg) == ("frame", False)
    assert reasoner.tep_mlp[-1].out_features == reasoner.config.window_frames
    assert len(reasoner.seg_embedding) == 1


def test_options_of_tempvrs_are_refused_elsewhere(tmp_path: Path) -> None:
    for method in ("virst", "visa"):
        for option in (("--one-seg",), ("--supervision", "frame")):
            result = CliRunner().invoke(command.train_app, ["--method", method, *option, "--out", str(tmp_path)])
            assert result.exit_code == 2
            assert "for the method tempvrs" in result.output


@pytest.mark.parametrize(("flag", "value"), [("--method", "oracle"), ("--supervision", "none")])
def test_a_method_that_there_is_not_is_refused(flag: str, value: str, tmp_path: Path) -> None:
    method = () if flag == "--method" else ("--method", "tempvrs")
    result = CliRunner().invoke(command.train_app, [*method, flag, value, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert value in result.output


def test_a_detector_is_trained_resumed_and_written_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short_detector(scale: float = 1.0) -> TrainConfig:
        config = detector_training(0.0001)
        return replace(config, stages=tuple(replace(stage, clips=1, sentences=2) for stage in config.stages))

    monkeypatch.setattr(command, "detector_training", short_detector)
    monkeypatch.setattr(command, "CALIBRATION_BATCHES", 2)
    start = ("--method", "grounding", "--out", tmp_path)
    first = run(*start, "--minutes", 1e-9)
    assert "detector-names 1/1 loss" in first.output
    result = run(*start, "--resume", "--export", tmp_path / "owl")
    assert result.exit_code == 0, result.output
    assert "detector-whole 1/1 loss" in result.output
    card = json.loads((tmp_path / "owl" / "card.json").read_text())
    assert card["steps"] == {"detector-names": 1, "detector": 1, "detector-whole": 1}
    assert card["finished"] is True
    assert card["calibration"]["phrases"] == 4
    assert load_detector(tmp_path / "owl").detect(np.zeros((48, 64, 3), np.uint8), "the red ball").boxes.shape[1] == 4
    refused = run("--method", "grounding", "--init", tmp_path / "x.safetensors")
    assert "starts from nothing" in refused.output
