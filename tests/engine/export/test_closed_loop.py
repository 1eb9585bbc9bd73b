# SPDX-License-Identifier: Apache-2.0
"""Backends in closed loop: 64 streamed frames of a simulated scene, masks against torch in fp32.

An error of one stage that looks harmless can grow through the recurrent memory; only many frames show it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from virst_engine.backends.base import Stages
from virst_engine.backends.tensorrt_backend import TensorRtStages
from virst_engine.backends.torch_backend import TorchStages, cpu_computes_in
from virst_engine.config import EngineConfig, EngineParameters, ModelParameters
from virst_engine.evaluate.bench import BenchSettings, Playback, default_case
from virst_engine.evaluate.modes import FirstAnswerOnly
from virst_engine.export.tensorrt import build_engines
from virst_engine.session import Session
from virst_engine.slow.reasoner import InProcessClient, NoReasoner
from virst_engine.types import ClickPrompt, Frame
from virst_engine.weights import load_reasoner, load_segmenter, load_stages
from virst_ros.demo.recorded_run import load_recording

FRAMES, OBJECTS, BEFORE = 64, 3, 24
Masks = list[list[np.ndarray]]


@pytest.fixture(scope="module")
def playback() -> Playback:
    return Playback(default_case(BenchSettings()))


def stream(stages: Stages, playback: Playback, device: str = "cpu") -> Masks:
    """Masks of each frame from the goals' first one on. The reasoner's one answer per goal is the same for all."""
    config = EngineConfig(model=ModelParameters(device=device))
    config = replace(config, tracking=replace(config.tracking, confirm_answers=1, start_presence=0.5))
    masks = []
    with Session(config, stages, FirstAnswerOnly(InProcessClient(load_reasoner(ModelParameters())))) as session:
        for number in range(BEFORE + FRAMES):
            if number == BEFORE:
                playback.set_goals(session, OBJECTS)
            result = session.step(playback.frame(number, 1_000_000_000 + number * 33_333_333))
            if number >= BEFORE:
                masks.append([found.mask for found in result.objects])
    return masks


@pytest.fixture(scope="module")
def expected(playback: Playback) -> Masks:
    masks = stream(load_stages(ModelParameters()), playback)
    seen = np.mean([mask.any() for frame in masks for mask in frame])
    assert seen > 0.5, "nothing is tracked, so nothing would be compared"
    return masks


def assert_equal_masks(found: Masks, expected: Masks, least: float = 0.99) -> None:
    for number, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        for row, (mask, wanted) in enumerate(zip(ours, reference, strict=True)):
            union = int((mask | wanted).sum())
            iou = int((mask & wanted).sum()) / union if union else 1.0
            # One pixel of the outline of a small thing is more than a hundredth of it.
            assert iou >= least or union - int((mask & wanted).sum()) <= 1, (number, row, iou)


def test_onnxruntime_gives_the_masks_of_torch(
    exported: Callable[[str], Path], playback: Playback, expected: Masks
) -> None:
    stages = load_stages(ModelParameters(), EngineParameters(backend="onnxruntime", path=str(exported("fp32"))))
    assert type(stages).__name__ == "OnnxRuntimeStages"
    assert_equal_masks(stream(stages, playback), expected)


@pytest.mark.parametrize("with_background", [False, True])
def test_a_users_box_shows_the_same_by_onnxruntime_as_by_torch(
    exported: Callable[[str], Path], with_background: bool
) -> None:
    """The model reads no corners: the box becomes a point, and its mask is cut."""
    recording = load_recording()
    rows, columns = np.nonzero(recording.instance_masks[0] == 1)
    box = tuple(map(float, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
    points = (np.array([[2.0, 2.0]]), np.array([0])) if with_background else (None, None)
    shown = []
    for engine in (EngineParameters(), EngineParameters(backend="onnxruntime", path=str(exported("fp32")))):
        stages = load_stages(ModelParameters(), engine)
        assert not stages.sizes.reads_boxes
        with Session(EngineConfig(), stages, NoReasoner()) as session:
            masks = []
            for number in range(12):
                if number == 1:
                    session.add_object(ClickPrompt(*points, box_px=box))
                result = session.step(Frame(recording.images_rgb_u8[number], round(1e9 * number / recording.rate_hz)))
                masks += [[found.mask for found in result.objects]] if number > 1 else []
        shown.append(masks)
    assert np.mean([mask.any() for frame in shown[0] for mask in frame]) == 1
    assert_equal_masks(shown[1], shown[0])


@pytest.mark.skipif(not cpu_computes_in(torch.bfloat16), reason="this CPU computes bfloat16 only by emulation")
def test_torch_in_bf16_gives_the_masks_of_fp32(playback: Playback, expected: Masks) -> None:
    stages = load_stages(ModelParameters(), EngineParameters(precision="bf16"))
    assert_equal_masks(stream(stages, playback), expected, least=0.9)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True)])
def test_torch_on_a_gpu_gives_the_masks_of_the_cpu(
    playback: Playback, expected: Masks, precision: str, compiled: bool
) -> None:
    sam2, level = load_segmenter(ModelParameters(device="cuda:0"))
    stages = TorchStages(sam2, fusion_level=level, precision=precision, compiled=compiled)
    assert_equal_masks(stream(stages, playback, "cuda:0"), expected, least=0.99 if precision == "fp32" else 0.95)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_tensorrt_gives_the_masks_of_torch(
    exported: Callable[[str], Path], playback: Playback, expected: Masks, precision: str
) -> None:
    folder = exported(precision)
    build_engines(folder, objects=(1, 4))
    stages = TensorRtStages(folder)
    assert_equal_masks(stream(stages, playback, "cuda:0"), expected, least=0.99 if precision == "fp32" else 0.95)


def test_the_node_runs_what_the_parameters_ask_for(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """`engine.path` as the segmenter node loads it; the diagnostics name the backend."""
    pytest.importorskip("rclpy", reason="no rclpy: run ./scripts/setup without --no-ros")
    from virst_ros.loading import load_engine

    config = EngineConfig(engine=EngineParameters(path=str(exported("fp32"))))
    config = replace(config, reasoner=replace(config.reasoner, endpoint=f"ipc://{tmp_path}/reasoner"))
    loaded = load_engine(config)
    loaded.session.close()
    assert loaded.model.backend == "OnnxRuntimeStages"
