# SPDX-License-Identifier: Apache-2.0
"""Published weights of SAM 2.1: every size, both forms, and each way in which a file can be the wrong one."""

import hashlib
import inspect
import logging
import math
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.resources import files
from itertools import chain
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from sam2.modeling.backbones.hieradet import Hiera
from torch import Tensor, nn
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe

from tests.engine.model.sam2_peers import (
    SAM2_CONFIGS,
    sam2_predictor,
    sam2_predictor_without_numbers,
    transformers_config,
    transformers_model,
)
from tests.engine.model.small_models import liven
from virst_engine.errors import CheckpointError, WeightsError
from virst_engine.model.checkpoint import checkpoint_file, load_sam2, official_name, parameters_without_numbers
from virst_engine.model.config import SAM2_1_SIZES, Sam2Config, sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.model.sam2_names import POSITION_MATRICES, from_transformers, to_transformers
from virst_engine.types import MemoryTensors

OFFICIAL = {
    "tiny": "sam2.1_hiera_tiny.pt",
    "small": "sam2.1_hiera_small.pt",
    "base-plus": "sam2.1_hiera_base_plus.pt",
    "large": "sam2.1_hiera_large.pt",
}
MILLIONS = {"tiny": 38.9, "small": 46.0, "base-plus": 80.8, "large": 224.4}  # of parameters, as published
NEW_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.bias", "obj_ptr_tpos_proj.weight")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@lru_cache
def shapes(size: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in Sam2(sam2_1(size)).state_dict().items()}


def hollow(size: str = "tiny", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All weights of a size, each of them one number that is shown everywhere: torch.save writes it once."""
    values = {name: torch.tensor(i / 1024, dtype=dtype) for i, name in enumerate(shapes(size))}
    return {name: values[name].expand(shape) for name, shape in shapes(size).items()}


def save(weights: object, path: Path) -> Path:
    torch.save({"model": weights}, path)
    return path


def refused(path: Path, size: str = "tiny", **arguments: object) -> str:
    """The message with which a file is refused; it names the file and where to get the right one."""
    with pytest.raises(CheckpointError) as caught:
        load_sam2(size, path, 64, **arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert str(path) in message
    assert f"hf download facebook/sam2.1-hiera-{size} {OFFICIAL[size]}" in message
    assert "model.weights" in message
    return message


# Dimensions


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_the_dimensions_are_those_of_sam2s_configuration(size: str) -> None:
    tree = OmegaConf.load(str(files("sam2") / SAM2_CONFIGS[size])).model
    defaults = {name: p.default for name, p in inspect.signature(Hiera).parameters.items()}
    trunk = defaults | OmegaConf.to_container(tree.image_encoder.trunk)
    ours = sam2_1(size)
    assert (ours.embed_dim, ours.num_heads) == (trunk["embed_dim"], trunk["num_heads"])
    assert ours.stages == tuple(trunk["stages"])
    assert ours.global_attention_blocks == tuple(trunk["global_att_blocks"])
    assert ours.window_spec == tuple(trunk["window_spec"])
    assert [ours.position_background] * 2 == list(trunk["window_pos_embed_bkg_spatial_size"])
    assert ours.backbone_channels == list(tree.image_encoder.neck.backbone_channel_list)
    assert ours.top_down_levels == tuple(tree.image_encoder.neck.fpn_top_down_levels)
    assert ours.image_size == tree.image_size
    assert (ours.memory_frames, ours.memory_layers) == (tree.num_maskmem, tree.memory_attention.num_layers)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of tiny, small, base-plus, large, got 'huge'"):
        sam2_1("huge")
    for image_size in (0, -32, 16, 48, 500, 1000):
        with pytest.raises(ValueError, match=rf"multiple of 32, 32 or more, got {image_size}"):
            sam2_1("tiny", image_size)
    with pytest.raises(ValueError, match="multiple of 32"):
        load_sam2("tiny", "/nowhere", 500)


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_names_and_shapes_are_those_of_sam2s_own_predictor(size: str) -> None:
    reference = sam2_predictor_without_numbers(SAM2_CONFIGS[size])
    assert shapes(size) == {name: value.shape for name, value in reference.state_dict().items()}
    assert sum(p.numel() for p in reference.parameters()) / 1e6 == pytest.approx(MILLIONS[size], abs=0.1)


@pytest.mark.parametrize(("size", "image_size"), [("tiny", s) for s in (32, 96, 128, 256, 512)] + [("base-plus", 160)])
def test_image_features_are_those_of_sam2_at_any_input_size(size: str, image_size: int) -> None:
    reference = liven(sam2_predictor(SAM2_CONFIGS[size], image_size))
    ours = Sam2(sam2_1(size, image_size)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    pixels = torch.randn(1, 3, image_size, image_size)
    features, out = ours.encode_image(pixels), reference.forward_image(pixels)
    assert features.top.shape[-1] == image_size // 16
    assert torch.allclose(features.top, out["vision_features"], atol=1e-5)
    assert torch.allclose(features.high_res_s0, out["backbone_fpn"][0], atol=1e-5)
    assert torch.allclose(features.high_res_s1, out["backbone_fpn"][1], atol=1e-5)

    # Memories with their places, at this size: RoPE's and the sine tables.
    grid, now, then = ours.config.grid, 20, 17
    spatial, pointer = torch.randn(1, 64, grid, grid), torch.randn(1, 256)
    memory = MemoryTensors(
        spatial=spatial[:, None],
        spatial_tpos=torch.tensor([[ours.config.memory_frames - 1]]),
        spatial_valid=torch.ones(1, 1, dtype=torch.bool),
        pointers=pointer[:, None],
        pointer_distance=torch.tensor([[float(now - then)]]),
        pointer_valid=torch.ones(1, 1, dtype=torch.bool),
    )
    _, vision, position, levels = reference._prepare_backbone_features(out)
    anchor = {
        "maskmem_features": spatial,
        "maskmem_pos_enc": [reference.memory_encoder.position_encoding(spatial)],
        "obj_ptr": pointer,
    }
    expected = reference._prepare_memory_conditioned_features(
        frame_idx=now,
        is_init_cond_frame=False,
        current_vision_feats=vision[-1:],
        current_vision_pos_embeds=position[-1:],
        feat_sizes=levels[-1:],
        output_dict={"cond_frame_outputs": {then: anchor}, "non_cond_frame_outputs": {}},
        num_frames=now + 1,
    )
    assert torch.allclose(ours.attend_memory(features, memory), expected, atol=1e-4)


# Official files


@pytest.fixture(scope="module")
def original() -> Sam2:
    torch.manual_seed(5)
    return liven(Sam2(sam2_1("tiny", 64)))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def official(original: Sam2, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The random model as Meta writes it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("official")
    yield save(original.state_dict(), folder / OFFICIAL["tiny"])
    shutil.rmtree(folder)  # 156 MB


def same_weights(one: Sam2, other: Sam2) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def mapped(path: Path) -> list[range]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def test_an_official_file_comes_back_number_for_number(original: Sam2, official: Path) -> None:
    loaded = load_sam2("tiny", official, 64)
    assert same_weights(loaded, original)
    assert not loaded.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert not any(t.is_meta for t in chain(loaded.parameters(), loaded.buffers()))
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.encode_image(pixels).top, original.encode_image(pixels).top)
    assert load_sam2("tiny", str(official)).config == sam2_1("tiny", 1024)


def test_tables_of_the_input_size_are_computed_not_loaded(official: Path) -> None:
    for image_size in (64, 96):
        fresh, loaded = Sam2(sam2_1("tiny", image_size)), load_sam2("tiny", official, image_size)
        tables = dict(fresh.named_buffers()).keys() - fresh.state_dict().keys()
        assert tables
        for name in tables:
            assert torch.equal(loaded.get_buffer(name), fresh.get_buffer(name)), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_weights_stay_in_the_mapped_file_and_never_change_it(official: Path) -> None:
    before = hashlib.sha256(official.read_bytes()).hexdigest()
    loaded = load_sam2("tiny", official, 64)
    spans = mapped(official)
    outside = [name for name, p in loaded.named_parameters() if not any(p.data_ptr() in span for span in spans)]
    assert outside == []
    for p in loaded.parameters():
        p.zero_()
    assert hashlib.sha256(official.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_every_size_loads(size: str, tmp_path: Path) -> None:
    loaded = load_sam2(size, save(hollow(size), tmp_path / official_name(size)), 64)
    assert official_name(size) == OFFICIAL[size]
    assert loaded.config == sam2_1(size, 64)
    expected = hollow(size)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = load_sam2("tiny", save(hollow(dtype=dtype), tmp_path / "half.pt"), 64)
    expected = hollow(dtype=dtype)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].float())


def test_what_training_stores_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    torch.save({"model": hollow(), "optimizer": {"state": [1]}, "epoch": 3}, tmp_path / "trained.pt")
    assert load_sam2("tiny", tmp_path / "trained.pt", 64)


def test_a_hash_is_checked_before_the_file_is_opened(tmp_path: Path) -> None:
    path = save(hollow(), tmp_path / "x.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_sam2("tiny", path, 64, sha256=digest)
    assert load_sam2("tiny", path, 64, sha256=digest.upper())
    other = "0" * 64
    assert f"its SHA-256 is {digest}, wanted {other}" in refused(path, sha256=other)
    assert "'beef' is none, it needs 64 hexadecimal digits" in refused(path, sha256="beef")
    path.write_bytes(b"\x80 code")
    assert "not the file that was asked for" in refused(path, sha256=other)


# Folders


def test_a_folder_gives_the_official_file_of_the_size_first(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert checkpoint_file("tiny", tmp_path).name == "model.safetensors"
    for name in OFFICIAL.values():
        (tmp_path / name).touch()
    for size, name in OFFICIAL.items():
        assert checkpoint_file(size, tmp_path) == tmp_path / name
    assert checkpoint_file("tiny", tmp_path / OFFICIAL["large"]).name == OFFICIAL["large"]


def test_a_folder_without_a_known_file_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    assert f"holds neither {OFFICIAL['tiny']} nor model.safetensors, but nothing" in refused(tmp_path)
    for name in ("config.json", OFFICIAL["large"]):
        (tmp_path / name).touch()
    assert f"but config.json, {OFFICIAL['large']};" in refused(tmp_path)
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    assert f"give one of the folders in {tmp_path / 'snapshots'}" in refused(tmp_path)
    (tmp_path / OFFICIAL["tiny"]).symlink_to(tmp_path / "blobs" / "gone")  # a download that was cleared
    assert "holds neither" in refused(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for size in SAM2_1_SIZES:
        assert f"SAM 2.1 {size} are missing: no file" in refused(tmp_path / "gone.pt", size)
    with pytest.raises(CheckpointError, match=f"no file {Path('~').expanduser()}/no such file"):
        load_sam2("tiny", "~/no such file")


def test_no_path_does_not_mean_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(hollow(), tmp_path / OFFICIAL["tiny"])
    monkeypatch.chdir(tmp_path)
    assert checkpoint_file("tiny", ".").name == OFFICIAL["tiny"]
    with pytest.raises(CheckpointError, match="do not come with this package; get the official file"):
        load_sam2("tiny", "")


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="Linux has a file that not even root can read")
def test_a_file_that_cannot_be_read_is_refused() -> None:
    assert "cannot be read ([Errno 5]" in refused(Path("/proc/self/mem"))
    assert "cannot be read ([Errno 5]" in refused(Path("/proc/self/mem"), sha256="0" * 64)


# Files that are damaged, dangerous or something else


@pytest.mark.parametrize("kept", [4, 1000, -1000, -1])
def test_a_truncated_official_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = save(hollow(), tmp_path / "x.pt")
    path.write_bytes(path.read_bytes()[:kept])
    assert f"is truncated: it ends after {path.stat().st_size} bytes" in refused(path)


@pytest.mark.parametrize("kept", [9, 100, 5000, -1])
def test_a_truncated_safetensors_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"mask_decoder.{i}": torch.zeros(100) for i in range(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "is truncated or damaged" in refused(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is no checkpoint"),
        (b"\0" * 64, "is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 100, "is truncated"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert cause in refused(path)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "x"), "zip", files("sam2") / "configs" / "sam2.1")
    assert "is damaged" in refused(tmp_path / "x.zip")


def spring() -> None:
    Trap.sprung = True


class Trap:
    """Unpickling it executes code."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


@pytest.mark.parametrize(
    ("write", "cause"),
    [
        (lambda path: torch.save(Trap(), path), "holds code"),
        (lambda path: save(Trap(), path), "holds code"),
        (lambda path: save(hollow() | {"no_obj_ptr": Trap()}, path), "holds code"),
        (lambda path: path.write_bytes(pickle.dumps(Trap())), "is a bare pickle"),
        (lambda path: torch.save(Trap(), path, _use_new_zipfile_serialization=False), "is a bare pickle"),
    ],
    ids=["alone", "as weights", "among weights", "bare pickle", "old torch.save"],
)
def test_code_in_a_file_is_refused_and_never_executed(
    write: Callable[[Path], object], cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    write(path)
    message = refused(path)
    assert cause in message
    if cause == "holds code":
        assert f"({spring.__module__}.spring), which was not executed" in message
    assert not Trap.sprung


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}, {"model": [1, 2]}, {"model": None}, 3])
def test_a_pickle_of_another_form_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert 'no weights under "model"' in refused(tmp_path / "x.pt")


def test_other_things_among_the_weights_are_refused(tmp_path: Path) -> None:
    for extra in ({"step": 3}, {7: torch.zeros(1)}):
        message = refused(save(hollow() | extra, tmp_path / "x.pt"))
        assert f"holds other things than weights, for example {next(iter(extra))!r}" in message


# Another model, another size


@pytest.mark.parametrize("wanted", ["tiny", "base-plus"])
@pytest.mark.parametrize("found", SAM2_1_SIZES)
def test_another_size_is_named(wanted: str, found: str, tmp_path: Path) -> None:
    path = save(hollow(found), tmp_path / "x.pt")
    if found == wanted:
        assert load_sam2(wanted, path, 64)
    else:
        message = refused(path, wanted)
        assert f"holds SAM 2.1 {found}, not {wanted} (set model.name to sam2.1-{found} to use it)" in message


def test_another_size_of_transformers_is_named(tmp_path: Path) -> None:
    path = save(to_transformers(hollow("small")), tmp_path / "x.pt")
    assert "holds SAM 2.1 small, not tiny" in refused(path)


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_sam_2_of_before_2_1_is_named(size: str, tmp_path: Path) -> None:
    old = sam2_predictor_without_numbers(SAM2_CONFIGS[size].replace("sam2.1", "sam2"))
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in old.state_dict().items()}
    assert sorted(shapes(size).keys() - weights.keys()) == list(NEW_IN_2_1)
    for wanted in {size, "large"}:
        message = refused(save(weights, tmp_path / "x.pt"), wanted)
        assert "holds SAM 2, not SAM 2.1: it lacks no_obj_embed_spatial, obj_ptr_tpos_proj.weight" in message


def test_sam_2_of_before_2_1_in_transformers_form_is_named(tmp_path: Path) -> None:
    config = transformers_config(sam2_1("tiny"))
    config.enable_occlusion_spatial_embedding = config.enable_temporal_pos_encoding_for_object_pointers = False
    with torch.device("meta"):
        old = Sam2VideoModel(config)
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in old.state_dict().items()}
    message = refused(save(weights, tmp_path / "x.pt"))
    assert "holds SAM 2, not SAM 2.1: it lacks occlusion_spatial_embedding_parameter" in message


def test_another_model_is_named(tmp_path: Path) -> None:
    assert "another model than SAM 2: layer.bias, layer.weight" in refused(
        save({"layer.weight": torch.zeros(2), "layer.bias": torch.zeros(2)}, tmp_path / "x.pt")
    )
    assert "another model than SAM 2: no tensors" in refused(save({}, tmp_path / "x.pt"))
    image_only = {name: value for name, value in hollow().items() if not name.startswith("memory_")}
    assert "a model for single images" in refused(save(image_only, tmp_path / "x.pt"))


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path: Path) -> None:
    weights = hollow()
    del weights["no_obj_ptr"], weights["obj_ptr_proj.layers.1.bias"]
    weights |= {"surplus": torch.zeros(2), "no_mem_embed": torch.zeros(1, 1, 3)}
    message = refused(save(weights, tmp_path / "x.pt"))
    assert "lacks 2 tensors: no_obj_ptr, obj_ptr_proj.layers.1.bias;" in message
    assert "has unknown 1 tensors: surplus;" in message
    assert "has wrong shapes for 1 tensors: no_mem_embed [1, 1, 3] instead of [1, 1, 256];" in message


def test_differences_of_the_transformers_form_are_named_in_its_words(tmp_path: Path) -> None:
    weights = to_transformers(hollow())
    del weights["no_object_pointer"]
    weights |= {
        "memory_attention.norm.weight": torch.zeros(2),
        "prompt_encoder.point_embed.weight": torch.zeros(3, 256),
    }
    message = refused(save(weights, tmp_path / "x.pt"))
    assert "lacks 1 tensors: no_object_pointer;" in message
    assert "has unknown 1 tensors: memory_attention.norm.weight;" in message
    assert "prompt_encoder.point_embed.weight [3, 256] instead of [4, 256]" in message


def test_a_long_list_goes_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = hollow() | {f"surplus.{i}": torch.zeros(1) for i in range(100, 150)}
    with caplog.at_level(logging.ERROR):
        message = refused(save(weights, tmp_path / "x.pt"))
    assert "has unknown 50 tensors: surplus.100, surplus.101" in message
    assert "and 30 more, see the log" in message
    assert "surplus.149" not in message
    assert "surplus.149" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    weights = hollow() | {"no_obj_ptr": torch.tensor(value).expand(1, 256)}
    assert "is damaged: it has numbers that are not finite in 1 tensors: no_obj_ptr;" in refused(
        save(weights, tmp_path / "x.pt")
    )


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(1, 256, dtype=torch.int8), "torch.int8"),
        (torch.zeros(1, 256, dtype=torch.float64), "torch.float64"),
        (torch.zeros(1, 256).to_sparse(), "torch.float32"),
    ],
)
def test_types_that_are_no_weights_are_refused(tensor: Tensor, found: str, tmp_path: Path) -> None:
    message = refused(save(hollow() | {"no_obj_ptr": tensor}, tmp_path / "x.pt"))
    assert f"has the wrong type for 1 tensors: no_obj_ptr {found}; float32, float16 or bfloat16" in message


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = save(hollow(), tmp_path / "x.pt")
    for device in ("cuda:93", "abacus"):
        with pytest.raises(WeightsError, match=rf"cannot run on device '{device}'.*model\.device"):
            load_sam2("tiny", path, 64, device=device)


def test_modules_of_others_keep_their_numbers() -> None:
    others: list[nn.Module] = []
    with parameters_without_numbers():
        thread = threading.Thread(target=lambda: others.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not others[0].weight.is_meta
    with pytest.raises(ValueError, match="stop"), parameters_without_numbers():
        raise ValueError("stop")
    assert not nn.Linear(2, 2).weight.is_meta


# The form of transformers


@pytest.mark.parametrize("size", SAM2_1_SIZES)
def test_names_and_shapes_in_transformers_form_are_its_own(size: str) -> None:
    with torch.device("meta"):
        theirs, ours = Sam2VideoModel(transformers_config(sam2_1(size))), Sam2(sam2_1(size))
    converted = {name: value.shape for name, value in to_transformers(ours.state_dict()).items()}
    assert converted == {name: value.shape for name, value in theirs.state_dict().items()}


class Peers:
    """transformers' model and ours with its weights."""

    def __init__(self, config: Sam2Config) -> None:
        torch.manual_seed(2)
        self.theirs = liven(transformers_model(config))
        self.ours = Sam2(config).eval()
        weights = from_transformers(self.theirs.state_dict(), self.ours.state_dict())
        self.ours.load_state_dict(weights, strict=True, assign=True)
        self.pixels = torch.randn(1, 3, config.image_size, config.image_size)
        self.features = self.ours.encode_image(self.pixels)


@pytest.fixture(scope="module", params=[("tiny", 256), ("base-plus", 128)], ids=["tiny", "base-plus"])
def peers(request: pytest.FixtureRequest) -> Peers:
    with torch.no_grad():
        return Peers(sam2_1(*request.param))


def test_there_and_back_changes_nothing(peers: Peers) -> None:
    theirs, back = peers.theirs.state_dict(), to_transformers(peers.ours.state_dict())
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)


def test_image_features_are_those_of_transformers(peers: Peers) -> None:
    levels = peers.theirs.get_image_features(peers.pixels).fpn_hidden_states  # hw b c
    features = peers.features
    for ours, theirs in zip((features.high_res_s0, features.high_res_s1, features.top), levels, strict=True):
        assert torch.allclose(ours.flatten(2).permute(2, 0, 1), theirs, atol=1e-4)
    embeddings = peers.theirs.get_image_embeddings(peers.pixels)
    assert torch.allclose(peers.ours.without_memory(features), embeddings[-1], atol=1e-4)


def test_masks_are_those_of_transformers(peers: Peers) -> None:
    ours, theirs, features = peers.ours, peers.theirs, peers.features
    conditioned = ours.without_memory(features)
    empty = theirs.prompt_encoder.not_a_point_embed.weight.expand(1, 1, 2, -1)
    masks, ious, tokens, score = theirs.mask_decoder(
        image_embeddings=conditioned,
        image_positional_embeddings=theirs.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=empty,
        dense_prompt_embeddings=theirs.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
        multimask_output=True,
        high_resolution_features=[features.high_res_s0, features.high_res_s1],
    )
    prediction = ours.decode_mask(features, conditioned, None)
    best = int(ious[0, 0].argmax())
    assert torch.allclose(prediction.mask_logits[0], masks[0, 0, best], atol=1e-4)
    assert torch.allclose(prediction.iou[0], ious[0, 0, best], atol=1e-4)
    assert torch.allclose(prediction.object_score_logits, score[0, 0], atol=1e-4)
    pointer = theirs.object_pointer_proj(tokens[0, :, best]) if score > 0 else theirs.no_object_pointer
    assert torch.allclose(prediction.pointer, pointer, atol=1e-4)
    token = torch.randn(3, 256)
    assert torch.allclose(ours.obj_ptr_proj(token), theirs.object_pointer_proj(token), atol=1e-4)


def test_prompts_are_those_of_transformers(peers: Peers) -> None:
    ours, theirs, size = peers.ours.sam_prompt_encoder, peers.theirs.prompt_encoder, peers.ours.config.image_size
    points, labels = torch.rand(1, 5, 2) * size, torch.tensor([[0, 1, 2, 3, -1]], dtype=torch.int32)
    mask = torch.randn(1, 1, size // 4, size // 4)
    sparse, dense = ours(points=(points, labels), boxes=None, masks=mask)
    their_sparse, their_dense = theirs(points[:, None], labels[:, None], None, mask)
    assert torch.allclose(sparse, their_sparse[:, 0], atol=1e-4)
    assert torch.allclose(dense, their_dense, atol=1e-4)
    large = torch.randn(1, 1, size, size)
    assert torch.equal(peers.ours.mask_downsample(large), peers.theirs.mask_downsample(large))


def test_memories_are_those_of_transformers(peers: Peers) -> None:
    ours, theirs, features, config = peers.ours, peers.theirs, peers.features, peers.ours.config
    masks = torch.randn(1, 1, config.image_size, config.image_size) * 10
    spatial, position = theirs.memory_encoder(features.top, masks)
    encoded = ours.memory_encoder(features.top, masks, skip_mask_sigmoid=True)["vision_features"]
    assert torch.allclose(encoded, spatial, atol=1e-4)

    row, distance = 3, torch.tensor([2.0, 5.0])
    pointers = torch.randn(1, 2, config.channels)
    temporal = theirs.memory_temporal_positional_encoding[row, 0, 0][:, None, None]
    pointer_position = theirs.temporal_positional_encoding_projection_layer(
        get_1d_sine_pe(distance / (config.max_pointers - 1), config.channels)
    )
    splits = config.channels // config.memory_channels
    parts = (spatial, position + temporal)
    memory, memory_position = (part.flatten(2).permute(2, 0, 1) for part in parts)  # hw b m
    tokens = pointers.reshape(2 * splits, 1, config.memory_channels)
    place = theirs.vision_encoder.neck.position_encoding(features.top.shape, features.top.device, features.top.dtype)
    expected = theirs.memory_attention(
        current_vision_features=features.top.flatten(2).permute(2, 0, 1),
        current_vision_position_embeddings=place.flatten(2).permute(2, 0, 1),
        memory=torch.cat((memory, tokens)),
        memory_posision_embeddings=torch.cat(
            (memory_position, pointer_position.repeat_interleave(splits, dim=0)[:, None])
        ),
        num_object_pointer_tokens=2 * splits,
    )
    recalled = ours.attend_memory(
        features,
        MemoryTensors(
            spatial=spatial[:, None],
            spatial_tpos=torch.tensor([[row]]),
            spatial_valid=torch.ones(1, 1, dtype=torch.bool),
            pointers=pointers,
            pointer_distance=distance[None],
            pointer_valid=torch.ones(1, 2, dtype=torch.bool),
        ),
    )
    assert torch.allclose(recalled.flatten(2), expected.reshape(-1, 1, config.channels).permute(1, 2, 0), atol=1e-4)


def test_a_folder_that_transformers_saved_is_loaded(original: Sam2, tmp_path: Path) -> None:
    theirs = transformers_model(original.config)
    theirs.load_state_dict(to_transformers(original.state_dict()), strict=True)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    try:
        assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
        loaded = load_sam2("tiny", tmp_path, 64)
        assert same_weights(loaded, original)
        assert same_weights(load_sam2("tiny", path, 64), original)
        spans = mapped(path)
        assert all(any(p.data_ptr() in span for span in spans) for p in loaded.parameters())
        path.write_bytes(path.read_bytes()[:-4])
        assert "is truncated or damaged" in refused(path)
    finally:
        path.unlink()  # 156 MB


@pytest.mark.parametrize("stored", POSITION_MATRICES)
def test_one_of_the_two_equal_matrices_is_enough(stored: str, tmp_path: Path) -> None:
    weights = to_transformers(hollow())
    for name in set(POSITION_MATRICES) - {stored}:
        del weights[name]
    loaded = load_sam2("tiny", save(weights, tmp_path / "x.pt"), 64)
    name = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert torch.equal(loaded.get_buffer(name), hollow()[name])


def test_two_different_matrices_are_refused(tmp_path: Path) -> None:
    weights = to_transformers(hollow()) | {POSITION_MATRICES[0]: torch.ones(2, 128)}
    assert "holds two different matrices" in refused(save(weights, tmp_path / "x.pt"))
    del weights[POSITION_MATRICES[0]], weights[POSITION_MATRICES[1]]
    assert "lacks 2 tensors: prompt_encoder.shared_embedding" in refused(save(weights, tmp_path / "x.pt"))
