# SPDX-License-Identifier: Apache-2.0
"""The node with depth, over the real middleware: places of objects, clouds, markers, and depth that does not fit."""

import time

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, PointCloud2
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray
from virst_msgs.srv import SetGoal
from visualization_msgs.msg import Marker, MarkerArray

from tests.ros.rgbd_camera import BLOCK_M, FOCAL_PX, FRAME_ID, WALL_M, RgbdCamera, points_of, stamp_of
from tests.ros.ros_graph import wait_until
from virst_ros import depth_outputs
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


class Setup:
    def __init__(self, graph, engine, camera=None, **parameters):
        self.graph, self.engine = graph, engine
        self.camera = camera or RgbdCamera(graph)
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        self.objects = graph.collect(SegmentedObjectArray, "/segmenter/objects", 50)
        self.node = graph.add(
            SegmenterNode, engine, use_depth=True, diagnostics_period_s=0.05, no_image_after_s=60.0, **parameters
        )
        wait_until(lambda: self.node.state == "active")
        wait_until(self.camera.connected)
        wait_until(lambda: self.node.cameras[0].outputs.objects.wanted)
        request = SetGoal.Request(goal="the block", object_id="block")
        assert graph.call(SetGoal, "/segmenter/set_goal", request).success

    def collect(self, kind, topic, qos=10):
        messages = self.graph.collect(kind, f"/segmenter/{topic}", qos)
        wait_until(lambda: getattr(self.node.cameras[0].outputs, topic).wanted)
        return messages

    def objects_of(self, stamp_ns):
        """The objects message of one frame."""
        found = wait_until(lambda: [message for message in self.objects if stamp_of(message) == stamp_ns])
        assert len(found) == 1
        return found[0].objects

    def block(self, **how):
        """Send one frame and get its object."""
        return self.objects_of(self.camera.send(**how))[0]

    def settled(self):
        """Wait until the calibration has come: best effort topics begin when they begin."""
        wait_until(lambda: self.block().depth_px > 0)
        return self

    def input_status(self, level, *texts):
        def fits():
            for message in self.diagnostics[-1:]:
                status = next(each for each in message.status if each.name == "segmenter: input")
                if status.level == level and all(text in status.message for text in texts):
                    return status
            return None

        return wait_until(fits)

    def input_values(self):
        status = next(each for each in self.diagnostics[-1].status if each.name == "segmenter: input")
        return {pair.key: pair.value for pair in status.values}


def vector(message):
    return np.array([message.x, message.y, message.z])


@pytest.mark.parametrize("encoding", ["32FC1", "16UC1"])
@pytest.mark.parametrize("depth_scale", [1.0, 0.5])
def test_the_block_is_where_it_is(graph, engine, encoding, depth_scale):
    setup = Setup(graph, engine, RgbdCamera(graph, encoding=encoding, depth_scale=depth_scale)).settled()
    found = setup.block()
    rows, columns = setup.camera.block
    assert found.depth_px == (rows.stop - rows.start) * (columns.stop - columns.start) * depth_scale**2
    exact_m = 1e-3 if depth_scale == 1.0 else 0.6 / FOCAL_PX  # the small image shows one pixel of each 2 x 2
    np.testing.assert_allclose(vector(found.centroid), setup.camera.block_centre_m(), atol=exact_m)
    np.testing.assert_allclose(vector(found.pose.position), setup.camera.block_centre_m(), atol=exact_m)
    # Its face, from the middle of the first pixel to that of the last; how deep it is cannot be seen.
    wide, high = setup.camera.block_size_m() - 1 / depth_scale / FOCAL_PX
    np.testing.assert_allclose(vector(found.size), [wide, 0.0, high], atol=2e-3)
    assert not found.is_supported, "it hangs before the wall"
    rotation = np.array([getattr(found.pose.orientation, name) for name in "xyzw"])
    assert np.linalg.norm(rotation) == pytest.approx(1.0)


def test_without_depth_places_are_void_and_the_rest_is_told(graph, engine):
    setup = Setup(graph, engine).settled()
    stamp_ns = setup.camera.send(depth=False)
    wait_until(lambda: stamp_ns in engine.session.stepped_stamps)  # else the newer one would replace it
    setup.camera.send()  # the next frame ends the wait for depth
    found = setup.objects_of(stamp_ns)[0]
    assert found.state == SegmentedObject.TRACKING
    assert found.area_px > 0
    assert found.depth_px == 0
    assert np.isnan(vector(found.centroid)).all()
    assert np.isnan(vector(found.pose.position)).all()
    assert np.isnan(vector(found.size)).all()
    assert found.pose.orientation.w == 1.0


@pytest.mark.parametrize("missing", [np.nan, 0.0, np.inf])
def test_holes_in_depth_are_no_points(graph, engine, missing):
    setup = Setup(graph, engine).settled()
    clouds = setup.collect(PointCloud2, "points_without_object")
    depth_m = setup.camera.depth_m()
    rows, columns = setup.camera.block
    depth_m[rows.start : rows.start + 6, columns] = missing
    depth_m[-8:] = missing
    found = setup.block(depth_m=depth_m)
    assert found.depth_px == (rows.stop - rows.start - 6) * (columns.stop - columns.start)
    assert vector(found.centroid)[2] == pytest.approx(BLOCK_M)
    points = points_of(wait_until(lambda: clouds)[-1])
    assert np.isfinite(points["z"]).all()
    assert points["y"].max() < (setup.camera.height - 8 - (setup.camera.height - 1) / 2) / FOCAL_PX * WALL_M


def test_depth_that_comes_after_the_result_is_waited_for(graph, engine):
    setup = Setup(graph, engine).settled()
    before = len(setup.objects)
    stamp_ns = setup.camera.send(depth=False)
    time.sleep(0.2)
    assert len(setup.objects) == before, "objects waits for the depth of its frame"
    setup.camera.send_depth(stamp_ns)
    assert setup.objects_of(stamp_ns)[0].depth_px > 0


def test_masks_never_wait_for_depth(graph, engine):
    setup = Setup(graph, engine).settled()
    masks = setup.collect(Image, "mask")
    stamp_ns = setup.camera.send(depth=False)
    wait_until(lambda: [mask for mask in masks if stamp_of(mask) == stamp_ns])
    after_ns = setup.camera.send()
    assert setup.objects_of(stamp_ns)[0].depth_px == 0
    assert setup.objects_of(after_ns)[0].depth_px > 0
    stamps = [stamp_of(message) for message in setup.objects]
    assert stamps == sorted(stamps), "in the order of the frames"


def test_a_frame_that_waits_is_not_published_after_a_pause(graph, engine):
    setup = Setup(graph, engine).settled()
    stamp_ns = setup.camera.send(depth=False)
    wait_until(lambda: stamp_ns in engine.session.stepped_stamps)
    time.sleep(0.1)
    setup.node.trigger_deactivate()
    setup.node.trigger_activate()
    wait_until(setup.camera.connected)
    after_ns = setup.camera.send()
    setup.objects_of(after_ns)
    assert all(stamp_of(message) != stamp_ns for message in setup.objects)


def test_stamps_must_be_equal_unless_a_slop_is_set(graph, engine):
    setup = Setup(graph, engine, RgbdCamera(graph)).settled()
    setup.camera.depth_offset_ns = 4_000_000
    for _ in range(12):
        setup.block()
        time.sleep(0.02)
    assert setup.block().depth_px == 0
    setup.input_status(DiagnosticStatus.WARN, "found no depth of their time", "4.0 ms away", "sync.slop_s")
    assert setup.node.set_parameters([Parameter("sync.slop_s", value=0.1)])[0].successful
    wait_until(lambda: setup.block().depth_px > 0)
    # Half of the time between images, which the test makes a few tens of milliseconds.
    wait_until(lambda: 4.0 < float(setup.input_values()["sync slop now (ms)"]) < 100.0)
    assert int(setup.input_values()["frames without depth"]) >= 12


def test_the_objects_points_are_labelled_and_coloured(graph, engine):
    setup = Setup(graph, engine).settled()
    clouds = setup.collect(PointCloud2, "points")
    stamp_ns = setup.camera.send()
    instance_id = setup.objects_of(stamp_ns)[0].instance_id
    cloud = wait_until(lambda: [each for each in clouds if stamp_of(each) == stamp_ns])[0]
    assert cloud.header.frame_id == FRAME_ID
    assert (cloud.height, cloud.is_dense, cloud.is_bigendian) == (1, True, False)
    assert cloud.row_step == cloud.point_step * cloud.width == len(cloud.data)
    points = points_of(cloud)
    rows, columns = setup.camera.block
    assert len(points) == (rows.stop - rows.start) * (columns.stop - columns.start)
    assert set(points["label"]) == {instance_id}
    np.testing.assert_allclose(points["z"], BLOCK_M)
    assert set(points["rgb"].view(np.uint32)) == {(200 << 16) | (180 << 8) | 255}
    middle = [points[name].mean() for name in "xyz"]
    np.testing.assert_allclose(middle, setup.camera.block_centre_m(), atol=1e-3)


def test_the_rest_is_everything_but_the_target_and_its_margin(graph, engine):
    setup = Setup(graph, engine, depth__every_px=1, depth__margin_px=2).settled()
    clouds = setup.collect(PointCloud2, "points_without_object")
    stamp_ns = setup.camera.send()
    points = points_of(wait_until(lambda: [each for each in clouds if stamp_of(each) == stamp_ns])[0])
    rows, columns = setup.camera.block
    left_out = (rows.stop - rows.start + 4) * (columns.stop - columns.start + 4)
    assert len(points) == setup.camera.width * setup.camera.height - left_out
    np.testing.assert_allclose(points["z"], WALL_M)
    assert setup.node.set_parameters([Parameter("target", value="somebody else")])[0].successful
    stamp_ns = setup.camera.send()
    points = points_of(wait_until(lambda: [each for each in clouds if stamp_of(each) == stamp_ns])[0])
    assert len(points) == setup.camera.width * setup.camera.height


def test_boxes_are_shown_as_markers(graph, engine):
    setup = Setup(graph, engine).settled()
    shown = setup.collect(MarkerArray, "markers")
    found = setup.block()
    erase, box, name = wait_until(lambda: shown)[-1].markers
    assert erase.action == Marker.DELETEALL
    assert (box.type, box.header.frame_id) == (Marker.CUBE, FRAME_ID)
    assert (box.pose.position, box.scale.x) == (found.pose.position, found.size.x)
    assert name.text == "the block"


def test_nothing_is_computed_without_a_subscriber(graph, engine, monkeypatch):
    computed = []
    for name in ("object_geometry", "object_cloud", "surroundings_cloud"):
        real = getattr(depth_outputs, name)
        monkeypatch.setattr(
            depth_outputs,
            name,
            lambda *given, real=real, name=name, **named: computed.append(name) or real(*given, **named),
        )
    setup = Setup(graph, engine).settled()
    assert set(computed) == {"object_geometry"}, "objects has a subscriber"
    for subscription in list(graph.node.subscriptions):
        if subscription.topic_name == "/segmenter/objects":
            graph.node.destroy_subscription(subscription)
    wait_until(lambda: not setup.node.cameras[0].outputs.objects.wanted)
    masks = setup.collect(Image, "mask")
    computed.clear()
    stamp_ns = setup.camera.send()
    wait_until(lambda: [mask for mask in masks if stamp_of(mask) == stamp_ns])
    assert computed == []


def test_what_keeps_depth_from_giving_points_is_told(graph, engine):
    setup = Setup(graph, engine)
    info = setup.camera.info(0)
    setup.camera.info = lambda stamp_ns: info
    setup.camera.info_publisher.publish(info)
    wait_until(lambda: setup.node.cameras[0].inputs.camera_info is not None)
    info.k = [0.0] * 9
    setup.block()
    wait_until(lambda: setup.block().depth_px == 0)
    setup.input_status(DiagnosticStatus.WARN, "no focal length in K")
    assert setup.node.set_parameters([Parameter("depth.rectified", value=True)])[0].successful
    wait_until(lambda: setup.block().depth_px > 0)
    setup.input_status(DiagnosticStatus.OK, "arrives")


def test_sensor_data_readers_get_clouds_too(graph, engine):
    setup = Setup(graph, engine).settled()
    clouds = setup.collect(PointCloud2, "points_without_object", qos_profile_sensor_data)
    wait_until(lambda: (setup.camera.send(), time.sleep(0.05)) and clouds)


def test_objects_of_the_simulator_have_their_true_pose(graph, engine):
    """The simulator's own colour camera, depth and calibration; the fake engine sees what is painted white."""
    from std_msgs.msg import Header

    from virst_engine.errors import SceneError
    from virst_engine.sim.live import LiveTabletop, demo_scene
    from virst_engine.sim.mujoco_world import close_all
    from virst_ros import conversions
    from virst_ros.sim_camera_node import CameraParameters, camera_info

    try:
        with LiveTabletop(width=320, height=240, spec=demo_scene()) as tabletop:
            tabletop.advance(0.5)
            frame, spec = tabletop.render(), tabletop.spec
    except SceneError as error:
        if "OpenGL" in str(error):
            pytest.skip(str(error))
        raise
    finally:
        close_all()
    setup = Setup(graph, engine)
    camera = setup.camera
    info = camera_info(Header(), spec.camera, CameraParameters())
    camera.info_publisher.publish(info)
    wait_until(
        lambda: (
            setup.node.cameras[0].inputs.camera_info is not None
            and setup.node.cameras[0].inputs.camera_info.width == 320
        )
    )
    to_camera = spec.camera.axes()
    for k, thing in enumerate(spec.objects):
        if thing.shape not in ("box", "can"):
            continue
        stamp_ns = camera.new_stamp_ns()
        header = Header(frame_id=FRAME_ID, stamp=conversions.time_message(stamp_ns))
        painted = np.repeat((frame.instance_mask == k + 1)[..., None], 3, axis=2).astype(np.uint8) * 255
        camera.depth_publisher.publish(conversions.image_message(header, frame.depth_m, "32FC1"))
        camera.image_publisher.publish(conversions.image_message(header, painted, "rgb8"))
        found = setup.objects_of(stamp_ns)[0]
        truth_m = to_camera @ (frame.position_m[k] - np.array(spec.camera.position_m))
        off_mm = np.linalg.norm(vector(found.pose.position) - truth_m) * 1e3
        assert off_mm < 4.0, f"the {thing.shape} is {off_mm:.1f} mm off"
        np.testing.assert_allclose(vector(found.size), np.multiply(thing.half_m, 2), atol=0.006)
        x, y, z, w = (getattr(found.pose.orientation, name) for name in "xyzw")
        up = np.array([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)])
        np.testing.assert_allclose(up, to_camera @ (0.0, 0.0, 1.0), atol=0.01)
