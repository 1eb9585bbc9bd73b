# SPDX-License-Identifier: Apache-2.0
"""An RGB-D camera before a wall, with one bright block whose place is known."""

import itertools
from array import array

import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

FRAME_ID = "front_color_optical_frame"
FOCAL_PX = 60.0
WALL_M, BLOCK_M = 1.5, 1.0


class RgbdCamera:
    """Publishes colour, registered depth and calibration on the relative topics of the segmenter.

    Args:
        depth_scale: size of the depth image over that of the colour image.
    """

    def __init__(self, graph, width=64, height=48, encoding="32FC1", depth_scale=1.0, depth_offset_ns=0):
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)  # as most drivers
        self.width, self.height, self.encoding = width, height, encoding
        self.depth_scale, self.depth_offset_ns = depth_scale, depth_offset_ns
        self.image_publisher = graph.publisher(Image, "image", qos)
        self.depth_publisher = graph.publisher(Image, "depth", qos)
        self.info_publisher = graph.publisher(CameraInfo, "camera_info", qos)
        self._graph = graph
        self._numbers = itertools.count(1)
        self.sent_ns = []

    def connected(self, subscribers=1):
        """Whether a segmenter with depth, and others, listen."""
        return all(
            publisher.get_subscription_count() >= subscribers
            for publisher in (self.image_publisher, self.depth_publisher, self.info_publisher)
        )

    @property
    def block(self):
        """Rows and columns of the block in the colour image."""
        return slice(self.height // 4, self.height // 2), slice(self.width // 4, self.width // 2)

    def block_centre_m(self):
        """Middle of the block's visible face, in the camera's frame."""
        rows, columns = self.block
        x = ((columns.start + columns.stop - 1) / 2 - (self.width - 1) / 2) / FOCAL_PX * BLOCK_M
        y = ((rows.start + rows.stop - 1) / 2 - (self.height - 1) / 2) / FOCAL_PX * BLOCK_M
        return np.array([x, y, BLOCK_M])

    def block_size_m(self):
        """Width and height of its face."""
        rows, columns = self.block
        return np.array([columns.stop - columns.start, rows.stop - rows.start]) / FOCAL_PX * BLOCK_M

    def depth_m(self):
        depth = np.full((self.height, self.width), WALL_M, np.float32)
        depth[self.block] = BLOCK_M
        step = round(1 / self.depth_scale)
        return depth[step // 2 :: step, step // 2 :: step]

    def new_stamp_ns(self):
        # The low digits are ours: no clock and no rounding would keep them by chance.
        return self._graph.node.get_clock().now().nanoseconds // 1000 * 1000 + next(self._numbers) % 1000

    def image(self, stamp_ns):
        pixels = np.zeros((self.height, self.width, 3), np.uint8)
        pixels[self.block] = 200, 180, 255
        return self._message(stamp_ns, pixels, "rgb8")

    def depth(self, stamp_ns, depth_m=None):
        depth_m = self.depth_m() if depth_m is None else depth_m
        if self.encoding == "16UC1":
            return self._message(stamp_ns, (depth_m * 1000).round().astype(np.uint16), "16UC1")
        return self._message(stamp_ns, depth_m.astype(np.float32), "32FC1")

    def info(self, stamp_ns):
        cx, cy = (self.width - 1) / 2, (self.height - 1) / 2
        message = CameraInfo(
            width=self.width,
            height=self.height,
            distortion_model="plumb_bob",
            d=[0.0] * 5,
            k=[FOCAL_PX, 0.0, cx, 0.0, FOCAL_PX, cy, 0.0, 0.0, 1.0],
            p=[FOCAL_PX, 0.0, cx, 0.0, 0.0, FOCAL_PX, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
        )
        self._stamp(message, stamp_ns)
        return message

    def send(self, *, depth=True, image=True, depth_m=None):
        """One frame; its stamp, ns."""
        stamp_ns = self.new_stamp_ns()
        self.info_publisher.publish(self.info(stamp_ns))
        if depth:
            self.depth_publisher.publish(self.depth(stamp_ns + self.depth_offset_ns, depth_m))
        if image:
            self.image_publisher.publish(self.image(stamp_ns))
            self.sent_ns.append(stamp_ns)
        return stamp_ns

    def send_depth(self, stamp_ns):
        self.depth_publisher.publish(self.depth(stamp_ns))

    def _message(self, stamp_ns, pixels, encoding):
        height, width = pixels.shape[:2]
        data = array("B")
        data.frombytes(np.ascontiguousarray(pixels).tobytes())
        message = Image(height=height, width=width, encoding=encoding, step=pixels[0].nbytes, data=data)
        self._stamp(message, stamp_ns)
        return message

    @staticmethod
    def _stamp(message, stamp_ns):
        message.header.frame_id = FRAME_ID
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)


def stamp_of(message):
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


def points_of(cloud):
    """Field name -> values of a PointCloud2, read as its fields say."""
    kinds = {6: "<u4", 7: "<f4"}
    dtype = np.dtype(
        {
            "names": [field.name for field in cloud.fields],
            "formats": [kinds[field.datatype] for field in cloud.fields],
            "offsets": [field.offset for field in cloud.fields],
            "itemsize": cloud.point_step,
        }
    )
    return np.frombuffer(cloud.data, dtype)
