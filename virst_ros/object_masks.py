# SPDX-License-Identifier: Apache-2.0
"""`objects/<object_id>/mask`: a mask of 0 and 255 for each object, on a topic that is there as long as the object."""

import re
from collections.abc import Collection

import numpy as np
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image

from virst_engine import ObjectState
from virst_ros import conversions
from virst_ros.outputs import Output, SegmentedFrame

try:
    from rclpy.event_handler import PublisherEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks

MOST_TOPICS = 64  # of one camera; objects beyond have none
LONGEST_NAME = 64


def topic_part(object_id: str, taken: Collection[str] = ()) -> str:
    """An object's id as one part of a topic's name, another one than those that are taken.

    What a name cannot hold becomes one _: "balls.1" is balls_1.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "_", object_id).strip("_")[:LONGEST_NAME].strip("_")
    if not name or name[0].isdigit():
        name = f"object_{name}".rstrip("_")
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


class ObjectMasks:
    """Makes the topics of one camera with its objects, on the inference thread.

    Args:
        prefix: of the topics, "~/" or "~/<camera>/".
    """

    def __init__(self, node: LifecycleNode, prefix: str, profile: QoSProfile) -> None:
        self._node, self._prefix, self._profile = node, prefix, profile
        self._outputs: dict[tuple[str, int], tuple[str, Output]] = {}  # by object and instance id: name, publisher
        self._is_full_told = False

    def publish(self, shown: SegmentedFrame) -> None:
        """Masks for those who listen; topics for objects that are new, none for those that are gone."""
        objects = {(found.object_id, found.instance_id): found for found in shown.result.objects}
        for key in [key for key in self._outputs if key not in objects]:
            self._node.destroy_publisher(self._outputs.pop(key)[1].publisher)
        for key, found in objects.items():
            if key not in self._outputs:
                if len(self._outputs) >= MOST_TOPICS:
                    self._tell_it_is_full(found.object_id)
                    continue
                self._outputs[key] = self._made(found.object_id)
            output = self._outputs[key][1]
            if output.wanted:
                mask = found.mask if found.state is ObjectState.TRACKING else np.zeros_like(found.mask)
                output.publish(conversions.image_message(shown.header, conversions.binary(mask), "mono8"))

    def destroy(self) -> None:
        for _, output in self._outputs.values():
            self._node.destroy_publisher(output.publisher)
        self._outputs = {}

    def _made(self, object_id: str) -> tuple[str, Output]:
        name = topic_part(object_id, [taken for taken, _ in self._outputs.values()])
        # Without events: a publisher with them would have to be made by the thread that waits for them.
        publisher = self._node.create_publisher(
            Image,
            f"{self._prefix}objects/{name}/mask",
            self._profile,
            event_callbacks=PublisherEventCallbacks(use_default_callbacks=False),
        )
        if name != object_id:  # whoever chose the id could not know
            self._node.get_logger().info(f"the mask of object {object_id!r} is on {publisher.topic_name}")
        return name, Output(publisher)

    def _tell_it_is_full(self, object_id: str) -> None:
        if not self._is_full_told:
            self._is_full_told = True
            self._node.get_logger().warning(
                f"{MOST_TOPICS} objects have a topic of their own already, {object_id!r} and others get none: read "
                f"{self._prefix}mask and {self._prefix}objects instead"
            )
