# SPDX-License-Identifier: Apache-2.0
"""Subscribers that take a segmenter's outputs as the stacks that use them do, and count what they accept and reject.

virst-contracts --sim --seconds 60      # starts camera, reasoner and segmenter; ends with status 0 or 1
virst-contracts --image /camera/color/image_raw --depth ... --camera-info ...    # watches running ones

Formats and synchronisation are those of FoundationPose (isaac_ros_pose_estimation), nvblox, Contact-GraspNet's inputs
and MoveIt's PointCloudOctomapUpdater. Their code is not run here.
"""

import io
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from virst_engine.errors import BadFrame, VirstError
from virst_ros.fast_dds import use_profile

# What a topic is for a consumer -> its name; the last four are relative to the segmenter.
INPUTS = ("image", "depth", "camera_info")
OUTPUTS = ("mask", "target_mask", "info", "points_without_object", "objects")
OUTPUT_NAMES = {"info": "camera_info"}
SIM_TOPICS = {
    "image": "/camera/color/image_raw",
    "depth": "/camera/depth/image_raw",
    "camera_info": "/camera/color/camera_info",
}
FOUNDATIONPOSE_CAPACITY = 12  # frames of its synchroniser
NVBLOX_QUEUE, OTHER_QUEUE = 10, 10
OLDEST_S = 1.0  # FoundationPose's discard_old_messages, in its demonstrations 1000 ms
NEAREST_M = 0.1  # FoundationPose's min_depth
LEAST_WITH_OBJECT = (
    0.5  # of what is accepted in a run with a simulated camera, whose object is in view most of the time
)


def stamp_ns(message: Any) -> int:
    stamp = message.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec


@dataclass
class Consumer:
    """One stack's way to take messages: those of equal stamp together, from buffers of limited depth.

    A message of the `lead` topic that is dropped before its set is complete is rejected. What comes before the first
    complete set is not judged: topics begin one after the other.

    Args:
        check: why a complete set is of no use; empty when it is.
        has_object: whether the object is in a set that is of use.
        reliable: topics that are read with a reliable subscription; the others take what comes (SENSOR_DATA).
    """

    name: str
    topics: Sequence[str]
    lead: str
    capacity: int
    check: Callable[[Mapping[str, Any]], str]
    has_object: Callable[[Mapping[str, Any]], bool]
    reliable: Sequence[str] = ()
    accepted: int = 0
    with_object: int = 0  # of those accepted
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _buffers: dict[str, "OrderedDict[int, Any]"] = field(default_factory=dict)
    _newest_ns: dict[str, int] = field(default_factory=dict)

    def put(self, topic: str, message: Any) -> None:
        buffer, stamp = self._buffer(topic), stamp_ns(message)
        buffer[stamp] = message
        self._newest_ns[topic] = max(stamp, self._newest_ns.get(topic, 0))
        if all(stamp in self._buffer(each) for each in self.topics):
            self._judge({each: self._buffer(each).pop(stamp) for each in self.topics})
        while len(buffer) > self.capacity:
            dropped, _ = buffer.popitem(last=False)
            if topic == self.lead:
                self._reject(self._what_misses(dropped))

    def finish(self) -> None:
        """Nothing comes any more: judge what can never be complete."""
        for stamp in list(self._buffer(self.lead)):
            missing = [topic for topic in self.topics if stamp not in self._buffer(topic)]
            if any(self._newest_ns.get(topic, 0) > stamp for topic in missing):  # past it, and will not go back
                self._reject(self._what_misses(stamp))

    def _buffer(self, topic: str) -> "OrderedDict[int, Any]":
        return self._buffers.setdefault(topic, OrderedDict())

    def _judge(self, matched: Mapping[str, Any]) -> None:
        if not self.accepted and not self.rejected:
            lead = self._buffer(self.lead)
            for stamp in [each for each in lead if each < stamp_ns(matched[self.lead])]:
                del lead[stamp]  # from before all topics had begun
        reason = self.check(matched)
        if reason:
            self.rejected += 1
            self.reasons[reason] += 1
        else:
            self.accepted += 1
            self.with_object += self.has_object(matched)

    def _reject(self, reason: str) -> None:
        if self.accepted or self.rejected:
            self.rejected += 1
            self.reasons[reason] += 1

    def _what_misses(self, stamp: int) -> str:
        missing = [topic for topic in self.topics if stamp not in self._buffer(topic) and topic != self.lead]
        return f"{self.lead} without {' and '.join(missing) or 'the rest'} of its stamp among the last {self.capacity}"


def _shows(topic: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda matched: bool(_pixels(matched[topic]).any())


def _seen_ids(objects: Any) -> set[int]:
    """Of the objects whose mask is not empty. TRACKING alone does not say so: it lasts over a few missed frames."""
    return {each.instance_id for each in objects.objects if each.area_px}


def _pixels(image: Any) -> np.ndarray:
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)[:, : image.width]


def _why_no_mono8(image: Any) -> str:
    if image.encoding != "mono8":
        return f"the mask is {image.encoding}, not mono8"
    if image.step != image.width:
        return f"the rows are padded: step {image.step}, width {image.width}"
    if len(image.data) != image.height * image.width:
        return f"{len(image.data)} bytes for {image.width}x{image.height}"
    return ""


def _why_other_frame(matched: Mapping[str, Any], *topics: str) -> str:
    frames = {topic: matched[topic].header.frame_id for topic in topics}
    return "" if len(set(frames.values())) == 1 else f"frames differ: {frames}"


def foundationpose(now_ns: Callable[[], int]) -> Consumer:
    """Its synchroniser has slop 0 and 12 frames; a mask of one instance, above 0 = object, of the size of the depth.

    Without a pixel of the mask it refuses a frame, and so without depth from NEAREST_M on inside. Where the segmenter
    says in `objects` that the target is not seen, an empty mask is right, and not counted as one with the object.
    """
    from virst_ros import conversions

    def check(matched: Mapping[str, Any]) -> str:
        mask, depth, image = matched["target_mask"], matched["depth"], matched["image"]
        sizes = {(each.width, each.height) for each in (mask, depth, image)}
        if _why_no_mono8(mask):
            return _why_no_mono8(mask)
        if len(sizes) > 1:
            return f"mask, depth and image differ in size: {sorted(sizes)}"
        values = set(np.unique(_pixels(mask)).tolist())
        if not values <= {0, 255}:
            return f"values besides 0 and 255: {sorted(values - {0, 255})[:5]}"
        age_s = (now_ns() - stamp_ns(mask)) * 1e-9
        if age_s > OLDEST_S:
            return f"older than {OLDEST_S:g} s"
        inside = _pixels(mask) > 0
        seen = _seen_ids(matched["objects"])
        if not inside.any() and seen and len(seen) == len(matched["objects"].objects):  # whichever is the target
            return "the mask is all zero, although the target is seen"
        try:
            depth_m = conversions.depth_m(depth)
        except BadFrame as error:
            return str(error)
        if inside.any() and not (depth_m[inside] >= NEAREST_M).any():
            return f"no depth of {NEAREST_M:g} m or more in the mask"
        return _why_other_frame(matched, "target_mask", "image")

    topics = ("target_mask", "image", "depth", "camera_info", "objects")
    return Consumer(
        "FoundationPose",
        topics,
        "target_mask",
        FOUNDATIONPOSE_CAPACITY,
        check,
        _shows("target_mask"),
        reliable=("target_mask", "objects"),
    )


def nvblox() -> Consumer:
    """A mask and the camera_info of its camera as a pair, with the colour image, all of one stamp."""

    def check(matched: Mapping[str, Any]) -> str:
        mask, info = matched["mask"], matched["info"]
        if _why_no_mono8(mask):
            return _why_no_mono8(mask)
        if (mask.width, mask.height) != (info.width, info.height):
            return f"the mask is {mask.width}x{mask.height}, its camera_info {info.width}x{info.height}"
        if not (info.k[0] > 0 and info.k[4] > 0):
            return "its camera_info is not calibrated"
        return _why_other_frame(matched, "mask", "info", "image")

    topics = ("mask", "info", "image")
    return Consumer("nvblox", topics, "mask", NVBLOX_QUEUE, check, _shows("mask"), reliable=("mask", "info"))


def contact_graspnet() -> Consumer:
    """The arrays of its npz file: depth in metres, K, rgb, and segmap of instance ids with 0 as background."""
    from virst_msgs.msg import SegmentedObject

    from virst_ros import conversions

    def check(matched: Mapping[str, Any]) -> str:
        if _why_no_mono8(matched["mask"]):
            return _why_no_mono8(matched["mask"])
        try:
            depth_m, rgb = conversions.depth_m(matched["depth"]), conversions.image_rgb(matched["image"])
        except BadFrame as error:
            return str(error)
        file = io.BytesIO()
        k = np.array(matched["info"].k).reshape(3, 3)
        np.savez(file, depth=depth_m, K=k, rgb=rgb, segmap=_pixels(matched["mask"]))
        file.seek(0)
        with np.load(file) as scene:
            segmap, depth_m = scene["segmap"], scene["depth"]
            if segmap.shape != depth_m.shape:
                return f"segmap is {segmap.shape}, depth {depth_m.shape}"
            if not (np.isfinite(scene["K"]).all() and scene["K"][0, 0] > 0):
                return "K is not a calibration"
            objects, seen = matched["objects"], _seen_ids(matched["objects"])
            known = {each.instance_id for each in objects.objects if each.state == SegmentedObject.TRACKING}
            ids = set(np.unique(segmap).tolist()) - {0}
            if not ids <= known:
                return f"segmap has ids {sorted(ids - known)} that `objects` does not have"
            if seen and not ids:
                return f"segmap is empty, although the objects {sorted(seen)} are seen"
            empty = [each for each in ids if not np.isfinite(depth_m[segmap == each]).any()]
        return f"no depth in the segments {empty}" if empty else ""

    topics = ("mask", "info", "objects", "image", "depth")
    reliable = ("mask", "info", "objects")
    return Consumer("Contact-GraspNet", topics, "mask", OTHER_QUEUE, check, _shows("mask"), reliable)


def moveit() -> Consumer:
    """A cloud that PointCloudOctomapUpdater can read and transform, in which the target is no obstacle."""
    from sensor_msgs.msg import PointField

    def check(matched: Mapping[str, Any]) -> str:
        cloud, mask, info = matched["points_without_object"], matched["target_mask"], matched["info"]
        frame_id = cloud.header.frame_id
        if not frame_id or frame_id.startswith("/"):
            return f"frame_id {frame_id!r} is none that tf knows"
        fields = {each.name: each for each in cloud.fields}
        for name in "xyz":
            if name not in fields or fields[name].datatype != PointField.FLOAT32:
                return f"no field {name} of FLOAT32"
        if len(cloud.data) != cloud.row_step * cloud.height or cloud.row_step != cloud.point_step * cloud.width:
            return "data, row_step and point_step do not fit"
        points = _points(cloud, [fields[name].offset for name in "xyz"])
        if cloud.is_dense and not np.isfinite(points).all():
            return "is_dense, but points are not finite"
        if _count_inside(points, _pixels(mask) > 0, np.array(info.k).reshape(3, 3)):
            return "points of the target are left in it"
        return _why_other_frame(matched, "points_without_object", "target_mask")

    topics = ("points_without_object", "target_mask", "info")
    reliable = ("target_mask", "info")
    return Consumer("MoveIt", topics, "points_without_object", OTHER_QUEUE, check, _shows("target_mask"), reliable)


def _points(cloud: Any, offsets: Sequence[int]) -> np.ndarray:
    layout = {"names": list("xyz"), "formats": ["<f4"] * 3, "offsets": list(offsets), "itemsize": cloud.point_step}
    read = np.frombuffer(cloud.data, np.dtype(layout))
    return np.stack([read[name] for name in "xyz"], axis=1).astype(np.float64)


def _count_inside(points: np.ndarray, mask: np.ndarray, k: np.ndarray) -> int:
    """How many points are seen in the mask."""
    ahead = points[points[:, 2] > 0]
    pixels = ahead @ k.T
    columns, rows = np.round(pixels[:, :2] / pixels[:, 2:]).astype(int).T
    inside = (columns >= 0) & (columns < mask.shape[1]) & (rows >= 0) & (rows < mask.shape[0])
    return int(mask[rows[inside], columns[inside]].sum())


class Watch:
    """All consumers, fed by the subscriptions of a node. Each topic is read once, whoever wants it.

    Args:
        topics: name of every topic of `INPUTS` and `OUTPUTS`.
    """

    def __init__(self, node: Any, topics: Mapping[str, str]) -> None:
        from rclpy.qos import QoSProfile, ReliabilityPolicy
        from sensor_msgs.msg import CameraInfo, Image, PointCloud2
        from virst_msgs.msg import SegmentedObjectArray

        self.consumers = (
            foundationpose(lambda: node.get_clock().now().nanoseconds),
            nvblox(),
            contact_graspnet(),
            moveit(),
        )
        kinds = {
            "camera_info": CameraInfo,
            "info": CameraInfo,
            "points_without_object": PointCloud2,
            "objects": SegmentedObjectArray,
        }
        reliable = {topic for consumer in self.consumers for topic in consumer.reliable}
        self.received: Counter[str] = Counter()
        self._node, self._lock = node, threading.Lock()
        for topic in (*INPUTS, *OUTPUTS):
            kind = ReliabilityPolicy.RELIABLE if topic in reliable else ReliabilityPolicy.BEST_EFFORT
            # Deep enough that this program is no reason for a loss; what a consumer keeps is in its own buffer.
            profile = QoSProfile(depth=50, reliability=kind)
            node.create_subscription(
                kinds.get(topic, Image), topics[topic], lambda message, topic=topic: self._put(topic, message), profile
            )

    def _put(self, topic: str, message: Any) -> None:
        with self._lock:
            self.received[topic] += 1
            for consumer in self.consumers:
                if topic in consumer.topics:
                    consumer.put(topic, message)

    def finish(self) -> list[dict[str, Any]]:
        """What became of everything: per consumer its name, accepted, of them with the object, rejected, and why."""
        with self._lock:
            for consumer in self.consumers:
                consumer.finish()
            return [
                {
                    "consumer": consumer.name,
                    "accepted": consumer.accepted,
                    "with_object": consumer.with_object,
                    "rejected": consumer.rejected,
                    "reasons": dict(consumer.reasons.most_common(10)),
                }
                for consumer in self.consumers
            ]


def output_topics(segmenter: str) -> dict[str, str]:
    """The topics of `OUTPUTS` of the segmenter of that full name."""
    return {topic: f"/{segmenter.strip('/')}/{OUTPUT_NAMES.get(topic, topic)}" for topic in OUTPUTS}


class _Simulation:
    """Camera, reasoner and segmenter as processes, as the demo starts them."""

    def __init__(self, children: Any, folder: Path, domain_id: int, rate_hz: float, width: int, height: int) -> None:
        endpoint = f"ipc://{folder}/reasoner"
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain_id)}
        remapped = [word for name, topic in SIM_TOPICS.items() for word in ("-r", f"{name}:={topic}")]
        camera = ["family:=demo", f"rate_hz:={rate_hz}", f"width:={width}", f"height:={height}"]
        segmenter = ["use_depth:=true", f"reasoner.endpoint:={endpoint}"]
        python = [sys.executable, "-m"]
        for name, command in (
            ("camera", [*python, "virst_ros.sim_camera_node", "--ros-args", *_parameters(camera)]),
            ("reasoner", [*python, "virst_engine.slow.zmq_server", "--endpoint", endpoint]),
            ("segmenter", [*python, "virst_ros.segmenter_node", "--ros-args", *remapped, *_parameters(segmenter)]),
        ):
            children.start(name, command, environment)


def _parameters(assignments: Sequence[str]) -> list[str]:
    return [word for each in assignments for word in ("-p", each)]


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def _command(
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to watch, from the first mask on.")] = 60.0,
    segmenter: Annotated[str, typer.Option(help="Full name of the segmenter.")] = "/segmenter",
    image: Annotated[str, typer.Option(help="Topic of its colour images.")] = SIM_TOPICS["image"],
    depth: Annotated[str, typer.Option(help="Topic of its registered depth.")] = SIM_TOPICS["depth"],
    camera_info: Annotated[str, typer.Option(help="Topic of its calibration.")] = SIM_TOPICS["camera_info"],
    goal: Annotated[str, typer.Option(help="A goal that is set first; empty = none.")] = "",
    sim: Annotated[bool, typer.Option("--sim", help="Start a simulated camera, a reasoner and a segmenter.")] = False,
    rate: Annotated[float, typer.Option(min=1.0, help="Images per second of the simulated camera.")] = 15.0,
    width: Annotated[int, typer.Option(help="Pixels of the simulated camera.")] = 320,
    height: Annotated[int, typer.Option(help="Pixels of the simulated camera.")] = 240,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    """Watch a segmenter as its consumers would, and say what they accept and reject."""
    use_profile()
    topics = {"image": image, "depth": depth, "camera_info": camera_info, **output_topics(segmenter)}
    try:
        if sim:
            figures = _watch_simulation(seconds, goal or "the red ball", rate, width, height)
        else:
            figures = _watch(topics, seconds, goal, segmenter, None)
    except VirstError as error:
        typer.echo(f"virst-contracts: {error}", err=True)
        raise typer.Exit(1) from error
    for row in figures["consumers"]:
        typer.echo(
            f"{row['consumer']:18s} accepted {row['accepted']:6d}   with the object {row['with_object']:6d}   "
            f"rejected {row['rejected']:4d}"
        )
        for reason, times in row["reasons"].items():
            typer.echo(f"{'':18s}   {times} x {reason}")
    typer.echo("received: " + ", ".join(f"{topic} {count}" for topic, count in figures["received"].items()))
    for name, value in figures["diagnostics"].items():
        typer.echo(f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    problems = failures(figures["consumers"], LEAST_WITH_OBJECT if sim else 0.0)
    for problem in problems:
        typer.echo(f"virst-contracts: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def failures(rows: Sequence[Mapping[str, Any]], least_with_object: float) -> list[str]:
    """Why these rows of `Watch.finish` are no success; empty when they are one.

    Args:
        least_with_object: the part of what is accepted that must have the object, 0 to 1.
    """
    problems = []
    for row in rows:
        if row["rejected"] or not row["accepted"]:
            problems.append(f"{row['consumer']}: {row['rejected']} rejected, {row['accepted']} accepted")
        elif row["with_object"] < least_with_object * row["accepted"]:
            problems.append(
                f"{row['consumer']}: the object is in {row['with_object']} of {row['accepted']}, less than "
                f"{least_with_object:.0%}; does the segmenter find it? See /diagnostics and ~/objects"
            )
    return problems


def _watch_simulation(seconds: float, goal: str, rate_hz: float, width: int, height: int) -> dict[str, Any]:
    from virst_ros.demo.child_processes import ChildProcesses
    from virst_ros.demo.ros_domain import free_ros_domain

    topics = {**SIM_TOPICS, **output_topics("/segmenter")}
    with (
        free_ros_domain() as domain_id,
        tempfile.TemporaryDirectory(prefix="virst_contracts_") as folder,
        ChildProcesses(Path(folder)) as children,
    ):
        _Simulation(children, Path(folder), domain_id, rate_hz, width, height)
        return _watch(topics, seconds, goal, "/segmenter", domain_id, children.check)


def _watch(
    topics: Mapping[str, str],
    seconds: float,
    goal: str,
    segmenter: str,
    domain_id: int | None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor

    from virst_ros.goal import SegmenterServices
    from virst_ros.spinning import spin_until_shutdown

    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain_id)
    told: dict[str, str] = {}

    def on_diagnostics(message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name == f"{segmenter.strip('/')}: output":
                told.update({pair.key: pair.value for pair in status.values if "p50" in pair.key or "rate" in pair.key})

    try:
        if goal:
            asker = rclpy.create_node("contracts_goal", context=context)
            _set_goal(SegmenterServices(asker, segmenter, 60.0), goal)
            asker.destroy_node()
        node = rclpy.create_node("contracts", context=context)
        watch = Watch(node, topics)
        node.create_subscription(DiagnosticArray, "/diagnostics", on_diagnostics, 10)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        thread = threading.Thread(target=spin_until_shutdown, args=(executor,))
        thread.start()
        try:
            _wait_for(lambda: bool(watch.received["mask"]), 60.0, f"no mask on {topics['mask']}", check)
            _wait_for(lambda: False, seconds, "", check)
        finally:
            executor.shutdown()
            thread.join()
        figures = {"seconds": seconds, "consumers": watch.finish(), "received": dict(watch.received)}
        node.destroy_node()
        return {**figures, "diagnostics": told}
    finally:
        context.try_shutdown()


def _set_goal(services: Any, goal: str) -> None:
    from virst_ros.goal import Refused

    deadline_s = time.monotonic() + 60.0
    while True:
        try:
            services.set_goal(goal, replace=True)
            return
        except Refused:  # it is not active yet
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


def _wait_for(condition: Callable[[], bool], timeout_s: float, otherwise: str, check: Callable[[], None]) -> None:
    """Until it holds; after the time-out, VirstError with `otherwise`, or nothing when that is empty."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        check()
        if time.monotonic() > deadline_s:
            if otherwise:
                raise VirstError(f"{otherwise} within {timeout_s:g} s: is the segmenter active, and do images arrive?")
            return
        time.sleep(min(0.1, max(0.0, deadline_s - time.monotonic())) or math.ulp(1.0))


def main() -> int:
    """Run the program; see --help."""
    app(prog_name="virst-contracts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
