# SPDX-License-Identifier: Apache-2.0
"""Shards on disk as training sees them. The clips are tables, not renderings: no OpenGL is needed."""

import json
from pathlib import Path

import numpy as np
import pytest

from virst_engine.data.clips import BatchSource, ClipPlan
from virst_engine.data.recorded import COLOUR_LABEL, SHAPE_LABEL, open_scenes
from virst_engine.errors import SceneError
from virst_engine.model.words import UNKNOWN, WordTokenizer
from virst_engine.sim.expressions import KINDS_PLAIN, VOCABULARY
from virst_engine.sim.recording import TRUTH_ARRAYS
from virst_engine.sim.scenes import generate_scene
from virst_engine.sim.spec import COLOURS, MAX_OBJECTS, SHAPES

FRAMES, SIDE = 26, 64


def write_shard(folder: Path, seeds: list[int]) -> None:
    """A shard in the format of `virst scenes write`: objects in a row on the table, all in view, none moves."""
    folder.mkdir(parents=True)
    specs = [generate_scene(seed, "plain") for seed in seeds]
    masks = np.zeros((len(seeds), FRAMES, SIDE, SIDE), np.uint8)
    truth = {
        name: np.zeros((len(seeds), FRAMES, MAX_OBJECTS, *shape), np.float32)
        for name, shape in zip(TRUTH_ARRAYS, ((), (), (), (3,), (4,), (3,), (2,)), strict=True)
    }
    for row, spec in enumerate(specs):
        for k in range(len(spec.objects)):
            masks[row, :, 10:20, 1 + 9 * k : 9 + 9 * k] = k + 1
            truth["centre_px"][row, :, k] = (5 + 9 * k, 15)
            truth["position_m"][row, :, k] = (0.0, 0.1 * k, 0.03)
        for name in ("visible_fraction", "in_view_fraction"):
            truth[name][row] = 1.0
        truth["area_fraction"][row] = 0.02
        truth["quaternion_wxyz"][row, ..., 0] = 1.0
    np.save(folder / "masks.npy", masks)
    np.save(folder / "frames.npy", np.repeat(masks[..., None] * 30, 3, axis=-1))
    np.savez(folder / "truth.npz", time_s=np.arange(FRAMES) / 10.0, **truth)
    header = {"fps": 10.0, "width": SIDE, "height": SIDE, "seeds": seeds, "specs": [spec.to_json() for spec in specs]}
    (folder / "scenes.json").write_text(json.dumps(header))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = tmp_path_factory.mktemp("clips")
    write_shard(clips / "plain-00000000-00000001", [0, 1])
    write_shard(clips / "plain-00000002-00000002", [2])
    return clips


def test_every_scene_of_every_shard_is_found_in_order(folder: Path) -> None:
    scenes = open_scenes(folder)
    assert len(scenes) == 3
    for seed, scene in enumerate(scenes):
        objects = generate_scene(seed, "plain").objects
        assert scene.colours == tuple(COLOURS_IN_ORDER.index(o.colour) + 1 for o in objects)
        assert scene.shapes == tuple(SHAPES_IN_ORDER.index(o.shape) + 1 for o in objects)
        assert scene.frames_rgb_u8.shape == (FRAMES, SIDE, SIDE, 3)
        assert scene.instance_masks.max() == len(objects)


COLOURS_IN_ORDER, SHAPES_IN_ORDER = list(COLOURS), list(SHAPES)


def test_labels_begin_at_one_and_leave_zero_to_the_background() -> None:
    assert sorted(COLOUR_LABEL.values()) == list(range(1, len(COLOURS) + 1))
    assert sorted(SHAPE_LABEL.values()) == list(range(1, len(SHAPES) + 1))


def test_pictures_are_mapped_and_not_read(folder: Path) -> None:
    assert isinstance(open_scenes(folder)[0].frames_rgb_u8, np.memmap)


def test_sentences_are_drawn_anew_from_training_phrasings_and_can_be_read(folder: Path) -> None:
    scene = open_scenes(folder)[1]
    tokenizer = WordTokenizer(VOCABULARY)
    seen = set()
    for seed in range(10):
        for sentence in scene.sentences(22, 4, np.random.default_rng(seed)):
            assert not sentence.held_out
            assert UNKNOWN not in tokenizer.encode(sentence.text)
            assert UNKNOWN not in tokenizer.encode(sentence.answer)
            assert all(0 <= target < len(scene.colours) for target in sentence.target_ids)
            seen.add(sentence.text)
    assert len(seen) > 10


def test_kinds_are_kept_to_where_the_scene_allows_them(folder: Path) -> None:
    scene = open_scenes(folder)[0]
    rng = np.random.default_rng(0)
    assert {s.kind for s in scene.sentences(22, 12, rng, kinds=("attribute",))} <= {"attribute", "absent"}
    kinds = {s.kind for s in scene.sentences(22, 6, rng, kinds=("event",))}  # nothing happens: any kind will do
    assert kinds
    assert kinds <= {*KINDS_PLAIN, "absent", "event"}


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (1.0, True)])
def test_as_many_sentences_as_asked_for_mean_nothing(folder: Path, share: float, expected: bool) -> None:
    said = open_scenes(folder)[0].sentences(22, 8, np.random.default_rng(0), absent_share=share)
    assert {s.kind == "absent" for s in said} == {expected}


def test_a_batch_of_recorded_scenes(folder: Path) -> None:
    plan = ClipPlan(clips=2, sentences=3, clip_frames=8)
    batch = BatchSource(open_scenes(folder), WordTokenizer(VOCABULARY), plan, (0,), 1)[0]
    assert batch.truth.shape == (6, 8, SIDE // 2, SIDE // 2)
    for row, kind in enumerate(batch.kinds):
        assert bool(batch.visible[row].all()) == (kind != "absent")


def test_scenes_kept_for_evaluation_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "plain-00000000-00000000", [0])
    write_shard(tmp_path / "plain-01000000-01000000", [1_000_000])
    with pytest.raises(SceneError, match=r"1 scenes kept for evaluation \(seeds from 1000000\)"):
        open_scenes(tmp_path)


def test_a_folder_without_scenes_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="virst scenes write"):
        open_scenes(tmp_path)
