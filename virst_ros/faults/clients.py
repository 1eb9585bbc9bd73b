# SPDX-License-Identifier: Apache-2.0
"""Programs that use a segmenter, as processes that a fault may kill or stop.

python -m virst_ros.faults.clients segment /segmenter "the purple egg"    # an action goal, and waits for its result
python -m virst_ros.faults.clients read /segmenter/mask                   # a reliable reader of masks
"""

import sys

import rclpy


def segment(segmenter: str, sentence: str) -> None:
    """Says "accepted" when the goal is."""
    from rclpy.action import ActionClient
    from virst_msgs.action import Segment

    node = rclpy.create_node("faults_client")
    client = ActionClient(node, Segment, f"{segmenter}/segment")
    client.wait_for_server()
    future = client.send_goal_async(Segment.Goal(goal=sentence, timeout=60.0))
    rclpy.spin_until_future_complete(node, future)
    print("accepted" if future.result().accepted else "rejected", flush=True)
    rclpy.spin_until_future_complete(node, future.result().get_result_async())


def read(topic: str) -> None:
    """Says "reading" with the first message."""
    from sensor_msgs.msg import Image

    node = rclpy.create_node("faults_reader")
    is_first = True

    def on_message(_: Image) -> None:
        nonlocal is_first
        if is_first:
            print("reading", flush=True)
        is_first = False

    node.create_subscription(Image, topic, on_message, 50)
    rclpy.spin(node)


if __name__ == "__main__":
    rclpy.init(args=[])
    {"segment": segment, "read": read}[sys.argv[1]](*sys.argv[2:])
