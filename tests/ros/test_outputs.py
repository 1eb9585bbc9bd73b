# SPDX-License-Identifier: Apache-2.0
"""What is made of an image alone: target_mask, PNG and JPEG, calibration; and what nobody reads costs nothing."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from virst_msgs.srv import ClearGoal, SetGoal

from tests.ros.rgbd_camera import FRAME_ID, RgbdCamera, stamp_of
from tests.ros.ros_graph import wait_until
from virst_engine.types import Goal, ObjectResult, ObjectState
from virst_ros import outputs
from virst_ros.outputs import choose_target
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


@pytest.fixture
def camera(graph):
    return RgbdCamera(graph)


@pytest.fixture
def node(graph, engine, camera):
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active")
    wait_until(camera.image_publisher.get_subscription_count)
    wait_until(camera.info_publisher.get_subscription_count)
    return node


def set_goal(graph, goal="the block", **fields):
    answer = graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal=goal, **fields))
    assert answer.success, answer.message
    return answer


class Reader:
    """Reads a topic of the node, and sends frames until one has come through."""

    def __init__(self, graph, node, camera, kind, topic, attribute, qos=10):
        self._camera = camera
        self.messages = graph.collect(kind, f"/segmenter/{topic}", qos)
        wait_until(lambda: getattr(node.cameras[0].outputs, attribute).wanted)

    def next(self):
        stamp_ns = self._camera.send()
        return wait_until(lambda: [message for message in self.messages if stamp_of(message) == stamp_ns])[0]


def pixels(message):
    assert message.step == message.width, "no padding"
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width)


def block_of(camera):
    mask = np.zeros((camera.height, camera.width), bool)
    mask[camera.block] = True
    return mask


def test_target_mask_is_binary_and_shows_the_newest_goal(graph, node, camera):
    masks = Reader(graph, node, camera, Image, "target_mask", "target_mask")
    mask = masks.next()
    assert (mask.encoding, mask.header.frame_id) == ("mono8", FRAME_ID)
    assert not pixels(mask).any(), "without goals it is there, and empty"
    set_goal(graph)
    np.testing.assert_array_equal(pixels(masks.next()), block_of(camera) * 255)


def test_target_mask_can_be_bound_to_an_object(graph, node, camera):
    masks = Reader(graph, node, camera, Image, "target_mask", "target_mask")
    first = set_goal(graph, "the block", object_id="mine")
    set_goal(graph, "another")
    assert node.set_parameters([Parameter("target", value="mine")])[0].successful
    assert pixels(masks.next()).any()
    assert graph.call(ClearGoal, "/segmenter/clear_goal", ClearGoal.Request(goal_id=first.goal_id)).success
    assert not pixels(masks.next()).any(), "it does not jump to another object"


def test_the_png_holds_exactly_the_ids(graph, node, camera):
    set_goal(graph, "one")
    set_goal(graph, "two")
    packed = Reader(graph, node, camera, CompressedImage, "mask/compressed", "mask_png")
    raw = graph.collect(Image, "/segmenter/mask")
    wait_until(lambda: node.cameras[0].outputs.mask.wanted)
    message = packed.next()
    assert message.format == "mono8; png compressed "
    plain = wait_until(lambda: [each for each in raw if each.header == message.header])[0]
    ids = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(ids, pixels(plain))
    assert ids.any()
    assert len(message.data) < len(plain.data) / 4


def test_the_overlay_goes_out_as_jpeg_too(graph, node, camera):
    pictures = Reader(
        graph, node, camera, CompressedImage, "overlay/compressed", "overlay_jpeg", qos_profile_sensor_data
    )
    message = pictures.next()
    assert message.format == "rgb8; jpeg compressed bgr8"
    bgr = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
    assert bgr.shape == (camera.height, camera.width, 3)
    rows, columns = camera.block
    middle = bgr[(rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2].astype(int)
    assert np.abs(middle - (255, 180, 200)).max() < 25, "blue is blue"


def test_camera_info_is_the_cameras_with_the_header_of_the_mask(graph, node, camera):
    infos = Reader(graph, node, camera, CameraInfo, "camera_info", "camera_info")
    camera.info_publisher.publish(camera.info(1))
    wait_until(lambda: node.cameras[0].inputs.camera_info is not None)
    info = infos.next()
    sent = camera.info(stamp_of(info))
    assert info == sent


def test_a_subscriber_who_waits_in_vain_is_told_why(graph, engine, camera):
    diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
    node = graph.add(SegmenterNode, engine, diagnostics_period_s=0.05)
    wait_until(lambda: node.state == "active" and camera.image_publisher.get_subscription_count())

    def output_says(level, text):
        camera.send()
        status = next((each for each in diagnostics[-1].status if each.name == "segmenter: output"), None)
        return status is not None and status.level == level and text in status.message

    wait_until(lambda: diagnostics)
    wait_until(lambda: output_says(DiagnosticStatus.OK, "masks are published"))
    graph.collect(PointCloud2, "/segmenter/points")
    wait_until(lambda: output_says(DiagnosticStatus.WARN, "~/points has a subscriber, but comes from depth only"))


def test_an_overlay_that_is_switched_off_is_told(graph, engine):
    node = graph.add(SegmenterNode, engine, overlay=False)
    wait_until(lambda: node.state == "active")
    assert not node.cameras[0].outputs.why_unserved(node._settings)
    graph.collect(Image, "/segmenter/overlay", qos_profile_sensor_data)
    wait_until(lambda: node.cameras[0].outputs.overlay.wanted)
    assert "the parameter overlay is false" in node.cameras[0].outputs.why_unserved(node._settings)


def test_nothing_is_computed_that_nobody_reads(graph, node, camera, engine, monkeypatch):
    made = []
    for module, name in (
        (outputs.conversions, "image_message"),
        (outputs.conversions, "png_message"),
        (outputs, "draw_overlay"),
    ):
        real = getattr(module, name)

        def noted(*given, real=real, name=name, **named):
            made.append(name)
            return real(*given, **named)

        monkeypatch.setattr(module, name, noted)
    monkeypatch.setattr(outputs, "instance_map", lambda *_: pytest.fail("no mask is wanted"))
    set_goal(graph)
    for _ in range(3):
        stamp_ns = camera.send()
        wait_until(lambda stamp_ns=stamp_ns: stamp_ns in engine.session.stepped_stamps)
    assert made == []


@pytest.mark.parametrize("reliability", [ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT])
def test_readers_of_both_kinds_get_masks(graph, node, camera, reliability):
    masks = Reader(graph, node, camera, Image, "mask", "mask", QoSProfile(depth=5, reliability=reliability))
    assert masks.next().encoding == "mono8"


def found(goal, score, object_id="", state=ObjectState.TRACKING):
    return ObjectResult(object_id or goal, goal, 1, state, np.ones((1, 1), bool), score, 0.0, 0.0)


def test_the_target_is_the_newest_goals_union_unless_another_object_is_named():
    goals = [Goal("old", "old", "the old"), Goal("new", "new", "the new")]
    union, part = found("new", 0.3, "a"), replace(found("new", 0.4, "a.1"), part_of="a")
    objects = [found("old", 0.9), union, part]
    assert choose_target(objects, goals, "").object_id == "a"
    assert choose_target(objects, goals, "a.1").object_id == "a.1"
    assert choose_target(objects, goals, "old").object_id == "old"
    assert choose_target(objects, goals, "nobody") is None
    assert choose_target(objects[:1], goals, "").object_id == "old", "the newest has none yet"
    assert choose_target([], goals, "") is None


def compressed(image, form=".png"):
    rgb = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
    encoded = cv2.imencode(form, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1]
    message = CompressedImage(header=image.header, format=f"rgb8; {form[1:]} compressed bgr8")
    message.data = encoded.tobytes()
    return message


def test_compressed_images_are_segmented_too(graph, engine, camera):
    node = graph.add(SegmenterNode, engine, image_transport="compressed")
    wait_until(lambda: node.state == "active")
    publisher = graph.publisher(CompressedImage, "image/compressed", qos_profile_sensor_data)
    wait_until(publisher.get_subscription_count)
    assert graph.node.count_subscribers("/image") == 0
    set_goal(graph)
    masks = graph.collect(Image, "/segmenter/mask")
    wait_until(lambda: node.cameras[0].outputs.mask.wanted)
    for form in (".png", ".jpg"):
        stamp_ns = camera.new_stamp_ns()
        publisher.publish(compressed(camera.image(stamp_ns), form))
        mask = wait_until(lambda stamp_ns=stamp_ns: [each for each in masks if stamp_of(each) == stamp_ns])[0]
        assert mask.header.frame_id == FRAME_ID
        assert (pixels(mask)[block_of(camera)] > 0).mean() > 0.9
