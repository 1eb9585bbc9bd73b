# SPDX-License-Identifier: Apache-2.0
"""Trackers side by side: built alike, fed alike, and of one opinion on what they see."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from tests.engine.model.sam2_peers import SAM2_CONFIGS
from tests.engine.model.sam2_peers import transformers_config as published_config
from tests.engine.model.small_models import SMALL_SAM2
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import ModelParameters
from virst_engine.evaluate.peers import (
    CountingStages,
    Footage,
    OurTracker,
    StageClock,
    System,
    comparison_config,
    comparison_model,
    random_model,
    with_pooled_memory,
)
from virst_engine.evaluate.sam2_peer import CONFIG_FILE, Sam2Predictor, _overrides, build_predictor
from virst_engine.evaluate.transformers_peer import TransformersSession, transformers_config
from virst_engine.model.config import SAM2_1_SIZES, Sam2Config, sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.timing import StageTimer
from virst_engine.types import ImageFeatures, MemoryTensors

# With the numbers of memories that our tracker keeps. transformers has the 64 channels of a memory in its code.
CONFIG = replace(SMALL_SAM2, memory_frames=7, max_pointers=16, channels=128, memory_channels=64)
FRAMES = 12


@pytest.fixture(scope="module")
def model() -> Sam2:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Footage:
    return Footage(tmp_path_factory.mktemp("footage"), CONFIG.image_size, pictures=8)


def all_systems(model: Sam2, footage: Footage) -> list[System]:
    return [
        OurTracker("torch", TorchStages(model), footage, "cpu"),
        Sam2Predictor(model, footage, 1 + FRAMES),
        TransformersSession(model, footage),
    ]


def played(system: System, footage: Footage, objects: int, frames: int = FRAMES) -> tuple[np.ndarray, torch.Tensor]:
    """All masks and all logits, frame by frame, the first one included."""
    masks, logits = [system.begin(footage.prompts[:objects])], [system.logits()]
    for number in range(1, 1 + frames):
        masks.append(system.step(number, StageTimer()))
        logits.append(system.logits())
    system.end()
    return np.stack(masks), torch.stack(logits)


# The video


def test_everybody_sees_the_pixels_that_sam2_reads(footage: Footage) -> None:
    folder = footage.as_folder(20)
    read = sorted(folder.glob("*.jpg"), key=lambda file: int(file.stem))
    assert [int(file.stem) for file in read] == list(range(20))
    for number, file in enumerate(read):
        with Image.open(file) as image:
            assert np.array_equal(np.array(image), footage.frame(number))


def test_the_video_goes_forwards_and_backwards_without_a_jump(footage: Footage) -> None:
    numbers = [footage._picture(number) for number in range(20)]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5]


def test_each_box_holds_a_disc_of_its_own_colour(tmp_path: Path) -> None:
    video = Footage(tmp_path, 256, pictures=2)
    colours = []
    for prompt in video.prompts:
        assert prompt.box_px is not None
        left, top, right, bottom = (round(v) for v in prompt.box_px)
        assert 0 <= left < right <= 256
        assert 0 <= top < bottom <= 256
        middle = video.frame(0)[(top + bottom) // 2 - 3 : (top + bottom) // 2 + 3, (left + right) // 2].astype(int)
        assert np.ptp(middle, axis=0).max() < 20
        colours.append(middle.mean(axis=0))
    distances = [np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]]
    assert min(distances) > 20
    assert not np.array_equal(video.frame(0), video.frame(1))


# Models


def test_random_weights_are_the_same_for_a_seed_and_leave_no_object_absent(model: Sam2, footage: Footage) -> None:
    again, other = random_model(CONFIG), random_model(CONFIG, seed=1)
    states = [each.state_dict() for each in (model, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["mask_downsample.weight"], states[2]["mask_downsample.weight"])
    masks, logits = played(OurTracker("torch", TorchStages(model), footage, "cpu"), footage, 2)
    assert float(logits.min()) > -1000  # NO_OBJECT_LOGIT would be below
    assert 0.001 < masks[1:].mean() < 0.999


def test_pooled_memory_shares_the_weights_and_changes_the_masks(model: Sam2, footage: Footage) -> None:
    pooled = with_pooled_memory(model)
    assert pooled.config == replace(CONFIG, memory_pool=2)
    assert model.config.memory_pool == 1
    assert pooled.mask_downsample.weight.data_ptr() == model.mask_downsample.weight.data_ptr()
    _, plain = played(OurTracker("torch", TorchStages(model), footage, "cpu"), footage, 1, frames=2)
    _, changed = played(OurTracker("torch pooled", TorchStages(pooled), footage, "cpu"), footage, 1, frames=2)
    assert torch.equal(plain[0], changed[0])  # no memory yet
    assert float((plain[1:] - changed[1:]).abs().max()) > 1e-4


def test_configurations_by_name() -> None:
    assert comparison_config(ModelParameters(name="sam2.1-small", image_size=512)) == sam2_1("small", 512)
    assert comparison_config(ModelParameters(name="sam2.1-tiny")) == sam2_1("tiny", 1024)
    tabletop = comparison_config(ModelParameters(name="tabletop-tiny"))
    assert (tabletop.image_size, tabletop.channels, tabletop.pointer_distance_limit) == (128, 128, 0)


def test_a_file_of_weights_is_taken_as_it_is(tmp_path: Path) -> None:
    original = random_model(sam2_1("tiny", 64), seed=3)
    file = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": original.state_dict()}, file)
    loaded = comparison_model(ModelParameters(name="sam2.1-tiny", weights=str(file), image_size=64))
    assert loaded.config == original.config
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in loaded.state_dict().items())
    file.unlink()  # 156 MB


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_sam2_is_built_as_its_own_configuration_of_that_size_says(size: str) -> None:
    def leaves(name: str) -> dict[str, Any]:
        tree = OmegaConf.load(str(files("sam2") / name)).model
        assert isinstance(tree, DictConfig)
        return _flat(OmegaConf.to_container(tree))

    overrides = _flat(_nested(_overrides(sam2_1(size))))
    wanted = {**leaves(SAM2_CONFIGS[size]), "fill_hole_area": 0}
    found = {**leaves(CONFIG_FILE), "fill_hole_area": 0, **overrides}
    # At the published size; RoPE's tables are computed for it whatever the files say.
    differ = {key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key)}
    unsaid = {
        key for key in differ if key not in wanted
    }  # defaults of sam2's classes, which tests of the model compare
    assert differ == unsaid
    assert unsaid <= overrides.keys()


def _nested(overrides: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in overrides.items():
        *groups, leaf = name.split(".")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = value
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, each in tree.items() for key, value in _flat(each, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_transformers_has_the_published_configuration_at_the_published_sizes(size: str) -> None:
    config = sam2_1(size, 512)
    assert transformers_config(config).to_dict() == published_config(config).to_dict()


def test_both_peers_can_be_built_with_the_dimensions_of_tabletop_tiny() -> None:
    config = comparison_config(ModelParameters(name="tabletop-tiny", image_size=64))
    weights = Sam2(config).state_dict()
    build_predictor(config, "cpu").load_state_dict(weights, strict=True)
    assert transformers_config(config).mask_decoder_config.mlp_dim == config.decoder_feedforward


def test_the_optimized_predictor_is_sam2s_own_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    predictor = build_predictor(CONFIG, "cpu", vos_optimized=True)
    assert type(predictor).__name__ == "SAM2VideoPredictorVOS"
    assert predictor.fill_hole_area == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


# Agreement


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, multimask_prompted=False, multimask_tracking=False)])
def test_all_systems_give_the_same_masks(config: Sam2Config, footage: Footage) -> None:
    model = random_model(config)
    ours, *peers = [played(system, footage, objects=2) for system in all_systems(model, footage)]
    assert ours[0].shape == (1 + FRAMES, 2, 64, 64)
    for masks, logits in peers:
        torch.testing.assert_close(logits, ours[1], atol=1e-3, rtol=0.0)
        assert (masks == ours[0]).mean() > 0.9999
    other, _ = played(OurTracker("torch", TorchStages(random_model(config, seed=1)), footage, "cpu"), footage, 2)
    assert (other == ours[0]).mean() < 0.99


def test_a_system_starts_over_with_other_objects(model: Sam2, footage: Footage) -> None:
    for system in all_systems(model, footage):
        before, _ = played(system, footage, objects=1, frames=3)
        played(system, footage, objects=3, frames=1)
        after, _ = played(system, footage, objects=1, frames=3)
        assert np.array_equal(before, after), system.name


def test_stages_are_timed_in_every_system(model: Sam2, footage: Footage) -> None:
    of_all = {"image_encoder", "memory_attention", "mask_decoder", "memory_encoder"}
    for system in all_systems(model, footage):
        system.begin(footage.prompts[:1])
        timer = StageTimer()
        system.step(1, timer)
        assert of_all <= timer.ms().keys(), system.name
        assert all(ms > 0 for ms in timer.ms().values())
        system.end()


def test_sam2_loads_its_frames_ahead_and_the_others_do_not(model: Sam2, footage: Footage) -> None:
    ours, sam2, transformers = all_systems(model, footage)
    assert ours.bytes_per_frame_ahead == transformers.bytes_per_frame_ahead == 0
    sam2.begin(footage.prompts[:1])
    assert isinstance(sam2, Sam2Predictor)
    images = sam2._state["images"]
    assert sam2.bytes_per_frame_ahead == images.nbytes / len(images)
    sam2.end()
    assert sam2._state == {}


def test_a_system_at_another_frame_is_noticed(model: Sam2, footage: Footage) -> None:
    predictor = Sam2Predictor(model, footage, 1 + FRAMES)
    predictor.begin(footage.prompts[:1])
    with pytest.raises(AssertionError, match="sam2 is at frame 1, the others at 2"):
        predictor.step(2, StageTimer())


# Counting and timing


class TwoProducts:
    """Stages whose cost is known: a matrix product, and an attention."""

    sizes: Any = None
    takes_several_frames = takes_fewer_memories = False

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        x = torch.ones(16, 32) @ torch.ones(32, 8)
        return ImageFeatures(*[x.reshape(1, 1, 16, 8)] * 4)

    def memory_attention(self, features: Any, memory: Any, frame_of: Any = None) -> torch.Tensor:
        q, k = torch.ones(2, 1, 10, 16), torch.ones(2, 1, 30, 16)
        return F.scaled_dot_product_attention(q, k, k)

    mask_decoder = memory_encoder = click_tokens = mask_prediction = at_image_size = image_encoder


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operations_are_counted_attention_included(mode: Any) -> None:
    counting = CountingStages(TwoProducts())  # type: ignore[arg-type]
    one, flag = torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)
    memory = MemoryTensors(torch.ones(2, 1, 1, 1, 1), one.long(), flag, one[..., None], one, flag)
    with mode():
        features = counting.image_encoder(torch.zeros(1, 3, 4, 4))
        counting.image_encoder(torch.zeros(1, 3, 4, 4))
        counting.memory_attention(features, memory)
    assert counting.flop["image_encoder"] == 2 * (2 * 16 * 32 * 8)
    assert counting.flop["memory_attention"] == 2 * (2 * 10 * 30 * 16) * 2  # two products for each of two objects


def test_another_librarys_functions_are_timed_while_a_frame_is_processed() -> None:
    clock, calls = StageClock(), []

    def work(value: int, *, extra: Sequence[int] = ()) -> int:
        calls.append((value, extra))
        return value + 1

    timed = clock.timed("stage", work)
    assert timed(1) == 2
    clock.timer = StageTimer()
    assert timed(2, extra=[3]) == 3
    assert clock.timer.ms().keys() == {"stage"}
    assert calls == [(1, ()), (2, [3])]
