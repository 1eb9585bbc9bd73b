# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim.recording import Recording


def test_a_saved_recording_comes_back_whole(rendered, tmp_path):
    path = tmp_path / "deep" / "scene.npz"
    rendered[0].save(path)
    loaded = Recording.load(path)
    assert loaded.spec == rendered[0].spec
    assert (loaded.fps, loaded.width, loaded.height) == (10.0, 128, 128)
    assert loaded.arrays().keys() == rendered[0].arrays().keys()
    for name, values in rendered[0].arrays().items():
        np.testing.assert_array_equal(loaded.arrays()[name], values, err_msg=name)
    assert [p.name for p in path.parent.iterdir()] == ["scene.npz"]


@pytest.mark.parametrize("content", [None, b"", b"not a recording"])
def test_missing_and_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "scene.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SceneError, match=r"cannot read the recording .*scene\.npz"):
        Recording.load(path)


def test_target_mask_is_the_union_of_the_targets(rendered):
    recording = rendered[0]
    union = recording.target_mask(5, (0, 1))
    np.testing.assert_array_equal(union, np.isin(recording.instance_mask[5], (1, 2)))
    assert not recording.target_mask(5, ()).any()
    with pytest.raises(SceneError, match="no images"):
        recording.without_images().target_mask(5, (0,))
