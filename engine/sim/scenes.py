# SPDX-License-Identifier: Apache-2.0
"""Scenes out of a seed. A draft is drawn, its physics is run without drawing, and it is kept if it suits its family.

`plain`: every object stays in the view and at least 80 % visible. `full`: patterned tables, a robot arm, objects that
hide each other, leave and come back, and movements one after the other.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.recording import Trajectory
from virst_engine.sim.spec import (
    COLOURS,
    FAMILIES,
    MATERIALS,
    SHAPES,
    VIEW_ASPECT,
    ArmKey,
    ArmSpec,
    CameraSpec,
    Family,
    LightSpec,
    ObjectSpec,
    Push,
    SceneSpec,
    TableSpec,
    Vec3,
)

__all__ = ["SceneSpec", "generate_scene", "generate_scene_and_motion"]

ROUND_SHAPES = ("ball", "capsule", "egg")
MAX_HIDDEN_PLAIN = 0.18  # of an outline; the rendered fraction is held to 0.2
ATTEMPTS = 120

PLAIN_THEMES = {
    "mixed": 0.22,
    "same_shape": 0.26,
    "same_colour": 0.10,
    "one_round": 0.16,
    "one_flat": 0.13,
    "sizes": 0.13,
}
FULL_THEMES = {
    "order": 0.30,
    "count": 0.16,
    "leave": 0.16,
    "behind": 0.14,
    "arm": 0.14,
    "plural": 0.10,
}


def generate_scene(seed: int, family: Family, *, duration_s: float = 4.8) -> SceneSpec:
    """The scene of a seed: the same seed, family and duration give the same scene on every machine.

    Raises:
        SceneError: unknown family or a negative seed.
    """
    return generate_scene_and_motion(seed, family, duration_s=duration_s)[0]


def generate_scene_and_motion(
    seed: int, family: Family, *, fps: float = 10.0, duration_s: float = 4.8
) -> tuple[SceneSpec, Trajectory]:
    """`generate_scene` and the trajectory that `simulate` gives for it, which the choice needed anyway."""
    from virst_engine.sim.mujoco_world import simulate  # scenes can be read where mujoco is not installed

    if family not in FAMILIES:
        raise SceneError(f"unknown scene family {family!r}; use one of {', '.join(FAMILIES)}")
    if seed < 0:
        raise SceneError(f"scene seeds are >= 0, got {seed}; choose another seed")
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    for attempt in range(ATTEMPTS):
        most_objects = 7 - attempt // 15  # a crowded draft that keeps failing gets emptier
        spec = _Draft(rng, seed, family, max(2, most_objects), duration_s).scene()
        if spec is None:
            continue
        trajectory = simulate(spec, fps=fps, duration_s=duration_s)
        if _suits(spec, trajectory):
            return spec, trajectory
    raise SceneError(f"no valid {family} scene for seed {seed} in {ATTEMPTS} drafts; choose another seed")


def hidden_fractions(spec: SceneSpec, position: np.ndarray, quaternion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per object of one frame: how much of its outline nearer objects cover (at most), and whether it is all in view."""
    from virst_engine.sim.mujoco_world import outlines

    view = geometry.ViewGeometry(spec.camera)
    shapes = outlines(view, spec, position, quaternion)
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
    for position, quaternion in zip(trajectory.position_m, trajectory.quaternion_wxyz, strict=True):
        hidden, inside = hidden_fractions(spec, position, quaternion)
        if (hidden > MAX_HIDDEN_PLAIN).any() or not inside.all():
            return False
    return True


@dataclass
class _Path:
    """Where an object's centre is on the table over time, as scripted: corner points and their times."""

    times: list[float]
    points: list[np.ndarray]

    def at(self, time_s: float) -> np.ndarray:
        xy = np.stack(self.points)
        return np.array([np.interp(time_s, self.times, xy[:, 0]), np.interp(time_s, self.times, xy[:, 1])])


class _Draft:
    """One try at a scene; `scene()` is None where the objects do not find room."""

    def __init__(self, rng: np.random.Generator, seed: int, family: Family, most_objects: int, duration_s: float):
        self.rng, self.seed, self.family, self.duration_s = rng, seed, family, duration_s
        self.full = family == "full"
        self.theme = self._choose(FULL_THEMES if self.full else PLAIN_THEMES)
        low = 3 if self.theme in ("one_round", "one_flat", "order", "plural") else 2
        weights = np.array([0.08, 0.2, 0.26, 0.22, 0.14, 0.10])
        weights[: low - 2] = 0
        weights[max(low, most_objects) - 1 :] = 0
        self.count = int(rng.choice(np.arange(2, 8), p=weights / weights.sum()))
        self.camera = self._camera()
        self.view = geometry.ViewGeometry(self.camera)
        axes = self.camera.axes()
        self.right = axes[0, :2] / np.linalg.norm(axes[0, :2])
        self.away = axes[2, :2] / np.linalg.norm(axes[2, :2])
        self.objects: list[ObjectSpec] = []
        self.paths: list[_Path] = []

    def _choose(self, weights: dict[str, float]) -> str:
        p = np.array(list(weights.values()))
        return str(self.rng.choice(list(weights), p=p / p.sum()))

    def _uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def _camera(self) -> CameraSpec:
        elevation = math.radians(self._uniform(30, 38) if self.theme == "behind" else self._uniform(36, 60))
        azimuth = math.radians(self._uniform(-18, 18))
        fovy = self._uniform(38, 50)
        view_width = self._uniform(0.51, 0.60)
        distance = view_width / (2 * math.tan(math.radians(fovy) / 2) * VIEW_ASPECT)
        target = (self._uniform(-0.03, 0.03), self._uniform(-0.03, 0.03), 0.02)
        position = (
            target[0] + distance * math.cos(elevation) * math.sin(azimuth),
            target[1] - distance * math.cos(elevation) * math.cos(azimuth),
            target[2] + distance * math.sin(elevation),
        )
        return CameraSpec(position, target, fovy, self._uniform(-2.5, 2.5))

    def _light(self) -> LightSpec:
        angle, tilt = self._uniform(0, 2 * math.pi), self._uniform(0.2, 0.9)
        strength, warmth = self._uniform(0.45, 0.62), self._uniform(-0.05, 0.05)
        ambient = self._uniform(0.32, 0.44)
        direction = (math.cos(angle) * math.sin(tilt), math.sin(angle) * math.sin(tilt), -math.cos(tilt))
        return LightSpec(
            direction, (strength * (1 + warmth), strength, strength * (1 - warmth)), (ambient, ambient, ambient)
        )

    def _muted_rgb(self, low: float = 0.36, high: float = 0.74) -> Vec3:
        """Colours of tables and floors: little saturation, neither black nor white, so that no object drowns in them."""
        value, tint = self._uniform(low, high), self.rng.uniform(-0.06, 0.06, 3)
        if self.rng.random() < 0.45:  # wood
            tint = np.array([0.09, 0.01, -0.10]) * self._uniform(0.5, 1.0)
        r, g, b = np.clip(value + tint, 0, 1)
        return float(r), float(g), float(b)

    def _table(self) -> TableSpec:
        rgb = self._muted_rgb()
        change = self._uniform(0.06, 0.16) * (1 if rgb[0] < 0.55 else -1)
        rgb2 = (rgb[0] + change, rgb[1] + change, rgb[2] + change)
        pattern = "none"
        if self.full:
            pattern = str(
                self.rng.choice(["none", "checker", "stripes", "grain", "speckle"], p=[0.2, 0.2, 0.2, 0.2, 0.2])
            )
        elif self.rng.random() < 0.3:
            pattern = "speckle"
            rgb2 = (rgb[0] + change / 3, rgb[1] + change / 3, rgb[2] + change / 3)
        return TableSpec(
            rgb, rgb2, pattern, int(self.rng.integers(1 << 30)), self._uniform(0.34, 1.2), self._muted_rgb(0.2, 0.6)
        )

    def _looks(self) -> list[tuple[str, str, str]]:
        """Shape, colour and size of every object, after the theme."""
        rng, n = self.rng, self.count
        colour_pool = rng.permutation(list(COLOURS))[: int(rng.integers(2, 6))]
        shape_pool = rng.permutation(list(SHAPES))[: int(rng.integers(2, 6))]
        if self.theme == "same_colour":
            colour_pool = colour_pool[:2]
        if self.theme in ("same_shape", "plural"):
            shape_pool = shape_pool[:2]
            colour_pool = rng.permutation(list(COLOURS))[: max(3, len(colour_pool))]
        flat = ["box", "can", "plate"]
        looks = []
        for k in range(n):
            shape, colour = str(rng.choice(shape_pool)), str(rng.choice(colour_pool))
            if self.theme == "one_round":
                shape = str(rng.choice(ROUND_SHAPES if k == 0 else flat))
            elif self.theme == "one_flat":
                shape = str(rng.choice(flat if k == 0 else ROUND_SHAPES))
            elif self.theme == "sizes" and k < 2:
                shape = str(shape_pool[0])
            elif self.theme == "behind" and k == 0:
                shape = "box"
            elif self.theme in ("order", "count") and k == 1 and rng.random() < 0.5:
                shape = looks[0][0]
            size = "small" if rng.random() < 0.5 else "large"
            if self.theme == "sizes" and k < 2:
                size = ("small", "large")[k]
                colour = looks[0][1] if k == 1 and rng.random() < 0.6 else colour
            if self.theme == "behind" and k < 2:
                size = ("large", "small")[k]
            for _ in range(6):  # twins of shape, colour and size make scenes that few sentences fit
                if (shape, colour, size) not in looks or self.theme == "plural":
                    break
                colour = str(rng.choice(list(COLOURS)))
            looks.append((shape, colour, size))
        return looks

    def _dimensions(self, shape: str, size: str) -> tuple[Vec3, bool]:
        """half_m and whether the object lies."""
        d = self._uniform(0.070, 0.080) if size == "small" else self._uniform(0.106, 0.122)
        tall = self.rng.random() < 0.22 and not (self.theme == "behind" and len(self.objects) == 1)
        if self.theme == "behind" and shape == "box" and not self.objects:
            return (0.085, 0.032, 0.090), False
        if shape == "box":
            if tall:
                return (0.30 * d, 0.30 * d, 0.80 * d), False
            a, b, c = 0.46 * d * self.rng.uniform(0.85, 1.1, 3)
            return (float(a), float(b), float(c)), False
        if shape == "ball":
            return (d / 2, d / 2, d / 2), False
        if shape == "can":
            lying = self.rng.random() < 0.25
            if tall:
                return (0.31 * d, 0.31 * d, 0.85 * d), lying
            return (0.40 * d, 0.40 * d, 0.54 * d), lying
        if shape == "capsule":
            return (0.31 * d, 0.31 * d, 0.47 * d), True
        if shape == "egg":
            return (0.44 * d, 0.44 * d, 0.64 * d), True
        return (0.66 * d, 0.66 * d, 0.085 * d), False

    def _object(self, look: tuple[str, str, str]) -> ObjectSpec:
        shape, colour, size = look
        half, lying = self._dimensions(shape, size)
        rgb = np.clip(
            np.asarray(COLOURS[colour]) * self.rng.uniform(0.92, 1.0) + self.rng.uniform(-0.025, 0.025, 3), 0, 1
        )
        material = str(self.rng.choice(list(MATERIALS)))
        yaw = self._uniform(-math.pi, math.pi)
        r, g, b = (float(x) for x in rgb)
        return ObjectSpec(shape, colour, size, material, (r, g, b), half, (0.0, 0.0, 0.0), yaw, lying)

    def scene(self) -> SceneSpec | None:
        for look in self._looks():
            if not self._add(self._object(look)):
                return None
        arm = self._script()
        return SceneSpec(
            self.seed, self.family, tuple(self.objects), self.camera, self._light(), self._table(), arm, self.theme
        )

    def _outline(self, thing: ObjectSpec, xy: np.ndarray, lift_m: float = 0.0) -> Float[np.ndarray, "k 2"]:
        from virst_engine.sim.mujoco_world import initial_quaternion

        rotation = geometry.rotation_of(initial_quaternion(thing))
        at = np.array([xy[0], xy[1], rest_height_m(thing) + lift_m])
        return self.view.silhouette(thing.shape, thing.half_m, at, rotation)

    def _add(self, thing: ObjectSpec) -> bool:
        for _ in range(40):
            u, v = self._uniform(0.08, 0.92), self._uniform(0.14, 0.92)
            xy = self.view.on_plane(u, v, rest_height_m(thing))[:2]
            if self.theme == "behind":
                xy = self._place_for_hiding(len(self.objects), xy)
            if self._has_room(len(self.objects), thing, [xy], [0.0]):
                self.objects.append(replace(thing, position_m=(float(xy[0]), float(xy[1]), rest_height_m(thing))))
                self.paths.append(_Path([0.0], [xy]))
                return True
        return False

    def _place_for_hiding(self, k: int, xy: np.ndarray) -> np.ndarray:
        if k == 0:  # the box that others pass behind stands across the view, near its middle
            return -0.04 * self.away + self._uniform(-0.06, 0.06) * self.right
        if k == 1:
            side = 1 if self.rng.random() < 0.5 else -1
            front = self.paths[0].points[0]
            return front + 0.092 * self.away + side * self._uniform(0.13, 0.19) * self.right
        return xy

    def _has_room(
        self, k: int, thing: ObjectSpec, points: list[np.ndarray], times: list[float], margin: float = 0.012
    ) -> bool:
        """Whether an object at these places and times is in the view, touches nothing and hides little or nothing."""
        allowed = 0.45 if self.full else 0.06
        for xy, time_s in zip(points, times, strict=True):
            outline = self._outline(thing, xy)
            if not geometry.is_inside_view(outline, margin):
                return False
            if xy[1] > 0.30:  # the table may end behind this
                return False
            own = geometry.area(outline)
            for j, other in enumerate(self.objects):
                if j == k:
                    continue
                there = self.paths[j].at(time_s)
                if np.linalg.norm(xy - there) < footprint_m(thing) + footprint_m(other) + 0.012:
                    return False
                theirs = self._outline(other, there)
                if geometry.overlap(outline, theirs) > allowed * min(own, geometry.area(theirs)):
                    return False
        return True

    def _direction(self) -> np.ndarray:
        """Mostly one of the four that sentences speak of, as the camera sees them."""
        choices = [self.right, -self.right, self.right, -self.right, self.away, -self.away]
        base = choices[int(self.rng.integers(6))]
        if self.rng.random() < 0.15:
            angle = self._uniform(0, 2 * math.pi)
        else:
            angle = math.radians(self._uniform(-14, 14))
        c, s = math.cos(angle), math.sin(angle)
        return np.array([c * base[0] - s * base[1], s * base[0] + c * base[1]])

    def _try_push(
        self, k: int, start_s: float, seconds: float, distance: float, direction: np.ndarray | None = None
    ) -> bool:
        """Script one more push if the way is free; its path is remembered for what is scripted next."""
        path, thing = self.paths[k], self.objects[k]
        if is_tall(thing):  # friction at its foot would tip it
            return False
        for _ in range(8 if direction is None else 1):
            d = self._direction() if direction is None else direction
            begin = path.points[-1]
            end = begin + d * distance
            turned = thing
            if not thing.pushes and (thing.lying or thing.shape == "box"):
                yaw = math.atan2(d[1], d[0]) + (math.pi / 2 if thing.lying else 0.0)
                turned = replace(thing, yaw_rad=yaw)
            times = [start_s + seconds * u for u in (0.0, 0.25, 0.5, 0.75, 1.0)] + [self.duration_s]
            points = [begin + (end - begin) * u for u in (0.0, 0.25, 0.5, 0.75, 1.0)] + [end]
            if not self._has_room(k, turned, [begin, *points], [0.0, *times]):
                continue
            speed = distance / max(seconds - 0.06, 0.1)  # the servo's ramp costs half of RAMP_S
            push = Push(start_s, start_s + seconds, (float(d[0] * speed), float(d[1] * speed)))
            self.objects[k] = replace(turned, pushes=(*turned.pushes, push))
            path.times += [start_s, start_s + seconds]
            path.points += [begin, end]
            return True
        return False

    def _try_drop(self, k: int, at_s: float) -> bool:
        thing, path = self.objects[k], self.paths[k]
        if thing.pushes or thing.shape in ("egg", "capsule"):
            return False
        lift = self._uniform(0.10, 0.17)
        outline = self._outline(thing, path.points[0], lift)
        if not geometry.is_inside_view(outline, 0.01):
            return False
        for j, other in enumerate(self.objects):
            if j != k and geometry.overlap(outline, self._outline(other, self.paths[j].points[0])) > 0:
                return False
        x, y, z = thing.position_m
        self.objects[k] = replace(thing, position_m=(x, y, z + lift), drop_at_s=at_s)
        return True

    def _script(self) -> ArmSpec | None:
        if not self.full:
            self._script_plain()
            return None
        arm = None
        order = [int(k) for k in self.rng.permutation(self.count)]
        if self.theme == "order":
            self._script_one_after_the_other(order[: int(self.rng.integers(2, 4))])
        elif self.theme == "count":
            self._script_repeats(order)
        elif self.theme == "leave":
            self._script_leave(order)
        elif self.theme == "behind":
            self._script_behind()
        else:
            self._script_plain()
        if self.theme == "arm" or self.rng.random() < 0.12:
            arm = self._arm(order[0])
        return arm

    def _script_plain(self) -> None:
        rng = self.rng
        movers = int(rng.choice([0, 1, 2, 3], p=[0.12, 0.40, 0.32, 0.16]))
        for k in [int(k) for k in rng.permutation(self.count)][: min(movers, self.count)]:
            if rng.random() < 0.14 and self._try_drop(k, self._uniform(0.6, self.duration_s - 1.2)):
                continue
            seconds = self._uniform(1.6, 4.4)
            start = self._uniform(0.0, max(0.1, min(2.2, self.duration_s - seconds)))
            for shrink in (1.0, 0.85, 0.7, 0.5):
                distance = min(0.36, seconds * self._uniform(0.065, 0.13)) * shrink
                if distance >= 0.10 and distance / seconds >= 0.042 and self._try_push(k, start, seconds, distance):
                    begin, end = self.paths[k].points[-2:]
                    back = start + seconds + self._uniform(0.3, 0.8)
                    if back + seconds < self.duration_s and rng.random() < 0.6:
                        back_way = (begin - end) / np.linalg.norm(begin - end)
                        self._try_push(k, back, seconds, float(np.linalg.norm(begin - end)), back_way)
                    break

    def _short_push(self, k: int, start_s: float) -> float:
        """A push that is over soon; returns when, or `start_s` again if there was no room."""
        seconds = self._uniform(0.45, 0.65)
        for distance in (self._uniform(0.07, 0.12), 0.07, 0.06):
            if self._try_push(k, start_s, seconds, distance):
                return start_s + seconds
        return start_s

    def _script_one_after_the_other(self, movers: list[int]) -> None:
        now, turn = self._uniform(0.2, 0.7), 0
        while now < self.duration_s - 0.9 and turn < 12:
            ended = self._short_push(movers[turn % len(movers)], now)
            turn += 1
            if ended > now:
                now = ended + self._uniform(0.40, 0.6)

    def _script_repeats(self, order: list[int]) -> None:
        """One object moves in short pushes again and again, another once or not at all."""
        now = self._uniform(0.2, 0.8)
        while now < self.duration_s - 0.8:
            ended = self._short_push(order[0], now)
            now = max(ended, now) + self._uniform(0.40, 0.6)
        if len(order) > 1:
            self._short_push(order[1], self._uniform(1.0, self.duration_s - 1.2))

    def _script_leave(self, order: list[int]) -> None:
        """The object nearest to a side of the view goes out there, stays away for a second or more and comes back."""
        u = [float(self.view.project(np.asarray(o.position_m))[0]) for o in self.objects]
        low = [k for k in order if not is_tall(self.objects[k])]
        if not low:
            return
        k = max(low, key=lambda k: abs(u[k] - 0.5))
        side = 1.0 if u[k] > 0.5 else -1.0
        thing, begin = self.objects[k], self.paths[k].points[-1]
        depth = float(self.view.depth_m(np.asarray(thing.position_m)))
        to_edge = (0.5 - abs(u[k] - 0.5)) / self.view.scale[0] * depth
        distance = to_edge * 1.12 + footprint_m(thing) + 0.05
        d = self.right * side
        start, seconds = self._uniform(0.3, 1.2), self._uniform(0.7, 1.1)
        away = self._uniform(1.0, 1.4)
        speed = distance / (seconds - 0.06)
        back = start + seconds + away
        yaw = math.atan2(d[1], d[0]) + (math.pi / 2 if thing.lying else 0.0)
        pushes = (
            Push(start, start + seconds, (float(d[0] * speed), float(d[1] * speed))),
            Push(back, back + seconds, (float(-d[0] * speed), float(-d[1] * speed))),
        )
        turned = replace(thing, pushes=pushes)
        if thing.lying or thing.shape == "box":
            turned = replace(turned, yaw_rad=yaw)
        self.objects[k] = turned
        end = begin + d * distance
        self.paths[k] = _Path([0, start, start + seconds, back, back + seconds], [begin, begin, end, end, begin])
        other = [j for j in order if j != k]
        if other and self.rng.random() < 0.5:
            self._short_push(other[0], self._uniform(0.5, 3.0))

    def _script_behind(self) -> None:
        """The second object passes, or waits, behind the first."""
        front, begin = self.paths[0].points[0], self.paths[1].points[0]
        offset = float((begin - front) @ self.right)
        towards = -self.right * np.sign(offset)
        # straight behind as the camera sees it
        eye = np.asarray(self.camera.position_m)[:2]
        line = (front - eye) / np.linalg.norm(front - eye)
        middle = front + line * (float((begin - front) @ self.away) / float(line @ self.away))
        first = float((middle - begin) @ towards)
        start, seconds = self._uniform(0.3, 0.9), self._uniform(0.7, 1.0)
        if self.theme == "behind" and first > 0.05:
            speed = first / (seconds - 0.06)
            velocity = (float(towards[0] * speed), float(towards[1] * speed))
            wait = self._uniform(0.9, 1.4)
            again = start + seconds + wait
            sign = 1.0 if self.rng.random() < 0.6 else -1.0
            pushes = (
                Push(start, start + seconds, velocity),
                Push(again, again + seconds, (velocity[0] * sign, velocity[1] * sign)),
            )
            thing = self.objects[1]
            yaw = math.atan2(towards[1], towards[0]) + (math.pi / 2 if thing.lying else 0.0)
            if not (thing.lying or thing.shape == "box"):
                yaw = thing.yaw_rad
            self.objects[1] = replace(thing, pushes=pushes, yaw_rad=yaw)
            end = middle + towards * first * sign
            self.paths[1] = _Path(
                [0, start, start + seconds, again, again + seconds], [begin, begin, middle, middle, end]
            )

    def _arm(self, target: int) -> ArmSpec:
        """An arm from the side whose hand stays between the camera and an object for a second or more."""
        rng = self.rng
        thing = self.objects[target]
        eye = np.asarray(self.camera.position_m)
        side = 1.0 if rng.random() < 0.5 else -1.0
        base = np.array([*(self.right * side * 0.52 - self.away * 0.02), 0.30])
        share = self._uniform(0.30, 0.42)
        radius = max(0.034, thing.radius_m * (1 - share) * 0.98)

        def before(time_s: float) -> np.ndarray:
            at = np.array([*self.paths[target].at(time_s), rest_height_m(thing)])
            return at + (eye - at) * share

        rest = np.array([*(self.right * side * 0.45 + self.away * 0.02), 0.28])
        start = self._uniform(0.5, 1.4)
        arrive, stay = start + self._uniform(0.5, 0.8), self._uniform(1.1, 1.7)
        leave = arrive + stay
        moments = [(0.0, rest), (start, rest), (arrive, before(arrive))]
        moments += [(arrive + stay * u, before(arrive + stay * u)) for u in (0.25, 0.5, 0.75)]
        moments += [(leave, before(leave)), (leave + 0.7, rest)]
        reach = max(float(np.linalg.norm(p - base)) for _, p in moments)
        shade = self._uniform(0.25, 0.6)
        keys = tuple(ArmKey(float(t), (float(p[0]), float(p[1]), float(p[2]))) for t, p in moments)
        return ArmSpec(
            (float(base[0]), float(base[1]), float(base[2])),
            reach * 0.53,
            self._uniform(0.018, 0.024),
            radius,
            (shade, shade, shade * 1.05),
            keys,
        )


def rest_height_m(thing: ObjectSpec) -> float:
    """Height of the centre of an object that stands or lies on the table."""
    return thing.half_m[0] if thing.lying or thing.shape == "ball" else thing.half_m[2]


def is_tall(thing: ObjectSpec) -> bool:
    return thing.shape in ("box", "can") and not thing.lying and thing.half_m[2] > 1.6 * min(thing.half_m[:2])


def footprint_m(thing: ObjectSpec) -> float:
    """Radius of the circle on the table that holds the object."""
    a, b, c = thing.half_m
    if thing.lying:
        return c + a if thing.shape == "capsule" else math.hypot(a, c) if thing.shape == "can" else c
    return math.hypot(a, b) if thing.shape == "box" else a
