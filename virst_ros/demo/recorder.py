# SPDX-License-Identifier: Apache-2.0
"""The demo's ear: collects images, truth and masks, and joins those of the same stamp."""

import json
import math
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String
from virst_msgs.msg import SegmentedObjectArray
from virst_msgs.srv import SetGoal

from virst_engine.errors import VirstError
from virst_engine.sim.recording import TRUTH_ARRAYS, Recording
from virst_engine.sim.spec import SceneSpec
from virst_engine.types import ObjectState
from virst_ros import conversions
from virst_ros.demo.report import GoalRun, MaskedFrame, encode_image, encode_mask

PENDING = 200  # stamps that wait for their other parts
KEPT_IMAGES = 2400  # two minutes: the video's part of a long run is its end
WINDOW_FRAMES, WINDOW_HZ = 22, 10.0  # what decides the meaning of a sentence


@dataclass(frozen=True)
class Moment:
    """The newest of everything, for displays."""

    images: int  # received in all
    masks: int
    age_ms: tuple[float, ...]  # of the newest masks
    state: ObjectState
    score: float
    reasoner_latency_s: float
    message: str
    image_rgb_u8: np.ndarray | None
    frame: MaskedFrame | None


class DemoRecorder(Node):
    """Subscribes to camera, truth and segmenter; callbacks come from the executor's thread, the rest from any."""

    def __init__(self, keep_images: bool = True, **node_arguments: Any) -> None:
        super().__init__("demo", **node_arguments)
        self._lock = threading.Lock()
        self._keep_images = keep_images
        self._images: OrderedDict[int, bytes] = OrderedDict()
        self._truths: OrderedDict[int, bytes] = OrderedDict()
        self._masks: OrderedDict[int, bytes] = OrderedDict()
        self._truth_numbers: deque[dict[str, Any]] = deque(maxlen=200)
        self._runs: dict[str, GoalRun] = {}
        self._frames: dict[str, OrderedDict[int, MaskedFrame]] = {}
        self._with_image: deque[tuple[GoalRun, int]] = deque()
        self._ages: deque[float] = deque(maxlen=100)
        self._newest_image: np.ndarray | None = None
        self._newest_frame: MaskedFrame | None = None
        self._message = ""
        self._image_count = self._mask_count = 0

        every = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
        self.create_subscription(Image, "/camera/color/image_raw", self._on_image, qos_profile_sensor_data)
        self.create_subscription(Image, "/camera/truth/mask", self._on_truth, every)
        self.create_subscription(String, "/camera/truth/frame", self._on_truth_numbers, every)
        self.create_subscription(Image, "/segmenter/mask", self._on_mask, every)
        self.create_subscription(SegmentedObjectArray, "/segmenter/objects", self._on_objects, every)
        self._set_goal = self.create_client(SetGoal, "/segmenter/set_goal")

    # Callbacks

    def _on_image(self, message: Image) -> None:
        image = conversions.image_rgb(message)
        jpeg = encode_image(image) if self._keep_images else None
        with self._lock:
            self._image_count += 1
            self._newest_image = image
            if jpeg is not None:
                _put(self._images, conversions.stamp_ns(message.header.stamp), jpeg, PENDING)

    def _on_truth(self, message: Image) -> None:
        png = encode_mask(_grey(message))
        with self._lock:
            _put(self._truths, conversions.stamp_ns(message.header.stamp), png, PENDING)

    def _on_truth_numbers(self, message: String) -> None:
        with self._lock:
            self._truth_numbers.append(json.loads(message.data))

    def _on_mask(self, message: Image) -> None:
        png = encode_mask(_grey(message))
        with self._lock:
            self._mask_count += 1
            _put(self._masks, conversions.stamp_ns(message.header.stamp), png, PENDING)

    def _on_objects(self, message: SegmentedObjectArray) -> None:
        stamp_ns = conversions.stamp_ns(message.header.stamp)
        with self._lock:
            self._ages.append(message.timings.age_ms)
            for found in message.objects:
                frame = MaskedFrame(
                    stamp_ns=stamp_ns,
                    mask_png=b"",
                    instance_id=found.instance_id,
                    state=ObjectState(found.state),
                    score=found.score,
                    reasoner_latency_s=found.reasoner_latency,
                    age_ms=message.timings.age_ms,
                    frames_in=message.timings.frames_in,
                )
                self._frames.setdefault(found.goal_id, OrderedDict())[stamp_ns] = frame
                self._newest_frame, self._message = frame, found.message
            self._join(stamp_ns)

    def _join(self, newest_ns: int) -> None:
        """Complete the frames whose parts have come meanwhile; parts of one stamp may overtake each other."""
        for goal_id, frames in self._frames.items():
            run = self._runs.get(goal_id)
            if run is None:
                continue
            for stamp_ns in list(frames):
                is_late = newest_ns - stamp_ns > 1_000_000_000
                mask, truth = self._masks.get(stamp_ns), self._truths.get(stamp_ns)
                image = self._images.get(stamp_ns)
                is_complete = truth is not None and (image is not None or not self._keep_images)
                if mask is None or not (is_complete or is_late):
                    if mask is None and is_late:
                        del frames[stamp_ns]
                    continue
                self._append(run, replace(frames.pop(stamp_ns), mask_png=mask, image_jpeg=image, truth_png=truth))

    def _append(self, run: GoalRun, frame: MaskedFrame) -> None:
        run.frames.append(frame)
        if frame.image_jpeg is None:
            return
        self._with_image.append((run, len(run.frames) - 1))
        if len(self._with_image) > KEPT_IMAGES:
            oldest, number = self._with_image.popleft()
            oldest.frames[number] = replace(oldest.frames[number], image_jpeg=None)

    # For the main thread

    def moment(self) -> Moment:
        with self._lock:
            newest = self._newest_frame
            return Moment(
                images=self._image_count,
                masks=self._mask_count,
                age_ms=tuple(self._ages),
                state=newest.state if newest else ObjectState.SEARCHING,
                score=newest.score if newest else 0.0,
                reasoner_latency_s=newest.reasoner_latency_s if newest else math.nan,
                message=self._message,
                image_rgb_u8=self._newest_image,
                frame=newest,
            )

    def set_goal(self, sentence: str, timeout_s: float = 5.0) -> GoalRun:
        """Ask the segmenter for this goal in place of all others. Raises VirstError when it refuses or is silent."""
        request = SetGoal.Request(goal=sentence, replace=True)
        done = threading.Event()
        future = self._set_goal.call_async(request)
        future.add_done_callback(lambda _: done.set())
        if not done.wait(timeout_s):
            raise VirstError(f"the segmenter did not answer set_goal within {timeout_s:g} s; see its log")
        response = future.result()
        if response is None or not response.success:
            reason = response.message if response is not None else "the call failed"
            raise VirstError(f"the segmenter refused the goal {sentence!r}: {reason}")
        run = GoalRun(sentence, response.goal_id)
        with self._lock:
            self._runs[response.goal_id] = run
            self._newest_frame, self._message = None, ""
        return run

    def service_is_ready(self) -> bool:
        return bool(self._set_goal.service_is_ready())

    def finish(self) -> None:
        """Give parts that are on their way a moment, then let frames join without them."""
        time.sleep(0.3)
        with self._lock:
            newest = max((stamp for frames in self._frames.values() for stamp in frames), default=0)
            self._join(newest + 2_000_000_000)

    def window(self, spec: SceneSpec, width: int = 320, height: int = 240) -> Recording | None:
        """The truth of the last 2.1 s at 10 Hz, without images; None while nothing was heard."""
        with self._lock:
            numbers = list(self._truth_numbers)
        if not numbers:
            return None
        newest_s = numbers[-1]["time_s"]
        picked: list[dict[str, Any]] = []
        for back in range(WINDOW_FRAMES):
            wanted_s = newest_s - back / WINDOW_HZ
            nearest = min(numbers, key=lambda each: abs(each["time_s"] - wanted_s))
            if abs(nearest["time_s"] - wanted_s) > 0.5 / WINDOW_HZ:
                break
            picked.insert(0, nearest)
        arrays = {name: np.array([each[name] for each in picked], dtype=np.float32) for name in TRUTH_ARRAYS}
        times = np.array([each["time_s"] for each in picked])
        return Recording(spec=spec, fps=WINDOW_HZ, width=width, height=height, time_s=times, **arrays)


def _put(store: "OrderedDict[int, bytes]", stamp_ns: int, value: bytes, limit: int) -> None:
    store[stamp_ns] = value
    while len(store) > limit:
        store.popitem(last=False)


def _grey(message: Image) -> np.ndarray:
    """A mono8 image's pixels, without the padding of its rows."""
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    return np.ascontiguousarray(rows[:, : message.width])
