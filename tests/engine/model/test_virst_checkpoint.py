# SPDX-License-Identifier: Apache-2.0
"""Published files -> weights folder: every name accounted for, adapters merged, and what may be wrong is named."""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.engine.model.small_virst_7b import (
    RANK,
    SMALL_7B,
    VOCABULARY,
    byte_vocabulary,
    published_state,
    small_virst_7b,
    write_base,
    write_tokenizer,
)
from virst_engine.cli import app
from virst_engine.errors import CheckpointError, WeightsError
from virst_engine.model import virst_checkpoint
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import Virst7bConfig, with_preset
from virst_engine.model.virst_checkpoint import (
    Sources,
    base_shapes,
    convert,
    expected_state,
    published_name,
    published_shapes,
)
from virst_engine.model.weights_folder import load_reasoner_model, load_segmenter_model, read_manifest

RELEASED = with_preset(SMALL_7B, "released")
SEG_ROW = VOCABULARY - 1
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")  # of the base model


@pytest.fixture(autouse=True)
def _small_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = virst_checkpoint.published_shapes
    monkeypatch.setattr(virst_checkpoint, "published_shapes", lambda config: shapes(config, RANK))


@pytest.fixture(scope="module")
def model() -> Virst7b:
    return small_virst_7b(RELEASED)


@pytest.fixture
def base(tmp_path: Path, model: Virst7b) -> Path:
    return write_base(tmp_path / "base", model)


@pytest.fixture
def sam2(tmp_path: Path, model: Virst7b) -> Path:
    file = tmp_path / "sam2.1_hiera_large.pt"
    torch.save({"model": model.seg_model.state_dict()}, file)
    return file


def published_file(folder: Path, state: dict[str, Tensor], **more: object) -> Path:
    file = folder / "virst.pt"
    torch.save({"model_state_dict": state, **more}, file)
    return file


def stored(out: Path) -> dict[str, Tensor]:
    """All numbers of a folder, both halves."""
    everything = {f"seg_model.{name}": value for name, value in load_segmenter_model(out).state_dict().items()}
    loaded = load_reasoner_model(out).state_dict()
    return everything | {name: value for name, value in loaded.items() if not name.startswith("seg_model.")}


# --- full size, without numbers ------------------------------------------------------------------------------------


def full_size_index() -> dict[str, tuple[int, ...]]:
    """Names and shapes of VIRST's checkpoint as facts about its format state them, written out here once more.

    The segmenter's are those of SAM2Base, which test_checkpoint.py compares with sam2 itself.
    """
    d, kv, ffn, c = 3584, 512, 18944, 256
    index: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (151647, d), "model.embed_tokens.weight": (151647, d), "model.norm.weight": (d,)
    }  # fmt: skip
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
    mlp = {"gate": (ffn, d), "up": (ffn, d), "down": (d, ffn)}
    for i in range(28):
        layer = f"model.layers.{i}"
        linear = {f"{layer}.self_attn.{name}_proj": shape for name, shape in shapes.items()}
        linear |= {f"{layer}.mlp.{name}_proj": shape for name, shape in mlp.items()}
        for name, (out, inner) in linear.items():
            index[f"{name}.weight"] = (out, inner)
            index[f"{name}.lora_A.default.weight"] = (64, inner)
            index[f"{name}.lora_B.default.weight"] = (out, 64)
        index |= {f"{layer}.self_attn.{name}_proj.bias": (shapes[name][0],) for name in "qkv"}
        index |= {f"{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    tower, v = "model.vision_tower.vision_tower.encoder", 1024

    def both(name: str, out: int, *inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, *inner), f"{name}.bias": (out,)}

    index |= both(f"{tower}.patch_embed.proj", v, 3, 1, 16, 16) | both(f"{tower}.vision_layernorm", v)
    for i in range(23):
        block = f"{tower}.blocks.{i}"
        index |= {f"{block}.attn.qkv.weight": (3 * v, v), f"{block}.attn.q_bias": (v,), f"{block}.attn.v_bias": (v,)}
        index |= both(f"{block}.attn.proj", v, v) | both(f"{block}.norm1", v) | both(f"{block}.norm2", v)
        index |= both(f"{block}.mlp.fc1", 4 * v, v) | both(f"{block}.mlp.fc2", v, 4 * v)
    index |= both("model.mm_projector.mlp.0", d, v) | both("model.mm_projector.mlp.2", d, d)
    prompter, initial = "model.seg_prompter", "model.initial_seg_fusion_module"
    for part in (prompter, initial):
        for i in (0, 2, 4):
            index |= both(f"{part}.spatial_down.{i}", c, c, 3, 3)

    def multihead(name: str, width: int) -> dict[str, tuple[int, ...]]:
        own = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
        return own | both(f"{name}.out_proj", width, width)

    index |= both(f"{prompter}.memory_norm", c) | both(f"{prompter}.seg_proj", c, d)
    for i in (0, 1):
        layer = f"{prompter}.decoder.{i}"
        for name in "qkvo":
            index |= both(f"{layer}.cross_attn.{name}_proj", c, c)
        index |= multihead(f"{layer}.self_attn", c)
        index |= both(f"{layer}.ff.0", 1024, c) | both(f"{layer}.ff.2", c, 1024)
        for name in ("norm1", "norm2", "norm3"):
            index |= both(f"{layer}.{name}", c)
    index |= both(f"{initial}.spatial_norm", c) | both(f"{initial}.vision_proj", d, c)
    index |= both(f"{initial}.norm_q", d) | both(f"{initial}.norm_kv", d) | multihead(f"{initial}.cross_attn", d)
    index |= {f"{initial}.gate": ()} | both("model.occ_predictor", 1, c)
    return {f"base_model.model.{name}": shape for name, shape in index.items()}


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_full_size_accounts_for_every_tensor_of_the_published_checkpoint(preset: str) -> None:
    config = with_preset(Virst7bConfig(), preset)
    shapes = published_shapes(config)
    segmenter = {name for name in shapes if name.startswith("base_model.model.model.seg_model.")}
    assert {name: tuple(shape) for name, shape in shapes.items() if name not in segmenter} == full_size_index()
    with torch.device("meta"):
        sam2 = Virst7b(config).seg_model.state_dict()
    assert segmenter == {f"base_model.model.model.seg_model.{name}" for name in sam2}
    adapters = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    assert len(adapters) == 2 * 196
    assert sum(shape.numel() for shape in adapters.values()) / 1e6 == pytest.approx(161.5, abs=0.05)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_full_size_checkpoint_without_numbers_has_nothing_missing_unexpected_or_mis_shaped(preset: str) -> None:
    """The check that a real file goes through, on tensors of the meta device."""
    config = with_preset(Virst7bConfig(), preset)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in full_size_index().items()}
    with torch.device("meta"):
        sam2 = Virst7b(config).seg_model.state_dict()
    tensors |= {f"base_model.model.model.seg_model.{name}": value for name, value in sam2.items()}
    found = virst_checkpoint._sort_published(tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(virst_checkpoint, "published_shapes", published_shapes)
        virst_checkpoint._check_published(found, config)
    assert len(found.adapters) == 196
    assert set(found.weights) == {published_name(name) for name in expected_state(config) if name != "st_embedding"}


def test_the_base_model_has_646_tensors_of_15845235712_bytes() -> None:
    shapes = base_shapes(Virst7bConfig())
    assert len(shapes) == 646
    assert 2 * sum(shape.numel() for shape in shapes.values()) == 15_845_235_712
    assert tuple(shapes["lm_head.weight"]) == (152064, 3584)
    own = {name.removeprefix("base_model.model.") for name in full_size_index() if ".lora_" not in name}
    assert shapes.keys() <= own


# --- small, with numbers -------------------------------------------------------------------------------------------


def test_a_published_checkpoint_becomes_the_model_that_was_saved(tmp_path: Path, model: Virst7b, base: Path) -> None:
    out = tmp_path / "out"
    file = published_file(tmp_path, published_state(model), epoch=3)
    manifest = convert(Sources(base, file), out, RELEASED, "float32")
    loaded, saved = stored(out), model.state_dict()
    assert loaded.keys() == saved.keys()
    for name, value in loaded.items():
        if name == "language_model.embed_tokens.weight":
            assert torch.equal(value[:-1], saved[name][:-1])
            assert torch.equal(value[-1], saved["st_embedding"][0])
        else:
            assert torch.allclose(value, saved[name], atol=1e-6), name
    assert manifest.facts["merged adapters"] == 14
    assert manifest.facts["of the base models"] == 0
    assert manifest.facts["untrained"] == []
    assert (out / "tokenizer.json").is_file()


def test_an_adapter_that_is_not_merged_would_be_seen(tmp_path: Path, model: Virst7b, base: Path) -> None:
    state = {name: value for name, value in published_state(model).items() if ".lora_" not in name}
    convert(Sources(base, published_file(tmp_path, state)), tmp_path / "out", RELEASED, "float32")
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(stored(tmp_path / "out")[name], model.state_dict()[name], atol=1e-3)


@pytest.mark.parametrize("change", ["module.", "base_layer", "adapter without a name"])
def test_other_names_for_the_same_tensors_are_known(tmp_path: Path, model: Virst7b, base: Path, change: str) -> None:
    state = published_state(model)
    if change == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    elif change == "base_layer":
        adapted = {name.replace(".lora_A.default", "") for name in state}
        state = {
            name.replace("_proj.", "_proj.base_layer.")
            if name in adapted and name.replace(".weight", ".lora_A.default.weight") in state
            else name: value
            for name, value in state.items()
        }
    else:
        state = {name.replace(".default.", "."): value for name, value in state.items()}
    convert(Sources(base, published_file(tmp_path, state)), tmp_path / "out", RELEASED, "float32")
    for name, value in stored(tmp_path / "out").items():
        if name != "language_model.embed_tokens.weight":
            assert torch.allclose(value, model.state_dict()[name], atol=1e-6), name


def test_the_papers_rows_of_st_tokens_start_as_the_shared_one(tmp_path: Path, model: Virst7b, base: Path) -> None:
    file = published_file(tmp_path, published_state(model))
    convert(Sources(base, file), tmp_path / "out", with_preset(SMALL_7B, "paper"), "float32")
    rows = load_reasoner_model(tmp_path / "out").st_embedding
    assert torch.equal(rows, model.st_embedding.expand(3, -1))


def test_the_video_language_model_is_rounded_and_the_rest_is_not(tmp_path: Path, model: Virst7b, base: Path) -> None:
    file = published_file(tmp_path, published_state(model))
    convert(Sources(base, file), tmp_path / "out", RELEASED)
    for name, value in stored(tmp_path / "out").items():
        vlm = name.startswith(("language_model.", "vision_tower.", "mm_projector.", "lm_head."))
        assert value.dtype == (torch.bfloat16 if vlm else torch.float32), name


def test_the_base_models_alone_give_untrained_fusion(tmp_path: Path, model: Virst7b, base: Path, sam2: Path) -> None:
    manifest = convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED, "float32")
    loaded = stored(tmp_path / "out")
    for name, value in model.state_dict().items():
        if name.startswith(("language_model.", "vision_tower.", "mm_projector.", "seg_model.")):
            assert torch.equal(loaded[name], value), name
    assert manifest.facts["untrained"] == ["initial_seg_fusion_module", "occ_predictor", "seg_prompter"]
    assert float(loaded["initial_seg_fusion_module.gate"]) == pytest.approx(0.1)
    assert torch.equal(loaded["st_embedding"][0], model.language_model.embed_tokens.weight[SEG_ROW])


def test_what_the_checkpoint_lacks_comes_from_the_base_models(
    tmp_path: Path, model: Virst7b, base: Path, sam2: Path
) -> None:
    """A checkpoint of the trained parts alone: adapters, fusion, embeddings."""
    state = {
        name: value
        for name, value in published_state(model).items()
        if ".lora_" in name or "seg_prompter" in name or "initial_seg" in name or "occ_" in name or "embed" in name
    }
    file = published_file(tmp_path, state)
    manifest = convert(Sources(base, file, sam2), tmp_path / "out", RELEASED, "float32")
    name = "language_model.layers.1.self_attn.q_proj"
    a, b = (state[f"base_model.model.model.{name[15:]}.lora_{side}.default.weight"] for side in "AB")
    expected = model.state_dict()[f"{name}.weight"] + 0.25 * b @ a
    assert torch.allclose(stored(tmp_path / "out")[f"{name}.weight"], expected, atol=1e-6)
    assert manifest.facts["of the base models"] > 100


def without_words_head(base: Path, tied: bool | None) -> None:
    """The base model as one that writes words with its embeddings, and says so (True), or not."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = index["weight_map"].pop("lm_head.weight")
    tensors = load_file(base / shard)
    save_file({name: value for name, value in tensors.items() if name != "lm_head.weight"}, base / shard)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    if tied is not None:
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))


def test_a_base_model_whose_words_are_its_embeddings_has_them_twice(
    tmp_path: Path, model: Virst7b, base: Path, sam2: Path
) -> None:
    without_words_head(base, tied=True)
    assert convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED, "float32").has_words
    loaded = stored(tmp_path / "out")
    assert torch.equal(loaded["lm_head.weight"], model.language_model.embed_tokens.weight)
    state = {name: value for name, value in published_state(model).items() if "lm_head" not in name}
    file = published_file(tmp_path, state)
    convert(Sources(base, file), tmp_path / "trained", RELEASED, "float32")
    own = stored(tmp_path / "trained")
    assert torch.equal(own["lm_head.weight"], own["language_model.embed_tokens.weight"])
    assert torch.equal(own["lm_head.weight"][-1], model.st_embedding[0])


@pytest.mark.parametrize("tied", [None, False])
def test_a_words_head_that_is_missing_is_told(tmp_path: Path, base: Path, sam2: Path, tied: bool | None) -> None:
    without_words_head(base, tied)
    with pytest.raises(CheckpointError, match="lacks 1 tensors: lm_head"):
        convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED)


# --- what may be wrong ---------------------------------------------------------------------------------------------

State = dict[str, Tensor]
GATE = "base_model.model.model.initial_seg_fusion_module.gate"
NORM = "base_model.model.model.norm.weight"


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {own: value for own, value in state.items() if own != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(GATE), "lacks 1 tensors: base_model.model.model.initial_seg_fusion_module.gate"),
        (
            drop("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"),
            "lacks (of its adapters) 1 tensors: model.layers.0.mlp.up_proj.lora_A.default.weight",
        ),
        (lambda state: {**state, "base_model.model.model.extra": torch.zeros(1)}, "has unknown 1 tensors: model.extra"),
        (lambda state: {**state, NORM: torch.zeros(5)}, "wrong shapes for 1 tensors: model.norm.weight [5] instead"),
        (lambda state: {**state, NORM: torch.zeros(32).char()}, "wrong type for 1 tensors: model.norm.weight torch"),
        (
            lambda state: {**state, NORM: torch.full((32,), torch.nan)},
            "has numbers that are not finite in model.norm.weight",
        ),
        (
            lambda state: {**state, "base_model.model.model.embed_tokens.weight": torch.zeros(VOCABULARY, 48)},
            "holds another base model: its hidden size is 48, VideoChat-Flash-Qwen2-7B has 32",
        ),
        (
            lambda state: {name: value for name, value in state.items() if "vision_tower" not in name},
            "holds a language model without a video encoder",
        ),
        (lambda _state: {"image_encoder.x": torch.zeros(1)}, "is no checkpoint of VIRST"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_told_by_tensor(
    tmp_path: Path, model: Virst7b, base: Path, change: Callable[[State], State], message: str
) -> None:
    file = published_file(tmp_path, change(published_state(model)))
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        convert(Sources(base, file), tmp_path / "out", RELEASED)
    assert str(file) in str(raised.value)
    assert "download VIRST's checkpoint again" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "virst.pt"]  # nothing half written


class Malicious:
    """What runs when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("bare", [True, False])
def test_a_pickle_with_code_is_not_executed(tmp_path: Path, model: Virst7b, base: Path, bare: bool) -> None:
    proof, file = tmp_path / "executed", tmp_path / "virst.pt"
    content = {"model_state_dict": published_state(model), "code": Malicious(proof)}
    if bare:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    why = "bare pickle" if bare else r"holds code \([\w.]+\), which was not executed"
    with pytest.raises(CheckpointError, match=why):
        convert(Sources(base, file), tmp_path / "out", RELEASED)
    assert not proof.exists()
    torch.load(file, weights_only=False) if not bare else pickle.loads(file.read_bytes())
    assert proof.exists()  # it would have been


def test_a_truncated_checkpoint_is_told(tmp_path: Path, model: Virst7b, base: Path) -> None:
    file = published_file(tmp_path, published_state(model))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"is truncated: it ends after \d+ bytes"):
        convert(Sources(base, file), tmp_path / "out", RELEASED)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: (base / SHARDS[1]).unlink(), "lacks 1 of its 2 shards, for example model-00002"),
        (lambda base: (base / SHARDS[0]).write_bytes(b"\0" * 40), "truncated or damaged, model-00001"),
        (lambda base: (base / "model.safetensors.index.json").unlink(), "index.json cannot be read"),
        (lambda base: (base / "model.safetensors.index.json").write_text("[]"), "index.json cannot be read"),
        (lambda base: (base / "tokenizer.json").unlink(), "has no tokenizer (tokenizer.json, vocab.json, merges.txt)"),
    ],
)  # fmt: skip
def test_a_damaged_base_model_is_told(
    tmp_path: Path, base: Path, sam2: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(base)
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED)
    assert "hf download OpenGVLab/VideoChat-Flash-Qwen2-7B_res448" in str(raised.value)


def test_another_base_model_is_told(tmp_path: Path, model: Virst7b, sam2: Path) -> None:
    other = replace(RELEASED, language=replace(RELEASED.language, hidden=48, heads=4))
    base = write_base(tmp_path / "other", small_virst_7b(other))
    with pytest.raises(CheckpointError, match="holds another base model: its hidden size is 48"):
        convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED)
    text_only = write_tokenizer(tmp_path / "qwen2")
    save_file({"model.embed_tokens.weight": torch.zeros(VOCABULARY, 32)}, text_only / "a.safetensors")
    (text_only / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.embed_tokens.weight": "a.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="a language model without a video encoder"):
        convert(Sources(text_only, sam2=sam2), tmp_path / "out", RELEASED)


def test_the_segmenter_is_asked_for_where_nothing_has_it(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights of SAM 2.1 large; .* --sam2"):
        convert(Sources(base), tmp_path / "out", RELEASED)
    (tmp_path / "wrong.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"wrong.pt is empty; .* --sam2"):
        convert(Sources(base, sam2=tmp_path / "wrong.pt"), tmp_path / "out", RELEASED)


def test_numbers_that_do_not_fit_float16_are_told(tmp_path: Path, model: Virst7b, base: Path) -> None:
    state = {**published_state(model), NORM: torch.full((32,), 1e6)}
    with pytest.raises(CheckpointError, match=r"not finite in model.norm.weight, as float16"):
        convert(Sources(base, published_file(tmp_path, state)), tmp_path / "out", RELEASED, "float16")


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path, base: Path, sam2: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(WeightsError, match="already holds something"):
        convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED)
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32"):
        convert(Sources(base, sam2=sam2), tmp_path / "new", RELEASED, "int8")


def test_the_tokenizers_two_older_files_are_taken_too(tmp_path: Path, base: Path, sam2: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(byte_vocabulary()))
    (base / "merges.txt").write_text("#version: 0.2\n")
    convert(Sources(base, sam2=sam2), tmp_path / "out", RELEASED)
    assert read_manifest(tmp_path / "out").config == RELEASED
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_converts_and_tells_what_it_wrote(
    tmp_path: Path, model: Virst7b, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"paper": with_preset(SMALL_7B, "paper"), "released": RELEASED}
    monkeypatch.setattr("virst_engine.model.virst_7b_config.with_preset", lambda _config, preset: small[preset])
    file, out = published_file(tmp_path, published_state(model)), tmp_path / "out"
    arguments = ["weights", "convert", str(file), "--out", str(out), "--base", str(base)]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    manifest = read_manifest(out)
    assert manifest.config == RELEASED  # the preset of the published checkpoint is the default
    assert f"tensors     {len(manifest.tensors)}" in run.output
    assert "merged adapters 14" in run.output
    told = CliRunner().invoke(app, ["weights", "info", str(out), "--verify"])
    assert told.exit_code == 0, told.output
    assert re.search(r"reasoner +\d\.\d\d GiB of weights; \d\.\d\d with --weight-bits 8, \d\.\d\d with", told.output)
    assert f"sha256      {manifest.sha256}" in told.output
    assert "every shard as its checksum says" in told.output
    assert "questions   answered" in told.output
    shard = out / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert CliRunner().invoke(app, ["weights", "info", str(out)]).exit_code == 0  # it reads no shard
    damaged = CliRunner().invoke(app, ["weights", "info", str(out), "--verify"])
    assert isinstance(damaged.exception, WeightsError)
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, WeightsError)
    wrong = CliRunner().invoke(app, [*arguments[:4], str(tmp_path / "new"), *arguments[5:], "--dtype", "int8"])
    assert wrong.exit_code == 2
    assert "dtype must be one of" in wrong.output
