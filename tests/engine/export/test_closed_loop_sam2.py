# SPDX-License-Identifier: Apache-2.0
"""SAM 2.1 in closed loop, torch against its exported stages: random weights, 64 frames, three prompts of each kind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.fast.test_exactness import box, disc, points, video
from tests.engine.fast.test_tracker_sam2 import AlwaysVisible
from tests.engine.model.small_models import liven
from virst_engine.backends.base import Stages
from virst_engine.backends.onnx_backend import OnnxRuntimeStages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import MemoryParameters, TrackingParameters
from virst_engine.fast.tracker import Tracker
from virst_engine.model.config import sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.types import Frame

FRAMES, SIZE = 64, 128
PROMPTS = {
    0: {0: box(SIZE, 0.2, 0.3)},
    9: {1: points(SIZE, [(0.6, 0.25)], [1])},
    20: {2: disc(SIZE), 0: points(SIZE, [(0.5, 0.6), (0.1, 0.1)], [1, 0])},
}


def stream(stages: Stages) -> list[dict[int, np.ndarray]]:
    """The mask of each object in each frame, at the decoder's size."""
    # mypy: the wrapper is written for torch's stages, and any other will do.
    tracker = Tracker(AlwaysVisible(stages), MemoryParameters(ring_steps=8), TrackingParameters(max_objects=3))  # type: ignore[arg-type]
    masks = []
    for t, image in enumerate(video(FRAMES, SIZE)):
        tracker.step(Frame(image, t))
        for slot, prompt in PROMPTS.get(t, {}).items():
            tracker.prompt(slot, t, prompt)
        sightings = {slot: tracker.sighting(slot) for slot in range(3)}
        masks.append({slot: (found.mask_logits > 0).numpy() for slot, found in sightings.items() if found is not None})
    return masks


@pytest.mark.slow
def test_sam2_tiny_tracks_the_same_by_onnxruntime(tmp_path: Path) -> None:
    exporting = pytest.importorskip("virst_engine.export.onnx")
    torch.manual_seed(3)
    sam2 = Sam2(sam2_1("tiny", SIZE))
    liven(sam2, 3)
    exporting.export_stages(sam2, tmp_path, name="sam2.1-tiny", weights_sha256="0" * 64)
    expected = stream(TorchStages(sam2))
    found = stream(OnnxRuntimeStages(tmp_path, threads=1))
    assert [frame.keys() for frame in found] == [frame.keys() for frame in expected]
    assert len(expected[-1]) == 3
    areas, changes = [], []
    for t, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
        for slot, mask in wanted.items():
            union = int((ours[slot] | mask).sum())
            assert int((ours[slot] & mask).sum()) >= 0.99 * union, (t, slot)
            areas.append(mask.mean())
            if t and slot in expected[t - 1]:
                changes.append(np.mean(mask != expected[t - 1][slot]))
    assert 0.05 < np.mean(areas) < 0.95
    assert np.mean(changes) > 1e-3  # they follow the video
