# SPDX-License-Identifier: Apache-2.0
"""A camera that films the simulated tabletop, with the truth of every frame.

Topics (the node is called `camera`), with one stamp for all messages of a frame:
~/color/image_raw rgb8, ~/color/camera_info, ~/depth/image_raw 32FC1 metres, registered with the colour image;
~/truth/mask mono8 (0 background, k + 1 object k, 255 the arm), ~/truth/frame (JSON: visibility, poses);
~/truth/scene (JSON, latched: what stands on the table), ~/truth/sentences (JSON, once a second: what is true now).
"""

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header, String
from std_srvs.srv import Trigger

from virst_engine.config import check_fields, parameter
from virst_engine.errors import VirstError
from virst_engine.sim.expressions import WINDOW_FRAMES, expressions
from virst_engine.sim.live import LiveTabletop, demo_scene
from virst_engine.sim.mujoco_world import close_all
from virst_engine.sim.recording import TRUTH_ARRAYS, SimFrame
from virst_engine.sim.spec import FAMILIES
from virst_ros import conversions, qos
from virst_ros.parameters import declare, node_parameters, node_specs, values_of
from virst_ros.spinning import run_node

SENTENCES_PERIOD_S = 1.0


@dataclass(frozen=True)
class CameraParameters:
    seed: int = parameter(1_000_000, "number of the scene; a change starts it", low=0, high=2**31 - 1, live=True)
    family: str = parameter(
        "plain", "kind of scene, demo = the one fixed scene; a change starts it", choices=(*FAMILIES, "demo"), live=True
    )
    width: int = parameter(320, "pixels", low=16, high=1280)
    height: int = parameter(240, "pixels; the view is 4:3, another shape squashes it", low=16, high=960)
    rate_hz: float = parameter(20.0, "frames per second", low=0.1, high=200.0)
    frame_id: str = parameter("camera_color_optical_frame", "frame of the images: z forward, x right, y down (REP-103)")

    def __post_init__(self) -> None:
        check_fields("", self)


class SteadyRate:
    """Deadlines that do not drift: the n-th is n periods after the first. Missed ones are counted and left out.

    Args:
        now_s, sleep: a steady clock and how to wait on it, seconds.
    """

    def __init__(
        self,
        rate_hz: float,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._period_s = 1.0 / rate_hz
        self._now_s, self._sleep = now_s, sleep
        self._start_s = now_s()
        self._next = 0
        self.overruns = 0

    def wait(self) -> float:
        """Sleep until the next deadline; its time since the first one, seconds."""
        due = max(self._next, math.floor((self._now_s() - self._start_s) / self._period_s))
        self.overruns += due - self._next
        self._next = due + 1
        rest_s = self._start_s + due * self._period_s - self._now_s()
        if rest_s > 0.0:
            self._sleep(rest_s)
        return due * self._period_s


class SimCameraNode(Node):
    """Films from a thread of its own: OpenGL wants one, and callbacks must not make frames late."""

    def __init__(self, **node_arguments: Any) -> None:
        super().__init__("camera", **node_arguments)
        declare(self, node_specs(CameraParameters))
        self._settings: CameraParameters = self._read({})
        # Reliable like most drivers; one deep, so that a slow reader gets the newest.
        images = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        self._image_publisher = self.create_publisher(Image, "~/color/image_raw", images)
        self._info_publisher = self.create_publisher(CameraInfo, "~/color/camera_info", images)
        self._depth_publisher = self.create_publisher(Image, "~/depth/image_raw", images)
        # Whoever scores masks needs the truth of every frame, also of those read late.
        truth = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self._mask_publisher = self.create_publisher(Image, "~/truth/mask", truth)
        self._frame_publisher = self.create_publisher(String, "~/truth/frame", truth)
        self._scene_publisher = self.create_publisher(String, "~/truth/scene", qos.LATCHED)
        self._sentences_publisher = self.create_publisher(String, "~/truth/sentences", qos.LATCHED)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.add_on_set_parameters_callback(self._on_parameters)
        self.create_service(Trigger, "~/new_scene", self._on_new_scene)
        self.create_timer(1.0, self._publish_diagnostics)

        self.failure = ""
        self._frames = 0
        self._frames_reported, self._reported_s = 0, time.monotonic()
        self._rate: SteadyRate | None = None
        self._scene_wanted = threading.Event()
        self._scene_wanted.set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._film, name="film", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop filming and give the OpenGL context back; the node can then be destroyed."""
        self._stopping.set()
        self._thread.join(10.0)

    def _read(self, changes: dict[str, Any]) -> CameraParameters:
        specs = node_specs(CameraParameters)
        settings: CameraParameters = node_parameters(values_of(self, specs) | changes, CameraParameters)
        return settings

    def _on_parameters(self, changes: list[Any]) -> SetParametersResult:
        try:
            settings = self._read({change.name: change.value for change in changes})
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if (settings.seed, settings.family) != (self._settings.seed, self._settings.family):
            self._settings = settings
            self._scene_wanted.set()
        return SetParametersResult(successful=True)

    def _on_new_scene(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        seed = self._settings.seed + 1
        result = self.set_parameters([rclpy.parameter.Parameter("seed", value=seed)])[0]
        response.success = result.successful
        response.message = f"scene {seed} follows" if result.successful else result.reason
        return response

    # The film thread

    def _film(self) -> None:
        tabletop = None
        try:
            self._rate = SteadyRate(self._settings.rate_hz, sleep=self._stopping.wait)
            before_s = sentences_s = 0.0
            while not self._stopping.is_set():
                if self._scene_wanted.is_set():
                    self._scene_wanted.clear()
                    if tabletop is not None:
                        tabletop.close()
                    tabletop = self._start_scene()
                    sentences_s = 0.0
                    before_s = self._rate.wait()
                assert tabletop is not None
                due_s = self._rate.wait()
                if self._stopping.is_set():
                    return
                stamp_ns = self.get_clock().now().nanoseconds
                tabletop.advance(due_s - before_s)
                before_s = due_s
                frame = tabletop.render(depth=self._depth_publisher.get_subscription_count() > 0)
                self._publish(tabletop, frame, stamp_ns)
                self._frames += 1
                if tabletop.time_s - sentences_s >= SENTENCES_PERIOD_S:
                    sentences_s = tabletop.time_s
                    self._publish_sentences(tabletop, stamp_ns)
        except VirstError as error:
            self._fail(str(error))
        except Exception as error:
            if self.context.ok():  # otherwise a signal has ended the context between two frames: no failure
                self._fail(f"unexpected {type(error).__name__}: {error}")
                raise
        finally:
            if tabletop is not None:
                tabletop.close()
            close_all()  # on the thread that drew: OpenGL contexts belong to it

    def _start_scene(self) -> LiveTabletop:
        settings = self._settings
        if settings.family == "demo":
            tabletop = LiveTabletop(width=settings.width, height=settings.height, spec=demo_scene())
        else:
            tabletop = LiveTabletop(settings.seed, settings.family, settings.width, settings.height)  # type: ignore[arg-type]
        things = [
            {"id": k + 1, **{name: getattr(thing, name) for name in ("shape", "colour", "size", "material")}}
            for k, thing in enumerate(tabletop.spec.objects)
        ]
        description = {"seed": settings.seed, "family": settings.family, "objects": things}
        self._scene_publisher.publish(String(data=json.dumps(description)))
        self.get_logger().info(f"scene {settings.seed} ({settings.family}): {len(things)} objects")
        return tabletop

    def _publish(self, tabletop: LiveTabletop, frame: SimFrame, stamp_ns: int) -> None:
        header = Header(stamp=conversions.time_message(stamp_ns), frame_id=self._settings.frame_id)
        self._image_publisher.publish(conversions.image_message(header, frame.image_rgb_u8, "rgb8"))
        self._info_publisher.publish(camera_info(header, tabletop.spec.camera, self._settings))
        if frame.depth_m is not None:
            self._depth_publisher.publish(conversions.image_message(header, frame.depth_m, "32FC1"))
        if self._mask_publisher.get_subscription_count() > 0:
            self._mask_publisher.publish(conversions.image_message(header, frame.instance_mask, "mono8"))
        if self._frame_publisher.get_subscription_count() > 0:
            numbers = {name: np.round(getattr(frame, name), 5).tolist() for name in TRUTH_ARRAYS}
            truth = {"stamp_ns": stamp_ns, "seed": tabletop.spec.seed, "time_s": frame.time_s, **numbers}
            self._frame_publisher.publish(String(data=json.dumps(truth)))

    def _publish_sentences(self, tabletop: LiveTabletop, stamp_ns: int) -> None:
        """Which sentences are true of the last two seconds, and what they mean."""
        history = tabletop.history()
        if self._sentences_publisher.get_subscription_count() == 0 or history is None or len(history) < WINDOW_FRAMES:
            return
        rng = np.random.default_rng(stamp_ns)
        found = expressions(history, query_frame=len(history) - 1, rng=rng, split="all")
        sentences = [
            {"text": each.text, "kind": each.kind, "target_ids": [k + 1 for k in each.target_ids]} for each in found
        ]
        told = {"stamp_ns": stamp_ns, "sentences": sentences}
        self._sentences_publisher.publish(String(data=json.dumps(told)))

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.get_logger().fatal(f"the camera has stopped: {reason}")

    def _publish_diagnostics(self) -> None:
        now_s, frames = time.monotonic(), self._frames
        rate_hz = (frames - self._frames_reported) / (now_s - self._reported_s)
        self._frames_reported, self._reported_s = frames, now_s
        overruns = self._rate.overruns if self._rate is not None else 0
        level, message = DiagnosticStatus.OK, "filming"
        if self.failure:
            level, message = DiagnosticStatus.ERROR, self.failure
        elif rate_hz < 0.9 * self._settings.rate_hz:
            level, message = (
                DiagnosticStatus.WARN,
                f"{rate_hz:.1f} frames/s instead of {self._settings.rate_hz:g}",
            )
        values = {"rate (Hz)": f"{rate_hz:.1f}", "frames": str(frames), "overruns": str(overruns)}
        values |= {name: str(value) for name, value in dataclasses.asdict(self._settings).items()}
        status = DiagnosticStatus(
            name=f"{self.get_name()}: simulated camera",
            level=level,
            message=message,
            values=[KeyValue(key=key, value=value) for key, value in values.items()],
        )
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(array)


def camera_info(header: Header, camera: Any, settings: CameraParameters) -> CameraInfo:
    """The pinhole of the simulated camera: no distortion, so rectified and raw image are the same."""
    pinhole = camera.intrinsics(settings.width, settings.height)
    # The simulator counts from the corner of the first pixel, CameraInfo from its centre.
    fx, fy, cx, cy = pinhole.fx, pinhole.fy, pinhole.cx - 0.5, pinhole.cy - 0.5
    return CameraInfo(
        header=header,
        width=settings.width,
        height=settings.height,
        distortion_model="plumb_bob",
        d=[0.0] * 5,
        k=[fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )


def main(arguments: list[str] | None = None) -> int:
    """Film until told to stop. The exit status is 1 when a parameter was not acceptable or filming is impossible."""
    return run_node(SimCameraNode, "camera", arguments)


if __name__ == "__main__":
    sys.exit(main())
