# SPDX-License-Identifier: Apache-2.0
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.mujoco_world import simulate
from virst_engine.sim.scenes import generate_scene, generate_scene_and_motion
from virst_engine.sim.spec import COLOURS, SHAPES, CameraSpec, SceneSpec


@pytest.mark.parametrize("family", ["plain", "full"])
def test_a_seed_is_a_scene(family):
    spec, trajectory = generate_scene_and_motion(11, family)
    assert spec == generate_scene(11, family)
    assert spec != generate_scene(12, family)
    again = simulate(spec)
    np.testing.assert_array_equal(again.position_m, trajectory.position_m)
    np.testing.assert_array_equal(again.quaternion_wxyz, trajectory.quaternion_wxyz)


def test_another_process_makes_the_same_scene():
    code = (
        "from virst_engine.sim.scenes import generate_scene_and_motion as g;"
        "s, t = g(5, 'full'); print(hash(s.camera.position_m), repr(t.position_m.sum()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    spec, trajectory = generate_scene_and_motion(5, "full")
    assert output == f"{hash(spec.camera.position_m)} {trajectory.position_m.sum()!r}\n"


def test_scenes_keep_their_promises(rendered):
    for recording in rendered:
        spec = recording.spec
        assert 2 <= len(spec.objects) <= 7
        assert {o.shape for o in spec.objects} <= set(SHAPES)
        assert {o.colour for o in spec.objects} <= set(COLOURS)
        for i, a in enumerate(spec.objects):
            for b in spec.objects[:i]:
                assert math.dist(a.position_m, b.position_m) > 0.03
        if spec.family == "plain":
            assert spec.arm is None
            assert recording.visible_fraction.min() >= 0.8
            assert recording.in_view_fraction.min() > 0.999


def test_specs_survive_json():
    for family, seed in (("plain", 3), ("full", 7)):
        spec = generate_scene(seed, family)
        assert SceneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(SceneError, match="not a scene of this version"):
        SceneSpec.from_json({"seed": 1})


def test_bad_seeds_and_families_are_named():
    with pytest.raises(SceneError, match="unknown scene family 'hard'; use one of plain, full"):
        generate_scene(1, "hard")  # type: ignore[arg-type]
    with pytest.raises(SceneError, match="seeds are >= 0"):
        generate_scene(-1, "plain")


def test_projection_of_a_camera_looking_straight_ahead():
    view = geometry.ViewGeometry(CameraSpec((0.0, -1.0, 0.0), (0.0, 0.0, 0.0), 2 * math.degrees(math.atan(0.5))))
    # 1 m away the view is 1 m high and 4/3 m wide
    points = np.array([[0, 0, 0], [2 / 3, 0, 0], [-2 / 3, 0, 0.5], [0, 1, 0.5]])
    np.testing.assert_allclose(view.project(points), [[0.5, 0.5], [1, 0.5], [0, 0], [0.5, 0.25]], atol=1e-12)
    np.testing.assert_allclose(view.depth_m(points), [1, 1, 1, 2], atol=1e-12)


def test_outline_areas_of_simple_shapes():
    far = CameraSpec((0.0, 0.0001, 10.0), (0.0, 0.0, 0.0), 30.0)  # so far that it is nearly orthographic
    view = geometry.ViewGeometry(far)
    per_m2 = view.scale[0] * view.scale[1] / 100
    at, upright = np.zeros(3), np.eye(3)
    box = geometry.area(view.silhouette("box", (0.1, 0.2, 0.01), at, upright))
    ball = geometry.area(view.silhouette("ball", (0.1, 0.1, 0.1), at, upright))
    can = geometry.area(view.silhouette("can", (0.1, 0.1, 0.01), at, upright))
    lying = geometry.rotation_of(np.array([math.sqrt(0.5), 0, math.sqrt(0.5), 0]))
    capsule = geometry.area(view.silhouette("capsule", (0.05, 0.05, 0.1), at, lying))
    np.testing.assert_allclose(
        np.array([box, ball, can, capsule]) / per_m2,
        [0.08, math.pi * 0.01, math.pi * 0.01, 0.02 + math.pi * 0.0025],
        rtol=0.02,
    )


def test_area_in_view_is_cut_at_the_border():
    square = np.array([[-0.5, 0.2], [0.5, 0.2], [0.5, 0.6], [-0.5, 0.6]], np.float32)
    assert geometry.area(square) == pytest.approx(0.4)
    assert geometry.area_in_view(square) == pytest.approx(0.2, abs=1e-5)
    assert geometry.area_in_view(square - np.float32(2)) == 0.0
