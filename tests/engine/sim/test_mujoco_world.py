# SPDX-License-Identifier: Apache-2.0
"""Physics and drawing; the tests that draw are skipped where there is no OpenGL."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.mujoco_world import Simulator, record, simulate, table_texture
from virst_engine.sim.scenes import generate_scene
from virst_engine.sim.spec import ARM_ID, COLOURS, CameraSpec, LightSpec, ObjectSpec, Push, SceneSpec, TableSpec

GREY = (0.5, 0.5, 0.5)


def scene(*objects, camera=None):
    camera = camera or CameraSpec((0.0, -0.4, 0.4), (0.0, 0.0, 0.0), 45.0)
    light = LightSpec((0.0, 0.0, -1.0), GREY, (0.4, 0.4, 0.4))
    return SceneSpec(0, "plain", objects, camera, light, TableSpec(GREY, GREY, "none", 0, 1.0, GREY))


def ball(x=0.0, y=0.0, z=0.04, **more):
    return ObjectSpec(
        "ball", "red", "small", "matte", COLOURS["red"], (0.04, 0.04, 0.04), (x, y, z), 0.0, False, **more
    )


def box(x=0.0, y=0.0, z=0.04, **more):
    return ObjectSpec(
        "box", "blue", "small", "matte", COLOURS["blue"], (0.04, 0.04, 0.04), (x, y, z), 0.0, False, **more
    )


def test_what_is_not_pushed_stays():
    t = simulate(scene(ball(-0.1), box(0.1)), duration_s=3.0)
    np.testing.assert_allclose(t.position_m[-1], t.position_m[0], atol=1e-3)


@pytest.mark.parametrize("make", [ball, box])
def test_a_push_moves_at_its_velocity_and_ends(make):
    push = Push(0.5, 2.0, (0.1, 0.0))
    t = simulate(scene(make(-0.1, pushes=(push,))), duration_s=4.0)
    x = t.position_m[:, 0, 0]
    assert x[5] == pytest.approx(-0.1, abs=2e-3)
    assert x[18] - x[8] == pytest.approx(0.1, abs=0.01)  # one second of it
    assert x[-1] - x[0] == pytest.approx(0.1 * 1.44, abs=0.015)
    assert abs(x[-1] - x[-10]) < 2e-3
    turned = abs(float(t.quaternion_wxyz[0, 0] @ t.quaternion_wxyz[15, 0])) < 0.9
    assert turned == (make is ball)  # a ball rolls, a box slides


def test_hanging_things_drop_when_they_should():
    t = simulate(scene(box(z=0.2, drop_at_s=1.0)), duration_s=2.0)
    z = t.position_m[:, 0, 2]
    assert z[9] == pytest.approx(0.2, abs=1e-3)
    assert z[-1] == pytest.approx(0.04, abs=2e-3)


def test_recording_is_deterministic_and_consistent(rendered):
    first = rendered[3]
    again = record(first.spec, width=128, height=128)
    for name, values in first.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], values, err_msg=name)


def test_visible_fraction_is_the_share_of_outline_that_shows(rendered):
    for recording in rendered:
        view = geometry.ViewGeometry(recording.spec.camera)
        for t in (0, 20, 47):
            shapes = geometry.outlines(view, recording.spec, recording.position_m[t], recording.quaternion_wxyz[t])
            for k, outline in enumerate(shapes):
                pixels = np.count_nonzero(recording.instance_mask[t] == k + 1)
                fine = np.zeros((1024, 1024), np.uint8)
                cv2.fillConvexPoly(fine, np.round(outline * 1024).astype(np.int32), 1)
                whole = fine.sum() / 64
                if whole < 80:
                    continue
                assert pixels / whole == pytest.approx(recording.visible_fraction[t, k], abs=0.13), (t, k)


def test_masks_name_only_what_is_there(rendered):
    for recording in rendered:
        ids = set(np.unique(recording.instance_mask).tolist())
        allowed = {0, *range(1, len(recording.spec.objects) + 1)} | ({ARM_ID} if recording.spec.arm else set())
        assert ids <= allowed
        assert len(ids) > 2
        assert recording.image_rgb_u8.std() > 10


def test_objects_show_their_colour(rendered):
    recording = rendered[0]
    for k, thing in enumerate(recording.spec.objects):
        seen = recording.image_rgb_u8[0][recording.instance_mask[0] == k + 1].astype(float)
        mean = seen.mean(axis=0) / 255
        mean /= np.linalg.norm(mean) + 1e-6
        distance = {c: np.linalg.norm(mean - np.asarray(rgb) / np.linalg.norm(rgb)) for c, rgb in COLOURS.items()}
        if thing.colour in ("black", "white"):
            assert distance["white"] < 0.3
        else:
            assert min(distance, key=distance.__getitem__) == thing.colour


def test_the_view_is_four_to_three_and_squashed_into_a_square():
    spec = generate_scene(1_000_002, "plain")
    with Simulator(spec, 320, 240) as large, Simulator(spec, 128, 128) as square:
        wide, small = large.render(depth=False), square.render(depth=False)
    resized = cv2.resize(wide.image_rgb_u8, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(resized.astype(int) - small.image_rgb_u8).mean() < 4
    mask = cv2.resize(wide.instance_mask, (128, 128), interpolation=cv2.INTER_NEAREST)
    assert (mask == small.instance_mask).mean() > 0.98
    np.testing.assert_allclose(small.centre_px, wide.centre_px * (128 / 320, 128 / 240), rtol=1e-6)


def test_depth_is_registered_and_in_metres():
    spec = scene(ball(0.0, 0.0), box(0.15, 0.05))
    with Simulator(spec, 320, 240) as simulator:
        frame = simulator.render()
    assert frame.depth_m is not None
    assert frame.depth_m.shape == (240, 320)
    intrinsics, view = spec.camera.intrinsics(320, 240), geometry.ViewGeometry(spec.camera)
    # a ball's surface is one radius before its centre, along the ray through it
    x, y = frame.centre_px[0].astype(int)
    assert frame.depth_m[y, x] == pytest.approx(float(view.depth_m(frame.position_m[0])) - 0.04, abs=0.003)
    # pixels of the table, back in the world, lie at height 0
    rows, columns = np.nonzero(frame.instance_mask == 0)
    z = frame.depth_m[rows, columns]
    camera = np.stack(
        [(columns + 0.5 - intrinsics.cx) / intrinsics.fx * z, (rows + 0.5 - intrinsics.cy) / intrinsics.fy * z, z],
        axis=1,
    )
    world = camera @ view.axes + view.position
    on_table = world[np.abs(world[:, 0]) < 0.3]
    assert np.abs(on_table[:, 2]).max() < 0.02
    assert np.abs(on_table[:, 2]).mean() < 0.003


def test_a_hidden_object_has_no_visible_fraction():
    camera = CameraSpec((0.0, -0.6, 0.12), (0.0, 0.0, 0.04), 40.0)
    wall = replace(box(0.0, -0.1, 0.08), half_m=(0.1, 0.02, 0.08))
    with Simulator(scene(ball(0.0, 0.05), wall, camera=camera), 128, 128) as simulator:
        frame = simulator.render(depth=False)
    assert frame.visible_fraction[0] == 0.0
    assert frame.in_view_fraction[0] == 1.0
    assert frame.visible_fraction[1] > 0.95


def test_simulators_side_by_side_do_not_disturb_each_other():
    spec = generate_scene(1_000_003, "full")
    with Simulator(spec, 64, 64) as alone:
        alone.step_to(1.0)
        expected = alone.render()
    with Simulator(spec, 64, 64) as first, Simulator(generate_scene(4, "plain"), 96, 64) as second:
        for time_s in (0.3, 0.7, 1.0):
            first.step_to(time_s)
            second.step_to(time_s)
            second.render()
        got = first.render()
    np.testing.assert_array_equal(got.image_rgb_u8, expected.image_rgb_u8)
    np.testing.assert_array_equal(got.instance_mask, expected.instance_mask)


def test_place_and_push_by_hand():
    with Simulator(scene(ball(), box(0.15))) as simulator:
        simulator.push(0, (0.0, 0.1), 1.0)
        assert simulator.is_pushed(0)
        simulator.step_to(2.0)
        assert not simulator.is_pushed(0)
        assert simulator.positions_m()[0, 1] == pytest.approx(0.094, abs=0.02)
        simulator.place(0, (-0.1, 0.0, 0.04))
        simulator.step_to(2.5)
        np.testing.assert_allclose(simulator.positions_m()[0], (-0.1, 0.0, 0.04), atol=2e-3)


@pytest.mark.parametrize("pattern", ["none", "checker", "stripes", "grain", "speckle"])
def test_table_patterns(pattern):
    table = TableSpec((0.4, 0.4, 0.4), (0.6, 0.6, 0.6), pattern, 3, 1.0, GREY)
    image = table_texture(table)
    np.testing.assert_array_equal(image, table_texture(table))
    assert 100 <= image.min() <= image.max() <= 154
    assert (len(np.unique(image)) == 1) == (pattern == "none")


def test_bad_sizes_and_counts_are_refused():
    with pytest.raises(SceneError, match="image size 0x240"):
        Simulator(scene(ball()), 0, 240)
    with pytest.raises(SceneError, match=r"1\.\.7 objects, got 0"):
        Simulator(scene())


def test_a_forgotten_simulator_does_not_spoil_the_exit(rendered):
    code = "from virst_engine.sim.live import LiveTabletop; t = LiveTabletop(3, width=32, height=24); t.render()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_without_opengl_the_error_says_what_to_install():
    code = (
        "from virst_engine.sim.dataset import record_scene\n"
        "from virst_engine.errors import SceneError\n"
        "try: record_scene(3, 'plain')\n"
        "except SceneError as error: print(error)"
    )
    environment = {**os.environ, "MUJOCO_GL": "disabled"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "cannot make an OpenGL context" in result.stdout
    assert "apt-get install libosmesa6" in result.stdout


def test_any_thread_may_draw(rendered):
    spec = generate_scene(3, "plain")
    with Simulator(spec, 32, 24) as simulator:
        here = simulator.render().instance_mask
    there = []

    def draw() -> None:
        with Simulator(spec, 32, 24) as simulator:
            there.append(simulator.render().instance_mask)

    for _ in range(2):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    assert len(there) == 2
    np.testing.assert_array_equal(there, [here, here])
