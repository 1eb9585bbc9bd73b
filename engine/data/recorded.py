# SPDX-License-Identifier: Apache-2.0
"""Recorded scenes on disk (`virst scenes write`) as training sees them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from virst_engine.errors import SceneError
from virst_engine.sim.dataset import ClipShard, open_clips
from virst_engine.sim.expressions import ABSENT_SHARE, Expression, sample_expressions
from virst_engine.sim.spec import COLOURS, SHAPES, Family

FIRST_EVALUATION_SEED = 1_000_000
COLOUR_LABEL = {name: i + 1 for i, name in enumerate(COLOURS)}
SHAPE_LABEL = {name: i + 1 for i, name in enumerate(SHAPES)}


class ShardScene:
    """One scene of a shard; see `RecordedScene`. Sentences are made anew for every batch, from training phrasings."""

    def __init__(self, shard: ClipShard, index: int) -> None:
        self._shard, self._index = shard, index
        spec = shard.specs[index]
        self.colours = tuple(COLOUR_LABEL[o.colour] for o in spec.objects)
        self.shapes = tuple(SHAPE_LABEL[o.shape] for o in spec.objects)

    @property
    def frames_rgb_u8(self) -> np.ndarray:
        return self._shard.frames[self._index]

    @property
    def instance_masks(self) -> np.ndarray:
        return self._shard.masks[self._index]

    def sentences(
        self,
        query_frame: int,
        count: int,
        rng: np.random.Generator,
        *,
        kinds: tuple[str, ...] = (),
        absent_share: float = ABSENT_SHARE,
    ) -> Sequence[Expression]:
        """Sentences about the window that ends at `query_frame`; fewer kinds where the scene allows none of `kinds`."""
        recording = self._shard.recording(self._index)
        try:
            return sample_expressions(
                recording, rng, count, query_frame, "train", kinds=kinds or None, absent_share=absent_share
            )
        except SceneError:
            return sample_expressions(recording, rng, count, query_frame, "train", absent_share=absent_share)


def open_scenes(folder: Path, family: Family | None = None) -> list[ShardScene]:
    """All scenes below a folder. Raises SceneError when there are none, or when they are kept for evaluation."""
    shards = open_clips(folder, family)
    kept = [seed for shard in shards for seed in shard.seeds if seed >= FIRST_EVALUATION_SEED]
    if kept:
        raise SceneError(
            f"{folder} holds {len(kept)} scenes kept for evaluation (seeds from {FIRST_EVALUATION_SEED}); "
            "train on others: virst scenes write FOLDER --seeds 0:3000"
        )
    scenes = [ShardScene(shard, i) for shard in shards for i in range(len(shard))]
    if not scenes:
        raise SceneError(f"no recorded scenes in {folder}; write some with `virst scenes write`")
    return scenes
