# SPDX-License-Identifier: Apache-2.0
"""Exported stages answer as torch does, whatever is left out of a call or does not fill the exported shapes."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.backends.exports import ROWS, SLOTS, TOKENS, small_sam2, stage_kernels, write_fake_export
from virst_engine.backends.base import Stages
from virst_engine.backends.exported import ExportedStages, Tensors
from virst_engine.backends.manifest import PROMPT_ENCODER, read_manifest
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.errors import BackendError, ExportError
from virst_engine.model.sam2 import Sam2
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryTensors, PromptTokens

OBJECTS = 3


class Named(ExportedStages):
    """Runs the stages by torch, and keeps to what was exported: shapes, dtypes, one frame, overwritten outputs."""

    def __init__(self, folder: Path, sam2: Sam2) -> None:
        super().__init__(folder, read_manifest(folder), torch.device("cpu"))
        self._kernels = stage_kernels(sam2)
        self._outputs: dict[str, Tensors] = {}

    def run(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        spec = self.manifest.stages[stage]
        assert inputs.keys() == spec.inputs.keys()
        for name, tensor in spec.inputs.items():
            assert tuple(inputs[name].shape) == tensor.for_objects(objects), (stage, name)
            assert str(inputs[name].dtype) == f"torch.{tensor.dtype}", (stage, name)
        for old in self._outputs.get(stage, {}).values():
            old.fill_(float("nan"))  # as a backend with fixed buffers does
        self._outputs[stage] = {name: value.clone() for name, value in self._kernels[stage](inputs).items()}
        return self._outputs[stage]


@pytest.fixture(scope="module")
def sam2() -> Sam2:
    return small_sam2()


@pytest.fixture
def exported(sam2: Sam2, tmp_path: Path) -> Named:
    write_fake_export(tmp_path, sam2)
    return Named(tmp_path, sam2)


@pytest.fixture
def reference(sam2: Sam2) -> TorchStages:
    return TorchStages(sam2)


def features(stages: Stages, frames: int = 1) -> ImageFeatures:
    """Of several frames: `b` is their number."""
    pixels = torch.rand(frames, 3, stages.sizes.image_size, stages.sizes.image_size)
    each = [stages.image_encoder(x[None]) for x in pixels]
    return ImageFeatures(**{f.name: torch.cat([getattr(x, f.name) for x in each]) for f in fields(ImageFeatures)})


def memories(stages: Stages, objects: int = OBJECTS, slots: int = SLOTS, rows: int = ROWS) -> MemoryTensors:
    s = stages.sizes
    return MemoryTensors(
        spatial=torch.randn(objects, slots, s.memory_channels, s.grid, s.grid),
        spatial_tpos=torch.randint(0, s.memory_frames, (objects, slots)),
        spatial_valid=torch.rand(objects, slots) < 0.7,
        pointers=torch.randn(objects, rows, s.channels),
        pointer_distance=torch.randint(0, 8, (objects, rows)).float(),
        pointer_valid=torch.rand(objects, rows) < 0.7,
    )


def assert_same(found: Any, wanted: Any) -> None:
    for f in fields(wanted):
        torch.testing.assert_close(getattr(found, f.name), getattr(wanted, f.name), rtol=1e-4, atol=1e-4, msg=f.name)


def test_is_a_backend(exported: Named, reference: TorchStages) -> None:
    assert isinstance(exported, Stages)
    assert exported.sizes == replace(reference.sizes, prompt_tokens=TOKENS)


def test_image_features_are_torchs(exported: Named, reference: TorchStages) -> None:
    pixels = torch.rand(1, 3, 64, 64)
    assert_same(exported.image_encoder(pixels), reference.image_encoder(pixels))


@pytest.mark.parametrize(("slots", "rows"), [(SLOTS, ROWS), (2, ROWS), (SLOTS, 1)])
def test_memories_that_do_not_fill_the_slots_change_nothing(
    exported: Named, reference: TorchStages, slots: int, rows: int
) -> None:
    frame, memory = features(reference), memories(reference, slots=slots, rows=rows)
    memory.spatial_valid[:, 0] = True  # a row without any is undefined
    found = exported.memory_attention(frame, memory)
    torch.testing.assert_close(found, reference.memory_attention(frame, memory), rtol=1e-4, atol=1e-4)


def test_more_memories_than_exported_are_refused(exported: Named, reference: TorchStages) -> None:
    with pytest.raises(BackendError, match=f"exported for {SLOTS} memories, got {SLOTS + 1}; .*anchors_attended"):
        exported.memory_attention(features(reference), memories(reference, slots=SLOTS + 1))
    with pytest.raises(BackendError, match=f"exported for {ROWS} object pointers, got {ROWS + 2}"):
        exported.memory_attention(features(reference), memories(reference, rows=ROWS + 2))


def tokens(n: int, **more: Any) -> PromptTokens:
    return PromptTokens(torch.randn(OBJECTS, n, 32), **more)


PROMPTS: dict[str, Callable[[], PromptTokens | None]] = {
    "none": lambda: None,
    "as many as exported": lambda: tokens(TOKENS),
    "fewer": lambda: tokens(2),
    "some rows not there": lambda: tokens(4, valid=torch.tensor([[True, False, True, True]] * OBJECTS)),
    "three masks for some": lambda: tokens(3, multimask=torch.tensor([True, False, True])),
    "with a mask": lambda: tokens(2, dense=torch.randn(OBJECTS, 32, 4, 4)),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("frames", [1, OBJECTS])
def test_masks_are_torchs(exported: Named, reference: TorchStages, kind: str, frames: int) -> None:
    prompts, frame = PROMPTS[kind](), features(reference, frames)
    conditioned = torch.randn(OBJECTS, 32, 4, 4)
    wanted = reference.mask_decoder(frame, conditioned, prompts)
    assert_same(exported.mask_decoder(frame, conditioned, prompts), wanted)


def test_an_anchor_is_decoded_without_memory(exported: Named, reference: TorchStages) -> None:
    frame, prompts = features(reference), tokens(3)
    assert_same(exported.mask_decoder(frame, None, prompts), reference.mask_decoder(frame, None, prompts))
    with pytest.raises(ValueError, match="got neither"):
        exported.mask_decoder(frame, None, None)


def test_more_prompt_tokens_than_exported_are_refused(exported: Named, reference: TorchStages) -> None:
    with pytest.raises(BackendError, match=f"exported for {TOKENS} prompt tokens, got {TOKENS + 1}"):
        exported.mask_decoder(features(reference), None, tokens(TOKENS + 1))


@pytest.mark.parametrize("frames", [1, OBJECTS])
@pytest.mark.parametrize("binarize", [None, torch.tensor([True, False, True])], ids=["as predicted", "approved"])
def test_memories_are_torchs(
    exported: Named, reference: TorchStages, frames: int, binarize: torch.Tensor | None
) -> None:
    frame = features(reference, frames)
    scores = torch.tensor([3.0, -2.0, 1.0])  # the second one is absent
    prediction = MaskPrediction(torch.randn(OBJECTS, 16, 16) * 5, scores.sigmoid(), scores, torch.randn(OBJECTS, 32))
    wanted = reference.memory_encoder(frame, prediction, binarize)
    assert_same(exported.memory_encoder(frame, prediction, binarize), wanted)


def test_clicks_and_masks_of_users_are_torchs(exported: Named, reference: TorchStages) -> None:
    points, labels = torch.rand(2, 3, 2) * 64, torch.tensor([[1, 0, -1], [2, 3, 1]])
    found, wanted = exported.click_tokens(points, labels), reference.click_tokens(points, labels)
    torch.testing.assert_close(found.sparse, wanted.sparse)
    assert found.multimask is not None
    assert wanted.multimask is not None
    assert found.multimask.tolist() == wanted.multimask.tolist()

    frame, mask = features(reference), torch.zeros(2, 1, 64, 64)
    mask[0, 0, 10:40, 20:50] = 1.0
    assert_same(exported.mask_prediction(frame, mask), reference.mask_prediction(frame, mask))


def test_images_of_another_size_are_refused(exported: Named) -> None:
    with pytest.raises(BackendError, match=r"exported for images of 64 x 64, got 48 x 32; set model\.image_size"):
        exported.image_encoder(torch.rand(1, 3, 32, 48))


def test_no_objects_are_refused(exported: Named, reference: TorchStages) -> None:
    with pytest.raises(BackendError, match="memory_attention was called for 0 objects"):
        exported.memory_attention(features(reference), memories(reference, objects=0))


@pytest.mark.parametrize("damage", ["missing", "text", "another model"])
def test_prompt_tables_that_do_not_fit_are_refused(sam2: Sam2, tmp_path: Path, damage: str) -> None:
    write_fake_export(tmp_path, sam2)
    path = tmp_path / PROMPT_ENCODER
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no tensors")
    else:
        save_file({"no_mem_embed": torch.zeros(1, 1, 7)}, path)
    with pytest.raises(ExportError, match=rf"{PROMPT_ENCODER} cannot be read .*export it again"):
        Named(tmp_path, sam2)
