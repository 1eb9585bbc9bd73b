# SPDX-License-Identifier: Apache-2.0
"""A tabletop that goes on living, for a simulated camera: what rests is pushed again, what left is fetched."""

from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import numpy as np

from virst_engine.sim import geometry
from virst_engine.sim.draft import footprint_m, is_tall, rest_height_m
from virst_engine.sim.expressions import WINDOW_FRAMES
from virst_engine.sim.mujoco_world import Simulator, stack
from virst_engine.sim.recording import Recording, SimFrame
from virst_engine.sim.scenes import generate_scene
from virst_engine.sim.spec import (
    COLOURS,
    CameraSpec,
    Family,
    LightSpec,
    ObjectSpec,
    SceneSpec,
    TableSpec,
    Vec3,
)

HISTORY_HZ = 10.0
DEMO_THEME = "demo"


class _Behaviour(Protocol):
    def act(self, simulator: Simulator) -> None:
        """Push, place or leave alone; called every 50 ms of simulated time."""


class LiveTabletop:
    """An endless scene. Deterministic: equal arguments and equal calls of `advance` give equal frames.

    Args:
        seed, family: of the scene; not used if `spec` is given.
        spec: a scene of one's own, such as `demo_scene()`.

    Raises:
        SceneError: from `render` when there is no OpenGL.
    """

    def __init__(
        self,
        seed: int = 0,
        family: Family = "plain",
        width: int = 320,
        height: int = 240,
        *,
        spec: SceneSpec | None = None,
    ):
        spec = spec or generate_scene(seed, family)
        if spec.arm is not None:
            spec = replace(spec, arm=replace(spec.arm, period_s=spec.arm.keys[-1].time_s + 4.0))
        self.spec = spec
        self._simulator = Simulator(spec, width, height)
        self._behaviour: _Behaviour = _DemoRound() if spec.theme == DEMO_THEME else _Restless(spec)
        self._time_s = 0.0
        self._acted_s = -1.0
        self._history: deque[SimFrame] = deque(maxlen=WINDOW_FRAMES)

    @property
    def time_s(self) -> float:
        return self._time_s

    def advance(self, dt_s: float) -> None:
        """Let `dt_s` seconds pass."""
        end = self._time_s + dt_s
        while self._time_s < end - 1e-9:
            if self._time_s - self._acted_s >= 0.05 - 1e-9:
                self._behaviour.act(self._simulator)
                self._acted_s = self._time_s
            self._time_s = min(end, self._time_s + 0.05)
            self._simulator.step_to(self._time_s)

    def render(self, *, depth: bool = True) -> SimFrame:
        """The camera's view now, with its truth; also remembered for `history`, ten times a second."""
        frame = replace(self._simulator.render(depth=depth), time_s=self._time_s)
        if not self._history or frame.time_s - self._history[-1].time_s >= 1 / HISTORY_HZ - 1e-6:
            self._history.append(frame)
        return frame

    def history(self) -> Recording | None:
        """The rendered frames of the last 2.1 s at 10 Hz without images, to tell what a sentence means now."""
        if not self._history:
            return None
        simulator = self._simulator
        recording = stack(self.spec, HISTORY_HZ, simulator.width, simulator.height, list(self._history))
        return recording.without_images()

    def close(self) -> None:
        self._simulator.close()

    def __enter__(self) -> "LiveTabletop":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Restless:
    """Every now and then pushes something to a free place in the view; now and then out of it, in `full` scenes."""

    def __init__(self, spec: SceneSpec):
        self.spec = spec
        self.rng = np.random.default_rng([spec.seed, 1])
        self.view = geometry.ViewGeometry(spec.camera)
        script_ends = [push.end_s for thing in spec.objects for push in thing.pushes]
        self.next_s = max([0.0, *script_ends]) + 1.0

    def act(self, simulator: Simulator) -> None:
        now = simulator.time_s
        position = simulator.positions_m()
        for k, thing in enumerate(self.spec.objects):
            fell_off = position[k, 2] < -0.02 or np.abs(position[k, :2]).max() > 1.5
            if fell_off:
                place = self._free_place(k, position)
                if place is not None:
                    simulator.place(k, (float(place[0]), float(place[1]), rest_height_m(thing)))
        if now < self.next_s:
            return
        self.next_s = now + float(self.rng.uniform(1.2, 3.0))
        outside = [k for k in range(len(position)) if not self._is_in_view(position[k])]
        movable = [k for k, thing in enumerate(self.spec.objects) if not is_tall(thing) and not simulator.is_pushed(k)]
        candidates = [k for k in outside if k in movable] or movable
        if not candidates:
            return
        k = candidates[int(self.rng.integers(len(candidates)))]
        goal = self._free_place(k, position)
        if self.spec.family == "full" and k not in outside and self.rng.random() < 0.15:
            side = 1.25 if self.view.project(position[k])[0] > 0.5 else -0.25
            goal = self.view.on_plane(side, float(self.view.project(position[k])[1]), 0.0)[:2]
        if goal is None or not self._way_is_free(k, position, goal):
            return
        way = goal - position[k, :2]
        distance = float(np.linalg.norm(way))
        if distance < 0.08:
            return
        speed = float(self.rng.uniform(0.07, 0.14))
        velocity = way / distance * speed
        simulator.push(k, (float(velocity[0]), float(velocity[1])), distance / speed + 0.06)

    def _is_in_view(self, position_m: np.ndarray) -> bool:
        u, v = self.view.project(position_m)
        return bool(0.05 < u < 0.95 and 0.08 < v < 0.95)

    def _free_place(self, k: int, position: np.ndarray) -> np.ndarray | None:
        for _ in range(12):
            place = self.view.on_plane(float(self.rng.uniform(0.12, 0.88)), float(self.rng.uniform(0.22, 0.88)), 0.03)[
                :2
            ]
            if place[1] < 0.28 and self._is_clear(k, position, place):
                return place
        return None

    def _is_clear(self, k: int, position: np.ndarray, place: np.ndarray) -> bool:
        things = self.spec.objects
        return all(
            np.linalg.norm(position[j, :2] - place) > footprint_m(things[j]) + footprint_m(things[k]) + 0.02
            for j in range(len(things))
            if j != k
        )

    def _way_is_free(self, k: int, position: np.ndarray, goal: np.ndarray) -> bool:
        begin = position[k, :2]
        return all(self._is_clear(k, position, begin + (goal - begin) * u) for u in np.linspace(0.1, 1, 10))


_DEMO_BALL, _DEMO_MOVER = 0, 4
_DEMO_SPEED_M_S = 0.055


def demo_scene() -> SceneSpec:
    """A fixed scene in which each of these means exactly one thing at any time.

    "the red ball", "the box left of the blue can", "the object moving to the left", "the thing that can roll"; and
    "the purple egg" means nothing. The plate moves to the left for ever: it leaves the view and enters opposite.
    """

    def thing(shape: str, colour: str, size: str, half_m: Vec3, x: float, y: float, yaw: float = 0.0) -> ObjectSpec:
        z = half_m[2]
        return ObjectSpec(shape, colour, size, "satin", COLOURS[colour], half_m, (x, y, z), yaw, False)

    objects = (
        thing("ball", "red", "small", (0.044, 0.044, 0.044), 0.185, 0.03),
        thing("can", "blue", "small", (0.037, 0.037, 0.048), 0.0, 0.06),
        thing("box", "yellow", "small", (0.042, 0.042, 0.040), -0.15, 0.05, 0.5),
        thing("box", "green", "small", (0.040, 0.038, 0.040), 0.10, 0.155, -0.3),
        thing("plate", "white", "small", (0.052, 0.052, 0.009), 0.20, -0.115),
    )
    camera = CameraSpec((0.0, -0.36, 0.39), (0.0, 0.015, 0.0), 43.0)
    light = LightSpec((0.3, 0.4, -1.0), (0.5, 0.5, 0.5), (0.42, 0.42, 0.42))
    table = TableSpec((0.56, 0.47, 0.38), (0.56, 0.47, 0.38), "none", 0, 0.9, (0.35, 0.35, 0.37))
    return SceneSpec(0, "plain", objects, camera, light, table, None, DEMO_THEME)


class _DemoRound:
    """The plate goes round to the left for ever; the ball rolls a little away and back, with rests."""

    def __init__(self) -> None:
        self.ball_s = 1.0
        self.ball_sign = 1.0

    def act(self, simulator: Simulator) -> None:
        position = simulator.positions_m()
        view = simulator.view
        u = float(view.project(position[_DEMO_MOVER])[0])
        plate = simulator.spec.objects[_DEMO_MOVER]
        if u < -0.12:
            start = view.on_plane(1.11, float(view.project(position[_DEMO_MOVER])[1]), 0.0)
            simulator.place(_DEMO_MOVER, (float(start[0]), plate.position_m[1], plate.position_m[2]))
        if not simulator.is_pushed(_DEMO_MOVER):
            simulator.push(_DEMO_MOVER, (-_DEMO_SPEED_M_S, 0.0), 60.0)
        if simulator.time_s >= self.ball_s:
            # along the line of sight: its place from left to right in the image stays
            way = position[_DEMO_BALL, :2] - view.position[:2]
            velocity = way / np.linalg.norm(way) * 0.05 * self.ball_sign
            simulator.push(_DEMO_BALL, (float(velocity[0]), float(velocity[1])), 1.6)
            self.ball_sign = -self.ball_sign
            self.ball_s = simulator.time_s + 3.2
