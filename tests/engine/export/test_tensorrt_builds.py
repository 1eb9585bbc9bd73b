# SPDX-License-Identifier: Apache-2.0
"""Exported models become engines: with TensorRT-RTX on any machine, and on a GPU they answer as torch does."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.backends.test_exported import memories
from tests.engine.export.test_tensorrt import KERNEL, SOFTMAX, TARGETS
from virst_engine.backends.manifest import STAGES
from virst_engine.backends.tensorrt_api import TENSORRT, TensorRt, load_tensorrt
from virst_engine.backends.tensorrt_backend import TensorRtStages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import ModelParameters
from virst_engine.errors import BackendError
from virst_engine.export.tensorrt import BuiltEngine, build_engines
from virst_engine.model.config import sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.types import PromptTokens
from virst_engine.weights import load_segmenter

OBJECTS = (1, 8)


def assert_complete(built: tuple[BuiltEngine, ...], precision: str, attentions: int) -> None:
    """One engine per stage and number of objects, and memory attention with so many fused attentions and no other."""
    names = [engine.path.name for engine in built]
    assert names == ["image_encoder.engine", *(f"{stage}-{n}.engine" for stage in STAGES[1:] for n in OBJECTS)]
    for engine in built:
        record, plan = engine.record, engine.path.read_bytes()
        assert (record.precision, record.targets, record.flavour) == (precision, TARGETS, "tensorrt_rtx")
        assert engine.engine_bytes == len(plan)
        if record.stage == "memory_attention":
            assert engine.fused_attentions == attentions
            assert KERNEL in plan
            assert SOFTMAX not in plan


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rtx_builds_tabletop_tiny(rtx: TensorRt, exported: Callable[[str], Path], precision: str) -> None:
    folder = exported(precision)
    built = build_engines(folder, objects=OBJECTS, targets=TARGETS, tensorrt=rtx)
    layers = load_segmenter(ModelParameters())[0].config.memory_layers
    assert_complete(built, precision, 2 * layers)
    again = build_engines(folder, objects=OBJECTS, targets=TARGETS, tensorrt=rtx)
    assert all(engine.kept for engine in again)


@pytest.mark.slow
def test_rtx_builds_sam2_tiny_at_full_size(rtx: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting = pytest.importorskip("virst_engine.export.onnx")
    # Running 600 GFLOP on a CPU to compare them is not what this is about.
    monkeypatch.setattr(exporting, "check_stage", lambda *args, **kwargs: 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own exporter
        sam2 = Sam2(sam2_1("tiny", 1024)).eval()
        exporting.export_stages(sam2, tmp_path, name="sam2.1-tiny", weights_sha256="0" * 64, precision="fp16")
    built = build_engines(tmp_path, objects=OBJECTS, targets=TARGETS, tensorrt=rtx)
    assert_complete(built, "fp16", 8)
    attention = next(engine.record for engine in built if engine.path.name == "memory_attention-8.engine")
    assert attention.inputs["spatial"].shape == (8, 9, 64, 64, 64)
    encoder = built[0].path.read_bytes()
    assert KERNEL in encoder  # TensorRT fuses the trunk's attention by itself
    assert SOFTMAX not in encoder


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-2), ("fp16", 5e-2), ("bf16", 1e-1)])
def test_engines_of_this_gpu_answer_as_torch(exported: Callable[[str], Path], precision: str, tolerance: float) -> None:
    """Of the largest number of each output; fp32 is TF32 in products."""
    trt = installed_tensorrt()
    folder = exported(precision)
    build_engines(folder, objects=(1, 4), tensorrt=trt)
    stages = TensorRtStages(folder, device="cuda:0", tensorrt=trt)
    model = ModelParameters(device="cuda:0")
    sam2, level = load_segmenter(model)
    reference = TorchStages(sam2, fusion_level=level)

    def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())

    pixels = torch.rand(1, 3, stages.sizes.image_size, stages.sizes.image_size)
    for objects in (1, 3, 6):
        frame, wanted_frame = stages.image_encoder(pixels), reference.image_encoder(pixels.cuda())
        assert_near(frame.top, wanted_frame.top)
        memory = on_gpu(memories(reference, objects, slots=9, rows=18))
        memory.spatial_valid[:, 0] = True
        conditioned = stages.memory_attention(frame, memory)
        wanted_conditioned = reference.memory_attention(wanted_frame, memory)
        assert_near(conditioned, wanted_conditioned)
        tokens = PromptTokens(torch.randn(objects, 3, stages.sizes.channels, device="cuda"))
        for prompts in (None, tokens):
            prediction = stages.mask_decoder(wanted_frame, wanted_conditioned, prompts)
            wanted = reference.mask_decoder(wanted_frame, wanted_conditioned, prompts)
            assert_near(prediction.mask_logits, wanted.mask_logits)
            assert_near(prediction.pointer, wanted.pointer)
            entry = stages.memory_encoder(wanted_frame, wanted)
            assert_near(entry.spatial, reference.memory_encoder(wanted_frame, wanted).spatial)
    assert stages.device_memory_bytes > 0


def installed_tensorrt() -> TensorRt:
    """TensorRT, else TensorRT-RTX; skips without either, or for a GPU that RTX has no code for."""
    try:
        return load_tensorrt(TENSORRT)
    except BackendError as error:
        reasons = str(error)
    try:
        trt = load_tensorrt("tensorrt_rtx")
    except BackendError as error:
        pytest.skip(f"{reasons}; {error}")
    major, minor = torch.cuda.get_device_capability()
    if f"SM{major}{minor}" not in trt.known_targets():
        pytest.skip(f"{reasons}; {trt.title} has no code for SM{major}{minor}")
    return trt


def on_gpu(values: Any) -> Any:
    return type(values)(**{name: value.cuda() for name, value in vars(values).items()})
