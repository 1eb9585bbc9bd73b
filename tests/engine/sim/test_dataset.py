# SPDX-License-Identifier: Apache-2.0
import shutil

import cv2
import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim import dataset
from virst_engine.sim.dataset import ClipShard, contact_sheet, open_clips, record_scene, write_clips
from virst_engine.sim.expressions import expressions, find_meaning
from virst_engine.sim.recording import stretches


@pytest.fixture(scope="module")
def clips(rendered, tmp_path_factory):
    """Three short scenes in two shards."""
    folder = tmp_path_factory.mktemp("clips")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SHARD_SCENES", 2)
        options = {"duration_s": 2.4, "size": (64, 48), "workers": 1}
        paths = write_clips(folder, range(20, 23), "plain", progress=lambda *a: seen.append(a), **options)
        stamps = [p.stat().st_mtime_ns for p in paths]
        again = write_clips(folder, range(20, 23), "plain", **options)
        assert again == paths
        assert [p.stat().st_mtime_ns for p in again] == stamps
        with pytest.raises(SceneError, match="choose another folder"):
            write_clips(folder, range(20, 23), "plain", **{**options, "size": (32, 32)})
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    return folder


def test_shards_hold_the_recordings(clips):
    first, second = open_clips(clips)
    assert (first.seeds, second.seeds) == ([20, 21], [22])
    assert first.frames.shape == (2, 24, 48, 64, 3)
    assert isinstance(first.frames, np.memmap)
    expected = record_scene(21, "plain", duration_s=2.4, size=(64, 48))
    got = first.recording(1, images=True)
    assert got.spec == expected.spec
    assert got.arrays().keys() == expected.arrays().keys()
    for name, values in expected.arrays().items():
        np.testing.assert_array_equal(got.arrays()[name], values, err_msg=name)


@pytest.mark.parametrize("seconds", [2.4, 0.3])
def test_a_shard_that_another_process_finishes_first_is_kept_if_it_is_the_same(clips, tmp_path, seconds):
    first = open_clips(clips)[0].path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SHARD_SCENES", 2)

        def write():
            write_clips(
                tmp_path,
                range(20, 22),
                "plain",
                duration_s=seconds,
                size=(64, 48),
                workers=1,
                progress=lambda done, of: shutil.copytree(first, tmp_path / first.name) if done == 1 else None,
            )

        if seconds == 2.4:
            write()
        else:
            with pytest.raises(SceneError, match="choose another folder"):
                write()
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_sentences_need_no_images(clips):
    shard = open_clips(clips, "plain")[0]
    recording = shard.recording(1)
    assert recording.image_rgb_u8 is None
    drawn = expressions(recording, query_frame=23, rng=np.random.default_rng(3))
    fresh = record_scene(21, "plain", duration_s=2.4, size=(64, 48))
    assert drawn == expressions(fresh, query_frame=23, rng=np.random.default_rng(3))


def test_missing_and_damaged_shards_are_named(clips, tmp_path):
    with pytest.raises(SceneError, match="no clips below"):
        open_clips(tmp_path)
    with pytest.raises(SceneError, match="no clips below"):
        open_clips(clips, "full")
    broken = tmp_path / "plain-00000000-00000001"
    broken.mkdir()
    (broken / "scenes.json").write_text("{")
    with pytest.raises(SceneError, match=r"cannot read the clips in .*plain-0"):
        len(ClipShard(broken))


def test_contact_sheet_is_a_picture(rendered, tmp_path):
    path = contact_sheet(tmp_path / "sheet.png", range(30, 31), "full", sentences=2, size=(160, 120))
    image = cv2.imread(str(path))
    assert image.shape == (156, 5 * 160, 3)
    with pytest.raises(SceneError, match=r"ends in \.png"):
        contact_sheet(tmp_path / "sheet.unknown", range(30, 31), "plain", sentences=1, size=(64, 48))


def test_shards_tell_when_objects_show_and_what_was_asked(rendered, tmp_path):
    options = {"duration_s": 4.8, "size": (64, 48), "workers": 1}
    (path,) = write_clips(tmp_path / "asked", range(41, 43), "full", queries=4, **options)
    shard = ClipShard(path)
    for row in range(2):
        recording = shard.recording(row, images=True)
        for k in range(len(recording.spec.objects)):
            shows = [bool((mask == k + 1).any()) for mask in recording.instance_mask]
            assert shard.presence(row, (k,)).tolist() == recording.presence((k,)).tolist() == shows
        asked = shard.queries(row)
        assert len(asked) == 4
        for query in asked:
            meaning = find_meaning(recording, query["sentence"], query_frame=query["query_frame"])
            assert list(meaning.target_ids) == query["target_ids"]
            present = shard.presence(row, tuple(query["target_ids"]))
            assert query["present"] == [list(stretch) for stretch in stretches(present)]
            assert present[query["query_frame"]]
    (again,) = write_clips(tmp_path / "asked", range(41, 43), "full", queries=4, **options)
    assert again == path
    assert ClipShard(again).queries(1) == shard.queries(1)
    (unasked,) = write_clips(tmp_path / "unasked", range(41, 42), "full", **options)
    with pytest.raises(SceneError, match="--queries"):
        ClipShard(unasked).queries(0)
    with pytest.raises(SceneError, match="without queries"):
        write_clips(tmp_path / "unasked", range(41, 42), "full", queries=1, **options)


def test_a_shard_of_an_earlier_version_tells_presence_from_its_masks(clips, tmp_path):
    shard = open_clips(clips)[0]
    old = tmp_path / shard.path.name
    shutil.copytree(shard.path, old)
    with np.load(old / "truth.npz") as data:
        arrays = {name: data[name] for name in data.files if name != "present"}
    np.savez(old / "truth.npz", **arrays)
    for row in range(2):
        assert ClipShard(old).presence(row, (0, 1)).tolist() == shard.presence(row, (0, 1)).tolist()


def test_the_bar_below_a_sentence_tells_when_its_target_shows():
    cell = np.full((20, 101, 3), 255, np.uint8)
    is_present = np.repeat([True, False], 5)
    dataset._draw_presence(cell, is_present, 7)
    bar = cell[-1, :-1]
    assert (bar[:50] == (0, 150, 90)).all()
    assert (bar[50:70] == (190, 190, 190)).all()
    assert (bar[70:80] == 0).all()
    assert (cell[: -dataset.BAR_PX] == 255).all()
