# SPDX-License-Identifier: Apache-2.0
"""Scenes of minutes: things take turns, move twice, leave the view and come back, from the first second to the last.

A script that is written beforehand comes apart after some pushes, because nothing stops quite where it was meant to. So
a long scene is played once, each push is chosen for where things are then, and the pushes that were made become the
script of the scene: its specification alone gives the recording again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.draft import DEEPEST_M, GAP_M, RAMP_LOSS_S, SceneDraft, footprint_m, is_tall, rest_height_m
from virst_engine.sim.mujoco_world import Simulator
from virst_engine.sim.spec import ObjectSpec, Push, SceneSpec, Vec2

LONG_THEME = "long"
ATTEMPTS = 60
TICK_S = 0.05  # how often the play may go on
MOST_OBJECTS, LEAST_MOVING = 5, 3
DRAFT_S = 4.8  # of the draft, whose movements are not used
MARGIN = 0.13  # of the view, within which things come to rest
FORESHORTENED = 1.3  # a way into the depth must be so much longer to be seen as clearly
SHARED = 0.10  # of an outline that two things may share
TURNS = {"order": 0.40, "count": 0.34, "leave": 0.26}
LEAVES_EVERY_S, QUIET_S = 30.0, 6.0  # a scene in which fewer things leave, or nothing happens for so long, is not used


@dataclass(frozen=True)
class Happening:
    """What an object was made to do. kind: "move", a push within the view; "leave" and "return", over its border."""

    kind: str
    object_id: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class LongScene:
    spec: SceneSpec
    happenings: tuple[Happening, ...]  # in order of time


def generate_long_scene(seed: int, *, duration_s: float) -> LongScene:
    """The long scene of a seed, of family `full`: the same seed and duration give the same one.

    Raises:
        SceneError: a negative seed, or no table on which enough goes on.
    """
    if seed < 0:
        raise SceneError(f"scene seeds are >= 0, got {seed}; choose another seed")
    rng = np.random.default_rng([seed, 1, 1])  # [seed, 1] draws the short scene of this family
    for _ in range(ATTEMPTS):
        table = _table(rng, seed)
        if table is None:
            continue
        played = _play(table, rng, duration_s)
        if played is not None and _goes_on(played.happenings, duration_s):
            return played
    raise SceneError(f"no long scene for seed {seed} in {ATTEMPTS} drafts; choose another seed")


def _table(rng: np.random.Generator, seed: int) -> SceneSpec | None:
    """Things at rest that can all be seen, most of which can be pushed; None where a draft has too few."""
    spec = SceneDraft(rng, seed, "full", MOST_OBJECTS, DRAFT_S).scene()
    if spec is None:
        return None
    right = spec.camera.axes()[0, :2]
    across = math.atan2(right[1], right[0]) + math.pi / 2  # what lies rolls to the sides
    objects = tuple(_at_rest(thing, across if thing.lying else thing.yaw_rad) for thing in spec.objects)
    if sum(not is_tall(thing) for thing in objects) < LEAST_MOVING:
        return None
    spec = replace(spec, objects=objects, arm=None, theme=LONG_THEME)
    view = geometry.ViewGeometry(spec.camera)
    outlines = [_outline(view, thing, np.asarray(thing.position_m)) for thing in objects]
    pairs = [(a, b) for k, a in enumerate(outlines) for b in outlines[:k]]
    if any(_share(a, b) > SHARED for a, b in pairs) or not all(geometry.is_inside_view(o, 0.02) for o in outlines):
        return None
    return spec


def _at_rest(thing: ObjectSpec, yaw_rad: float) -> ObjectSpec:
    x, y, _ = thing.position_m
    return replace(thing, position_m=(x, y, rest_height_m(thing)), pushes=(), drop_at_s=None, yaw_rad=yaw_rad)


def _play(spec: SceneSpec, rng: np.random.Generator, duration_s: float) -> LongScene | None:
    """Let things happen until the time is over; None where something got out of hand."""
    with Simulator(spec) as simulator:
        director = _Director(spec, rng, simulator)
        turns = director.turns()
        go_on_s = next(turns)
        for tick in range(1, math.ceil(duration_s / TICK_S) + 1):
            if simulator.time_s >= go_on_s:
                go_on_s = next(turns)
            simulator.step_to(min(tick * TICK_S, duration_s))
            at = simulator.positions_m()
            if not np.isfinite(at).all() or (at[:, 2] < -0.01).any() or np.abs(at).max() > 1.5:
                return None
    objects = tuple(
        replace(thing, pushes=tuple(pushes)) for thing, pushes in zip(spec.objects, director.script, strict=True)
    )
    return LongScene(replace(spec, objects=objects), tuple(director.happenings))


def _goes_on(happenings: tuple[Happening, ...], duration_s: float) -> bool:
    """Whether something happens all the time, and often enough something leaves and comes back."""
    moments = [0.0, *(happening.end_s for happening in happenings), duration_s]
    returns = [happening for happening in happenings if happening.kind == "return" and happening.end_s <= duration_s]
    return max(np.diff(sorted(moments))) <= QUIET_S and len(returns) >= max(1, int(duration_s / LEAVES_EVERY_S))


class _Director:
    """Decides what happens next. `turns` is the play: it yields the time at which it wants to go on."""

    def __init__(self, spec: SceneSpec, rng: np.random.Generator, simulator: Simulator):
        self.spec, self.rng, self.simulator = spec, rng, simulator
        self.view = simulator.view
        axes = spec.camera.axes()
        self.right = axes[0, :2] / np.linalg.norm(axes[0, :2])
        self.away = axes[2, :2] / np.linalg.norm(axes[2, :2])
        self.moving = [k for k, thing in enumerate(spec.objects) if not is_tall(thing)]
        self.script: list[list[Push]] = [[] for _ in spec.objects]
        self.happenings: list[Happening] = []
        self.outside: int | None = None
        self.kept_free: list[np.ndarray] = []  # the way back of what is outside

    def turns(self) -> Iterator[float]:
        yield self._uniform(0.4, 0.9)
        while True:
            turn = str(self.rng.choice(list(TURNS), p=list(TURNS.values())))
            yield from getattr(self, f"_{turn}")()
            yield self._in(self._uniform(0.4, 0.9))

    def _order(self) -> Iterator[float]:
        """Two or three take turns: one moves and stops, then the next."""
        count = 2 + int(self.rng.random() < 0.3)
        for k in self._some(count):
            yield from self._move(k)
            yield self._in(self._uniform(0.40, 0.55))

    def _count(self) -> Iterator[float]:
        """One moves twice in a row; perhaps another one once."""
        chosen = self._some(2)
        yield from self._move(chosen[0])
        yield self._in(self._uniform(0.42, 0.52))
        yield from self._move(chosen[0])
        if len(chosen) > 1 and self.rng.random() < 0.7:
            yield self._in(self._uniform(0.1, 0.4))
            yield from self._move(chosen[1])

    def _leave(self) -> Iterator[float]:
        """One goes out at a side of the view and, when others have had their turn, comes back to where it was."""
        for k in self._some(len(self.moving)):
            for side in self.rng.permutation([-1.0, 1.0]):
                way = self._way_out(k, float(side))
                if way is None:
                    continue
                yield from self._cross(k, way, "leave")
                self.outside, self.kept_free = k, self._places_along(k, -way)
                yield self._in(self._uniform(0.8, 2.0))
                if self.rng.random() < 0.6:
                    yield from self._order()
                    yield self._in(self._uniform(0.2, 0.5))
                self.outside, self.kept_free = None, []
                yield from self._cross(k, -way, "return")
                return

    def _some(self, count: int) -> list[int]:
        """So many of those that can move and are in the view, or fewer."""
        inside = [k for k in self.moving if k != self.outside]
        return [int(k) for k in self.rng.permutation(inside)[:count]]

    def _move(self, k: int) -> Iterator[float]:
        """A short way in a direction that has room; nothing where none has."""
        for way in self._short_ways(k):
            if self._has_room(k, way):
                yield self._push(k, way, self._uniform(0.45, 0.62), "move")
                return

    def _cross(self, k: int, way: Float[np.ndarray, " 2"], kind: str) -> Iterator[float]:
        distance = float(np.linalg.norm(way))
        yield self._push(k, way, max(0.7, distance / self._uniform(0.24, 0.34)), kind)

    def _push(self, k: int, way: Float[np.ndarray, " 2"], seconds: float, kind: str) -> float:
        """Push object k along `way` from now on; returns when it ends."""
        now = self.simulator.time_s
        x, y = (float(each) for each in way / (seconds - RAMP_LOSS_S))
        velocity: Vec2 = (x, y)
        self.simulator.push(k, velocity, seconds)
        self.script[k].append(Push(now, now + seconds, velocity))
        self.happenings.append(Happening(kind, k, now, now + seconds))
        return now + seconds

    def _short_ways(self, k: int) -> list[Float[np.ndarray, " 2"]]:
        lying = self.spec.objects[k].lying
        directions = [self.right, -self.right] if lying else [self.right, -self.right, self.away, -self.away]
        ways: list[np.ndarray] = []
        for i in self.rng.permutation(len(directions)):
            angle = 0.0 if lying else math.radians(self._uniform(-14, 14))
            c, s = math.cos(angle), math.sin(angle)
            x, y = directions[int(i)]
            turned = np.array([c * x - s * y, s * x + c * y])
            longer = 1.0 if int(i) < 2 else FORESHORTENED
            ways += [turned * longer * self._uniform(0.080, 0.12), turned * longer * 0.075]
        return ways

    def _way_out(self, k: int, side: float) -> Float[np.ndarray, " 2"] | None:
        """To the right (side 1) or left, until all of it is out of the view; None where something is in the way."""
        at = self.simulator.positions_m()[k]
        u = float(self.view.project(at)[0])
        to_edge = ((1.0 - u) if side > 0 else u) / self.view.scale[0] * float(self.view.depth_m(at))
        distance = to_edge * 1.12 + footprint_m(self.spec.objects[k]) + 0.03
        way: np.ndarray = self.right * side * distance
        return way if all(self._is_clear(k, place) for place in self._places_along(k, way)) else None

    def _places_along(self, k: int, way: Float[np.ndarray, " 2"]) -> list[np.ndarray]:
        begin = self.simulator.positions_m()[k, :2]
        steps = max(2, math.ceil(float(np.linalg.norm(way)) / 0.03))
        return [begin + way * u for u in np.linspace(1 / steps, 1.0, steps)]

    def _has_room(self, k: int, way: Float[np.ndarray, " 2"]) -> bool:
        """Whether it can go there, stays in the view, and then neither hides others nor is hidden."""
        places = self._places_along(k, way)
        if places[-1][1] > DEEPEST_M or not all(self._is_clear(k, place) for place in places):
            return False
        things = self.spec.objects
        goal = np.array([*places[-1], rest_height_m(things[k])])
        if not (self.view.project(goal) >= MARGIN).all() or not (self.view.project(goal) <= 1 - MARGIN).all():
            return False
        at = self.simulator.positions_m()
        mine = _outline(self.view, things[k], goal)
        if not geometry.is_inside_view(mine, 0.01):
            return False
        others = [j for j in range(len(things)) if j not in (k, self.outside)]
        return all(_share(mine, _outline(self.view, things[j], at[j])) <= SHARED for j in others)

    def _is_clear(self, k: int, place: Float[np.ndarray, " 2"]) -> bool:
        things, at = self.spec.objects, self.simulator.positions_m()[:, :2]
        mine = footprint_m(things[k]) + GAP_M
        clear: Bool[np.ndarray, " n"] = np.array(
            [j == k or np.linalg.norm(at[j] - place) > mine + footprint_m(things[j]) for j in range(len(things))]
        )
        reserved = 0.0 if self.outside is None else footprint_m(things[self.outside])
        return bool(clear.all()) and all(np.linalg.norm(kept - place) > mine + reserved for kept in self.kept_free)

    def _in(self, seconds: float) -> float:
        return self.simulator.time_s + seconds

    def _uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


def _outline(
    view: geometry.ViewGeometry, thing: ObjectSpec, at: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, "corners 2"]:
    """As it would look there in its first orientation."""
    rotation = geometry.rotation_of(geometry.initial_quaternion(thing))
    return view.silhouette(thing.shape, thing.half_m, at, rotation)


def _share(a: Float[np.ndarray, "k 2"], b: Float[np.ndarray, "m 2"]) -> float:
    """What two outlines share, as a part of the smaller one."""
    return geometry.overlap(a, b) / max(min(geometry.area(a), geometry.area(b)), 1e-9)
