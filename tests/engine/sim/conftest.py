# SPDX-License-Identifier: Apache-2.0
"""Recordings for the tests of the simulator: a few rendered ones, and a maker of hand-made ones that need no OpenGL."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.dataset import record_scene
from virst_engine.sim.mujoco_world import close_all
from virst_engine.sim.recording import Recording
from virst_engine.sim.spec import COLOURS, CameraSpec, LightSpec, ObjectSpec, SceneSpec, TableSpec

HALF_M = {
    "box": (0.035, 0.035, 0.035),
    "ball": (0.035, 0.035, 0.035),
    "can": (0.03, 0.03, 0.04),
    "capsule": (0.025, 0.025, 0.035),
    "egg": (0.03, 0.03, 0.045),
    "plate": (0.05, 0.05, 0.008),
}


@dataclass(frozen=True)
class Thing:
    """A hand-made object: where it is on the table (metres right of and beyond the middle), per frame or for ever."""

    colour: str
    shape: str
    xy_m: tuple[float, float] | list[tuple[float, float]]
    size: str = "small"
    lying: bool = False
    scale: float = 1.0
    visible: tuple[float, ...] = ()
    lift_m: tuple[float, ...] = ()


MakeRecording = Callable[..., Recording]


def hand_made(things: Sequence[Thing], frames: int = 22, family: str = "plain") -> Recording:
    """A recording without images, 10 Hz, by a camera in front of the table that looks straight along y."""
    camera = CameraSpec((0.0, -0.5, 0.5), (0.0, 0.0, 0.0), 45.0)
    objects, position, quaternion, visible = [], [], [], []
    for thing in things:
        lying = thing.lying or thing.shape in ("capsule", "egg")
        a, b, c = (h * thing.scale for h in HALF_M[thing.shape])
        spec = ObjectSpec(
            thing.shape, thing.colour, thing.size, "matte", COLOURS[thing.colour], (a, b, c), (0, 0, 0), 0.0, lying
        )
        objects.append(spec)
        xy = np.broadcast_to(np.asarray(thing.xy_m, float), (frames, 2))
        lift = np.asarray(thing.lift_m or (0.0,) * frames)
        position.append(np.column_stack([xy, (a if lying else c) + lift]))
        quaternion.append(np.tile(geometry.initial_quaternion(spec), (frames, 1)))
        visible.append(thing.visible or (1.0,) * frames)
    light = LightSpec((0.0, 0.0, -1.0), (0.5, 0.5, 0.5), (0.4, 0.4, 0.4))
    grey = (0.5, 0.5, 0.5)
    table = TableSpec(grey, grey, "none", 0, 1.0, grey)
    spec = SceneSpec(0, family, tuple(objects), camera, light, table)  # type: ignore[arg-type]
    view = geometry.ViewGeometry(camera)
    position_m, quaternion_wxyz = np.stack(position, axis=1), np.stack(quaternion, axis=1)
    areas, in_view = np.zeros(position_m.shape[:2]), np.zeros(position_m.shape[:2])
    for t in range(frames):
        for k, outline in enumerate(geometry.outlines(view, spec, position_m[t], quaternion_wxyz[t])):
            areas[t, k] = geometry.area_in_view(outline)
            in_view[t, k] = areas[t, k] / geometry.area(outline)
    return Recording(
        spec=spec,
        fps=10.0,
        width=128,
        height=128,
        time_s=np.arange(frames) / 10,
        visible_fraction=np.stack(visible, axis=1).astype(np.float32),
        in_view_fraction=in_view.astype(np.float32),
        area_fraction=areas.astype(np.float32),
        position_m=position_m,
        quaternion_wxyz=quaternion_wxyz,
        velocity_m_s=np.gradient(position_m, 0.1, axis=0),
        centre_px=view.project(position_m) * 128,
    )


@pytest.fixture
def make_recording() -> MakeRecording:
    return hand_made


@pytest.fixture
def thing() -> type[Thing]:
    return Thing


@pytest.fixture(scope="session")
def rendered() -> Iterator[list[Recording]]:
    """Three scenes of each family, drawn at 128 x 128."""
    try:
        recordings = [
            record_scene(seed, family) for family in ("plain", "full") for seed in (1_000_001, 1_000_002, 1_000_003)
        ]
    except SceneError as error:
        if "OpenGL" in str(error):
            pytest.skip(str(error))
        raise
    yield recordings
    close_all()
