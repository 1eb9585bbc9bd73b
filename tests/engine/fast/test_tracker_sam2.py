# SPDX-License-Identifier: Apache-2.0
"""The tracker around SAM 2's networks, with random weights: fixed buffers and replays change nothing."""

import dataclasses

import pytest
import torch

from tests.fakes import Video, moving_square
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import MemoryParameters, TrackingParameters
from virst_engine.fast.tracker import DecodedAnchors, Tracker
from virst_engine.model.config import tabletop_tiny
from virst_engine.model.sam2 import Sam2
from virst_engine.types import (
    Frame,
    ImageFeatures,
    MaskPrediction,
    MemoryEntry,
    MemoryTensors,
    PromptTokens,
    StageSizes,
)


class AlwaysVisible:
    """An untrained decoder sees nothing, so the numbers that gate memory are raised; the rest is SAM 2's."""

    def __init__(self, stages: TorchStages) -> None:
        self._stages = stages
        self.sizes: StageSizes = stages.sizes
        self.takes_several_frames = stages.takes_several_frames
        self.takes_fewer_memories = stages.takes_fewer_memories

    def at_image_size(self, image_size: int) -> None:
        return None

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        return self._stages.image_encoder(pixels)

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._stages.memory_attention(features, memory, frame_of)

    def mask_decoder(
        self, features: ImageFeatures, conditioned: torch.Tensor | None, prompts: PromptTokens | None
    ) -> MaskPrediction:
        made = self._stages.mask_decoder(features, conditioned, prompts)
        logits = made.mask_logits - made.mask_logits.mean(dim=(1, 2), keepdim=True)  # some pixels are always inside
        score = torch.full_like(made.object_score_logits, 3.0)
        return dataclasses.replace(made, mask_logits=logits, object_score_logits=score, iou=torch.ones_like(made.iou))

    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: torch.Tensor | None = None
    ) -> MemoryEntry:
        return self._stages.memory_encoder(features, prediction, binarize)

    def click_tokens(
        self, points: torch.Tensor, labels: torch.Tensor, mask_logits: torch.Tensor | None = None
    ) -> PromptTokens:
        return self._stages.click_tokens(points, labels, mask_logits)

    def mask_prediction(self, features: ImageFeatures, mask: torch.Tensor) -> MaskPrediction:
        return self._stages.mask_prediction(features, mask)


@pytest.fixture(scope="module")
def stages() -> AlwaysVisible:
    torch.manual_seed(0)
    return AlwaysVisible(TorchStages(Sam2(tabletop_tiny(("ball",)).sam2), fusion_level=0, video_size=128))


def tracker_of(stages: AlwaysVisible) -> Tracker:
    return Tracker(stages, MemoryParameters(ring_steps=16), TrackingParameters(max_objects=2))


def frame(t: int) -> Frame:
    return Video([moving_square()], scale=(4, 4)).frame(t)


def decode(tracker: Tracker, step: int, slot: int = 0) -> DecodedAnchors:
    prompts = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(slot))
    anchors = tracker.decode_anchors(slot, [step], prompts)
    assert anchors is not None
    return anchors


def logits_of(tracker: Tracker, slot: int = 0) -> torch.Tensor:
    sighting = tracker.sighting(slot)
    assert sighting is not None
    assert sighting.is_remembered
    return sighting.mask_logits


def test_a_late_answer_and_its_replay_are_bit_equal_to_an_answer_at_once(stages: AlwaysVisible) -> None:
    at_once, late = tracker_of(stages), tracker_of(stages)
    for t in range(14):
        at_once.step(frame(t))
        late.step(frame(t))
        if t == 2:
            at_once.start_over(0, decode(at_once, 2), [0])
        if t == 7:
            late.start_over(0, decode(late, 2), [0])
        at_once.catch_up()
        late.catch_up()
    assert torch.equal(logits_of(at_once), logits_of(late))
    one, other = at_once.memory.read(14, [0]), late.memory.read(14, [0])
    assert torch.equal(one.spatial, other.spatial)
    assert torch.equal(one.pointers, other.pointers)
    assert int(one.spatial_valid.sum()) == 7  # an anchor and six recent frames


def test_an_object_is_the_same_alone_and_in_company(stages: AlwaysVisible) -> None:
    alone, together = tracker_of(stages), tracker_of(stages)
    for t in range(8):
        alone.step(frame(t))
        together.step(frame(t))
        if t == 0:
            alone.start_over(0, decode(alone, 0), [0])
            together.start_over(0, decode(together, 0), [0])
        if t == 3:
            together.start_over(1, decode(together, 3, slot=1), [0])
        alone.catch_up()
        together.catch_up()
    assert torch.allclose(logits_of(alone), logits_of(together), atol=1e-5)
    assert not torch.allclose(logits_of(together), logits_of(together, 1), atol=1e-4)


def test_growing_memory_and_fixed_buffers_give_the_same_masks(stages: AlwaysVisible) -> None:
    tracker, history = tracker_of(stages), []
    anchor: MemoryEntry | None = None
    for t in range(10):
        tracked = tracker.step(frame(t))
        if t == 0:
            anchors = decode(tracker, 0)
            tracker.start_over(0, anchors, [0])
            tracker.catch_up()
            anchor = stages.memory_encoder(anchors.features, anchors.prediction)
            continue
        assert anchor is not None
        recent = history[::-1][:6]
        entries = [anchor, *recent]
        memory = MemoryTensors(
            spatial=torch.stack([entry.spatial for entry in entries], dim=1),
            spatial_tpos=torch.tensor([[6, *range(len(recent))]]),
            spatial_valid=torch.ones(1, len(entries), dtype=torch.bool),
            pointers=torch.stack([entry.pointer for entry in [anchor, *history[::-1]]], dim=1),
            pointer_distance=torch.tensor([[float(t), *(float(k) for k in range(1, t))]]),
            pointer_valid=torch.ones(1, t, dtype=torch.bool),
        )
        prediction = stages.mask_decoder(tracked.features, stages.memory_attention(tracked.features, memory), None)
        history.append(stages.memory_encoder(tracked.features, prediction))
        assert torch.allclose(prediction.mask_logits[0], logits_of(tracker), atol=1e-5)
