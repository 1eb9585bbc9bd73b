# SPDX-License-Identifier: Apache-2.0
"""TensorRT's stages answer as torch's, for any number of objects; engines of elsewhere are refused.

Without a GPU the engines are fakes that compute with torch on the memory that they were given: what is tested is
everything around them. The tests marked `gpu` run the real ones.
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.backends.exports import SLOTS, small_sam2, stage_kernels, write_fake_export
from tests.engine.backends.fake_tensorrt import HostMemory, fake_tensorrt
from tests.engine.backends.test_exported import assert_same, features, memories
from virst_engine.backends import tensorrt_api
from virst_engine.backends.base import Stages
from virst_engine.backends.engine_store import folder_key, record_of, save_engine
from virst_engine.backends.manifest import STAGES, Manifest
from virst_engine.backends.tensorrt_api import TensorRt
from virst_engine.backends.tensorrt_backend import Cuda, TensorRtStages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.errors import BackendError, EngineMismatch
from virst_engine.types import MemoryTensors

FLAVOURS = [("tensorrt", "10.3.0"), ("tensorrt", "11.1.0"), ("tensorrt_rtx", "1.7.1.116")]
BUCKETS = (1, 4)


@pytest.fixture(scope="module")
def reference() -> TorchStages:
    return TorchStages(small_sam2())


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_fake_export(tmp_path, small_sam2())


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: " ".join(flavour))
def trt(request: pytest.FixtureRequest, manifest: Manifest, tmp_path: Path) -> TensorRt:
    """A TensorRT with engines for 1 and 4 objects in the folder."""
    trt = TensorRt(fake_tensorrt(*request.param, stage_kernels(small_sam2())))
    store_engines(trt, manifest, tmp_path)
    return trt


def store_engines(trt: TensorRt, manifest: Manifest, folder: Path, buckets: tuple[int, ...] = BUCKETS) -> None:
    platform = trt.platform(*HostMemory().describe())
    for stage in STAGES:
        for n in buckets:
            record = record_of(manifest, stage, n, platform, attention="free")
            tensors = {
                name: [tensorrt_api.DTYPES[spec.dtype], list(spec.shape), side]
                for side, specs in (("in", record.inputs), ("out", record.outputs))
                for name, spec in specs.items()
            }
            plan = {"version": [trt.flavour, trt.version], "kernel": stage, "tensors": tensors}
            root = folder / "engines" / folder_key(manifest, platform)
            save_engine(root, record, json.dumps(plan).encode())


@pytest.fixture
def stages(trt: TensorRt, tmp_path: Path) -> TensorRtStages:
    return TensorRtStages(tmp_path, tensorrt=trt, gpu=HostMemory())


def runs(stages: TensorRtStages, call: Callable[[], Any]) -> list[tuple[str, int]]:
    """Stage and rows of the engines that a call runs."""
    before = len(stages.tensorrt.module.calls)
    call()
    return [(stage, rows) for what, stage, rows in stages.tensorrt.module.calls[before:] if what == "run"]


def test_is_a_backend_with_the_sizes_of_the_model(stages: TensorRtStages, reference: TorchStages) -> None:
    assert isinstance(stages, Stages)
    assert replace(stages.sizes, prompt_tokens=0) == reference.sizes
    assert stages.buckets == BUCKETS


@pytest.mark.parametrize("objects", [1, 2, 4, 5, 9])
def test_answers_as_torch_for_any_number_of_objects(
    stages: TensorRtStages, reference: TorchStages, objects: int
) -> None:
    pixels = torch.rand(1, 3, 64, 64)
    frame, wanted_frame = stages.image_encoder(pixels), reference.image_encoder(pixels)
    assert_same(frame, wanted_frame)

    memory = memories(reference, objects)
    memory.spatial_valid[:, 0] = True
    conditioned = stages.memory_attention(frame, memory)
    wanted_conditioned = reference.memory_attention(wanted_frame, memory)
    torch.testing.assert_close(conditioned, wanted_conditioned, rtol=1e-4, atol=1e-4)

    prediction, wanted = (
        stages.mask_decoder(frame, conditioned, None),
        reference.mask_decoder(wanted_frame, wanted_conditioned, None),
    )
    assert_same(prediction, wanted)
    entry, wanted_entry = stages.memory_encoder(frame, prediction), reference.memory_encoder(wanted_frame, wanted)
    assert_same(entry, wanted_entry)


@pytest.mark.parametrize(("objects", "rows"), [(1, [1]), (2, [4]), (4, [4]), (5, [4, 1]), (7, [4, 4]), (9, [4, 4, 1])])
def test_objects_are_padded_up_to_an_engine_and_take_turns_beyond_the_largest(
    stages: TensorRtStages, reference: TorchStages, objects: int, rows: list[int]
) -> None:
    frame, memory = features(reference), memories(reference, objects)
    found = runs(stages, lambda: stages.memory_attention(frame, memory))
    assert found == [("memory_attention", n) for n in rows]


def test_objects_of_before_do_not_reach_into_a_smaller_call(stages: TensorRtStages, reference: TorchStages) -> None:
    frame, many = features(reference), memories(reference, 4)
    stages.memory_attention(frame, many)
    few = MemoryTensors(**{f.name: getattr(many, f.name)[:2].clone() for f in fields(many)})
    few.spatial_valid[:, 0] = True
    found = stages.memory_attention(frame, few)
    assert found.shape[0] == 2
    torch.testing.assert_close(found, reference.memory_attention(frame, few), rtol=1e-4, atol=1e-4)


def test_nothing_is_allocated_for_outputs_after_loading(stages: TensorRtStages) -> None:
    pixels = torch.rand(1, 3, 64, 64)
    first, second = stages.image_encoder(pixels), stages.image_encoder(pixels * 0.5)
    assert first.top.data_ptr() == second.top.data_ptr()


def test_device_memory_is_that_of_buffers_and_contexts(stages: TensorRtStages, manifest: Manifest) -> None:
    size = {"float32": 4, "int64": 8, "bool": 1}
    wanted = 0
    for spec in manifest.stages.values():
        for n in BUCKETS if spec.has_objects else (0,):
            tensors = (*spec.inputs.values(), *spec.outputs.values())
            shapes = [(torch.Size(tensor.for_objects(n)).numel(), size[tensor.dtype]) for tensor in tensors]
            wanted += 1000 + sum(count * width for count, width in shapes)  # 1000: what the fake's context takes
    assert stages.device_memory_bytes == wanted


class OtherDevice(HostMemory):
    """As a GPU: its memory is not the host's. `meta` tensors keep no data, so only what is asked for is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0
        self.pinned_bytes = 0

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        self.pinned_bytes += like.numel() * like.element_size()
        return super().pinned(like)

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waited += 1

        return wait


def test_pixels_from_the_host_pass_through_pinned_memory_that_is_not_overwritten_early(
    trt: TensorRt, tmp_path: Path
) -> None:
    gpu = OtherDevice()
    stages = TensorRtStages(tmp_path, tensorrt=trt, gpu=gpu)
    runner = stages._runners["image_encoder", 0]
    runner.buffers = {name: buffer.to("meta") for name, buffer in runner.buffers.items()}
    for _ in range(3):
        runner._copy_in("pixels", torch.rand(1, 3, 64, 64))
    assert gpu.pinned_bytes == 3 * 64 * 64 * 4  # allocated once
    assert gpu.waited == 2  # each copy but the first waits for the one before


# ---- what is refused ----


def test_engines_of_another_gpu_are_refused(trt: TensorRt, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatch, match="this is NVIDIA Thor") as refusal:
        TensorRtStages(tmp_path, tensorrt=trt, gpu=HostMemory("NVIDIA Thor", "SM110"))
    assert f"virst build {tmp_path}" in str(refusal.value)


def test_engines_of_another_version_are_refused(trt: TensorRt, tmp_path: Path) -> None:
    newer = TensorRt(fake_tensorrt(trt.flavour, "12.0.0"))
    with pytest.raises(EngineMismatch, match=rf"built for {trt.flavour} {trt.version}, this is .* 12\.0\.0"):
        TensorRtStages(tmp_path, tensorrt=newer, gpu=HostMemory())


def test_engines_of_other_weights_are_refused(trt: TensorRt, tmp_path: Path) -> None:
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace("ab" * 32, "cd" * 32))
    with pytest.raises(EngineMismatch, match=r"was built for weights abab.*, this is weights cdcd"):
        TensorRtStages(tmp_path, tensorrt=trt, gpu=HostMemory())


def test_an_engine_with_other_tensors_than_its_record_is_refused(
    trt: TensorRt, manifest: Manifest, tmp_path: Path
) -> None:
    platform = trt.platform(*HostMemory().describe())
    record = record_of(manifest, "memory_encoder", 1, platform, attention="free")
    plan = {"version": [trt.flavour, trt.version], "kernel": "", "tensors": {"top": ["HALF", [1], "in"]}}
    save_engine(tmp_path / "engines" / folder_key(manifest, platform), record, json.dumps(plan).encode())
    with pytest.raises(EngineMismatch, match="binarize is None, its record says"):
        TensorRtStages(tmp_path, tensorrt=trt, gpu=HostMemory())


def test_a_folder_without_engines_is_refused_with_the_command_to_build(manifest: Manifest, tmp_path: Path) -> None:
    trt = TensorRt(fake_tensorrt("tensorrt", "11.1.0"))
    with pytest.raises(EngineMismatch, match=rf"no engine runs image_encoder here: .*virst build {tmp_path}"):
        TensorRtStages(tmp_path, tensorrt=trt, gpu=HostMemory())


def test_engines_for_different_numbers_of_objects_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    trt = TensorRt(fake_tensorrt("tensorrt", "11.1.0"))
    store_engines(trt, manifest, tmp_path, buckets=(2,))
    for path in tmp_path.glob("engines/*/memory_encoder-2.*"):
        path.rename(path.with_name(f"gone{path.suffix}"))
    platform = trt.platform(*HostMemory().describe())
    record = record_of(manifest, "memory_encoder", 3, platform, attention="free")
    save_engine(tmp_path / "engines" / folder_key(manifest, platform), record, b"{}")
    with pytest.raises(EngineMismatch, match="are for different numbers of objects"):
        TensorRtStages(tmp_path, tensorrt=trt, gpu=HostMemory())


def test_images_memories_and_objects_that_do_not_fit_are_refused(
    stages: TensorRtStages, reference: TorchStages
) -> None:
    with pytest.raises(BackendError, match="exported for images of 64 x 64"):
        stages.image_encoder(torch.rand(1, 3, 32, 32))
    frame = features(reference)
    with pytest.raises(BackendError, match=f"exported for {SLOTS} memories"):
        stages.memory_attention(frame, memories(reference, slots=SLOTS + 1))
    with pytest.raises(BackendError, match="for 0 objects"):
        stages.memory_attention(frame, memories(reference, 0))


def test_a_machine_without_gpu_is_told_what_to_do(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"need an NVIDIA GPU, and torch finds none; .*engine\.backend: torch"):
        TensorRtStages(tmp_path, device="cuda:0")
    with pytest.raises(BackendError, match=r"device is cpu; set model\.device to cuda:0"):
        TensorRtStages(tmp_path, device="cpu")


def test_without_tensorrt_the_message_says_how_to_get_it(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"libnvinfer.so.10 of {name} is missing")

    monkeypatch.setattr(tensorrt_api.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported \(libnvinfer.*install TensorRT 10\.3"):
        TensorRtStages(tmp_path, gpu=HostMemory())


def test_a_tensorrt_that_is_too_old_is_refused() -> None:
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1 is too old; install TensorRT 10\.3 or later"):
        TensorRt(fake_tensorrt("tensorrt", "8.6.1"))


def test_the_tensorrt_whose_engines_are_there_is_taken(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {name: fake_tensorrt(name, version) for name, version in FLAVOURS[1:]}
    monkeypatch.setattr(tensorrt_api.importlib, "import_module", modules.__getitem__)
    store_engines(TensorRt(modules["tensorrt_rtx"]), manifest, tmp_path)
    assert TensorRtStages(tmp_path, gpu=HostMemory()).tensorrt.is_rtx
    store_engines(TensorRt(modules["tensorrt"]), manifest, tmp_path)
    assert not TensorRtStages(tmp_path, gpu=HostMemory()).tensorrt.is_rtx


# ---- on a GPU ----


@pytest.mark.gpu
def test_cuda_replays_what_was_recorded() -> None:
    gpu = Cuda("cuda:0")
    x = torch.zeros(4, device=gpu.device)
    calls = []

    def enqueue(stream: int) -> bool:
        calls.append(stream)
        x.add_(1.0)
        return True

    replay = gpu.record(enqueue)
    assert len(calls) == 2  # once to warm up, once to record
    assert x.tolist() == [1.0] * 4
    replay()
    replay()
    assert x.tolist() == [3.0] * 4
    assert len(calls) == 2
    name, target = gpu.describe()
    assert name
    assert target.startswith("SM")


@pytest.mark.gpu
def test_cuda_copies_from_pinned_memory() -> None:
    gpu = Cuda("cuda:0")
    pinned = gpu.pinned(torch.zeros(3, device=gpu.device))
    assert pinned.is_pinned()
    pinned.copy_(torch.tensor([1.0, 2.0, 3.0]))
    there = torch.empty(3, device=gpu.device)
    there.copy_(pinned, non_blocking=True)
    gpu.mark()()
    assert there.tolist() == [1.0, 2.0, 3.0]
