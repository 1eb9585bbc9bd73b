# SPDX-License-Identifier: Apache-2.0
"""Points and boxes of things whose place is known: made by hand, and drawn by the simulator."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from virst_engine import depth
from virst_engine.errors import SceneError
from virst_engine.sim.live import LiveTabletop, demo_scene
from virst_engine.sim.mujoco_world import close_all

WIDTH, HEIGHT = 160, 120
FX = FY = 150.0
CX, CY = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
RAYS = depth.pinhole_rays(FX, FY, CX, CY, WIDTH, HEIGHT)
# A table 0.5 m below the camera, which looks down on it at 45 degrees.
DOWN = np.array([0.0, 1.0, 1.0]) / np.sqrt(2)
TABLE_M = 0.5


def table() -> np.ndarray:
    """Depth of the empty table; the rays above the horizon see nothing."""
    along = np.concatenate([RAYS, np.ones((HEIGHT, WIDTH, 1), np.float32)], axis=2) @ DOWN
    return np.where(along > 0.05, TABLE_M / np.maximum(along, 0.05), np.nan).astype(np.float32)


def with_box(
    scene_m: np.ndarray, centre: tuple[float, float], size_m: tuple[float, float, float], yaw: float, lift_m: float = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box drawn by ray casting: the new depth, its mask, its centre in the camera's frame.

    centre: on the table, right of the camera and away from it, metres.
    """
    right, away = np.array([1.0, 0.0, 0.0]), np.cross(DOWN, [1.0, 0.0, 0.0])
    if away[2] < 0:
        away = -away
    up = -DOWN
    x = np.cos(yaw) * right + np.sin(yaw) * np.cross(up, right)
    axes = np.stack([x, np.cross(up, x), up], axis=1)
    middle = centre[0] * right + centre[1] * away + (TABLE_M - lift_m - size_m[2] / 2) * DOWN
    rays = np.concatenate([RAYS, np.ones((HEIGHT, WIDTH, 1), np.float32)], axis=2).astype(np.float64)
    slope, start = rays @ axes, -middle @ axes
    half = np.array(size_m) / 2
    with np.errstate(divide="ignore"):
        enter = np.minimum((-half - start) / slope, (half - start) / slope).max(axis=2)
        leave = np.maximum((-half - start) / slope, (half - start) / slope).min(axis=2)
    mask = (enter < leave) & (enter > 0) & ~(enter > scene_m)
    return np.where(mask, enter, scene_m).astype(np.float32), mask, middle


def test_rays_and_depth_give_the_point_that_a_pinhole_would_project_there() -> None:
    point = np.array([0.12, -0.05, 0.8])
    column, row = 3, 2  # where it is seen, by the choice of the principal point
    cx, cy = column - FX * point[0] / point[2], row - FY * point[1] / point[2]
    rays = depth.pinhole_rays(FX, FY, cx, cy, 8, 6)
    assert rays.dtype == np.float32
    depth_m = np.full((6, 8), np.nan, np.float32)
    depth_m[row, column] = point[2]
    pixels = np.flatnonzero(depth.measured(depth_m))
    np.testing.assert_allclose(depth.back_project(depth_m, rays, pixels), [point], rtol=1e-5)


@pytest.mark.parametrize("missing", [np.nan, 0.0, -1.0, np.inf, -np.inf])
def test_what_was_not_measured_is_no_point(missing: float) -> None:
    depth_m = np.full((4, 4), missing, np.float32)
    depth_m[1, 1] = 0.7
    assert np.flatnonzero(depth.measured(depth_m)).tolist() == [5]


def test_ids_are_resized_to_their_nearest_neighbour_only() -> None:
    ids = np.zeros((4, 6), np.uint8)
    ids[2:, 3:] = 9
    half = depth.resize_nearest(ids, 2, 3)
    np.testing.assert_array_equal(half, [[0, 0, 0], [0, 9, 9]])
    np.testing.assert_array_equal(depth.resize_nearest(half, 4, 6), [[0, 0, 0, 0, 0, 0]] * 2 + [[0, 0, 9, 9, 9, 9]] * 2)
    assert depth.resize_nearest(ids, 4, 6) is ids
    assert depth.resize_nearest(np.zeros((4, 6, 3), np.uint8), 2, 2).shape == (2, 2, 3)


def test_a_mask_grows_by_its_margin_and_stays_in_the_image() -> None:
    mask = np.zeros((6, 9), bool)
    mask[0, 0] = mask[3, 6] = True
    expected = np.zeros_like(mask)
    expected[:2, :2] = expected[2:5, 5:8] = True
    np.testing.assert_array_equal(depth.grow(mask, 1), expected)
    assert depth.grow(mask, 0) is mask
    assert depth.grow(mask, 100).all()
    assert not depth.grow(np.zeros((3, 3), bool), 2).any()


def test_clouds_hold_each_measured_pixel_once() -> None:
    depth_m = np.array([[0.5, np.nan, 1.0, 2.0]], np.float32)
    rays = depth.pinhole_rays(1.0, 1.0, 0.0, 0.0, 4, 1)
    ids = np.array([[1, 1, 0, 2]], np.uint8)
    image = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
    objects = depth.object_cloud(depth_m, rays, ids, image)
    np.testing.assert_allclose(objects.points_m, [[0, 0, 0.5], [6, 0, 2]])
    assert objects.labels.tolist() == [1, 2]
    assert objects.rgb_u8.tolist() == [[0, 1, 2], [9, 10, 11]]
    rest = depth.surroundings_cloud(depth_m, rays, ids, image, ids == 1)
    np.testing.assert_allclose(rest.points_m, [[2, 0, 1], [6, 0, 2]])
    assert rest.labels.tolist() == [0, 2]


def test_a_thinned_cloud_holds_every_second_row_and_column() -> None:
    depth_m = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    rays, ids = depth.pinhole_rays(1.0, 1.0, 0.0, 0.0, 4, 4), np.zeros((4, 4), np.uint8)
    excluded = depth_m == 14
    cloud = depth.surroundings_cloud(depth_m, rays, ids, np.zeros((4, 4, 3), np.uint8), excluded, every_px=2)
    assert cloud.points_m[:, 2].tolist() == [6, 8, 16]


@pytest.mark.parametrize("yaw", [0.0, 0.4, -0.7])
def test_the_box_of_a_box_on_a_table(yaw: float) -> None:
    size_m = (0.12, 0.08, 0.06)
    depth_m, mask, centre_m = with_box(table(), (0.03, 0.5), size_m, yaw)
    found = depth.object_geometry(depth_m, RAYS, mask)
    assert found is not None
    assert found.support is not None
    np.testing.assert_allclose(found.support.normal, -DOWN, atol=0.01)
    np.testing.assert_allclose(found.box.centre_m, centre_m, atol=0.004)
    np.testing.assert_allclose(found.box.size_m, size_m, atol=0.006)
    np.testing.assert_allclose(found.box.axes[:, 2], -DOWN, atol=0.01)
    assert found.box.axes[0, 0] == pytest.approx(np.cos(yaw), abs=0.03)
    assert found.depth_px == mask.sum()
    # Only the near side is seen: its mean is nearer to the camera than the middle of the box.
    assert np.linalg.norm(found.centroid_m) < np.linalg.norm(centre_m)


def test_axes_are_a_rotation_and_the_quaternion_is_the_same_one() -> None:
    for yaw in np.linspace(-0.78, 0.78, 5):
        depth_m, mask, _ = with_box(table(), (0.0, 0.5), (0.1, 0.1, 0.05), float(yaw))
        found = depth.object_geometry(depth_m, RAYS, mask)
        assert found is not None
        axes = found.box.axes
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
        assert np.linalg.det(axes) == pytest.approx(1.0)
        x, y, z, w = depth.quaternion_xyzw(axes)
        rebuilt = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        np.testing.assert_allclose(rebuilt, axes, atol=1e-9)


@pytest.mark.parametrize("half_turn", [np.diag([1.0, -1, -1]), np.diag([-1.0, 1, -1]), np.diag([-1.0, -1, 1])])
def test_the_quaternion_of_a_half_turn(half_turn: np.ndarray) -> None:
    np.testing.assert_allclose(np.abs(depth.quaternion_xyzw(half_turn)[:3]), (np.diag(half_turn) + 1) / 2)


def test_what_hovers_far_above_the_table_does_not_reach_down_to_it() -> None:
    depth_m, mask, centre_m = with_box(table(), (0.0, 0.4), (0.06, 0.06, 0.04), 0.0, lift_m=0.15)
    found = depth.object_geometry(depth_m, RAYS, mask)
    assert found is not None
    assert found.support is None
    assert found.box.size_m.max() < 0.12
    np.testing.assert_allclose(found.box.centre_m, centre_m, atol=0.03)


def test_pixels_that_look_past_the_object_do_not_move_it() -> None:
    depth_m, mask, centre_m = with_box(table(), (0.0, 0.4), (0.08, 0.08, 0.06), 0.2)
    behind = depth.grow(mask, 3) & ~mask
    depth_m[behind] = 3.0
    found = depth.object_geometry(depth_m, RAYS, mask | behind)
    assert found is not None
    np.testing.assert_allclose(found.centroid_m, centre_m, atol=0.05)
    assert found.box.size_m.max() < 0.12
    assert found.depth_px == (mask | behind).sum()


def test_holes_and_noise_change_little() -> None:
    rng = np.random.default_rng(3)
    depth_m, mask, centre_m = with_box(table(), (0.02, 0.45), (0.1, 0.1, 0.08), 0.1)
    depth_m += rng.normal(0.0, 0.002, depth_m.shape).astype(np.float32)
    depth_m[rng.random(depth_m.shape) < 0.3] = np.nan
    depth_m[rng.random(depth_m.shape) < 0.1] = 0.0
    found = depth.object_geometry(depth_m, RAYS, mask)
    assert found is not None
    np.testing.assert_allclose(found.box.centre_m, centre_m, atol=0.012)
    np.testing.assert_allclose(found.box.size_m, (0.1, 0.1, 0.08), atol=0.02)


def test_too_little_depth_is_no_geometry() -> None:
    depth_m = table()
    assert depth.object_geometry(depth_m, RAYS, np.zeros((HEIGHT, WIDTH), bool)) is None
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[60:90, 60:90] = True
    depth_m[mask] = np.nan
    assert depth.object_geometry(depth_m, RAYS, mask) is None
    depth_m[60, 60 : 60 + depth.FEWEST_POINTS - 1] = 0.5
    assert depth.object_geometry(depth_m, RAYS, mask) is None


def test_an_object_alone_in_the_void_has_a_box_too() -> None:
    depth_m, mask, centre_m = with_box(table(), (0.0, 0.5), (0.1, 0.06, 0.06), 0.0)
    depth_m[~mask] = np.nan
    found = depth.object_geometry(depth_m, RAYS, mask)
    assert found is not None
    assert found.support is None
    np.testing.assert_allclose(found.box.centre_m, centre_m, atol=0.03)
    assert abs(found.box.axes[0, 0]) > 0.95, "x is the side nearest to the image's right"
    assert found.box.axes[1, 2] < 0.0, "z points up in the image"
    assert np.linalg.det(found.box.axes) == pytest.approx(1.0)


def test_other_objects_are_no_support() -> None:
    """A small box on a large flat one: it stands on that, unless that is an object itself; then on nothing near."""
    below_m, below, _ = with_box(table(), (0.0, 0.5), (0.3, 0.3, 0.05), 0.0)
    depth_m, mask, _ = with_box(below_m, (0.0, 0.5), (0.06, 0.06, 0.04), 0.0, lift_m=0.05)
    on_top = depth.object_geometry(depth_m, RAYS, mask)
    assert on_top is not None
    assert on_top.support is not None
    assert on_top.support.offset_m == pytest.approx(-(TABLE_M - 0.05), abs=0.004)
    excluded = depth.object_geometry(depth_m, RAYS, mask, below | mask)
    assert excluded is not None
    assert excluded.support is None or excluded.support.offset_m == pytest.approx(-TABLE_M, abs=0.004)


@dataclass(frozen=True)
class Truth:
    """One object as drawn: what the camera measured, and where it is in the camera's frame."""

    shape: str
    mask: np.ndarray
    depth_m: np.ndarray
    all_masks: np.ndarray
    rays: np.ndarray
    centre_m: np.ndarray
    half_m: tuple[float, float, float]
    up: np.ndarray
    turned: np.ndarray  # direction of its local x


@pytest.fixture(scope="module")
def demo_truth() -> Iterator[list[Truth]]:
    width, height = 320, 240
    try:
        with LiveTabletop(width=width, height=height, spec=demo_scene()) as tabletop:
            tabletop.advance(0.5)
            frame, camera, things = tabletop.render(), tabletop.spec.camera, tabletop.spec.objects
    except SceneError as error:
        if "OpenGL" in str(error):
            pytest.skip(str(error))
        raise
    pinhole, axes = camera.intrinsics(width, height), camera.axes()
    rays = depth.pinhole_rays(pinhole.fx, pinhole.fy, pinhole.cx - 0.5, pinhole.cy - 0.5, width, height)
    assert frame.depth_m is not None
    truths = []
    for k, thing in enumerate(things):
        w, x, y, z = frame.quaternion_wxyz[k]
        local_x = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)])
        truths.append(
            Truth(
                thing.shape,
                frame.instance_mask == k + 1,
                frame.depth_m,
                frame.instance_mask > 0,
                rays,
                axes @ (frame.position_m[k] - camera.position_m),
                thing.half_m,
                axes @ (0.0, 0.0, 1.0),
                axes @ local_x,
            )
        )
    yield truths
    close_all()


def test_objects_of_the_simulator_are_where_it_says(demo_truth: list[Truth]) -> None:
    for truth in demo_truth:
        found = depth.object_geometry(truth.depth_m, truth.rays, truth.mask, truth.all_masks)
        assert found is not None, truth.shape
        assert found.support is not None, truth.shape
        np.testing.assert_allclose(found.box.axes[:, 2], truth.up, atol=0.01)
        off_m = np.linalg.norm(found.box.centre_m - truth.centre_m)
        # Of a ball one sees less than half: its far side is not in the box.
        assert off_m < (0.016 if truth.shape == "ball" else 0.004), f"{truth.shape}: {off_m * 1e3:.1f} mm off"
        assert found.box.size_m[2] == pytest.approx(2 * truth.half_m[2], abs=0.002)
        if truth.shape == "box":
            np.testing.assert_allclose(found.box.size_m[:2], np.multiply(truth.half_m[:2], 2), atol=0.003)
            assert abs(found.box.axes[:, 0] @ truth.turned) > 0.999, "its yaw is the box's"


def test_the_cloud_of_the_surroundings_is_the_table_of_the_simulator(demo_truth: list[Truth]) -> None:
    truth = demo_truth[0]
    excluded = depth.grow(truth.all_masks, 2)
    ids, image = np.zeros(truth.mask.shape, np.uint8), np.zeros((*truth.mask.shape, 3), np.uint8)
    cloud = depth.surroundings_cloud(truth.depth_m, truth.rays, ids, image, excluded)
    assert len(cloud.points_m) == (depth.measured(truth.depth_m) & ~excluded).sum()
    found = depth.object_geometry(truth.depth_m, truth.rays, truth.mask, truth.all_masks)
    assert found is not None
    assert found.support is not None
    heights_m = found.support.heights_m(cloud.points_m[cloud.points_m[:, 2] < 1.0].astype(np.float64))
    assert np.percentile(np.abs(heights_m), 90) < 1e-3
