# SPDX-License-Identifier: Apache-2.0
"""The weights folder: written and read shard by shard, and what may be wrong with one is named."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.model.small_virst_7b import SMALL_7B, small_virst_7b, write_tokenizer
from tests.engine.model.test_virst_7b import prompts_of
from virst_engine.errors import WeightsError
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import Virst7bConfig
from virst_engine.model.weights_folder import (
    find_folder,
    load_reasoner_model,
    load_segmenter_model,
    read_manifest,
    verify_folder,
    working_bytes,
    write_folder,
)

SHARD = 40_000  # bytes: several shards, and tensors that are larger than one


@pytest.fixture(scope="module")
def model() -> Virst7b:
    return small_virst_7b()


@pytest.fixture
def folder(tmp_path: Path, model: Virst7b) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    write_folder(tmp_path / "weights", model.config, model.state_dict().items(), {"from": "a test"}, [tokenizer], SHARD)
    return tmp_path / "weights"


def test_a_folder_comes_back_number_for_number(folder: Path, model: Virst7b) -> None:
    reasoner, segmenter = load_reasoner_model(folder), load_segmenter_model(folder)
    with torch.inference_mode():
        assert torch.equal(prompts_of(reasoner), prompts_of(model))
        pixels = torch.randn(1, 3, 64, 64)
        assert torch.equal(segmenter.encode_image(pixels).top, model.seg_model.encode_image(pixels).top)
    assert not reasoner.training
    assert not segmenter.training
    assert torch.equal(reasoner.lm_head.weight, model.lm_head.weight)
    assert all(value.device.type == "meta" for value in reasoner.seg_model.parameters())  # what it does not need
    manifest = read_manifest(folder)
    assert manifest.config == SMALL_7B
    assert manifest.facts == {"from": "a test"}
    assert manifest.tensors.keys() == model.state_dict().keys()
    assert (folder / "tokenizer.json").is_file()


def test_shards_are_as_large_as_asked_for_and_each_tensor_is_in_one(folder: Path, model: Virst7b) -> None:
    manifest = read_manifest(folder)
    assert len(manifest.shards) > 5
    for name, shard in manifest.shards.items():
        own = [tensor for tensor in manifest.tensors.values() if tensor.shard == name]
        assert len(own) == 1 or sum(tensor.bytes for tensor in own) <= SHARD
        assert (folder / name).stat().st_size == shard["bytes"]
        assert load_file(folder / name).keys() == {
            key for key, value in manifest.tensors.items() if value.shard == name
        }
    verify_folder(folder)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from virst_engine.model.weights_folder import load_reasoner_model, load_segmenter_model

def peak() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

small, large = Path(sys.argv[1]), Path(sys.argv[2])
load_reasoner_model(small)  # what building a model allocates, whatever its size
load_segmenter_model(small)
before = peak()
model = load_reasoner_model(large)
total = sum(float(value.double().sum()) for value in model.parameters() if value.device.type != "meta")  # touch all
print(peak() - before, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_files_are_large(folder: Path, tmp_path: Path) -> None:
    """The same code at a width where weights are what counts: about 200 MB, in another process."""
    language = replace(SMALL_7B.language, hidden=512, feedforward=8192, layers=4, heads=8)
    config = replace(SMALL_7B, language=language)
    with torch.device("meta"):
        shapes = Virst7b(config).state_dict()
    numbers = ((name, torch.full(value.shape, 0.01)) for name, value in shapes.items())
    write_folder(tmp_path / "large", config, numbers, {}, [], 16 << 20)
    manifest = read_manifest(tmp_path / "large")
    size = sum(shard["bytes"] for shard in manifest.shards.values())
    assert size > 150e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "large")],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak, total = (float(word) for word in run.stdout.split())
    assert peak < 1.3 * size
    assert total > 0


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_writing_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted:
        """Tensors that are made when they are asked for; how many bytes of them are alive is counted."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            for number in range(20):
                alive.append(resident())
                yield f"t{number}", torch.full((4 << 20,), 1.0 + number)  # 16 MiB

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    write_folder(tmp_path / "out", SMALL_7B, Counted(), {}, [], 32 << 20)
    assert max(alive) - alive[0] < 160 << 20  # of 320: two shards of 32, the one that is written also as bytes


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


def shard_of_norm(folder: Path) -> Path:
    return folder / read_manifest(folder).tensors["language_model.norm.weight"].shard


def truncate(folder: Path) -> None:
    file = shard_of_norm(folder)
    file.write_bytes(file.read_bytes()[:-10])


def swap_dtype(folder: Path) -> None:
    """Half the numbers in twice the bytes: the size is right, the content is not what the manifest says."""
    manifest, name, file = read_manifest(folder), "language_model.norm.weight", shard_of_norm(folder)
    state = load_file(file)
    state[name] = state[name].to(torch.int32)
    save_file(state, file)
    assert file.stat().st_size == manifest.shards[file.name]["bytes"]


def garble(folder: Path) -> None:
    file = shard_of_norm(folder)
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shard_of_norm(folder).unlink(), "a shard is missing: no file"),
        (truncate, ".safetensors is truncated or another file: it has"),
        (garble, ".safetensors is damaged"),
        (swap_dtype, "language_model.norm.weight is torch.int32 [32], wanted float32 [32]"),
        (lambda folder: (folder / "manifest.json").unlink(), "the weights of virst-7b are missing: no file"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is no manifest that this version can read"),
        (edit_manifest(lambda m: m.update(format="virst-folder-0")), "format 'virst-folder-0', wanted"),
        (edit_manifest(lambda m: m["config"].update(nonsense=1)), "unknown fields of Virst7bConfig: nonsense"),
        (edit_manifest(lambda m: m["config"]["language"].update(hidden=48)), "has wrong shapes for"),
        (edit_manifest(lambda m: m["tensors"].pop("st_embedding")), "lacks 1 tensors: st_embedding"),
        (edit_manifest(lambda m: m["shards"]["model-00001.safetensors"].pop("sha256")), "is no manifest that"),
        (edit_manifest(lambda m: m.update(shards=[])), "is no manifest that"),
        (
            edit_manifest(lambda m: m["tensors"]["st_embedding"].update(dtype="int8")),
            "has the wrong type for 1 tensors: st_embedding int8",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_told(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=re.escape(message)) as raised:
        load_reasoner_model(folder)
    assert "virst weights convert" in str(raised.value)


def test_a_number_that_changed_is_found_by_its_checksum(folder: Path) -> None:
    file = folder / "model-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    load_reasoner_model(folder)
    with pytest.raises(WeightsError, match=r"model-00003.safetensors is damaged: its SHA-256 is"):
        verify_folder(folder)


def test_a_budget_that_is_too_small_is_told_before_anything_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    wanted = [name for name in manifest.tensors if not name.startswith("seg_model.")]
    weights = sum(manifest.tensors[name].bytes for name in wanted)
    needed = (weights + working_bytes(manifest.config)) / 2**30
    load_reasoner_model(folder, budget_gib=needed * 1.01)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        WeightsError, match=r"needs [\d.]+ GiB of device memory .* the budget is [\d.]+ GiB; allow more"
    ):
        load_reasoner_model(folder, budget_gib=needed * 0.9)
    with pytest.raises(WeightsError, match="the budget is"):
        load_reasoner_model(folder, budget_gib=needed * 1.01, windows=1000)


class FakeGpu:
    """A GPU of 1 GiB whose memory is `free`, as torch tells of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, capability: tuple[int, int] = (8, 0)) -> None:
        self.share: list[float] = []
        answers = {
            "is_available": lambda: True,
            "get_device_capability": lambda device: capability,
            "mem_get_info": lambda device: (free, 1 << 30),
            "set_per_process_memory_fraction": lambda share, device: self.share.append(share),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


def test_without_a_budget_what_the_gpu_has_free_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, free=100_000)
    with pytest.raises(WeightsError, match=r"needs [\d.]+ GiB .*cuda:0 has 0.00 GiB free; allow more .*end what else"):
        load_reasoner_model(folder, "cuda:0")
    with pytest.raises(WeightsError, match=r"cuda:0 has 0.00 GiB free"):
        load_reasoner_model(folder, "cuda:0", budget_gib=0.5)
    assert gpu.share == [0.5]  # of the GPU; no answer takes more than the budget later on


def test_a_budget_counts_where_the_gpu_has_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, free=1 << 30)
    with pytest.raises(WeightsError, match=r"the budget is 0.00 GiB"):
        load_reasoner_model(folder, "cuda:0", budget_gib=1e-6)


def test_bfloat16_is_refused_by_gpus_that_emulate_it(
    tmp_path: Path, model: Virst7b, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        tensors = ((name, value.to(dtype)) for name, value in model.state_dict().items())
        write_folder(tmp_path / str(dtype), model.config, tensors, {})
    FakeGpu(monkeypatch, free=0, capability=(7, 5))
    with pytest.raises(WeightsError, match=r"does not compute in bfloat16 \(compute capability 7.5.*--dtype float16"):
        load_reasoner_model(tmp_path / "torch.bfloat16", "cuda:0")
    with pytest.raises(WeightsError, match="GiB free"):
        load_reasoner_model(tmp_path / "torch.float16", "cuda:0")


def test_a_folder_without_the_head_that_writes_words_has_prompts(tmp_path: Path, model: Virst7b) -> None:
    tensors = ((name, value) for name, value in model.state_dict().items() if not name.startswith("lm_head."))
    assert not write_folder(tmp_path / "out", model.config, tensors, {}).has_words
    loaded = load_reasoner_model(tmp_path / "out")
    assert not loaded.has_words
    with torch.inference_mode():
        assert torch.equal(prompts_of(loaded), prompts_of(model))


def test_weights_are_told_apart_by_what_the_manifest_says(folder: Path, tmp_path: Path, model: Virst7b) -> None:
    first = read_manifest(folder).sha256
    assert len(first) == 64
    again = write_folder(tmp_path / "again", model.config, model.state_dict().items(), {"from": "elsewhere"}, [], SHARD)
    assert again.sha256 == read_manifest(tmp_path / "again").sha256 == first
    other = small_virst_7b(seed=1).state_dict().items()
    assert write_folder(tmp_path / "other", model.config, other, {}, [], SHARD).sha256 != first
    config = replace(model.config, seg_frames=3)  # the same numbers mean something else
    assert write_folder(tmp_path / "config", config, model.state_dict().items(), {}, [], SHARD).sha256 != first


def test_what_is_no_folder_is_told(tmp_path: Path, folder: Path) -> None:
    assert find_folder(str(folder)) == folder
    (tmp_path / "file").write_text("")
    for path, why in (
        ("", "do not come with this package"),
        (str(tmp_path / "nowhere"), r"are missing: no folder .*nowhere"),
        (str(tmp_path / "file"), "is a file, not a weights folder"),
        (str(tmp_path), r"is a folder without manifest\.json, not a weights folder"),
    ):
        with pytest.raises(WeightsError, match=rf"{why}.*virst weights convert .*--base.*--out.*model\.weights"):
            find_folder(path)


def test_one_answer_at_full_size_works_in_less_than_two_gib() -> None:
    assert 0.2 < working_bytes(Virst7bConfig()) / 2**30 < 2


def test_an_unknown_device_is_told(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be put on device 'cuda:99'.*set model.device"):
        load_reasoner_model(folder, "cuda:99")
