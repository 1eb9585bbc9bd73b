# SPDX-License-Identifier: Apache-2.0
"""Where objects appear in the image, computed without drawing: all shapes are convex, so a silhouette is a hull."""

import math

import cv2
import numpy as np
from jaxtyping import Float

from virst_engine.sim.spec import CameraSpec, ObjectSpec, SceneSpec, Vec3

CIRCLE_POINTS = 28
_ANGLES = np.arange(CIRCLE_POINTS) * (2 * math.pi / CIRCLE_POINTS)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES), np.zeros(CIRCLE_POINTS)], axis=1)
BOX_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
NEAR_M = 0.02


class ViewGeometry:
    """The camera of a scene as arrays: projects points and outlines objects, in fractions of the image (0..1)."""

    def __init__(self, camera: CameraSpec):
        self.position = np.asarray(camera.position_m, float)
        self.axes = camera.axes()
        unit = camera.intrinsics(1, 1)
        self.scale = np.array([unit.fx, unit.fy])

    def depth_m(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
        """Distance along the optical axis."""
        return np.asarray((points - self.position) @ self.axes[2])

    def project(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 2"]:
        """World metres -> fractions of the image width and height; points behind the camera land far outside."""
        p = (points - self.position) @ self.axes.T
        z = np.maximum(p[..., 2:], NEAR_M)
        return p[..., :2] / z * self.scale + 0.5

    def on_plane(self, u: float, v: float, height_m: float) -> Float[np.ndarray, " 3"]:
        """The world point at `height_m` above the table that appears at (u, v)."""
        ray = ((np.array([u, v]) - 0.5) / self.scale) @ self.axes[:2] + self.axes[2]
        return self.position + ray * ((height_m - self.position[2]) / ray[2])

    def silhouette(
        self, shape: str, half_m: Vec3, position_m: Float[np.ndarray, " 3"], rotation: Float[np.ndarray, "3 3"]
    ) -> Float[np.ndarray, "k 2"]:
        """The convex outline of an object, in fractions of the image."""
        half = np.asarray(half_m, float)
        if shape == "box":
            points = BOX_CORNERS * half @ rotation.T + position_m
        elif shape in ("can", "plate"):
            rim, lift = _CIRCLE * half, np.array([0.0, 0.0, half[2]])
            points = np.concatenate([rim + lift, rim - lift]) @ rotation.T + position_m
        elif shape == "capsule":
            offset = rotation[:, 2] * half[2]
            ball = np.full(3, half[0])
            points = np.concatenate(
                [
                    self._ellipsoid_rim(ball, position_m + offset, rotation),
                    self._ellipsoid_rim(ball, position_m - offset, rotation),
                ]
            )
        else:
            points = self._ellipsoid_rim(half, position_m, rotation)
        return cv2.convexHull(self.project(points).astype(np.float32))[:, 0]

    def _ellipsoid_rim(
        self, half: Float[np.ndarray, " 3"], centre: Float[np.ndarray, " 3"], rotation: Float[np.ndarray, "3 3"]
    ) -> Float[np.ndarray, "k 3"]:
        # in the space where the ellipsoid is the unit sphere, the rim seen from the eye is a circle
        eye = ((self.position - centre) @ rotation) / half
        distance = math.sqrt(float(eye @ eye))
        if distance <= 1.0:
            return np.repeat(centre[None], 3, axis=0)
        x, y, z = (float(v) / distance for v in eye)
        # two axes across the line of sight, spelled out because np.cross is slow on single vectors
        side = (0.0, z, -y) if abs(x) < 0.9 else (-z, 0.0, x)
        length = math.sqrt(side[0] ** 2 + side[1] ** 2 + side[2] ** 2)
        p, q, r = side[0] / length, side[1] / length, side[2] / length
        across = np.array([[p, q, r], [y * r - z * q, z * p - x * r, x * q - y * p]])
        rim = _CIRCLE[:, :2] @ (math.sqrt(1 - 1 / distance**2) * across) + np.array([x, y, z]) / distance
        return (rim * half) @ rotation.T + centre


_VIEW = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)


def area(polygon: Float[np.ndarray, "k 2"]) -> float:
    """Of a polygon in fractions of the image: 1 is the whole image."""
    return float(cv2.contourArea(polygon))


def is_inside_view(polygon: Float[np.ndarray, "k 2"], margin: float = 0.0) -> bool:
    return bool((polygon >= margin).all() and (polygon <= 1 - margin).all())


def area_in_view(polygon: Float[np.ndarray, "k 2"]) -> float:
    """The part of `area` that lies in the image."""
    if is_inside_view(polygon):
        return area(polygon)
    if (polygon.max(axis=0) <= 0).any() or (polygon.min(axis=0) >= 1).any():
        return 0.0
    return float(cv2.intersectConvexConvex(polygon, _VIEW)[0])


def overlap(a: Float[np.ndarray, "k 2"], b: Float[np.ndarray, "m 2"]) -> float:
    """Area that two convex outlines share."""
    if (a.max(axis=0) <= b.min(axis=0)).any() or (b.max(axis=0) <= a.min(axis=0)).any():
        return 0.0
    return float(cv2.intersectConvexConvex(a, b)[0])


def rotation_of(quaternion_wxyz: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n 3 3"]:
    q = np.asarray(quaternion_wxyz, float)
    w, x, y, z = q[..., 0], q[..., 1], q[..., 2], q[..., 3]
    matrix = np.empty((*q.shape[:-1], 3, 3))
    matrix[..., 0, 0] = 1 - 2 * (y * y + z * z)
    matrix[..., 0, 1] = 2 * (x * y - w * z)
    matrix[..., 0, 2] = 2 * (x * z + w * y)
    matrix[..., 1, 0] = 2 * (x * y + w * z)
    matrix[..., 1, 1] = 1 - 2 * (x * x + z * z)
    matrix[..., 1, 2] = 2 * (y * z - w * x)
    matrix[..., 2, 0] = 2 * (x * z - w * y)
    matrix[..., 2, 1] = 2 * (y * z + w * x)
    matrix[..., 2, 2] = 1 - 2 * (x * x + y * y)
    return matrix


def contact_spot(
    thing: ObjectSpec, position_m: Float[np.ndarray, " 3"], rotation: Float[np.ndarray, "3 3"]
) -> tuple[Float[np.ndarray, "k 3"], float]:
    """The outline on the table of the shade under an object, and how high its lowest point is above the table (m)."""
    a, b, c = thing.half_m
    if thing.shape == "box":
        corners = BOX_CORNERS * thing.half_m @ rotation.T
        lift, ground = float(position_m[2] + corners[:, 2].min()), corners[:, :2] * 1.1
    else:
        half = np.array([a, b, c + (a if thing.shape == "capsule" else 0.0)])
        if thing.shape in ("can", "plate"):
            rim = (
                np.concatenate([np.column_stack([_CIRCLE[:, :2] * a, np.full(CIRCLE_POINTS, z)]) for z in (-c, c)])
                @ rotation.T
            )
            lift, ground = float(position_m[2] + rim[:, 2].min()), rim[:, :2] * 1.08
        else:
            # seen straight from above an ellipsoid is an ellipse: a circle times the root of this matrix
            shape = (rotation[:2] * half**2) @ rotation[:2].T
            values, vectors = np.linalg.eigh(shape)
            lift = float(position_m[2] - math.sqrt(float(rotation[2] ** 2 @ half**2)))
            ground = _CIRCLE[:, :2] * np.sqrt(values) @ vectors.T * 0.9
    lift = max(lift, 0.0)
    ground = position_m[:2] + ground * (1 + 2 * lift)
    return np.column_stack([ground, np.zeros(len(ground))]), lift


def initial_quaternion(spec: ObjectSpec) -> Float[np.ndarray, " 4"]:
    """w x y z: about z by the yaw, after laying the object's axis down onto x if it lies."""
    half_yaw = spec.yaw_rad / 2
    yaw = np.array([math.cos(half_yaw), 0.0, 0.0, math.sin(half_yaw)])
    if not spec.lying:
        return yaw
    s = math.sqrt(0.5)
    w, z = yaw[0], yaw[3]
    return np.array([w * s, -z * s, w * s, z * s])


def outlines(
    view: ViewGeometry, spec: SceneSpec, position: np.ndarray, quaternion: np.ndarray
) -> list[Float[np.ndarray, "k 2"]]:
    """The convex outline of every object in one frame, in fractions of the image."""
    rotation = rotation_of(quaternion)
    return [view.silhouette(o.shape, o.half_m, position[k], rotation[k]) for k, o in enumerate(spec.objects)]
