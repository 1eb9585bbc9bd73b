# SPDX-License-Identifier: Apache-2.0
"""A camera of another process: python camera_process.py WIDTH HEIGHT COUNT publishes best-effort bgr8 on /image."""

import sys
import time
from array import array

import rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image


def main(width: int, height: int, count: int) -> None:
    rclpy.init()
    node = rclpy.create_node("camera_process")
    publisher = node.create_publisher(Image, "/image", qos_profile_sensor_data)
    message = Image(height=height, width=width, encoding="bgr8", step=width * 3)
    message.header.frame_id = "other_process"
    message.data = array("B", bytes(width * height * 3))
    while publisher.get_subscription_count() == 0:
        time.sleep(0.01)
    time.sleep(0.5)  # the subscriber has found us, but Fast DDS tells a writer a little before its reader is ready
    for number in range(count):
        message.header.stamp.sec, message.header.stamp.nanosec = 1000 + number, 987_654_321
        publisher.publish(message)
        time.sleep(0.05)
    time.sleep(0.5)
    node.destroy_node()
    rclpy.shutdown()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
