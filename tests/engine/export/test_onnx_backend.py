# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime answers as torch does, says why when it cannot, and keeps nothing."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.backends.exports import small_sam2
from tests.engine.backends.test_exported import assert_same, features, memories
from virst_engine.backends.manifest import STAGES, file_sha256, read_manifest, write_manifest
from virst_engine.backends.onnx_backend import CPU, CUDA, ONE_BY_ONE, OnnxRuntimeStages, load_onnxruntime, open_session
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import ModelParameters
from virst_engine.errors import BackendError, ExportError
from virst_engine.types import MemoryTensors, PromptTokens
from virst_engine.weights import load_segmenter

pytest.importorskip("onnxruntime")
SLOTS, ROWS, TOKENS = 9, 18, 16
LAST_BITS = 2e-6  # the same sums, perhaps in another order


@pytest.fixture
def folder(exported: Callable[[str], Path]) -> Path:
    return exported("fp32")


@pytest.fixture
def stages(folder: Path) -> OnnxRuntimeStages:
    return OnnxRuntimeStages(folder, threads=1)


@pytest.fixture(scope="module")
def reference() -> TorchStages:
    sam2, level = load_segmenter(ModelParameters())
    return TorchStages(sam2, fusion_level=level)


def assert_near(found: Any, wanted: Any, within: float = 1e-4) -> None:
    """Both tensors, or both dataclasses of them; `within`: of the largest number."""
    for name, tensor in vars(wanted).items() if hasattr(wanted, "__dataclass_fields__") else [("", wanted)]:
        ours = getattr(found, name) if name else found
        assert ours.shape == tensor.shape
        assert torch.allclose(ours, tensor, atol=within * float(tensor.abs().max())), name


def some_memories(reference: TorchStages, objects: int, slots: int = SLOTS, rows: int = ROWS) -> MemoryTensors:
    """With at least one memory of each object, and slots that no object uses."""
    memory = memories(reference, objects, slots, rows)
    memory.spatial_valid[:, 0] = True
    memory.spatial_valid[:, 2:4] = False
    memory.pointer_valid[:, 5:6] = False
    return memory


@pytest.mark.parametrize("objects", [1, 3, 8])
def test_all_stages_answer_as_torch(stages: OnnxRuntimeStages, reference: TorchStages, objects: int) -> None:
    pixels = torch.randn(1, 3, 128, 128)
    frame = reference.image_encoder(pixels)
    assert_near(stages.image_encoder(pixels), frame)
    memory = some_memories(reference, objects)
    conditioned = reference.memory_attention(frame, memory)
    assert_near(stages.memory_attention(frame, memory), conditioned)
    tokens = PromptTokens(torch.randn(objects, 4, stages.sizes.channels))
    for prompts in (None, tokens, replace(tokens, valid=torch.rand(objects, 4) > 0.3)):
        prediction = reference.mask_decoder(frame, conditioned, prompts)
        assert_near(stages.mask_decoder(frame, conditioned, prompts), prediction)
    binarize = torch.rand(objects) > 0.5
    blocks = replace(prediction, mask_logits=torch.where(prediction.mask_logits > 0, 7.0, -5.0))
    assert_near(
        stages.memory_encoder(frame, blocks, binarize).spatial,
        reference.memory_encoder(frame, blocks, binarize).spatial,
    )


@pytest.mark.parametrize(("slots", "rows"), [(SLOTS, ROWS), (4, 6), (1, 1)])
def test_empty_slots_change_nothing(stages: OnnxRuntimeStages, reference: TorchStages, slots: int, rows: int) -> None:
    frame = features(reference)
    memory = some_memories(reference, 2, slots, rows)
    assert_near(stages.memory_attention(frame, memory), reference.memory_attention(frame, memory))


def test_an_object_without_any_memory_spoils_no_other(stages: OnnxRuntimeStages, reference: TorchStages) -> None:
    frame, memory = features(reference), some_memories(reference, 2)
    for valid in (memory.spatial_valid, memory.pointer_valid):
        valid[0] = False
    found = stages.memory_attention(frame, memory)
    assert torch.isfinite(found).all()
    assert_near(found[1:], reference.memory_attention(frame, memory)[1:])
    for valid in (memory.spatial_valid, memory.pointer_valid):
        valid[:] = False
    assert torch.isfinite(stages.memory_attention(frame, memory)).all()


def test_what_no_object_has_is_left_out(stages: OnnxRuntimeStages, reference: TorchStages) -> None:
    frame, memory = features(reference), some_memories(reference, 3)
    memory.spatial_valid[:] = torch.tensor([True, False, False, True, False, False, False, False, False])
    memory.pointer_valid[:] = False
    session, seen = stages._sessions["memory_attention"], []
    stages._sessions["memory_attention"] = SimpleNamespace(
        run=lambda names, given: seen.append(given) or session.run(names, given)
    )
    stages.memory_attention(frame, memory)
    (given,) = seen
    assert given["spatial"].shape[1] == given["spatial_tpos"].shape[1] == 2
    assert torch.equal(torch.from_numpy(given["spatial_tpos"]), memory.spatial_tpos[:, [0, 3]])
    assert given["pointers"].shape[1] == 1
    assert not given["pointer_valid"].any()


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small model that has memory attention for one object, too: 4 memories, 5 pointers."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    from virst_engine.export.onnx import export_stages

    folder = tmp_path_factory.mktemp("one_by_one")
    sizes = {"anchors_attended": 2, "recent_frames": 2, "pointers": 4, "prompt_tokens": 6}
    export_stages(small_sam2(), folder, name="small", weights_sha256="ab" * 32, one_by_one=True, **sizes)
    return folder


def watched(stages: OnnxRuntimeStages) -> list[tuple[str, dict[str, Any]]]:
    """What the sessions of memory attention are given from now on."""
    seen: list[tuple[str, dict[str, Any]]] = []
    for stage in {"memory_attention", *ONE_BY_ONE} & stages._sessions.keys():

        def run(names: Any, given: Any, stage: str = stage, session: Any = stages._sessions[stage]) -> Any:
            seen.append((stage, given))
            return session.run(names, given)

        stages._sessions[stage] = SimpleNamespace(run=run)
    return seen


def test_objects_one_by_one_read_what_they_read_together(one_by_one: Path) -> None:
    stages, reference = OnnxRuntimeStages(one_by_one, threads=1), TorchStages(small_sam2())
    frame, memory = features(reference), some_memories(reference, 4, slots=4, rows=5)
    memory.spatial_valid[:] = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    memory.pointer_valid[:] = torch.tensor([[1] * 5, [1, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    wanted, seen = reference.memory_attention(frame, memory), watched(stages)
    assert_near(stages.memory_attention(frame, memory), wanted)
    assert [stage for stage, _ in seen] == ["memory_queries"] + ["memory_read"] * 4
    assert [given["spatial"].shape[1] for _, given in seen[1:]] == [4, 1, 2, 2]
    assert [given["pointers"].shape[1] for _, given in seen[1:]] == [5, 1, 3, 3]
    assert not {"spatial_valid", "pointer_valid"} & seen[1][1].keys(), "every row that is given is there"


@pytest.mark.parametrize("pool", [1, 2])
def test_operators_of_onnxruntime_give_the_numbers_of_the_plain_graph(
    one_by_one: Path, tmp_path: Path, pool: int
) -> None:
    """Over numbers of memories and pointers; pooled keys have scores of their own, which no fused attention adds."""
    if pool > 1:
        from virst_engine.export.onnx import export_stages

        sam2, one_by_one = small_sam2(), tmp_path
        sam2.pool_memory(pool)
        sizes = {"anchors_attended": 2, "recent_frames": 2, "pointers": 4, "prompt_tokens": 6}
        export_stages(sam2, one_by_one, name="small", weights_sha256="ab" * 32, one_by_one=True, **sizes)
    stages = OnnxRuntimeStages(one_by_one, threads=1)
    frame = features(TorchStages(small_sam2()))
    for slots, rows in ((4, 5), (1, 1), (4, 1), (1, 5), (3, 2)):
        memory = memories(stages, 2, slots, rows)
        memory.spatial_valid[:] = memory.pointer_valid[:] = True
        given = {"top": frame.top, **vars(memory)}
        plain = stages._run_on_cpu("memory_attention", given, stages._sessions)["conditioned"]
        assert_near(stages.memory_attention(frame, memory), plain)


def test_only_the_graphs_for_one_object_have_operators_of_onnxruntime(one_by_one: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for stage in (*STAGES, *ONE_BY_ONE):
        nodes = onnx.load(str(one_by_one / f"{stage}.onnx")).graph.node
        own = {node.op_type for node in nodes if node.domain == "com.microsoft"}
        assert own == ({"RotaryEmbedding", "MultiHeadAttention"} if stage in ONE_BY_ONE else set()), stage


def test_an_object_without_pointers_or_memories_reads_by_the_stage_for_all(one_by_one: Path) -> None:
    stages, reference = OnnxRuntimeStages(one_by_one, threads=1), TorchStages(small_sam2())
    frame, memory = features(reference), some_memories(reference, 3, slots=4, rows=5)
    memory.spatial_valid[:, 0] = memory.pointer_valid[:, 0] = True
    memory.pointer_valid[1] = False
    memory.spatial_valid[2] = False
    wanted, seen = reference.memory_attention(frame, memory), watched(stages)
    assert_near(stages.memory_attention(frame, memory), wanted)
    assert [stage for stage, _ in seen] == ["memory_queries", "memory_read", "memory_attention", "memory_attention"]
    memory.pointer_valid[2] = False
    assert torch.isfinite(stages.memory_attention(frame, memory)).all()


def test_an_export_without_the_stages_for_one_object_reads_all_at_once(one_by_one: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one_by_one, tmp_path / "export"))
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, stages={stage: manifest.stages[stage] for stage in STAGES}))
    for stage in ONE_BY_ONE:
        (folder / f"{stage}.onnx").unlink()
    apart, together = OnnxRuntimeStages(one_by_one, threads=1), OnnxRuntimeStages(folder, threads=1)
    frame, memory = features(together), some_memories(together, 3, slots=4, rows=5)
    memory.pointer_valid[:, 0] = True
    seen = watched(together)
    assert_near(together.memory_attention(frame, memory), apart.memory_attention(frame, memory))
    assert [stage for stage, _ in seen] == ["memory_attention"]


def test_what_a_call_returns_outlives_the_next_one(stages: OnnxRuntimeStages, reference: TorchStages) -> None:
    frame, memory = features(reference), some_memories(reference, 2)
    conditioned = stages.memory_attention(frame, memory)
    kept = conditioned.clone()
    stages.memory_attention(features(reference), some_memories(reference, 2))
    assert torch.equal(conditioned, kept)


def test_each_object_may_have_a_frame_of_its_own(stages: OnnxRuntimeStages, reference: TorchStages) -> None:
    frames, prompts = features(reference, 3), PromptTokens(torch.randn(3, 4, stages.sizes.channels))
    wanted = reference.mask_decoder(frames, None, prompts)
    assert_near(stages.mask_decoder(frames, None, prompts), wanted)
    assert_near(stages.memory_encoder(frames, wanted).spatial, reference.memory_encoder(frames, wanted).spatial)


def test_clicks_and_masks_answer_as_torch(stages: OnnxRuntimeStages, reference: TorchStages) -> None:
    points, labels = torch.tensor([[[30.0, 40.0], [90.0, 20.0]]]), torch.tensor([[1, 0]])
    tokens = stages.click_tokens(points, labels)
    assert_same(tokens, reference.click_tokens(points, labels))
    frame = features(reference)
    assert_near(stages.mask_decoder(frame, None, tokens), reference.mask_decoder(frame, None, tokens))
    mask = torch.zeros(1, 1, 128, 128)
    mask[:, :, 30:70, 50:90] = 1.0
    assert_near(stages.mask_prediction(frame, mask), reference.mask_prediction(frame, mask))


def test_what_was_not_exported_is_refused(stages: OnnxRuntimeStages, reference: TorchStages) -> None:
    with pytest.raises(BackendError, match=r"exported for images of 128 x 128, got 96 x 96; set model\.image_size"):
        stages.image_encoder(torch.zeros(1, 3, 96, 96))
    frame = features(reference)
    with pytest.raises(BackendError, match="exported for 9 memories, got 10"):
        stages.memory_attention(frame, memories(reference, 1, SLOTS + 1, ROWS))
    with pytest.raises(BackendError, match="exported for 18 object pointers, got 19"):
        stages.memory_attention(frame, memories(reference, 1, SLOTS, ROWS + 1))
    with pytest.raises(BackendError, match="exported for 16 prompt tokens, got 17"):
        stages.mask_decoder(frame, None, PromptTokens(torch.zeros(1, TOKENS + 1, stages.sizes.channels)))
    with pytest.raises(BackendError, match="called for 0 objects"):
        stages.memory_attention(frame, memories(reference, 0, SLOTS, ROWS))


def test_a_file_of_another_export_is_refused(folder: Path) -> None:
    shutil.copy(folder / "mask_decoder.onnx", folder / "memory_encoder.onnx")
    with pytest.raises(ExportError, match=r"memory_encoder\.onnx is not the memory_encoder that was exported"):
        OnnxRuntimeStages(folder)


def test_a_file_that_is_no_onnx_is_refused(folder: Path) -> None:
    manifest, file = read_manifest(folder), folder / "mask_decoder.onnx"
    file.write_bytes(b"not a graph")
    spec = replace(manifest.stages["mask_decoder"], sha256=file_sha256(file))
    write_manifest(folder, replace(manifest, stages={**manifest.stages, "mask_decoder": spec}))
    with pytest.raises(BackendError, match=r"cannot run .*mask_decoder\.onnx on CPUExecutionProvider"):
        OnnxRuntimeStages(folder)


def test_half_precision_on_a_cpu(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, precision="bf16"))
    with pytest.raises(BackendError, match="no bfloat16 on CPUs; export the model with --precision fp32"):
        OnnxRuntimeStages(folder)
    write_manifest(folder, replace(manifest, precision="fp16"))
    with caplog.at_level(logging.WARNING):
        OnnxRuntimeStages(folder)
    assert "fp32 is faster here" in caplog.text


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"package onnxruntime cannot be imported .* set engine\.backend to torch"):
        OnnxRuntimeStages(folder)


def test_a_provider_that_is_not_there_is_named(folder: Path) -> None:
    if CUDA in load_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime is for GPUs")
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider, only .* install onnxruntime-gpu"):
        OnnxRuntimeStages(folder, device="cuda:0")
    with pytest.raises(BackendError, match="has no TensorrtExecutionProvider"):
        OnnxRuntimeStages(folder, providers=("TensorrtExecutionProvider", CPU))


class Pretender:
    """An onnxruntime that offers CUDA and then quietly runs on the CPU, as the real one does with a wrong CUDA."""

    def __init__(self) -> None:
        self._real = load_onnxruntime()
        self.SessionOptions = self._real.SessionOptions

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def InferenceSession(
        self, model: object, options: object, providers: list[tuple[str, dict[str, Any]]], **others: object
    ) -> Any:
        assert providers[0][0] == CUDA
        assert providers[-1][0] == CPU
        return self._real.InferenceSession(model, options, providers=[CPU])


def test_a_provider_that_does_not_start_is_not_passed_over(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"could not start CUDAExecutionProvider .* and would run on CPUExecution"):
        open_session(Pretender(), folder / "mask_decoder.onnx", providers=(CUDA,), device=torch.device("cuda:1"))


Calls = list[tuple[str, bool, int]]  # stage, in a session of one thread?, objects


def called(stages: OnnxRuntimeStages) -> Calls:
    """What the sessions are called for from now on, in the order in which they are."""
    calls: Calls = []
    for own, sessions in ((False, stages._sessions), (True, stages._one_thread)):
        for stage, real in sessions.items():

            def run(names: Any, given: Any, stage: str = stage, own: bool = own, real: Any = real) -> Any:
                rows = [len(value) for name, value in given.items() if name not in ("top", "tokens", "queries")]
                calls.append((stage, own, rows[0] if rows else 1))
                return real.run(names, given)

            sessions[stage] = SimpleNamespace(run=run)
    return calls


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_objects_as_threads_go_at_once(one_by_one: Path, folder: Path, threads: int, turns: bool) -> None:
    """Alone where scores are large, with those left over on all threads; else in equal parts. To the same numbers."""
    export, slots, rows = (one_by_one, 4, 5) if turns else (folder, SLOTS, ROWS)
    single, several = OnnxRuntimeStages(export, threads=1), OnnxRuntimeStages(export, threads=threads)
    size = single.sizes.image_size
    frame = single.image_encoder(torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
    calls = called(several)
    for objects in (1, 2, 3, 5, 7):
        memory = memories(single, objects, slots, rows)
        memory.spatial_valid[:, 0] = memory.pointer_valid[:, 0] = True
        conditioned = single.memory_attention(frame, memory)
        prediction = single.mask_decoder(frame, conditioned, None)
        entry = single.memory_encoder(frame, prediction)
        calls.clear()
        found = several.memory_attention(frame, memory)
        assert_near(several.mask_decoder(frame, conditioned, None), prediction, within=LAST_BITS)
        assert_near(several.memory_encoder(frame, prediction), entry, within=LAST_BITS)
        assert_near(found, conditioned, within=LAST_BITS)
        for stage in ("memory_read" if turns else "memory_attention", "mask_decoder", "memory_encoder"):
            alone = [count for name, own, count in calls if name == stage and own]
            together = [count for name, own, count in calls if name == stage and not own]
            left = objects % threads if turns else 0
            if objects < threads:
                assert alone == []
                assert sum(together) == objects
            elif turns:
                assert (alone, together) == ([1] * (objects - left), [1] * left)
            else:
                sizes = [objects // threads + (part < objects % threads) for part in range(threads)]
                assert (sorted(alone), together) == (sorted(sizes), [])


def test_objects_really_go_at_the_same_time(one_by_one: Path) -> None:
    stages = OnnxRuntimeStages(one_by_one, threads=3)
    frame = stages.image_encoder(torch.randn(1, 3, stages.sizes.image_size, stages.sizes.image_size))
    memory = memories(stages, 6, 4, 5)
    memory.spatial_valid[:] = memory.pointer_valid[:] = True
    all_there = threading.Barrier(3, timeout=60)
    real = stages._one_thread["memory_read"]

    def run(names: Any, given: Any) -> Any:
        all_there.wait()  # breaks where fewer than three come
        return real.run(names, given)

    stages._one_thread["memory_read"] = SimpleNamespace(run=run)
    assert len(stages.memory_attention(frame, memory)) == 6


def test_an_object_with_a_gap_reads_by_itself_while_the_others_go_at_once(one_by_one: Path) -> None:
    single, several = OnnxRuntimeStages(one_by_one, threads=1), OnnxRuntimeStages(one_by_one, threads=2)
    frame = single.image_encoder(torch.randn(1, 3, single.sizes.image_size, single.sizes.image_size))
    memory = memories(single, 5, 4, 5)
    memory.spatial_valid[:, 0] = memory.pointer_valid[:, 0] = True
    memory.pointer_valid[1] = False
    wanted, calls = single.memory_attention(frame, memory), called(several)
    assert_near(several.memory_attention(frame, memory), wanted, within=LAST_BITS)
    assert [own for stage, own, _ in calls if stage == "memory_read"] == [True] * 4
    assert [own for stage, own, _ in calls if stage == "memory_attention"] == [False]


def test_a_failure_of_one_object_is_told_when_the_others_have_ended(one_by_one: Path) -> None:
    stages = OnnxRuntimeStages(one_by_one, threads=2)
    frame = stages.image_encoder(torch.randn(1, 3, stages.sizes.image_size, stages.sizes.image_size))
    memory = memories(stages, 6, 4, 5)
    memory.spatial_valid[:] = memory.pointer_valid[:] = True
    before, real = stages.memory_attention(frame, memory), stages._one_thread["memory_read"]
    started, ended = itertools.count(), []

    def run(names: Any, given: Any) -> Any:
        if next(started) == 0:
            raise RuntimeError("out of memory")
        time.sleep(0.2)
        ended.append(real.run(names, given))
        return ended[-1]

    stages._one_thread["memory_read"] = SimpleNamespace(run=run)
    with pytest.raises(RuntimeError, match="out of memory"):
        stages.memory_attention(frame, memory)
    assert len(ended) == next(started) - 1 < 5, "what had begun has ended, the rest never began"
    stages._one_thread["memory_read"] = real
    assert torch.equal(stages.memory_attention(frame, memory), before), "it goes on"


def test_no_thread_is_bound_to_a_core_that_was_not_given(folder: Path) -> None:
    """ONNX Runtime's own number of threads binds them to all cores of the machine."""
    allowed = os.sched_getaffinity(0)
    core = {min(allowed)}
    before = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, core)
    try:
        stages = OnnxRuntimeStages(folder, threads=0)
        stages.image_encoder(torch.zeros(1, 3, 128, 128))
        for thread in set(os.listdir("/proc/self/task")) - before:
            assert os.sched_getaffinity(int(thread)) == core
    finally:
        os.sched_setaffinity(0, allowed)
    assert stages._at_once == torch.get_num_threads()


@pytest.mark.gpu
def test_a_gpu_answers_as_torch(folder: Path, reference: TorchStages) -> None:
    if CUDA not in load_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime is not for GPUs")
    stages = OnnxRuntimeStages(folder, device="cuda:0")
    pixels = torch.randn(1, 3, 128, 128)
    frame, memory = reference.image_encoder(pixels), some_memories(reference, 3)
    found = stages.image_encoder(pixels.cuda())
    assert torch.allclose(found.top.cpu(), frame.top, atol=2e-2 * float(frame.top.abs().max()))  # TF32
    conditioned = stages.memory_attention(found, MemoryTensors(**{k: v.cuda() for k, v in vars(memory).items()}))
    wanted = reference.memory_attention(frame, memory)
    assert torch.allclose(conditioned.cpu(), wanted, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.slow
def test_nothing_grows_over_a_thousand_frames(folder: Path) -> None:
    """In a process of its own, where no shapes are checked: those checks keep some memory."""
    command, root = [sys.executable, __file__, str(folder)], str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])}
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    settled, last = json.loads(run.stdout)
    assert last < 1.01 * settled + 1.0


def frames(folder: Path) -> Iterator[float]:
    """MiB that are allocated after each frame; objects come, go and lack memories."""
    stages = OnnxRuntimeStages(folder, threads=2)
    size, s = 128, stages.sizes
    for number in range(1200):
        objects = 1 + number % 5
        frame = stages.image_encoder(torch.randn(1, 3, size, size))
        memory = memories(stages, objects, SLOTS, ROWS)
        prompts = None if number % 7 else PromptTokens(torch.randn(objects, 1 + number % TOKENS, s.channels))
        prediction = stages.mask_decoder(frame, stages.memory_attention(frame, memory), prompts)
        stages.memory_encoder(frame, prediction)
        yield allocated_mib()


def allocated_mib() -> float:
    """Without the pages of libraries, which the kernel takes and gives back as other programs run."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 2**10


if __name__ == "__main__":
    torch.set_num_threads(1)
    allocated = list(frames(Path(sys.argv[1])))
    print(json.dumps([max(allocated[150:200]), max(allocated[-50:])]))
