# SPDX-License-Identifier: Apache-2.0
"""What a simulated scene is made of: pure data, no physics and no randomness in it.

World frame: metres, z up, the table top is z = 0. Pixels: x right, y down, (0, 0) is the corner of the first pixel.
The view is always 4:3; an image of another shape is that view squashed.
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from virst_engine.errors import SceneError

Family = Literal["plain", "full"]
Vec2 = tuple[float, float]
Vec3 = tuple[float, float, float]

VIEW_ASPECT = 4.0 / 3.0
MAX_OBJECTS = 7
ARM_ID = 255  # the arm's value in instance masks
FAMILIES: tuple[Family, ...] = ("plain", "full")

COLOURS: dict[str, Vec3] = {
    "red": (0.82, 0.05, 0.06),
    "orange": (1.00, 0.42, 0.02),
    "yellow": (0.98, 0.86, 0.08),
    "green": (0.08, 0.58, 0.14),
    "blue": (0.06, 0.22, 0.88),
    "purple": (0.52, 0.12, 0.70),
    "white": (0.97, 0.97, 0.97),
    "black": (0.045, 0.045, 0.05),
}
SHAPES = ("box", "ball", "can", "capsule", "egg", "plate")
SIZES = ("small", "large")
# specular, shininess
MATERIALS: dict[str, Vec2] = {"matte": (0.05, 0.1), "satin": (0.3, 0.4), "glossy": (0.7, 0.8)}


@dataclass(frozen=True)
class Push:
    """A servo that drives an object at a horizontal velocity from `start_s` to `end_s` and then brakes it."""

    start_s: float
    end_s: float
    velocity_m_s: Vec2


@dataclass(frozen=True)
class ObjectSpec:
    """One object of the table.

    `half_m` by shape: box half edges; ball (r, r, r); can and plate (r, r, half height); capsule (r, r, half length of
    its straight part); egg half axes. The local z axis is that of can, plate, capsule and egg; `lying` lays it down.
    """

    shape: str
    colour: str
    size: str
    material: str
    rgb: Vec3
    half_m: Vec3
    position_m: Vec3
    yaw_rad: float
    lying: bool
    pushes: tuple[Push, ...] = ()
    drop_at_s: float | None = None  # hangs in the air until then

    @property
    def radius_m(self) -> float:
        """Of the bounding sphere."""
        return bounding_radius_m(self.shape, self.half_m)


def bounding_radius_m(shape: str, half_m: Vec3) -> float:
    a, b, c = half_m
    if shape == "box":
        return math.sqrt(a * a + b * b + c * c)
    if shape in ("can", "plate"):
        return math.hypot(a, c)
    if shape == "capsule":
        return a + c
    return max(half_m)


@dataclass(frozen=True)
class CameraSpec:
    position_m: Vec3
    look_at_m: Vec3
    fovy_deg: float
    roll_deg: float = 0.0

    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rows: the camera's right, down and forward axes in the world (the OpenCV convention)."""
        forward = np.asarray(self.look_at_m, float) - np.asarray(self.position_m, float)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        roll = math.radians(self.roll_deg)
        c, s = math.cos(roll), math.sin(roll)
        return np.stack([c * right + s * down, -s * right + c * down, forward])

    def intrinsics(self, width: int, height: int) -> "Intrinsics":
        """Pinhole intrinsics of the 4:3 view drawn into `width` x `height` pixels."""
        half_tan = math.tan(math.radians(self.fovy_deg) / 2)
        fy = height / (2 * half_tan)
        fx = width / (2 * half_tan * VIEW_ASPECT)
        return Intrinsics(fx=fx, fy=fy, cx=width / 2, cy=height / 2)


@dataclass(frozen=True)
class Intrinsics:
    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class LightSpec:
    direction: Vec3
    diffuse: Vec3
    ambient: Vec3


@dataclass(frozen=True)
class TableSpec:
    """`pattern` none, checker, stripes, grain or speckle between `rgb` and `rgb2`; `back_edge_m` is where it ends."""

    rgb: Vec3
    rgb2: Vec3
    pattern: str
    pattern_seed: int
    back_edge_m: float
    floor_rgb: Vec3


@dataclass(frozen=True)
class ArmKey:
    """Where the arm's hand is at a time; between keys it moves smoothly."""

    time_s: float
    hand_m: Vec3


@dataclass(frozen=True)
class ArmSpec:
    base_m: Vec3
    link_m: float
    radius_m: float
    hand_radius_m: float
    rgb: Vec3
    keys: tuple[ArmKey, ...]
    period_s: float = 0.0  # the keys repeat after so long; 0 = once

    def hand_at(self, time_s: float) -> Float[np.ndarray, " 3"]:
        keys = self.keys
        if self.period_s > 0:
            time_s %= self.period_s
        if time_s <= keys[0].time_s:
            return np.asarray(keys[0].hand_m, float)
        for before, after in itertools.pairwise(keys):
            if time_s <= after.time_s:
                u = (time_s - before.time_s) / max(after.time_s - before.time_s, 1e-9)
                u = u * u * (3 - 2 * u)
                return (1 - u) * np.asarray(before.hand_m, float) + u * np.asarray(after.hand_m, float)
        return np.asarray(keys[-1].hand_m, float)


@dataclass(frozen=True)
class SceneSpec:
    """Everything that decides a recording; equal specs give equal arrays."""

    seed: int
    family: Family
    objects: tuple[ObjectSpec, ...]
    camera: CameraSpec
    light: LightSpec
    table: TableSpec
    arm: ArmSpec | None = None
    theme: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "SceneSpec":
        """Inverse of `to_json`, also after a trip through JSON text (lists become tuples again)."""
        try:
            objects = tuple(
                ObjectSpec(
                    **{
                        **{k: _tuples(v) for k, v in o.items()},
                        "pushes": tuple(Push(**{k: _tuples(v) for k, v in p.items()}) for p in o["pushes"]),
                    }
                )
                for o in data["objects"]
            )
            arm = data.get("arm")
            if arm is not None:
                keys = tuple(ArmKey(**{k: _tuples(v) for k, v in key.items()}) for key in arm["keys"])
                arm = ArmSpec(**{**{k: _tuples(v) for k, v in arm.items()}, "keys": keys})
            return SceneSpec(
                seed=data["seed"],
                family=data["family"],
                objects=objects,
                camera=CameraSpec(**{k: _tuples(v) for k, v in data["camera"].items()}),
                light=LightSpec(**{k: _tuples(v) for k, v in data["light"].items()}),
                table=TableSpec(**{k: _tuples(v) for k, v in data["table"].items()}),
                arm=arm,
                theme=data.get("theme", ""),
            )
        except (KeyError, TypeError) as error:
            raise SceneError(
                f"this is not a scene of this version ({error!r}); write the clips again with `virst scenes write`"
            ) from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
