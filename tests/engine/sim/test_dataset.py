# SPDX-License-Identifier: Apache-2.0
import shutil

import cv2
import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim import dataset
from virst_engine.sim.dataset import ClipShard, contact_sheet, open_clips, record_scene, write_clips
from virst_engine.sim.expressions import expressions


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
