# SPDX-License-Identifier: Apache-2.0
"""Measures what ROS costs per frame: from the image's callback to the frame's last message, less the engine's step.

virst-overhead --seconds 30     # 1280x720; camera, reasoner and segmenter are processes of their own

The segmenter itself measures and tells it on /diagnostics ("ROS overhead p50 (ms)"); this program gives it work.
"""

import json
import os
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer

from virst_engine.errors import VirstError
from virst_ros.fast_dds import use_profile

SENTENCES = ("the red ball", "the box left of the blue can", "the thing that can roll", "the object moving to the left")

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def _command(
    seconds: Annotated[float, typer.Option(min=5.0, help="How long to measure.")] = 30.0,
    width: Annotated[int, typer.Option(min=64, help="Pixels of the images.")] = 1280,
    height: Annotated[int, typer.Option(min=48, help="Pixels of the images.")] = 720,
    rate: Annotated[float, typer.Option(min=0.5, help="Images per second; below what the engine can do.")] = 6.0,
    encoding: Annotated[str, typer.Option(help="rgb8 or bgr8.")] = "rgb8",
    goals: Annotated[int, typer.Option(min=0, max=len(SENTENCES), help="Goals that are set.")] = 1,
    depth: Annotated[bool, typer.Option("--depth", help="With depth, and readers of both clouds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    """Measure the overhead of the node on this machine."""
    try:
        figures = _measure(seconds, width, height, rate, encoding, goals, with_depth=depth)
    except VirstError as error:
        typer.echo(f"virst-overhead: {error}", err=True)
        raise typer.Exit(1) from error
    for name, value in figures.items():
        typer.echo(f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(
    seconds: float, width: int, height: int, rate_hz: float, encoding: str, goals: int, *, with_depth: bool
) -> dict[str, Any]:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor
    from sensor_msgs.msg import Image, PointCloud2
    from std_srvs.srv import SetBool
    from virst_msgs.msg import SegmentedObjectArray

    from virst_ros.demo.child_processes import ChildProcesses
    from virst_ros.demo.ros_domain import free_ros_domain
    from virst_ros.goal import SegmenterServices
    from virst_ros.spinning import spin_until_shutdown

    use_profile()
    told: dict[str, str] = {}

    def on_diagnostics(message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name == "segmenter: output":
                told.update({pair.key: pair.value for pair in status.values})

    with (
        free_ros_domain() as domain_id,
        tempfile.TemporaryDirectory(prefix="virst_overhead_") as folder,
        ChildProcesses(Path(folder)) as children,
    ):
        endpoint = f"ipc://{folder}/reasoner"
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain_id)}
        python = [sys.executable, "-m"]
        parameters = [f"reasoner.endpoint:={endpoint}", f"use_depth:={str(with_depth).lower()}"]
        given = [word for each in parameters for word in ("-p", each)]
        children.start("reasoner", [*python, "virst_engine.slow.zmq_server", "--endpoint", endpoint], environment)
        children.start("segmenter", [*python, "virst_ros.segmenter_node", "--ros-args", *given], environment)
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain_id)
        try:
            asker = rclpy.create_node("overhead_asker", context=context)
            services = SegmenterServices(asker, "/segmenter", 60.0)
            for sentence in SENTENCES[:goals]:
                _insist(lambda sentence=sentence: services.set_goal(sentence))
            node = rclpy.create_node("overhead", context=context)
            node.create_subscription(DiagnosticArray, "/diagnostics", on_diagnostics, 10)
            node.create_subscription(Image, "/segmenter/mask", lambda _: None, 5)
            node.create_subscription(SegmentedObjectArray, "/segmenter/objects", lambda _: None, 5)
            if with_depth:
                for topic in ("points", "points_without_object"):
                    node.create_subscription(PointCloud2, f"/segmenter/{topic}", lambda _: None, 1)
            camera = _Camera(node, width, height, rate_hz, encoding, with_depth=with_depth)
            executor = SingleThreadedExecutor(context=context)
            executor.add_node(node)
            threads = [threading.Thread(target=spin_until_shutdown, args=(executor,)), camera.thread]
            for thread in threads:
                thread.start()
            try:
                time.sleep(5.0)  # the first frames allocate, and the goals are found
                for wanted in (False, True):  # starts the node's figures anew
                    services._call(SetBool, "enable", SetBool.Request(data=wanted))
                end_s = time.monotonic() + seconds
                while time.monotonic() < end_s:
                    children.check()
                    time.sleep(0.1)
            finally:
                camera.stopping.set()
                executor.shutdown()
                for thread in threads:
                    thread.join()
            node.destroy_node()
            asker.destroy_node()
        finally:
            context.try_shutdown()
    wanted_keys = ("rate (Hz)", "published", "age p50 (ms)", "age p99 (ms)")
    kept = {key: float(told[key]) for key in told if key in wanted_keys or key.startswith("ROS overhead")}
    return {"image": f"{width}x{height} {encoding}", "goals": goals, "depth": with_depth, **kept}


def _insist(act: Any) -> None:
    from virst_ros.goal import Refused

    deadline_s = time.monotonic() + 60.0
    while True:
        try:
            act()
            return
        except Refused:  # it is not active yet
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


class _Camera:
    """Plays the recorded run of the demo, enlarged, from a thread of its own."""

    def __init__(self, node: Any, width: int, height: int, rate_hz: float, encoding: str, *, with_depth: bool) -> None:
        from sensor_msgs.msg import CameraInfo, Image

        from virst_ros.demo.recorded_run import load_recording

        self._run = load_recording()
        self._node, self._size, self._period_s, self._encoding = node, (width, height), 1.0 / rate_hz, encoding
        self._images = node.create_publisher(Image, "/image", 5)
        self._infos = node.create_publisher(CameraInfo, "/camera_info", 5)
        self._depths = node.create_publisher(Image, "/depth", 5) if with_depth else None
        self._depth_mm = np.full((height, width), 600, np.uint16)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._play)

    def _play(self) -> None:
        from sensor_msgs.msg import CameraInfo, Image

        (width, height), played = self._size, 0
        while not self.stopping.wait(self._period_s):
            picture = self._run.images_rgb_u8[played % len(self._run)]
            played += 1
            large = cv2.resize(picture, (width, height))
            message = Image(height=height, width=width, encoding=self._encoding, step=3 * width)
            message.data = array("B", large.tobytes())
            message.header.frame_id = "camera"
            message.header.stamp = self._node.get_clock().now().to_msg()
            focal_px = float(width)
            k = [focal_px, 0.0, width / 2, 0.0, focal_px, height / 2, 0.0, 0.0, 1.0]
            self._infos.publish(CameraInfo(header=message.header, width=width, height=height, k=k))
            if self._depths is not None:
                far = Image(header=message.header, height=height, width=width, encoding="16UC1", step=2 * width)
                far.data = array("B", self._depth_mm.tobytes())
                self._depths.publish(far)
            self._images.publish(message)


def main() -> int:
    """Run the program; see --help."""
    app(prog_name="virst-overhead")
    return 0


if __name__ == "__main__":
    sys.exit(main())
