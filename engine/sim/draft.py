# SPDX-License-Identifier: Apache-2.0
"""One try at a scene: what stands where, and who moves when, so that things have room and stay visible."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from virst_engine.sim import geometry
from virst_engine.sim.spec import (
    COLOURS,
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

ROUND_SHAPES = ("ball", "capsule", "egg")
FLAT_SHAPES = ("box", "can", "plate")
CHECK_EVERY_S = 0.25
GAP_M = 0.012
DEEPEST_M = 0.30  # the table may end behind this
RAMP_LOSS_S = 0.06  # half of the servo's ramp: a push of t seconds goes (t - this) x speed

PLAIN_THEMES = {
    "mixed": 0.22,
    "same_shape": 0.26,
    "same_colour": 0.10,
    "one_round": 0.16,
    "one_flat": 0.13,
    "sizes": 0.13,
}
FULL_THEMES = {
    "order": 0.28,
    "count": 0.16,
    "leave": 0.14,
    "behind": 0.12,
    "arm": 0.10,
    "plural": 0.08,
    "motion": 0.12,
}


@dataclass
class _Actor:
    """An object with its place over time, as scripted; `xy` and `outlines` are sampled every CHECK_EVERY_S."""

    thing: ObjectSpec
    times: list[float]
    points: list[np.ndarray]
    lift_m: float = 0.0  # until it drops
    xy: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    outlines: list[np.ndarray] = field(default_factory=list)

    def at(self, time_s: float) -> Float[np.ndarray, " 2"]:
        xy = np.stack(self.points)
        return np.array([np.interp(time_s, self.times, xy[:, 0]), np.interp(time_s, self.times, xy[:, 1])])


class SceneDraft:
    """One try at a scene; `scene()` is None where the objects do not find room."""

    def __init__(self, rng: np.random.Generator, seed: int, family: Family, most_objects: int, duration_s: float):
        self.rng, self.seed, self.family, self.duration_s = rng, seed, family, duration_s
        self.full = family == "full"
        self.theme = self._choose(FULL_THEMES if self.full else PLAIN_THEMES)
        low = 3 if self.theme in ("one_round", "one_flat", "order", "plural", "same_shape") else 2
        weights = np.array([0.08, 0.2, 0.26, 0.22, 0.14, 0.10])
        weights[: low - 2] = 0
        weights[max(low, most_objects) - 1 :] = 0
        self.count = int(rng.choice(np.arange(2, 8), p=weights / weights.sum()))
        self.camera = self._camera()
        self.view = geometry.ViewGeometry(self.camera)
        axes = self.camera.axes()
        self.right = axes[0, :2] / np.linalg.norm(axes[0, :2])
        self.away = axes[2, :2] / np.linalg.norm(axes[2, :2])
        self.moments = np.arange(0.0, duration_s + 1e-9, CHECK_EVERY_S)
        self.actors: list[_Actor] = []

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
        strength, warmth = self._uniform(0.40, 0.55), self._uniform(-0.05, 0.05)
        ambient = self._uniform(0.38, 0.50)
        direction = (math.cos(angle) * math.sin(tilt), math.sin(angle) * math.sin(tilt), -math.cos(tilt))
        return LightSpec(
            direction, (strength * (1 + warmth), strength, strength * (1 - warmth)), (ambient, ambient, ambient)
        )

    def _muted_rgb(self, low: float = 0.36, high: float = 0.74) -> Vec3:
        """For tables and floors: little saturation, neither black nor white, so that no object drowns in it."""
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
        looks: list[tuple[str, str, str]] = []
        for k in range(n):
            shape, colour = str(rng.choice(shape_pool)), str(rng.choice(colour_pool))
            if self.theme == "one_round":
                shape = str(rng.choice(ROUND_SHAPES if k == 0 else FLAT_SHAPES))
            elif self.theme == "one_flat":
                shape = str(rng.choice(FLAT_SHAPES if k == 0 else ROUND_SHAPES))
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
        if self.theme == "behind":
            return looks
        return [looks[int(k)] for k in rng.permutation(n)]

    def _dimensions(self, shape: str, size: str, moves: bool) -> tuple[Vec3, bool]:
        """half_m and whether the object lies."""
        d = self._uniform(0.075, 0.085) if size == "small" else self._uniform(0.112, 0.126)
        tall = self.rng.random() < 0.22 and not moves  # friction at its foot would tip it
        if self.theme == "behind" and shape == "box" and not self.actors:
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
        return (0.68 * d, 0.68 * d, 0.10 * d), False

    def _object(self, look: tuple[str, str, str], *, moves: bool) -> ObjectSpec:
        shape, colour, size = look
        half, lying = self._dimensions(shape, size, moves)
        rgb = np.asarray(COLOURS[colour]) * self.rng.uniform(0.92, 1.0) + self.rng.uniform(-0.025, 0.025, 3)
        r, g, b = (float(x) for x in np.clip(rgb, 0, 1))
        material = str(self.rng.choice(list(MATERIALS)))
        yaw = self._uniform(-math.pi, math.pi)
        return ObjectSpec(shape, colour, size, material, (r, g, b), half, (0.0, 0.0, 0.0), yaw, lying)

    def scene(self) -> SceneSpec | None:
        looks = self._looks()
        placed = getattr(self, f"_stage_{self.theme}", self._stage_plain)(looks)
        for look in looks[placed:]:
            if not self._add(self._object(look, moves=False)):
                return None
        arm = None
        if self.theme == "arm" or (self.full and self.rng.random() < 0.12):
            arm = self._arm(int(self.rng.integers(len(self.actors))))
        objects = tuple(actor.thing for actor in self.actors)
        return SceneSpec(self.seed, self.family, objects, self.camera, self._light(), self._table(), arm, self.theme)

    # room

    def _outline(self, thing: ObjectSpec, xy: np.ndarray, lift_m: float = 0.0) -> Float[np.ndarray, "k 2"]:
        at = np.array([xy[0], xy[1], rest_height_m(thing) + lift_m])
        return self.view.silhouette(
            thing.shape, thing.half_m, at, geometry.rotation_of(geometry.initial_quaternion(thing))
        )

    def _sampled(self, actor: _Actor) -> _Actor:
        """The actor with its places and outlines at the moments that are checked."""
        corners = np.stack(actor.points)
        actor.xy = np.stack([np.interp(self.moments, actor.times, corners[:, i]) for i in (0, 1)], axis=1)
        actor.outlines = []
        drop_at = actor.thing.drop_at_s or 0.0
        for g, time_s in enumerate(self.moments):
            hangs = actor.lift_m > 0 and time_s < drop_at + 0.3
            if (
                g
                and (actor.xy[g] == actor.xy[g - 1]).all()
                and hangs == (actor.lift_m > 0 and time_s - CHECK_EVERY_S < drop_at + 0.3)
            ):
                actor.outlines.append(actor.outlines[-1])
            else:
                actor.outlines.append(self._outline(actor.thing, actor.xy[g], actor.lift_m if hangs else 0.0))
        if actor.lift_m > 0:  # it passes through every height on its way down
            actor.outlines[-1] = self._outline(actor.thing, actor.xy[-1])
        return actor

    def _fits(
        self, actor: _Actor, *, instead_of: int | None = None, may_leave: bool = False, behind: int | None = None
    ) -> bool:
        """Whether a sampled actor stays in the view, touches nothing and hides little or nothing.

        Args:
            instead_of: the actor that it would replace.
            behind: an actor that may hide it and stands clear of its way.
        """
        allowed = 0.45 if self.full else 0.06
        if (actor.xy[:, 1] > DEEPEST_M).any():
            return False
        others = [j for j in range(len(self.actors)) if j != instead_of]
        for j in others:
            if j == behind:
                continue
            room = footprint_m(actor.thing) + footprint_m(self.actors[j].thing) + GAP_M
            if (((actor.xy - self.actors[j].xy) ** 2).sum(axis=1) < room * room).any():
                return False
        checked: set[int] = set()
        for outline in actor.outlines:
            if id(outline) not in checked and not may_leave and not geometry.is_inside_view(outline, 0.012):
                return False
            checked.add(id(outline))
        for j in others:
            if j == behind:
                continue
            before: tuple[int, int] = (0, 0)
            for mine, theirs in zip(actor.outlines, self.actors[j].outlines, strict=True):
                pair = (id(mine), id(theirs))
                if pair == before:
                    continue
                before = pair
                shared = geometry.overlap(mine, theirs)
                if shared > 0 and shared > allowed * min(geometry.area(mine), geometry.area(theirs)):
                    return False
        return True

    def _somewhere(self, thing: ObjectSpec, low_v: float = 0.14, high_v: float = 0.92) -> np.ndarray:
        """A place on the table, evenly over the image."""
        return self.view.on_plane(self._uniform(0.08, 0.92), self._uniform(low_v, high_v), rest_height_m(thing))[:2]

    def _placed(self, thing: ObjectSpec, xy: np.ndarray) -> _Actor:
        thing = replace(thing, position_m=(float(xy[0]), float(xy[1]), rest_height_m(thing)))
        return self._sampled(_Actor(thing, [0.0], [xy]))

    def _add(self, thing: ObjectSpec, tries: int = 40) -> bool:
        for _ in range(tries):
            actor = self._placed(thing, self._somewhere(thing))
            if self._fits(actor):
                self.actors.append(actor)
                return True
        return False

    # movements

    def _directions(self) -> list[np.ndarray]:
        """To the right, left, away and toward the camera in random order, each a little off; now and then any."""
        axes = [self.right, -self.right, self.away, -self.away]
        result = []
        # there is seldom room toward the camera, so it is tried first more often
        for i in self.rng.choice(4, size=4, replace=False, p=[0.27, 0.27, 0.12, 0.34]):
            angle = math.radians(self._uniform(-14, 14))
            if self.rng.random() < 0.12:
                angle = self._uniform(0, 2 * math.pi)
            c, s = math.cos(angle), math.sin(angle)
            x, y = axes[int(i)]
            result.append(np.array([c * x - s * y, s * x + c * y]))
        return result

    def _pushed(self, actor: _Actor, start_s: float, seconds: float, distance: float, direction: np.ndarray) -> _Actor:
        """The actor with one more push at the end of its script."""
        thing = actor.thing
        if not thing.pushes and (thing.lying or thing.shape == "box"):
            # across its axis, so that it rolls; a box slides with a face ahead
            thing = replace(
                thing, yaw_rad=math.atan2(direction[1], direction[0]) + (math.pi / 2 if thing.lying else 0.0)
            )
        begin = actor.points[-1]
        end = begin + direction * distance
        speed = distance / (seconds - RAMP_LOSS_S)
        push = Push(start_s, start_s + seconds, (float(direction[0] * speed), float(direction[1] * speed)))
        thing = replace(thing, pushes=(*thing.pushes, push))
        moved = _Actor(thing, [*actor.times, start_s, start_s + seconds], [*actor.points, begin, end], actor.lift_m)
        return self._sampled(moved)

    def _try_push(
        self, k: int, start_s: float, seconds: float, distance: float, directions: Sequence[np.ndarray]
    ) -> bool:
        """Push object k in the first direction that has room."""
        for direction in directions:
            moved = self._pushed(self.actors[k], start_s, seconds, distance, direction)
            if self._fits(moved, instead_of=k):
                self.actors[k] = moved
                return True
        return False

    def _short_push(self, k: int, start_s: float) -> float:
        """A push that is over soon; returns when, or `start_s` again if there was no room."""
        seconds = self._uniform(0.45, 0.65)
        for distance in (self._uniform(0.075, 0.12), 0.07):
            if self._try_push(k, start_s, seconds, distance, self._directions()):
                return start_s + seconds
        return start_s

    def _add_mover(self, look: tuple[str, str, str]) -> bool:
        """An object that is pushed for long, perhaps back again, or that drops; still if there is no room for that."""
        thing = self._object(look, moves=True)
        if self.rng.random() < 0.22 and thing.shape not in ("egg", "capsule") and self._add_dropping(thing):
            return True
        seconds = self._uniform(1.8, 4.2)
        start = self._uniform(0.0, max(0.1, min(2.0, self.duration_s - seconds)))
        wanted = min(0.36, seconds * self._uniform(0.065, 0.13))
        for attempt in range(24):
            actor = self._placed(thing, self._somewhere(thing))
            if not self._fits(actor):
                continue
            distance = max(0.10, wanted * (1.0 - attempt / 40), seconds * 0.045)
            for direction in self._directions():
                moved = self._pushed(actor, start, seconds, distance, direction)
                if not self._fits(moved):
                    continue
                again = start + seconds + self._uniform(0.25, 0.6)
                if again + seconds * 0.6 < self.duration_s and self.rng.random() < 0.7:
                    back = self._pushed(moved, again, seconds, distance, -direction)
                    moved = back if self._fits(back) else moved
                self.actors.append(moved)
                return True
        return self._add(thing)

    def _add_dropping(self, thing: ObjectSpec) -> bool:
        lift, at_s = self._uniform(0.10, 0.16), self._uniform(0.8, self.duration_s - 0.9)
        for _ in range(12):
            xy = self._somewhere(thing, low_v=0.4)
            hanging = replace(
                thing, position_m=(float(xy[0]), float(xy[1]), rest_height_m(thing) + lift), drop_at_s=at_s
            )
            actor = self._sampled(_Actor(hanging, [0.0], [xy], lift))
            if self._fits(actor):
                self.actors.append(actor)
                return True
        return False

    # themes: each places and scripts the first objects and returns how many

    def _stage_plain(self, looks: list[tuple[str, str, str]]) -> int:
        movers = min(int(self.rng.choice([0, 1, 2, 3], p=[0.10, 0.38, 0.34, 0.18])), len(looks))
        for k in range(movers):
            if not self._add_mover(looks[k]):
                return k
        return movers

    def _stage_order(self, looks: list[tuple[str, str, str]]) -> int:
        """Two or three take turns: one moves and stops, then the next; a rest, and again."""
        movers = 2 + int(self.rng.random() < 0.35 and len(looks) > 2)
        for k in range(movers):
            if not self._add(self._object(looks[k], moves=True)):
                return k
        now = self._uniform(0.2, 0.8)
        while now < self.duration_s - 1.2:
            for k in self.rng.permutation(movers):
                if now < self.duration_s - 0.5:
                    ended = self._short_push(int(k), now)
                    now = ended + (self._uniform(0.30, 0.5) if ended > now else 0.1)
            now += self._uniform(0.5, 0.9)
        return movers

    def _stage_count(self, looks: list[tuple[str, str, str]]) -> int:
        """One object moves twice in a row, another once; a rest, and again."""
        movers = min(2, len(looks))
        for k in range(movers):
            if not self._add(self._object(looks[k], moves=True)):
                return k
        now = self._uniform(0.3, 0.8)
        while now < self.duration_s - 1.0:
            twice, once = (int(k) for k in self.rng.permutation(movers))
            first = self._short_push(twice, now)
            second = self._short_push(twice, max(first, now) + self._uniform(0.38, 0.5))
            if self.rng.random() < 0.7:
                self._short_push(once, now + self._uniform(0.0, 0.6))
            now = max(first, second, now) + self._uniform(0.9, 1.3)
        return movers

    def _stage_leave(self, looks: list[tuple[str, str, str]]) -> int:
        """The first object goes out at a side of the view, stays away for a second or more and comes back."""
        for _ in range(20):
            thing = self._object(looks[0], moves=True)
            side = 1.0 if self.rng.random() < 0.5 else -1.0
            u, v = 0.5 + side * self._uniform(0.12, 0.36), self._uniform(0.2, 0.85)
            begin = self.view.on_plane(u, v, rest_height_m(thing))[:2]
            actor = self._placed(thing, begin)
            if not self._fits(actor):
                continue
            depth = float(self.view.depth_m(np.array([*begin, rest_height_m(thing)])))
            to_edge = (0.5 - abs(u - 0.5)) / self.view.scale[0] * depth
            distance = to_edge * 1.08 + footprint_m(thing) + 0.02
            seconds = max(0.7, distance / self._uniform(0.22, 0.34))
            start = self._uniform(0.3, 1.0)
            out = self._pushed(actor, start, seconds, distance, self.right * side)
            back = self._pushed(out, start + seconds + self._uniform(1.0, 1.3), seconds, distance, -self.right * side)
            self.actors.append(back)
            break
        else:
            return 0
        if len(looks) > 1 and self.rng.random() < 0.6:
            return 1 + int(self._add_mover(looks[1]))
        return 1

    def _stage_behind(self, looks: list[tuple[str, str, str]]) -> int:
        """The second object goes behind the first, waits there for a second and goes on, or back."""
        box = self._object(looks[0], moves=False)
        front = -0.04 * self.away + self._uniform(-0.06, 0.06) * self.right
        self.actors.append(self._placed(replace(box, yaw_rad=math.atan2(self.right[1], self.right[0])), front))
        thing = self._object(looks[1], moves=True)
        eye = np.asarray(self.camera.position_m)[:2]
        line = (front - eye) / np.linalg.norm(front - eye)
        back_m = 0.034 + footprint_m(thing) + 0.012
        hidden = front + line * (back_m / float(line @ self.away))  # straight behind as the camera sees it
        for _ in range(20):
            side = 1.0 if self.rng.random() < 0.5 else -1.0
            way = self._uniform(0.15, 0.20)
            towards = -self.right * side
            actor = self._placed(thing, hidden - towards * way)
            start, seconds = self._uniform(0.3, 0.9), self._uniform(0.7, 1.0)
            there = self._pushed(actor, start, seconds, way, towards)
            again = start + seconds + self._uniform(1.0, 1.4)
            onward = towards if self.rng.random() < 0.6 else -towards
            passed = self._pushed(there, again, seconds, way, onward)
            if self._fits(passed, behind=0):
                self.actors.append(passed)
                return 2
        return 1

    def _arm(self, target: int) -> ArmSpec:
        """An arm from the side whose hand stays between the camera and an object for a second or more."""
        rng = self.rng
        thing = self.actors[target].thing
        eye = np.asarray(self.camera.position_m)
        side = 1.0 if rng.random() < 0.5 else -1.0
        base = np.array([*(self.right * side * 0.52 - self.away * 0.02), 0.30])
        share = self._uniform(0.30, 0.42)
        radius = max(0.034, thing.radius_m * (1 - share) * 0.98)

        def before(time_s: float) -> np.ndarray:
            at = np.array([*self.actors[target].at(time_s), rest_height_m(thing)])
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
    """Whether a push would tip it: friction holds it at its foot."""
    return thing.shape in ("box", "can") and not thing.lying and thing.half_m[2] > 1.6 * min(thing.half_m[:2])


def footprint_m(thing: ObjectSpec) -> float:
    """Radius of the circle on the table that holds the object."""
    a, b, c = thing.half_m
    if thing.lying:
        return c + a if thing.shape == "capsule" else math.hypot(a, c) if thing.shape == "can" else c
    return math.hypot(a, b) if thing.shape == "box" else a
