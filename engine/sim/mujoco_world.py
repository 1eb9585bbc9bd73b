# SPDX-License-Identifier: Apache-2.0
"""The simulated tabletop in MuJoCo: physics and drawing of a SceneSpec.

Compiling a model and making an OpenGL context cost far more than a frame, so one compiled model is changed in place
from scene to scene (type, size, inertia and colour of its bodies) and goes back to a pool when a Simulator is closed.
Only this file imports mujoco.
"""

import atexit
import ctypes
import functools
import logging
import math
import os
import threading
import weakref
from dataclasses import replace
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.recording import TRUTH_ARRAYS, Recording, SimFrame, Trajectory
from virst_engine.sim.spec import (
    ARM_ID,
    MATERIALS,
    MAX_OBJECTS,
    VIEW_ASPECT,
    Push,
    SceneSpec,
    TableSpec,
)

logger = logging.getLogger(__name__)


def _egl_works() -> bool:
    """Whether EGL has a device that works: asked of the library itself, since PyOpenGL can choose only once."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
        query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
        get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
        if not query or not get_display:
            return False
        query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
        platform_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(
            get_display
        )
        devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
        if not query_devices(16, devices, ctypes.byref(count)):
            return False
        egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        egl.eglInitialize.restype = ctypes.c_uint
        platform_device_ext = 0x313F
        for device in devices[: count.value]:
            display = platform_display(platform_device_ext, device, None)
            if display and egl.eglInitialize(display, None, None):
                return True
    except (OSError, AttributeError):
        pass
    return False


# mujoco and PyOpenGL read these once, at their import
os.environ.setdefault("LP_NUM_THREADS", "1")
if not os.environ.get("MUJOCO_GL"):
    os.environ["MUJOCO_GL"] = "egl" if _egl_works() else "osmesa"

_NO_OPENGL = (
    "cannot make an OpenGL context with MUJOCO_GL={backend} ({error}); install one with"
    " `apt-get install libosmesa6` (then MUJOCO_GL=osmesa) or `apt-get install libegl1 libgl1-mesa-dri` (MUJOCO_GL=egl)"
)

_mujoco_error = ""
try:
    import mujoco
except (ImportError, OSError, AttributeError, RuntimeError) as _error:
    # physics needs no OpenGL: go on without a context, rendering will say what is missing
    _mujoco_error = f"{type(_error).__name__}: {_error}"
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        import mujoco
    except ImportError as _missing:
        raise SceneError(
            f"the simulated tabletop needs mujoco ({_missing}); install it with `pip install mujoco`"
        ) from _missing

TIMESTEP_S = 0.004
SERVO_ACCELERATION_M_S2 = 15.0
FRICTION, GRAVITY_M_S2 = 0.6, 9.81
BRAKE_S = 0.35
STILL_POSE = 2e-4  # metres, and quaternion components: far below a pixel
RAMP_S = 0.12
TEXTURE_PX = 256
MAX_WIDTH, MAX_HEIGHT = 1280, 960
ROLLING_SHAPES = ("ball", "capsule", "egg")
ARM_PARTS = ("arm_upper", "arm_fore", "arm_hand", "arm_finger_a", "arm_finger_b")

_CONTACT = f'condim="6" friction="{FRICTION} 0.01 0.0015"'
_GHOST = 'contype="0" conaffinity="0"'


def _object_xml(k: int) -> str:
    geom = f'<geom name="object{k}" type="sphere" size="0.05" mass="0.2" material="object{k}" {_CONTACT}/>'
    return f'<body name="object{k}" pos="{k} 0 -5"><freejoint/>{geom}</body>'


def _arm_part_xml(name: str) -> str:
    shape = "sphere" if name == "arm_hand" else "capsule"
    geom = f'<geom name="{name}" type="{shape}" size="0.03 0.1" material="arm" {_GHOST}/>'
    return f'<body name="{name}" mocap="true" pos="0 0 -5">{geom}</body>'


_XML = f"""
<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" iterations="30"/>
  <statistic extent="1" center="0 0 0"/>
  <visual>
    <map znear="0.05" zfar="12"/>
    <quality shadowsize="0" offsamples="4"/>
    <global offwidth="320" offheight="240"/>
  </visual>
  <asset>
    <texture name="table" type="2d" builtin="flat" rgb1="1 1 1" width="{TEXTURE_PX}" height="{TEXTURE_PX}"/>
    <material name="table" texture="table" texuniform="true" texrepeat="1.6 1.6" specular="0.05" shininess="0.1"/>
    <material name="arm" specular="0.4" shininess="0.5"/>
    {"".join(f'<material name="object{k}"/>' for k in range(MAX_OBJECTS))}
  </asset>
  <worldbody>
    <light name="lamp" directional="true" pos="0 0 3" dir="0 0 -1" castshadow="false"/>
    <camera name="view" pos="0 -1 1"/>
    <geom name="ground" type="plane" size="0 0 1" group="5" {_CONTACT}/>
    <geom name="table" type="plane" size="3 1 1" material="table" {_GHOST}/>
    <geom name="floor" type="plane" pos="0 0 -0.7" size="12 12 1" {_GHOST}/>
    {"".join(_object_xml(k) for k in range(MAX_OBJECTS))}
    {"".join(_arm_part_xml(name) for name in ARM_PARTS)}
  </worldbody>
</mujoco>
"""


def _geom_type(shape: str) -> int:
    kinds = mujoco.mjtGeom
    return int(
        {
            "box": kinds.mjGEOM_BOX,
            "ball": kinds.mjGEOM_SPHERE,
            "can": kinds.mjGEOM_CYLINDER,
            "plate": kinds.mjGEOM_CYLINDER,
            "capsule": kinds.mjGEOM_CAPSULE,
            "egg": kinds.mjGEOM_ELLIPSOID,
        }[shape]
    )


def _mass_and_inertia(shape: str, half_m: tuple[float, float, float]) -> tuple[float, tuple[float, float, float]]:
    """Of a solid of density 400 kg/m3; a capsule counts as the cylinder of its full length."""
    a, b, c = half_m
    if shape == "box":
        mass = 400 * 8 * a * b * c
        return mass, (mass / 3 * (b * b + c * c), mass / 3 * (a * a + c * c), mass / 3 * (a * a + b * b))
    if shape in ("can", "plate", "capsule"):
        half_length = c + a * (0.7 if shape == "capsule" else 0.0)
        mass = 400 * math.pi * a * a * 2 * half_length
        across = mass * (3 * a * a + 4 * half_length * half_length) / 12
        return mass, (across, across, mass * a * a / 2)
    mass = 400 * 4 / 3 * math.pi * a * b * c
    return mass, (mass / 5 * (b * b + c * c), mass / 5 * (a * a + c * c), mass / 5 * (a * a + b * b))


class _Canvas:
    """An OpenGL context with the model's textures in it and the frame buffer to draw into."""

    def __init__(self, model: Any):
        try:
            if _mujoco_error:
                raise RuntimeError(_mujoco_error)
            self.gl: Any = mujoco.GLContext(MAX_WIDTH, MAX_HEIGHT)
            self.gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        except Exception as error:  # every GL backend fails in its own way, all mean the same to the user
            raise SceneError(_NO_OPENGL.format(backend=os.environ.get("MUJOCO_GL"), error=error)) from error
        _close_at_exit_once()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZERONEAR.value
        self.scene = mujoco.MjvScene(model, maxgeom=200)
        self.option = mujoco.MjvOption()
        self.option.geomgroup[:] = [1, 1, 1, 1, 1, 0]
        self.view = mujoco.MjvCamera()
        self.view.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
        self.view.fixedcamid = 0
        self.perturb = mujoco.MjvPerturb()
        self.size = (0, 0)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_HAZE] = 0

    def prepare(self, width: int, height: int) -> None:
        self.gl.make_current()
        if self.size != (width, height):
            mujoco.mjr_resizeOffscreen(width, height, self.context)
            self.size = (width, height)

    def upload_texture(self, model: Any) -> None:
        self.gl.make_current()
        mujoco.mjr_uploadTexture(model, self.context, 0)

    def let_go(self) -> None:
        """Unbind the context from this thread: EGL lets no other thread have it before that."""
        if os.environ["MUJOCO_GL"] == "egl":
            egl = mujoco.egl.EGL
            egl.eglMakeCurrent(mujoco.egl.EGL_DISPLAY, egl.EGL_NO_SURFACE, egl.EGL_NO_SURFACE, egl.EGL_NO_CONTEXT)

    def close(self) -> None:
        self.gl.make_current()  # else its names would be freed in whatever context is bound here
        self.context.free()
        self.gl.free()


class _Stage:
    """One compiled model with its data and, once something is drawn, its canvas."""

    def __init__(self) -> None:
        self.model: Any = mujoco.MjModel.from_xml_string(_XML)
        self.data: Any = mujoco.MjData(self.model)
        self.canvas: _Canvas | None = None
        self.drawn_table: TableSpec | None = None
        model = self.model
        self.geom = [model.geom(f"object{k}").id for k in range(MAX_OBJECTS)]
        self.body = [model.body(f"object{k}").id for k in range(MAX_OBJECTS)]
        self.qpos = [int(model.jnt_qposadr[model.body_jntadr[b]]) for b in self.body]
        self.dof = [int(model.jnt_dofadr[model.body_jntadr[b]]) for b in self.body]
        self.material = [model.mat(f"object{k}").id for k in range(MAX_OBJECTS)]
        self.table, self.floor = model.geom("table").id, model.geom("floor").id
        self.table_material, self.arm_material = model.mat("table").id, model.mat("arm").id
        self.arm_geom = [model.geom(name).id for name in ARM_PARTS]
        self.arm_mocap = [int(model.body_mocapid[model.body(name).id]) for name in ARM_PARTS]
        self.mask_value = np.zeros(model.ngeom + 2, np.uint8)  # by geom id + 1

    def load(self, spec: SceneSpec) -> None:
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        self.mask_value[:] = 0
        for k in range(MAX_OBJECTS):
            geom, body = self.geom[k], self.body[k]
            if k >= len(spec.objects):
                model.geom_group[geom] = 5
                model.geom_contype[geom] = model.geom_conaffinity[geom] = 0
                model.body_gravcomp[body] = 1.0
                data.qpos[self.qpos[k] : self.qpos[k] + 7] = (k, 0, -5, 1, 0, 0, 0)
                continue
            thing = spec.objects[k]
            self.mask_value[geom + 1] = k + 1
            model.geom_group[geom] = 0
            model.geom_contype[geom] = model.geom_conaffinity[geom] = 1
            model.body_gravcomp[body] = 0.0
            model.geom_type[geom] = _geom_type(thing.shape)
            a, b, c = thing.half_m
            model.geom_size[geom] = (a, c, 0.0) if thing.shape in ("can", "plate", "capsule") else (a, b, c)
            model.geom_rbound[geom] = thing.radius_m
            model.geom_aabb[geom] = (0, 0, 0, *([thing.radius_m] * 3))
            mass, inertia = _mass_and_inertia(thing.shape, thing.half_m)
            model.body_mass[body] = mass
            model.body_inertia[body] = inertia
            material = self.material[k]
            model.mat_rgba[material] = (*thing.rgb, 1.0)
            model.mat_specular[material], model.mat_shininess[material] = MATERIALS[thing.material]
            data.qpos[self.qpos[k] : self.qpos[k] + 3] = thing.position_m
            data.qpos[self.qpos[k] + 3 : self.qpos[k] + 7] = geometry.initial_quaternion(thing)
        start = data.qpos.copy()
        mujoco.mj_setConst(model, data)  # inverse weights follow the new masses; it also resets qpos
        data.qpos[:] = start
        data.qvel[:] = 0
        self._load_view(spec)
        for part, geom in enumerate(self.arm_geom):
            self.mask_value[geom + 1] = ARM_ID if spec.arm else 0
            model.geom_group[geom] = 0 if spec.arm else 5
            if spec.arm:
                radius = spec.arm.hand_radius_m if part == 2 else spec.arm.radius_m * (1.0, 0.85, 0, 0.35, 0.35)[part]
                half_length = (
                    spec.arm.link_m / 2,
                    spec.arm.link_m / 2,
                    0.0,
                    spec.arm.hand_radius_m * 0.8,
                    spec.arm.hand_radius_m * 0.8,
                )
                model.geom_size[geom] = (radius, half_length[part], 0.0)
                model.geom_rbound[geom] = radius + half_length[part]
        if spec.arm:
            model.mat_rgba[self.arm_material] = (*spec.arm.rgb, 1.0)
        self.place_arm(spec, 0.0)
        mujoco.mj_forward(model, data)

    def _load_view(self, spec: SceneSpec) -> None:
        model = self.model
        right, down, forward = spec.camera.axes()
        model.cam_pos[0] = spec.camera.position_m
        rotation = np.stack([right, -down, -forward], axis=1)
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, rotation.ravel())
        model.cam_quat[0] = quaternion
        model.cam_fovy[0] = spec.camera.fovy_deg
        model.light_dir[0] = np.asarray(spec.light.direction) / np.linalg.norm(spec.light.direction)
        model.light_diffuse[0] = spec.light.diffuse
        model.light_specular[0] = (0.35, 0.35, 0.35)
        model.vis.headlight.ambient[:] = spec.light.ambient
        model.vis.headlight.diffuse[:] = (0.22, 0.22, 0.22)
        model.vis.headlight.specular[:] = (0.05, 0.05, 0.05)
        front = -1.2
        model.geom_pos[self.table] = (0, (spec.table.back_edge_m + front) / 2, 0)
        model.geom_size[self.table] = (3.0, (spec.table.back_edge_m - front) / 2, 1.0)
        model.geom_rgba[self.floor] = (*spec.table.floor_rgb, 1.0)

    def place_arm(self, spec: SceneSpec, time_s: float) -> None:
        """Two equal links from the base to the hand, elbow up, and a gripper of two fingers that points down."""
        if spec.arm is None:
            return
        arm, data = spec.arm, self.data
        base, hand = np.asarray(arm.base_m, float), arm.hand_at(time_s)
        reach = hand - base
        distance = float(np.linalg.norm(reach))
        along = reach / max(distance, 1e-9)
        bend = math.sqrt(max(arm.link_m**2 - distance**2 / 4, 0.0))
        up = np.array([0.0, 0.0, 1.0]) - along * along[2]
        elbow = base + reach / 2 + up / max(float(np.linalg.norm(up)), 1e-9) * bend
        side = np.cross(along, (0.0, 0.0, 1.0))
        side /= max(float(np.linalg.norm(side)), 1e-9)
        finger = arm.hand_radius_m * 0.55
        tips = [hand + side * s * finger - (0, 0, arm.hand_radius_m * 1.1) for s in (-1, 1)]
        short = np.array([0.0, 0.0, 0.01])
        ends = [(base, elbow), (elbow, hand), (hand, hand), *[(tip + short, tip - short) for tip in tips]]
        for mocap, (a, b) in zip(self.arm_mocap, ends, strict=True):
            data.mocap_pos[mocap] = (a + b) / 2
            axis = b - a
            length = float(np.linalg.norm(axis))
            quaternion = np.array([1.0, 0, 0, 0])
            if length > 1e-9:
                mujoco.mju_quatZ2Vec(quaternion, axis / length)
            data.mocap_quat[mocap] = quaternion

    def close(self) -> None:
        if self.canvas is not None:
            self.canvas.close()
            self.canvas = None


_pool: list[_Stage] = []
_all_stages: "weakref.WeakSet[_Stage]" = weakref.WeakSet()
_pool_lock = threading.Lock()


def _acquire() -> _Stage:
    with _pool_lock:
        if _pool:
            return _pool.pop()
        stage = _Stage()
        _all_stages.add(stage)
        return stage


def _release(stage: _Stage) -> None:
    with _pool_lock:
        _pool.append(stage)


def close_all() -> None:
    """Free the OpenGL contexts of all closed simulators."""
    with _pool_lock:
        while _pool:
            _pool.pop().close()


@functools.cache
def _close_at_exit_once() -> None:
    """To be called when a context exists: mujoco's own clean-up, registered by then, must run after this one."""
    atexit.register(_close_at_exit)


def _close_at_exit() -> None:
    """Free every context while Python still stands: OSMesa prints an error if that is left to the collapse."""
    for stage in list(_all_stages):
        stage.close()


class Simulator:
    """A scene that lives: step its physics, draw it.

    Not thread-safe: one thread at a time. Drawing always from the same one is fastest.

    Args:
        width, height: of the images, up to 1280 x 960. The view is 4:3 whatever they are.

    Raises:
        SceneError: from `render` when there is no OpenGL.
    """

    def __init__(self, spec: SceneSpec, width: int = 320, height: int = 240):
        if not (0 < width <= MAX_WIDTH and 0 < height <= MAX_HEIGHT):
            raise SceneError(
                f"image size {width}x{height} is outside 1x1..{MAX_WIDTH}x{MAX_HEIGHT}; choose a smaller one"
            )
        if not 0 < len(spec.objects) <= MAX_OBJECTS:
            raise SceneError(f"a scene holds 1..{MAX_OBJECTS} objects, got {len(spec.objects)}; leave some out")
        self.spec = spec
        self.width, self.height = width, height
        self.view = geometry.ViewGeometry(spec.camera)
        self._stage = _acquire()
        self._stage.load(spec)
        self._steps = 0
        self._pushes: list[list[Push]] = [list(thing.pushes) for thing in spec.objects]
        self._closed = False

    @property
    def time_s(self) -> float:
        return self._steps * TIMESTEP_S

    def step_to(self, time_s: float) -> None:
        """Advance the physics to `time_s` (rounded to the time step); the past cannot be reached."""
        target = round(time_s / TIMESTEP_S)
        model, data = self._stage.model, self._stage.data
        while self._steps < target:
            busy = self._drive()
            count = 1 if busy else min(target - self._steps, self._steps_to_next_event())
            mujoco.mj_step(model, data, nstep=count)
            self._steps += count

    def push(self, thing: int, velocity_m_s: tuple[float, float], duration_s: float) -> None:
        """Drive an object from now on, in place of what was scripted for it."""
        self._pushes[thing] = [Push(self.time_s, self.time_s + duration_s, velocity_m_s)]

    def place(self, thing: int, position_m: tuple[float, float, float]) -> None:
        """Put an object somewhere else, at rest and in its first orientation."""
        stage, q, v = self._stage, self._stage.qpos[thing], self._stage.dof[thing]
        stage.data.qpos[q : q + 3] = position_m
        stage.data.qpos[q + 3 : q + 7] = geometry.initial_quaternion(self.spec.objects[thing])
        stage.data.qvel[v : v + 6] = 0
        self._pushes[thing] = []

    def is_pushed(self, thing: int) -> bool:
        """Whether a push of this object is under way or still to come."""
        return any(push.end_s > self.time_s for push in self._pushes[thing])

    def positions_m(self) -> Float[np.ndarray, "n 3"]:
        """Where the objects' centres are now (a copy)."""
        return self._poses()[0]

    def _steps_to_next_event(self) -> int:
        times = [push.start_s for pushes in self._pushes for push in pushes if push.start_s > self.time_s]
        times += [t.drop_at_s for t in self.spec.objects if t.drop_at_s is not None and t.drop_at_s > self.time_s]
        if not times:
            return 1_000_000
        return max(1, math.ceil((min(times) - self.time_s) / TIMESTEP_S - 1e-6))

    def _drive(self) -> bool:
        """Act on the objects for the next time step; False when nothing is being driven."""
        busy = False
        now, data, model = self.time_s, self._stage.data, self._stage.model
        for k, thing in enumerate(self.spec.objects):
            if thing.drop_at_s is not None:
                hangs = now < thing.drop_at_s
                model.body_gravcomp[self._stage.body[k]] = 1.0 if hangs else 0.0
                if hangs:
                    continue
            pushes = self._pushes[k]
            while pushes and now >= pushes[0].end_s + BRAKE_S:
                pushes.pop(0)
            if len(pushes) > 1 and now >= pushes[1].start_s:
                pushes.pop(0)
            if not pushes or now < pushes[0].start_s:
                continue
            busy = True
            push = pushes[0]
            pushing = now < push.end_s
            ramp = min(1.0, (now - push.start_s + TIMESTEP_S) / RAMP_S) if pushing else 0.0
            rolls = thing.shape in ROLLING_SHAPES or thing.lying
            v = self._stage.dof[k]
            limit = SERVO_ACCELERATION_M_S2 * TIMESTEP_S
            speed = math.hypot(*push.velocity_m_s)
            wanted = ramp * speed
            if pushing and not rolls:
                wanted += FRICTION * GRAVITY_M_S2 * TIMESTEP_S  # what friction will take of it in this step
            for axis in (0, 1):
                error = wanted * push.velocity_m_s[axis] / max(speed, 1e-9) - data.qvel[v + axis]
                data.qvel[v + axis] += min(max(error, -limit), limit)
            if not rolls:
                data.qvel[v + 3 : v + 6] *= (
                    0.8  # a push at the centre of mass would tip what friction holds at its foot
                )
            elif not pushing:
                data.qvel[v + 3 : v + 6] *= 0.93
        return busy

    def _poses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, data = len(self.spec.objects), self._stage.data
        q = np.stack([data.qpos[s : s + 7] for s in self._stage.qpos[:n]])
        velocity = np.stack([data.qvel[s : s + 3] for s in self._stage.dof[:n]])
        return q[:, :3], q[:, 3:], velocity

    def _set_poses(self, time_s: float, position_m: np.ndarray, quaternion: np.ndarray, velocity: np.ndarray) -> None:
        """Show a moment of a trajectory that was simulated before."""
        self._steps = round(time_s / TIMESTEP_S)
        data = self._stage.data
        for k in range(len(position_m)):
            q, v = self._stage.qpos[k], self._stage.dof[k]
            data.qpos[q : q + 3] = position_m[k]
            data.qpos[q + 3 : q + 7] = quaternion[k]
            data.qvel[v : v + 3] = velocity[k]

    def render(self, *, depth: bool = True) -> SimFrame:
        """Draw the scene as it is now; `depth=False` leaves depth_m None and is a little faster."""
        return self._draw(depth)

    def _draw(self, depth: bool, like: SimFrame | None = None, time_s: float | None = None) -> SimFrame:
        """`like`: the frame before this one, whose pixels are shared if nothing has moved since."""
        time_s = self.time_s if time_s is None else time_s
        if like is not None and self.spec.arm is None:
            position, quaternion, velocity = self._poses()
            shift = max(np.abs(position - like.position_m).max(), np.abs(quaternion - like.quaternion_wxyz).max())
            if shift < STILL_POSE:
                # its poses stay the drawn ones, so that a slow creep adds up and is drawn in the end
                return replace(like, time_s=time_s, velocity_m_s=velocity)
        stage = self._stage
        if stage.canvas is None:
            stage.canvas = _Canvas(stage.model)
        canvas = stage.canvas
        canvas.prepare(self.width, self.height)
        if stage.drawn_table != self.spec.table:
            stage.model.tex_data[: TEXTURE_PX * TEXTURE_PX * 3] = table_texture(self.spec.table).ravel()
            canvas.upload_texture(stage.model)
            stage.drawn_table = self.spec.table
        stage.place_arm(self.spec, self.time_s)
        mujoco.mj_kinematics(stage.model, stage.data)
        mujoco.mj_camlight(stage.model, stage.data)
        position, quaternion, velocity = self._poses()

        mask, depth_m = self._draw_mask(canvas, depth)
        image = self._draw_colour(canvas)
        canvas.let_go()
        self._shade_contacts(image, mask, position, quaternion)
        outlines = self._outlines(position, quaternion)
        visible, in_view, area = self._visibility(mask, outlines)
        return SimFrame(
            time_s=time_s,
            image_rgb_u8=image,
            depth_m=depth_m,
            instance_mask=mask,
            visible_fraction=visible,
            in_view_fraction=in_view,
            area_fraction=area,
            position_m=position,
            quaternion_wxyz=quaternion,
            velocity_m_s=velocity,
            centre_px=self.view.project(position) * (self.width, self.height),
        )

    def _update_scene(self, canvas: _Canvas) -> None:
        mujoco.mjv_updateScene(
            self._stage.model,
            self._stage.data,
            canvas.option,
            canvas.perturb,
            canvas.view,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            canvas.scene,
        )
        for eye in canvas.scene.camera:  # a 4:3 view whatever the shape of the image
            eye.frustum_width = VIEW_ASPECT * (eye.frustum_top - eye.frustum_bottom) / 2

    def _draw_mask(
        self, canvas: _Canvas, depth: bool
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"] | None]:
        self._update_scene(canvas)
        flags = canvas.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 1
        viewport = mujoco.MjrRect(0, 0, self.width, self.height)
        mujoco.mjr_render(viewport, canvas.scene, canvas.context)
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 0
        ids = np.empty((self.height, self.width, 3), np.uint8)
        # depth is read here and not with the colours, where antialiasing blurs it over the borders of masks
        raw = np.empty((self.height, self.width), np.float32) if depth else None
        mujoco.mjr_readPixels(ids, raw, viewport, canvas.context)
        # the red byte is 1 + the place in scene.geoms; fewer than 255 geoms, so it is enough
        value = np.zeros(256, np.uint8)
        geoms = canvas.scene.geoms
        for place in range(canvas.scene.ngeom):
            geom = geoms[place]
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.segid >= 0:
                value[geom.segid + 1] = self._stage.mask_value[geom.objid + 1]
        mask = np.ascontiguousarray(value[ids[::-1, :, 0]])
        if raw is None:
            return mask, None
        extent, near_far = self._stage.model.stat.extent, self._stage.model.vis.map
        near, far = near_far.znear * extent, near_far.zfar * extent
        metres = near / (1 - raw[::-1] * (1 - near / far))
        return mask, np.ascontiguousarray(metres, dtype=np.float32)

    def _draw_colour(self, canvas: _Canvas) -> UInt8[np.ndarray, "h w 3"]:
        viewport = mujoco.MjrRect(0, 0, self.width, self.height)
        mujoco.mjr_render(viewport, canvas.scene, canvas.context)
        image = np.empty((self.height, self.width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, canvas.context)
        return np.ascontiguousarray(image[::-1])

    def _shade_contacts(
        self, image: np.ndarray, mask: np.ndarray, position: np.ndarray, quaternion: np.ndarray
    ) -> None:
        """Darken the table softly under each object: without this, height above the table cannot be seen.

        Done on the pixels because see-through geoms cost llvmpipe five times the rest of the picture.
        """
        light = np.full(mask.shape, 255, np.uint8)
        size = np.array([self.width, self.height])
        rotation = geometry.rotation_of(quaternion)
        for k, thing in enumerate(self.spec.objects):
            if position[k, 2] < -0.05:
                continue
            spot, lift = geometry.contact_spot(thing, position[k], rotation[k])
            pixels = self.view.project(spot) * size
            if (np.abs(pixels) > 4 * size).any():
                continue
            darkest = 255 - round(115 / (1 + 6 * lift))
            hull = cv2.convexHull(np.round(pixels * 16).astype(np.int32))
            darkness = np.full(mask.shape, 255, np.uint8)
            cv2.fillConvexPoly(darkness, hull, darkest, lineType=cv2.LINE_AA, shift=4)
            np.minimum(light, darkness, out=light)
        blur = max(1, round(self.width / 128 * 2)) * 2 + 1
        light = cv2.blur(light, (blur, blur))
        light[mask != 0] = 255
        np.multiply(image, light[..., None].astype(np.float32) / 255, out=image, casting="unsafe")

    def _outlines(self, position: np.ndarray, quaternion: np.ndarray) -> list[np.ndarray]:
        return geometry.outlines(self.view, self.spec, position, quaternion)

    def _visibility(
        self, mask: UInt8[np.ndarray, "h w"], shapes: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels = self.width * self.height
        counts = np.bincount(mask.ravel(), minlength=256)
        n = len(shapes)
        visible, in_view, area = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
        for k, shape in enumerate(shapes):
            full = geometry.area(shape)
            area[k] = geometry.area_in_view(shape)
            in_view[k] = min(1.0, area[k] / max(full, 1e-9))
            if area[k] < 2e-4:  # three pixels of 128 x 128: not in the view
                continue
            crosses = self.spec.arm is not None or any(
                geometry.overlap(shape, other) > 0 for j, other in enumerate(shapes) if j != k
            )
            visible[k] = min(1.0, counts[k + 1] / (area[k] * pixels)) if crosses or in_view[k] < 1 else 1.0
        return visible, in_view, area

    def close(self) -> None:
        """Give the compiled model back for the next scene."""
        if not self._closed:
            self._closed = True
            _release(self._stage)

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def table_texture(table: TableSpec) -> UInt8[np.ndarray, "p p 3"]:
    """The table top's pattern as an RGB image that tiles."""
    rng = np.random.default_rng(table.pattern_seed)
    y, x = np.mgrid[0:TEXTURE_PX, 0:TEXTURE_PX] / TEXTURE_PX
    if table.pattern == "checker":
        cells = int(rng.integers(3, 8))
        blend = ((np.floor(x * cells * 2) + np.floor(y * cells * 2)) % 2).astype(float)
    elif table.pattern == "stripes":
        count = int(rng.integers(4, 12))
        blend = (np.sin(2 * math.pi * count * (x if rng.random() < 0.5 else y)) > 0).astype(float)
    elif table.pattern in ("grain", "speckle"):
        stretch = (24, 3) if table.pattern == "grain" else (8, 8)
        blend = np.zeros((TEXTURE_PX, TEXTURE_PX))
        for octave in (1, 2, 4):
            fx, fy = rng.integers(1, stretch[1] * octave + 1, 6), rng.integers(1, stretch[0] * octave + 1, 6)
            for kx, ky, phase in zip(fx, fy, rng.random(6), strict=True):
                blend += np.sin(2 * math.pi * (kx * x + ky * y + phase)) / octave
        blend = np.clip(0.5 + blend / 6, 0, 1)
    else:
        blend = np.zeros((TEXTURE_PX, TEXTURE_PX))
    rgb = (1 - blend[..., None]) * np.asarray(table.rgb) + blend[..., None] * np.asarray(table.rgb2)
    return np.clip(np.round(rgb * 255), 0, 255).astype(np.uint8)


def simulate(spec: SceneSpec, *, fps: float = 10.0, duration_s: float = 4.8) -> Trajectory:
    """The motion of a scene, without drawing it: round(fps x duration_s) frames from time 0 on."""
    times = np.arange(max(1, round(fps * duration_s))) / fps
    with Simulator(spec) as simulator:
        moments = []
        for time_s in times:
            simulator.step_to(float(time_s))
            moments.append([a.copy() for a in simulator._poses()])
    position, quaternion, velocity = (np.stack(a) for a in zip(*moments, strict=True))
    return Trajectory(times, position, quaternion, velocity)


def record(
    spec: SceneSpec,
    *,
    fps: float = 10.0,
    duration_s: float = 4.8,
    width: int = 128,
    height: int = 128,
    depth: bool = False,
    trajectory: Trajectory | None = None,
) -> Recording:
    """Simulate and draw a scene; the same arguments give the same arrays.

    Args:
        trajectory: what `simulate` returned for the same spec, fps and duration, to save doing it again.

    Raises:
        SceneError: no OpenGL.
    """
    trajectory = trajectory or simulate(spec, fps=fps, duration_s=duration_s)
    frames: list[SimFrame] = []
    with Simulator(spec, width, height) as simulator:
        for t, time_s in enumerate(trajectory.time_s):
            simulator._set_poses(
                float(time_s), trajectory.position_m[t], trajectory.quaternion_wxyz[t], trajectory.velocity_m_s[t]
            )
            frames.append(simulator._draw(depth, like=frames[-1] if frames else None, time_s=float(time_s)))
    return stack(spec, fps, width, height, frames)


def stack(spec: SceneSpec, fps: float, width: int, height: int, frames: list[SimFrame]) -> Recording:
    """Frames one after the other as one Recording."""
    names = (*TRUTH_ARRAYS, "image_rgb_u8", "instance_mask")
    arrays = {name: np.stack([getattr(frame, name) for frame in frames]) for name in names}
    # single precision, so that sentences drawn from a file are those drawn from memory
    arrays = {name: a if a.dtype == np.uint8 else a.astype(np.float32) for name, a in arrays.items()}
    depths = [frame.depth_m for frame in frames if frame.depth_m is not None]
    return Recording(
        spec=spec,
        fps=fps,
        width=width,
        height=height,
        time_s=np.array([frame.time_s for frame in frames]),
        depth_m=np.stack(depths) if depths else None,
        **arrays,
    )
