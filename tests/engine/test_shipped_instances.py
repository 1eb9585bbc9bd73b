# SPDX-License-Identifier: Apache-2.0
"""The shipped weights on a simulated scene that training never saw: a sentence in the plural, one object each."""

import itertools

import numpy as np
import pytest

from virst_engine.config import EngineConfig
from virst_engine.session import Session
from virst_engine.sim.mujoco_world import record
from virst_engine.sim.scenes import generate_scene
from virst_engine.slow.reasoner import InProcessClient
from virst_engine.types import Frame
from virst_engine.weights import load_reasoner, load_stages

RATE_HZ, SECONDS, ASKED = 10.0, 8.0, 25  # frames; the reasoner's window is full before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "sentence", "targets"),
    [(1_000_005, "all boxes on the table", (1, 3)), (1_000_015, "the two eggs", (0, 2))],
)
def test_a_plural_gives_one_object_each_and_they_keep_their_ids(
    seed: int, sentence: str, targets: tuple[int, ...]
) -> None:
    recording = record(generate_scene(seed, "full", duration_s=10.0), fps=RATE_HZ, duration_s=SECONDS)
    assert recording.image_rgb_u8 is not None
    assert recording.instance_mask is not None
    config = EngineConfig()
    ids: dict[int, list[str]] = {target: [] for target in targets}
    overlaps: dict[int, list[float]] = {target: [] for target in targets}
    with Session(config, load_stages(config.model), InProcessClient(load_reasoner(config.model))) as session:
        for number, image in enumerate(recording.image_rgb_u8):
            if number == ASKED:
                session.set_goal(sentence, max_instances=4)
            result = session.step(Frame(image, round(1e9 * (1 + number / RATE_HZ))))
            parts = [found for found in result.objects if found.part_of and found.mask.any()]
            if number < ASKED + config.tracking.instance_steps + 2:
                continue
            assert len(parts) == len(targets), number
            for target in targets:
                truth = recording.instance_mask[number] == target + 1
                overlap, name = max(
                    (float((part.mask & truth).sum() / (part.mask | truth).sum()), part.object_id) for part in parts
                )
                ids[target].append(name)
                overlaps[target].append(overlap)
    for target in targets:
        assert np.mean(overlaps[target]) > 0.7, target
        assert len(list(itertools.groupby(ids[target]))) == 1
    assert len({names[0] for names in ids.values()}) == len(targets)
