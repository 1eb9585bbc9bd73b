# SPDX-License-Identifier: Apache-2.0
"""`detections` and `label_info`, in the messages of vision_msgs; only where that package is installed.

It is no dependency of the node: without it, everything else is published.
"""

import importlib
from types import ModuleType
from typing import Any

from virst_engine import ObjectState
from virst_engine.visualize import caption_of
from virst_ros import conversions, qos
from virst_ros.outputs import Publishers, SegmentedFrame
from virst_ros.parameters import OFF, ON, NodeParameters


def load_vision_msgs() -> ModuleType | None:
    """vision_msgs.msg, or None where it is not installed."""
    try:
        return importlib.import_module("vision_msgs.msg")
    except ImportError:
        return None


def why_no_detections(settings: NodeParameters) -> str:
    """What to tell a user who has asked for detections and gets none; empty when all is well."""
    if settings.detections != ON or load_vision_msgs() is not None:
        return ""
    return (
        "detections is on, but the package vision_msgs is not installed: detections and label_info are not published. "
        "Install it (sudo apt install ros-$ROS_DISTRO-vision-msgs), or set detections to auto"
    )


class VisionOutputs:
    """The two publishers. `make` gives None where there are none."""

    def __init__(self, messages: ModuleType, publishers: Publishers, settings: NodeParameters) -> None:
        self._messages = messages
        results = qos.profile(settings.output_qos, settings.output_depth)
        self.detections = publishers.make(messages.Detection2DArray, "detections", results)
        self.label_info = publishers.make(messages.LabelInfo, "label_info", qos.LATCHED)
        self._labels: list[tuple[int, str]] | None = None

    @staticmethod
    def make(publishers: Publishers, settings: NodeParameters) -> "VisionOutputs | None":
        messages = load_vision_msgs() if settings.detections != OFF else None
        return VisionOutputs(messages, publishers, settings) if messages is not None else None

    def publish(self, shown: SegmentedFrame) -> None:
        labels = _labels(shown)
        if labels != self._labels or self.label_info.wanted:
            self._labels = labels
            self.label_info.publish(label_info(self._messages, shown))
        if self.detections.wanted:
            self.detections.publish(detections(self._messages, shown))


def _labels(shown: SegmentedFrame) -> list[tuple[int, str]]:
    """Value in the mask and caption of every object that is set, seen or not."""
    labels = [(goal.instance_id, shown.captions[goal.goal_id]) for goal in shown.goals]
    parts = [(each.instance_id, caption_of(each, shown.captions)) for each in shown.result.objects if each.part_of]
    return labels + parts


def label_info(messages: ModuleType, shown: SegmentedFrame) -> Any:
    """Which value in the mask stands for which sentence (vision_msgs/LabelInfo)."""
    classes = [messages.VisionClass(class_id=class_id, class_name=name) for class_id, name in _labels(shown)]
    return messages.LabelInfo(header=shown.header, class_map=classes, threshold=0.5)


def detections(messages: ModuleType, shown: SegmentedFrame) -> Any:
    """What is seen now (vision_msgs/Detection2DArray): box of the mask, `id` the object's, class_id the sentence."""
    found = []
    for each in shown.result.objects:
        ours = conversions.object_message(each, "")
        if each.state is not ObjectState.TRACKING or ours.area_px == 0:
            continue
        box = messages.BoundingBox2D(size_x=float(ours.bbox.width), size_y=float(ours.bbox.height))
        box.center.position.x = ours.bbox.x_offset + ours.bbox.width / 2
        box.center.position.y = ours.bbox.y_offset + ours.bbox.height / 2
        guess = messages.ObjectHypothesisWithPose()
        guess.hypothesis.class_id, guess.hypothesis.score = (
            caption_of(each, shown.captions),
            float(each.score),
        )
        found.append(messages.Detection2D(header=shown.header, results=[guess], bbox=box, id=each.object_id))
    return messages.Detection2DArray(header=shown.header, detections=found)
