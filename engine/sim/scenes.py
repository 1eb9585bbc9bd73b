# SPDX-License-Identifier: Apache-2.0
"""Scenes out of a seed. A draft is drawn, its physics is run without drawing, and it is kept if it suits its family.

`plain`: every object stays in the view and at least 80 % visible. `full`: patterned tables, a robot arm, objects that
hide each other, leave and come back, and movements one after the other. A `full` scene of more than LONGEST_SCRIPT_S is
a long one (long_scenes.py), on which things go on happening to the end.
"""

import numpy as np

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.draft import SceneDraft
from virst_engine.sim.recording import Trajectory
from virst_engine.sim.spec import (
    FAMILIES,
    SceneSpec,
)

__all__ = ["SceneSpec", "generate_scene", "generate_scene_and_motion"]

MAX_HIDDEN_PLAIN = 0.18  # of an outline; the rendered fraction is held to 0.2
ATTEMPTS = 120
LONGEST_SCRIPT_S = 12.0  # of scenes that are written beforehand


def generate_scene(seed: int, family: str, *, duration_s: float = 4.8) -> SceneSpec:
    """The scene of a seed: the same seed, family and duration give the same scene on every machine.

    A long one (`is_long`) is another scene than the short one of that seed.

    Raises:
        SceneError: unknown family or a negative seed.
    """
    return generate_scene_and_motion(seed, family, duration_s=duration_s)[0]


def generate_scene_and_motion(
    seed: int, family: str, *, fps: float = 10.0, duration_s: float = 4.8
) -> tuple[SceneSpec, Trajectory]:
    """`generate_scene` and the trajectory that `simulate` gives for it, which the choice needed anyway."""
    from virst_engine.sim.mujoco_world import simulate  # scenes can be read where mujoco is not installed

    if family not in FAMILIES:
        raise SceneError(f"unknown scene family {family!r}; use one of {', '.join(FAMILIES)}")
    if is_long(family, duration_s):
        from virst_engine.sim.long_scenes import generate_long_scene

        long_spec = generate_long_scene(seed, duration_s=duration_s).spec
        return long_spec, simulate(long_spec, fps=fps, duration_s=duration_s)
    if seed < 0:
        raise SceneError(f"scene seeds are >= 0, got {seed}; choose another seed")
    which = FAMILIES.index(family)
    rng = np.random.default_rng([seed, which])
    for attempt in range(ATTEMPTS):
        most_objects = 7 - attempt // 15  # a crowded draft that keeps failing gets emptier
        spec = SceneDraft(rng, seed, FAMILIES[which], max(2, most_objects), duration_s).scene()
        if spec is None:
            continue
        trajectory = simulate(spec, fps=fps, duration_s=duration_s)
        if _suits(spec, trajectory):
            return spec, trajectory
    raise SceneError(f"no valid {family} scene for seed {seed} in {ATTEMPTS} drafts; choose another seed")


def is_long(family: str, duration_s: float) -> bool:
    """Whether things go on happening for so long that they are not written beforehand."""
    return family == "full" and duration_s > LONGEST_SCRIPT_S


def hidden_fractions(spec: SceneSpec, position: np.ndarray, quaternion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per object of one frame: how much of its outline nearer objects cover, at most, and whether it is all in view."""
    view = geometry.ViewGeometry(spec.camera)
    shapes = geometry.outlines(view, spec, position, quaternion)
    depth = view.depth_m(position)
    hidden = np.zeros(len(shapes))
    inside = np.zeros(len(shapes), bool)
    for k, shape in enumerate(shapes):
        inside[k] = geometry.is_inside_view(shape)
        covered = sum(geometry.overlap(shape, s) for j, s in enumerate(shapes) if j != k and depth[j] < depth[k])
        hidden[k] = covered / max(geometry.area(shape), 1e-9)
    return hidden, inside


def _suits(spec: SceneSpec, trajectory: Trajectory) -> bool:
    if not np.isfinite(trajectory.position_m).all() or (trajectory.position_m[..., 2] < -0.01).any():
        return False
    if spec.family == "full":
        return True
    checked = np.full_like(trajectory.position_m[0], np.inf)
    for position, quaternion in zip(trajectory.position_m, trajectory.quaternion_wxyz, strict=True):
        if np.abs(position - checked).max() < 0.002:
            continue
        checked = position
        hidden, inside = hidden_fractions(spec, position, quaternion)
        if (hidden > MAX_HIDDEN_PLAIN).any() or not inside.all():
            return False
    return True
