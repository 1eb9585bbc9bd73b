# SPDX-License-Identifier: Apache-2.0
"""Compiled code is made for few numbers of objects, however many come and go."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.backends.exports import small_sam2
from tests.engine.backends.test_exported import memories
from virst_engine.backends import torch_backend
from virst_engine.backends.torch_backend import TorchStages, object_bucket
from virst_engine.types import MemoryTensors


def test_above_eight_objects_there_is_code_for_multiples_of_eight() -> None:
    counts = [1, 2, 4, 5, 8, 9, 16, 17, 24, 25, 254]
    assert [object_bucket(count) for count in counts] == [1, 4, 4, 8, 8, 16, 16, 24, 24, 32, 256]
    assert len({object_bucket(count) for count in range(1, 33)}) == 6


@pytest.mark.parametrize("frame_of", [None, torch.tensor([0, 1, 1])])
def test_on_a_cpu_large_objects_take_turns_and_see_what_they_see_together(
    frame_of: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = TorchStages(small_sam2())
    torch.manual_seed(0)
    cameras = 1 if frame_of is None else 2
    features = stages.image_encoder(torch.randn(cameras, 3, stages.sizes.image_size, stages.sizes.image_size))
    memory = memories(stages, 3)
    read, turns = stages._sam2.read_memory, []

    def reads(tokens: Tensor, queries: Tensor, own: MemoryTensors) -> Tensor:
        turns.append(tuple(own.spatial.shape[:2]))
        return read(tokens, queries, own)

    monkeypatch.setattr(stages._sam2, "read_memory", reads)
    together = stages.memory_attention(features, memory, frame_of)
    assert [objects for objects, _ in turns] == [3]
    monkeypatch.setattr(torch_backend, "MOST_TOGETHER", 1)
    in_turn = stages.memory_attention(features, memory, frame_of)
    assert turns[1:] == [(1, int(valid.sum())) for valid in memory.spatial_valid]  # each without its empty slots
    assert torch.allclose(in_turn, together, atol=1e-5)


def test_compiled_stages_see_full_buckets_and_answer_for_the_objects_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, int]] = set()

    def compiled(stage: Any, **named: Any) -> Any:
        def run(*inputs: Any) -> Any:
            of_objects = inputs[1] if len(inputs) > 1 else None
            if isinstance(of_objects, Tensor):
                seen.add((stage.__name__, len(of_objects)))
            elif hasattr(of_objects, "__dict__"):
                seen.add((stage.__name__, len(next(iter(vars(of_objects).values())))))
            return stage(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    sam2 = small_sam2()
    stages, plain = TorchStages(sam2, compiled=True), TorchStages(sam2)
    torch.manual_seed(0)
    features = plain.image_encoder(torch.randn(1, 3, stages.sizes.image_size, stages.sizes.image_size))
    for objects in (3, 8, 9, 11, 16):
        memory = memories(plain, objects)
        conditioned = stages.memory_attention(features, memory)
        assert torch.allclose(conditioned, plain.memory_attention(features, memory), atol=1e-4)
        prediction = stages.mask_decoder(features, conditioned, None)
        entry = stages.memory_encoder(features, prediction)
        assert len(prediction.mask_logits) == len(prediction.iou) == len(entry.spatial) == len(entry.pointer) == objects
    stage_names = ("attend_memory", "decode_mask", "encode_memory")
    assert seen == {(name, size) for name in stage_names for size in (4, 8, 16)}
