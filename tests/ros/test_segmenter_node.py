# SPDX-License-Identifier: Apache-2.0
"""The node over the real middleware, with a fake engine: stamps, QoS, lifecycle, services, bad input, diagnostics."""

import itertools
import threading
import time
from array import array
from functools import partial

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import SetBool
from virst_msgs.msg import SegmentedObject, SegmentedObjectArray
from virst_msgs.srv import ClearGoal, ListGoals, SetGoal

from tests.ros.ros_graph import wait_until
from virst_engine.errors import BadFrame, WeightsError
from virst_ros.inputs import SAME_STAMPS
from virst_ros.segmenter_node import SegmenterNode, missing_profile_warning

pytestmark = pytest.mark.ros
WIDTH, HEIGHT = 32, 24
FRAME_ID = "front_color_optical_frame"


class Camera:
    """Publishes pictures with one bright square, each with its own stamp."""

    def __init__(self, graph, topic="image", qos=qos_profile_sensor_data):
        self.publisher = graph.publisher(Image, topic, qos)
        self._graph = graph
        self._numbers = itertools.count(1)

    def image(self, width=WIDTH, height=HEIGHT, bright=True):
        pixels = np.zeros((height, width, 3), np.uint8)
        if bright:
            pixels[2:10, 4:16] = 255
        message = Image(height=height, width=width, encoding="rgb8", step=width * 3, data=array("B", pixels.tobytes()))
        message.header.frame_id = FRAME_ID
        message.header.stamp = self._graph.node.get_clock().now().to_msg()
        # The low digits are ours: no clock and no rounding would keep them by chance.
        message.header.stamp.nanosec = message.header.stamp.nanosec // 1000 * 1000 + next(self._numbers) % 1000
        return message

    def send(self, message=None):
        message = message or self.image()
        self.publisher.publish(message)
        return message.header

    def wait_for_subscriber(self):
        wait_until(self.publisher.get_subscription_count)


class Setup:
    def __init__(self, graph, engine, **parameters):
        self.graph, self.engine = graph, engine
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        self.masks = graph.collect(Image, "/segmenter/mask")
        self.objects = graph.collect(SegmentedObjectArray, "/segmenter/objects", 50)
        self.camera = Camera(graph)
        parameters = {"diagnostics_period_s": 0.05} | parameters
        self.node = graph.add(SegmenterNode, engine, **parameters)

    def active(self):
        wait_until(lambda: self.node.state == "active")
        self.camera.wait_for_subscriber()
        wait_until(lambda: self.graph.node.count_publishers("/segmenter/mask"))
        wait_until(lambda: self.node.cameras[0].outputs.mask.wanted)
        wait_until(lambda: self.node.cameras[0].outputs.objects.wanted)
        return self

    def send_until_mask(self, message=None):
        """One picture in, its mask out: (header sent, mask)."""
        before = len(self.masks)
        header = self.camera.send(message)
        wait_until(lambda: len(self.masks) > before)
        return header, self.masks[-1]

    def status(self, subject):
        """The newest diagnostic status of a subject."""
        if not self.diagnostics:
            return None
        return next(status for status in self.diagnostics[-1].status if status.name == f"segmenter: {subject}")

    def wait_for_status(self, subject, level, *texts, key=None):
        """The first status of that level whose message (or value of `key`) holds all texts."""

        def fits():
            status = self.status(subject)
            if status is None or status.level != level:
                return None
            # The newest message may be from before the value was there.
            shown = {pair.key: pair.value for pair in status.values}.get(key, "") if key else status.message
            return status if all(text in shown for text in texts) else None

        return wait_until(fits)

    def values(self, subject):
        return {pair.key: pair.value for pair in wait_until(lambda: self.status(subject)).values}

    def set_goal(self, goal="the bright one", **fields):
        return self.graph.call(SetGoal, "/segmenter/set_goal", SetGoal.Request(goal=goal, **fields))

    def clear_goal(self, goal_id=""):
        return self.graph.call(ClearGoal, "/segmenter/clear_goal", ClearGoal.Request(goal_id=goal_id))

    def list_goals(self):
        return self.graph.call(ListGoals, "/segmenter/list_goals", ListGoals.Request()).goals

    def change(self, transition_id):
        request = ChangeState.Request(transition=Transition(id=transition_id))
        return self.graph.call(ChangeState, "/segmenter/change_state", request).success


@pytest.fixture
def setup(graph, engine):
    return Setup(graph, engine).active()


def pixels(message):
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)[:, : message.width]


class TestFrames:
    def test_every_output_carries_the_header_of_its_frame(self, setup):
        infos = setup.graph.collect(CameraInfo, "/segmenter/camera_info")
        wait_until(lambda: setup.node.cameras[0].outputs.camera_info.wanted)
        info_publisher = setup.graph.publisher(CameraInfo, "camera_info", qos_profile_sensor_data)
        wait_until(info_publisher.get_subscription_count)
        info_publisher.publish(CameraInfo(width=WIDTH, height=HEIGHT, k=[9.0] * 9))
        wait_until(lambda: setup.node.cameras[0].inputs.camera_info is not None)
        assert setup.set_goal().success
        sent = []
        for _ in range(5):
            header, mask = setup.send_until_mask()
            assert (mask.encoding, mask.width, mask.height, mask.step) == ("mono8", WIDTH, HEIGHT, WIDTH)
            sent.append(header)
        wait_until(lambda: len(setup.objects) >= 5 and len(infos) >= 5)
        assert [mask.header for mask in setup.masks] == sent
        assert [message.header for message in setup.objects] == sent
        assert [info.header for info in infos] == sent
        assert list(infos[0].k) == [9.0] * 9
        assert sent[0].frame_id == FRAME_ID

    def test_a_mask_is_published_without_goals_too(self, setup):
        _, mask = setup.send_until_mask()
        assert not pixels(mask).any()
        wait_until(lambda: setup.objects)
        assert not setup.objects[-1].objects

    def test_the_mask_holds_the_instance_id_of_the_object(self, setup):
        answer = setup.set_goal("the bright one", object_id="my_object")
        assert answer.success
        assert list(answer.object_ids) == ["my_object"]
        _, mask = setup.send_until_mask()
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        wait_until(lambda: setup.objects)
        found = setup.objects[-1].objects[0]
        expected[2:10, 4:16] = found.instance_id
        np.testing.assert_array_equal(pixels(mask), expected)
        assert (found.object_id, found.goal_id, found.goal) == ("my_object", answer.goal_id, "the bright one")
        assert (found.state, found.area_px) == (SegmentedObject.TRACKING, 8 * 12)

    def test_an_invisible_object_gives_an_empty_mask_and_its_state(self, setup):
        assert setup.set_goal().success
        _, mask = setup.send_until_mask(setup.camera.image(bright=False))
        assert not pixels(mask).any()
        wait_until(lambda: setup.objects)
        assert setup.objects[-1].objects[0].state == SegmentedObject.LOST

    def test_the_newest_frame_wins_when_inference_is_slow(self, setup):
        setup.engine.session.step_s = 0.3
        sent = []
        for _ in range(20):
            sent.append(setup.camera.send())
            time.sleep(0.03)
        newest = sent[-1]
        wait_until(lambda: setup.masks and setup.masks[-1].header == newest)
        processed = [mask.header for mask in setup.masks]
        assert len(processed) < 10
        assert [header for header in sent if header in processed] == processed, "order kept, nothing twice"
        wait_until(lambda: len(setup.objects) == len(processed))
        timings = setup.objects[-1].timings
        # The middleware itself may drop before the node sees a frame, so only what came in can be accounted for.
        assert timings.frames_in == len(processed) + timings.frames_dropped
        assert timings.frames_dropped > 0

    def test_a_consumer_that_pairs_by_exact_stamp_gets_every_pair(self, setup):
        """What FoundationPose does: image and mask with identical stamps, 12 deep, same size, no row padding."""
        images = setup.graph.collect(Image, "image", qos_profile_sensor_data)
        wait_until(lambda: setup.camera.publisher.get_subscription_count() == 2)
        assert setup.set_goal().success
        for _ in range(10):
            setup.send_until_mask()
        wait_until(lambda: len(images) == 10)
        waiting = {}
        for image in images[-12:]:
            waiting[image.header.stamp.sec, image.header.stamp.nanosec] = image
        pairs = [(waiting.pop((mask.header.stamp.sec, mask.header.stamp.nanosec)), mask) for mask in setup.masks]
        assert len(pairs) == 10
        for image, mask in pairs:
            assert (image.width, image.height, image.header.frame_id) == (mask.width, mask.height, mask.header.frame_id)
            assert mask.step == mask.width

    def test_the_overlay_is_drawn_only_for_somebody(self, setup):
        setup.send_until_mask()
        overlays = setup.graph.collect(Image, "/segmenter/overlay", qos_profile_sensor_data)
        wait_until(lambda: setup.node.cameras[0].outputs.overlay.wanted)
        header, _ = setup.send_until_mask()
        wait_until(lambda: overlays)
        assert [message.header for message in overlays] == [header]
        assert (overlays[0].encoding, overlays[0].width, overlays[0].height) == ("rgb8", WIDTH, HEIGHT)

    def test_ages_and_rates_are_on_diagnostics(self, setup):
        for _ in range(3):
            setup.send_until_mask()
        setup.wait_for_status("output", DiagnosticStatus.OK)
        values = setup.values("output")
        for name in ("age p50 (ms)", "age p95 (ms)", "age p99 (ms)", "rate (Hz)"):
            assert float(values[name]) > 0.0
        assert values["image_encoder (ms)"] == "2.0"
        assert float(setup.values("input")["rate (Hz)"]) > 0.0
        assert float(setup.values("model")["resident memory (MiB)"]) > 10.0
        assert setup.values("model")["weights"] == "fake.safetensors"


class TestQos:
    def profiles(self, setup, topic, kind):
        get = setup.node.get_publishers_info_by_topic if kind == "pub" else setup.node.get_subscriptions_info_by_topic

        def found():
            return [info.qos_profile for info in get(topic) if info.node_name == "segmenter"]

        return wait_until(found)[0]

    @pytest.mark.parametrize(
        ("topic", "kind", "reliability", "durability"),
        [
            ("/image", "sub", ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE),
            ("/camera_info", "sub", ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE),
            ("/depth", "sub", ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE),
            ("/segmenter/mask", "pub", ReliabilityPolicy.RELIABLE, DurabilityPolicy.VOLATILE),
            ("/segmenter/camera_info", "pub", ReliabilityPolicy.RELIABLE, DurabilityPolicy.VOLATILE),
            ("/segmenter/objects", "pub", ReliabilityPolicy.RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL),
            ("/segmenter/overlay", "pub", ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE),
            ("/diagnostics", "pub", ReliabilityPolicy.RELIABLE, DurabilityPolicy.VOLATILE),
        ],
    )
    def test_endpoints(self, graph, engine, topic, kind, reliability, durability):
        setup = Setup(graph, engine, use_depth=True).active()
        profile = self.profiles(setup, topic, kind)
        assert (profile.reliability, profile.durability) == (reliability, durability)

    def test_parameters_choose_other_profiles(self, graph, engine):
        setup = Setup(graph, engine, input_qos="DEFAULT", output_qos="SENSOR_DATA")
        wait_until(lambda: setup.node.state == "active")
        assert self.profiles(setup, "/image", "sub").reliability == ReliabilityPolicy.RELIABLE
        assert self.profiles(setup, "/segmenter/mask", "pub").reliability == ReliabilityPolicy.BEST_EFFORT

    def test_a_late_reader_gets_the_newest_state(self, setup):
        header, _ = setup.send_until_mask()
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        late = setup.graph.collect(SegmentedObjectArray, "/segmenter/objects", latched)
        wait_until(lambda: late)
        assert late[0].header == header

    def test_an_incompatible_camera_is_explained(self, graph, engine):
        setup = Setup(graph, engine, input_qos="DEFAULT", no_image_after_s=0.2)
        setup.wait_for_status("input", DiagnosticStatus.ERROR, "/image offers another RELIABILITY", "set input_qos")

    def test_a_reader_that_does_not_fit_is_told_until_it_is_gone(self, setup, monkeypatch):
        monkeypatch.setattr("virst_ros.diagnostics.RECENT_S", 0.2)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        reader = setup.graph.node.create_subscription(Image, "/segmenter/mask", print, latched)
        key, reason = "incompatible QoS on ~/mask", "a subscriber of ~/mask wants another DURABILITY"
        wait_until(lambda: setup.values("output").get(key) == reason)
        assert setup.change(Transition.TRANSITION_DEACTIVATE)
        assert setup.change(Transition.TRANSITION_ACTIVATE)
        setup.active()
        before = len(setup.diagnostics)
        wait_until(lambda: len(setup.diagnostics) > before + 8)  # 0.4 s
        assert setup.values("output")[key] == reason
        assert key not in setup.values("input")
        setup.graph.node.destroy_subscription(reader)
        wait_until(lambda: key not in setup.values("output"))


class TestNothingArrives:
    def test_nobody_publishes(self, graph, engine):
        setup = Setup(graph, engine, no_image_after_s=0.2)
        graph.node.destroy_publisher(setup.camera.publisher)
        setup.wait_for_status("input", DiagnosticStatus.ERROR, "no images on /image", "nobody publishes it")

    def test_announced_but_not_arriving_names_the_profile(self, graph, engine):
        setup = Setup(graph, engine, no_image_after_s=0.2).active()
        setup.wait_for_status(
            "input", DiagnosticStatus.ERROR, "announced by 1 publisher(s)", "FASTDDS_DEFAULT_PROFILES_FILE"
        )
        setup.send_until_mask()
        setup.wait_for_status("input", DiagnosticStatus.ERROR, "has stopped arriving", "fastdds_profile.xml")

    def test_the_missing_profile_is_warned_of_at_the_start(self):
        assert "fastdds_profile.xml" in missing_profile_warning("rmw_fastrtps_cpp", {})
        assert not missing_profile_warning("rmw_fastrtps_cpp", {"FASTDDS_DEFAULT_PROFILES_FILE": "x.xml"})
        assert not missing_profile_warning("rmw_cyclonedds_cpp", {})


class TestLifecycle:
    def test_every_transition(self, graph, engine):
        setup = Setup(graph, engine, autostart=False)
        node = setup.node
        setup.wait_for_status("model", DiagnosticStatus.STALE, "configure")
        assert node.state == "unconfigured"
        assert not engine.configurations

        assert setup.change(Transition.TRANSITION_CONFIGURE)
        assert node.state == "inactive"
        assert len(engine.configurations) == 1
        assert node.count_publishers("/segmenter/mask") == 1
        assert node.count_subscribers("/image") == 0
        setup.wait_for_status("input", DiagnosticStatus.STALE, "not active (inactive)")

        assert setup.change(Transition.TRANSITION_ACTIVATE)
        setup.active().send_until_mask()

        assert setup.change(Transition.TRANSITION_DEACTIVATE)
        assert node.state == "inactive"
        assert node.count_subscribers("/image") == 0
        assert not engine.session.closed

        assert setup.change(Transition.TRANSITION_ACTIVATE)
        setup.active().send_until_mask()
        assert len(engine.configurations) == 1, "activation does not load again"

        assert setup.change(Transition.TRANSITION_DEACTIVATE)
        assert setup.change(Transition.TRANSITION_CLEANUP)
        assert node.state == "unconfigured"
        assert engine.session.closed
        wait_until(lambda: node.count_publishers("/segmenter/mask") == 0)

        assert setup.change(Transition.TRANSITION_CONFIGURE)
        assert setup.change(Transition.TRANSITION_ACTIVATE)
        setup.active().send_until_mask()
        assert setup.change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
        assert node.state == "finalized"
        assert engine.session.closed

    def test_a_step_that_hangs_keeps_its_session_to_itself(self, setup, monkeypatch):
        monkeypatch.setattr("virst_ros.segmenter_node.STOP_TIMEOUT_S", 0.1)
        session, release, begun = setup.engine.session, threading.Event(), threading.Event()
        step = session.step

        def hanging_step(frame):
            begun.set()
            release.wait(20.0)
            return step(frame)

        session.step = hanging_step
        try:
            setup.camera.send()
            wait_until(begun.is_set)
            assert setup.change(Transition.TRANSITION_DEACTIVATE)
            for transition in (Transition.TRANSITION_ACTIVATE, Transition.TRANSITION_CLEANUP):
                assert not setup.change(transition)
                assert setup.node.state == "inactive"
            assert not session.closed
        finally:
            release.set()
        session.step = step
        wait_until(lambda: setup.change(Transition.TRANSITION_ACTIVATE))
        setup.active().send_until_mask()

    def test_a_wrong_transition_is_refused(self, graph, engine):
        setup = Setup(graph, engine, autostart=False)
        assert not setup.change(Transition.TRANSITION_ACTIVATE)
        assert graph.call(GetState, "/segmenter/get_state", GetState.Request()).current_state.label == "unconfigured"

    def test_goals_outlive_a_pause(self, setup):
        answer = setup.set_goal()
        assert setup.change(Transition.TRANSITION_DEACTIVATE)
        assert setup.change(Transition.TRANSITION_ACTIVATE)
        assert [goal.goal_id for goal in setup.list_goals()] == [answer.goal_id]

    def test_frames_from_before_a_pause_are_forgotten(self, setup):
        before = setup.engine.session.resets
        assert setup.change(Transition.TRANSITION_DEACTIVATE)
        assert setup.change(Transition.TRANSITION_ACTIVATE)
        assert setup.engine.session.resets == before + 1

    def test_configuring_can_be_tried_again(self, graph, engine):
        engine.failure = WeightsError("the weights are missing: no file x; train them with `virst train`")
        setup = Setup(graph, engine)
        setup.wait_for_status("model", DiagnosticStatus.ERROR, "no file x", "virst train")
        assert setup.node.state == "unconfigured"
        assert not setup.change(Transition.TRANSITION_CONFIGURE)
        engine.failure = None
        assert setup.change(Transition.TRANSITION_CONFIGURE)
        assert setup.change(Transition.TRANSITION_ACTIVATE)
        setup.active().send_until_mask()
        setup.wait_for_status("model", DiagnosticStatus.OK)

    def test_an_unexpected_failure_of_configure_is_not_swallowed(self, graph, engine):
        engine.failure = ZeroDivisionError("by chance")
        setup = Setup(graph, engine)
        setup.wait_for_status("model", DiagnosticStatus.ERROR, "unexpected ZeroDivisionError: by chance")

    def test_parameters_reach_the_engine(self, graph, engine):
        setup = Setup(graph, engine, tracking__max_objects=3, reasoner__period_s=4.0)
        wait_until(lambda: setup.node.state == "active")
        config = engine.configurations[0]
        assert (config.tracking.max_objects, config.reasoner.period_s) == (3, 4.0)

    def test_live_parameters_reach_the_running_session(self, setup):
        assert setup.node.set_parameters([Parameter("reasoner.period_s", value=7.5)])[0].successful
        assert setup.engine.session.reconfigured[-1].reasoner.period_s == 7.5
        refused = setup.node.set_parameters([Parameter("reasoner.period_s", value=-1.0)])[0]
        assert not refused.successful
        assert refused.reason
        assert len(setup.engine.session.reconfigured) == 1

    def test_values_that_contradict_each_other_are_refused(self, graph, engine):
        setup = Setup(graph, engine, memory__anchor_slots=2, memory__anchors_attended=3)
        setup.wait_for_status("model", DiagnosticStatus.ERROR, "memory.anchors_attended must be <= memory.anchor_slots")
        assert not engine.configurations

    def test_the_initial_goal_is_set(self, graph, engine):
        setup = Setup(graph, engine, initial_goal="the red ball").active()
        assert [goal.goal for goal in setup.list_goals()] == ["the red ball"]

    def test_a_bad_initial_goal_is_told_and_the_node_is_active(self, graph, engine):
        setup = Setup(graph, engine, initial_goal="  ").active()
        setup.wait_for_status("goals", DiagnosticStatus.WARN, "got an empty one")
        setup.send_until_mask()


class TestGoals:
    def test_set_list_clear(self, setup):
        first, second = setup.set_goal("one"), setup.set_goal("two", camera="camera")
        assert first.success
        assert second.success
        setup.send_until_mask()
        goals = wait_until(lambda: [g for g in [setup.list_goals()] if g[0].states[0] == SegmentedObject.TRACKING])[0]
        assert [(goal.goal_id, goal.goal, goal.camera) for goal in goals] == [
            (first.goal_id, "one", ""),
            (second.goal_id, "two", "camera"),
        ]
        assert goals[0].set_at.sec > 0
        answer = setup.clear_goal(first.goal_id)
        assert answer.success
        assert answer.message == "1 goal(s) cleared"
        assert [goal.goal for goal in setup.list_goals()] == ["two"]
        assert setup.clear_goal().success
        assert not setup.list_goals()

    def test_replace(self, setup):
        setup.set_goal("one")
        assert setup.set_goal("two", replace=True).success
        assert [goal.goal for goal in setup.list_goals()] == ["two"]

    def test_only_goals_that_are_set_are_remembered(self, setup):
        for _ in range(3):
            answer = setup.set_goal("another", replace=True)
        assert setup.node.goals._set_at_ns.keys() == {answer.goal_id}
        set_at = setup.list_goals()[0].set_at
        second = setup.set_goal("one more")
        assert setup.node.goals._set_at_ns.keys() == {answer.goal_id, second.goal_id}
        assert setup.list_goals()[0].set_at == set_at, "it stays when other goals are set"

    def test_a_goal_that_ends_while_all_are_cleared_keeps_no_other(self, setup):
        for sentence in ("the bright one", "the other one"):
            assert setup.set_goal(sentence).success
        session = setup.engine.session
        goals = session.goals()
        session.goals = lambda: (goals[0], *session._goals.values())  # the first one twice: then it is gone already
        answer = setup.clear_goal()
        assert (answer.success, answer.message) == (True, "2 goal(s) cleared")
        assert session._goals == {}

    def test_a_request_that_is_rejected_again_and_again_is_logged_once_with_its_service(self, setup, monkeypatch):
        lines = []
        logger = setup.node.get_logger()
        monkeypatch.setattr(logger, "warning", lines.append)
        monkeypatch.setattr(setup.node, "get_logger", lambda: logger)
        for _ in range(3):
            assert not setup.set_goal("").success
            assert not setup.clear_goal("nobody").success
        told = [line.partition(":")[0] for line in lines if "rejected" in line]
        assert told == ["set_goal rejected", "clear_goal rejected"]
        wait_until(lambda: setup.values("goals")["rejected"] == "6")

    def test_a_goal_for_another_camera_is_refused(self, setup):
        answer = setup.set_goal("the cup", camera="back" * 100)
        assert not answer.success
        assert "this segmenter sees camera 'camera', the goal is for 'backback" in answer.message
        assert len(answer.message) < 250
        assert not setup.list_goals()

    def test_diagnostics_tell_the_namespace(self, graph, engine):
        diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
        graph.add(partial(SegmenterNode, namespace="left"), engine, diagnostics_period_s=0.05)
        names = {status.name for status in wait_until(lambda: diagnostics and diagnostics[-1].status)}
        assert names == {f"left/segmenter: {subject}" for subject in ("input", "output", "reasoner", "goals", "model")}

    def test_each_goal_is_on_diagnostics(self, setup):
        answer = setup.set_goal("the cup")
        setup.send_until_mask()
        setup.wait_for_status("goals", DiagnosticStatus.OK, "TRACKING score 0.75", key=f"{answer.goal_id}: the cup")
        assert setup.values("reasoner")[f"latency of {answer.goal_id} (s)"] == "0.250"

    def test_requests_do_not_wait_for_the_frame_at_hand(self, setup):
        setup.engine.session.step_s = 2.0
        setup.camera.send()
        time.sleep(0.2)
        assert setup.set_goal().success
        assert len(setup.list_goals()) == 1
        assert not setup.masks, "the answers came before the frame was done"

    @pytest.mark.parametrize("state", ["unconfigured", "inactive"])
    def test_rejected_when_not_active(self, graph, engine, state):
        setup = Setup(graph, engine, autostart=False)
        if state == "inactive":
            assert setup.change(Transition.TRANSITION_CONFIGURE)
        for answer in (setup.set_goal(), setup.clear_goal()):
            assert not answer.success
            assert f"the segmenter is {state}, not active" in answer.message
            assert "ros2 lifecycle set /segmenter" in answer.message


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"encoding": "bayer_rggb8"}, "'bayer_rggb8' is not supported"),
            ({"encoding": "mono16"}, "'mono16' is not supported"),
            ({"step": 5}, "step 5, but a row needs 96 bytes"),
            ({"step": WIDTH * 3 + 8}, "it was cut short"),
            ({"data": array("B", [1, 2, 3])}, "it was cut short"),
            ({"width": 0, "height": 0, "step": 0, "data": array("B")}, "no pixels"),
        ],
    )
    def test_images(self, setup, change, says):
        setup.send_until_mask()
        bad = setup.camera.image()
        for name, value in change.items():
            setattr(bad, name, value)
        setup.camera.send(bad)
        setup.wait_for_status("input", DiagnosticStatus.WARN, says)
        values = setup.values("input")
        assert values["bad frames"] == "1"
        assert (values["image"], values["changes of size or encoding"]) == (f"{WIDTH}x{HEIGHT} rgb8", "0")
        header, mask = setup.send_until_mask()
        assert mask.header == header, "the node goes on"
        wait_until(lambda: setup.objects[-1].header == header)
        assert setup.objects[-1].timings.frames_dropped == 1

    def test_images_that_were_rejected_are_counted_beyond_a_pause(self, setup):
        setup.camera.send(Image(encoding="rgb8"))
        wait_until(lambda: setup.values("input")["dropped"] == "1")
        for enabled in (False, True):
            assert setup.graph.call(SetBool, "/segmenter/enable", SetBool.Request(data=enabled)).success
        before = len(setup.diagnostics)
        wait_until(lambda: len(setup.diagnostics) > before + 2)
        assert (setup.values("input")["received"], setup.values("input")["dropped"]) == ("1", "1")

    def test_a_new_resolution_in_mid_stream_is_followed_and_told(self, setup):
        assert setup.set_goal().success
        setup.send_until_mask()
        header, mask = setup.send_until_mask(setup.camera.image(width=64, height=48))
        assert (mask.header, mask.width, mask.height) == (header, 64, 48)
        wait_until(lambda: setup.values("input")["changes of size or encoding"] == "1")
        assert setup.values("input")["image"] == "64x48 rgb8"
        setup.wait_for_status("input", DiagnosticStatus.WARN, "changed from 32x24 rgb8 to 64x48 rgb8")

    def test_images_without_a_time_are_told_with_the_cause(self, setup):
        bad = setup.camera.image()
        bad.header.stamp.sec = bad.header.stamp.nanosec = 0
        setup.camera.send(bad)
        setup.wait_for_status("input", DiagnosticStatus.WARN, "no time stamp (header.stamp is 0 ns)", "camera driver")
        assert not setup.masks
        setup.send_until_mask()

    def test_images_whose_time_stands_still_are_told_with_the_cause(self, setup):
        image = setup.camera.image()
        for _ in range(SAME_STAMPS):
            setup.send_until_mask(image)
        setup.camera.send(image)
        setup.wait_for_status("input", DiagnosticStatus.WARN, f"the last {SAME_STAMPS + 1} images carry the same time")
        assert len(setup.masks) == SAME_STAMPS
        setup.send_until_mask()

    def test_time_stamps_that_go_back_are_told(self, setup):
        first, second = setup.camera.image(), setup.camera.image()
        second.header.stamp.sec = first.header.stamp.sec - 5
        second.header.stamp.nanosec = first.header.stamp.nanosec
        setup.send_until_mask(first)
        setup.send_until_mask(second)
        setup.wait_for_status("input", DiagnosticStatus.WARN, "time stamps went back by 5.000 s", "two publishers")
        setup.send_until_mask()
        values = setup.values("input")
        assert (values["time stamps went back"], values["bad frames"]) == ("1", "0")

    def test_a_frame_that_the_session_rejects(self, setup):
        bad = setup.camera.image()
        stamp_ns = bad.header.stamp.sec * 10**9 + bad.header.stamp.nanosec
        setup.engine.session.failing_stamps[stamp_ns] = BadFrame("too dark to see; light a lamp")
        setup.camera.send(bad)
        setup.wait_for_status("input", DiagnosticStatus.WARN, "light a lamp")
        setup.send_until_mask()

    def test_repeated_failures_stop_inference_with_the_traceback_and_activation_restarts_it(self, graph, engine):
        setup = Setup(graph, engine, stop_after_failures=3).active()
        engine.session.failure = RuntimeError("boom")

        def stopped():
            setup.camera.send()
            time.sleep(0.02)
            return setup.node._thread.failed

        wait_until(stopped)
        setup.wait_for_status("output", DiagnosticStatus.ERROR, "inference stopped: RuntimeError: boom")
        assert "in step" in setup.values("output")["traceback"]
        answer = setup.set_goal()
        assert not answer.success
        assert "inference has stopped" in answer.message
        engine.session.failure = None
        assert setup.change(Transition.TRANSITION_DEACTIVATE)
        assert setup.change(Transition.TRANSITION_ACTIVATE)
        setup.active().send_until_mask()

    @pytest.mark.parametrize(("goal", "says"), [("  ", "got an empty one"), ("the xyzzy", "does not know 'xyzzy'")])
    def test_a_goal_that_nobody_could_read_is_refused_at_once(self, setup, goal, says):
        answer = setup.set_goal(goal)
        assert not answer.success
        assert says in answer.message
        assert not setup.list_goals()
        setup.wait_for_status("goals", DiagnosticStatus.WARN, says)
        setup.send_until_mask()

    def test_an_unknown_goal_id(self, setup):
        answer = setup.clear_goal("nobody's")
        assert not answer.success
        assert 'no goal "nobody\'s" is set' in answer.message
        setup.wait_for_status("goals", DiagnosticStatus.WARN, "nobody's")
        setup.send_until_mask()

    def test_depth_that_does_not_fit_is_told(self, graph, engine):
        setup = Setup(graph, engine, use_depth=True, no_image_after_s=60.0).active()
        setup.send_until_mask()
        depth = graph.publisher(Image, "depth", qos_profile_sensor_data)
        wait_until(depth.get_subscription_count)
        depth.publish(Image(width=2, height=1, encoding="16UC1", step=4, data=array("B", bytes(4))))
        setup.wait_for_status(
            "input", DiagnosticStatus.WARN, "depth is 2x1, the image 32x24: not two sizes of one view"
        )
        assert "registered with the image" in setup.values("input")["depth problem"]
        depth.publish(Image(width=2, height=1, encoding="8UC1", step=2, data=array("B", bytes(2))))
        setup.wait_for_status("input", DiagnosticStatus.WARN, "'8UC1' is not supported")
        fitting = array("B", bytes(WIDTH * HEIGHT * 2))
        other_frame = Image(width=WIDTH, height=HEIGHT, encoding="16UC1", step=WIDTH * 2, data=fitting)
        depth.publish(other_frame)
        setup.wait_for_status("input", DiagnosticStatus.WARN, f"depth has the frame '', the image {FRAME_ID!r}")
        other_frame.header.frame_id = FRAME_ID
        depth.publish(other_frame)
        setup.wait_for_status("input", DiagnosticStatus.OK, "arrives")

    def test_depth_that_does_not_come_is_told(self, graph, engine):
        setup = Setup(graph, engine, use_depth=True, no_image_after_s=0.5).active()

        def told():
            setup.camera.send()
            status = setup.status("input")
            is_told = status is not None and "no depth on /depth since activation" in status.message
            return is_told and status.level == DiagnosticStatus.WARN  # beside other warnings: we send very fast

        wait_until(told)

    def test_camera_info_that_does_not_fit_is_told_and_not_passed_on(self, graph, engine):
        setup = Setup(graph, engine, no_image_after_s=60.0).active()
        infos = graph.collect(CameraInfo, "/segmenter/camera_info")
        wait_until(lambda: setup.node.cameras[0].outputs.camera_info.wanted)
        info_publisher = graph.publisher(CameraInfo, "camera_info", qos_profile_sensor_data)
        wait_until(info_publisher.get_subscription_count)
        info_publisher.publish(CameraInfo(width=64, height=48))
        wait_until(lambda: setup.node.cameras[0].inputs.camera_info is not None)
        setup.send_until_mask()
        setup.wait_for_status("input", DiagnosticStatus.WARN, "camera_info is 64x48, the image 32x24", "remap")
        assert "camera_info is 64x48" in setup.values("input")["camera_info problem"]
        info_publisher.publish(CameraInfo(width=WIDTH, height=HEIGHT))
        wait_until(lambda: setup.node.cameras[0].inputs.camera_info.width == WIDTH)
        header, _ = setup.send_until_mask()
        wait_until(lambda: infos)
        assert [info.header for info in infos] == [header]
        setup.wait_for_status("input", DiagnosticStatus.OK, "none", key="camera_info problem")

    def test_the_reasoners_trouble_is_shown_and_masks_go_on(self, setup):
        setup.engine.reasoner.problem = "no reasoner answers at ipc:///x; start virst-reasoner"
        setup.send_until_mask()
        setup.wait_for_status("reasoner", DiagnosticStatus.WARN, "start virst-reasoner", "masks go on")
        setup.engine.reasoner.problem = ""
        setup.send_until_mask()
        setup.wait_for_status("reasoner", DiagnosticStatus.OK)

    def test_the_reasoners_trouble_is_shown_before_the_first_image(self, setup):
        setup.engine.reasoner.problem = "no reasoner answers at ipc:///x; start virst-reasoner"
        setup.wait_for_status("reasoner", DiagnosticStatus.WARN, "start virst-reasoner")
        assert not setup.masks
        setup.engine.reasoner.problem = ""
        setup.wait_for_status("reasoner", DiagnosticStatus.OK, "listening")

    def test_the_words_of_an_endless_goal_are_not_read(self, graph, engine):
        setup = Setup(graph, engine, goal__max_length=20).active()
        assert "does not know" in setup.set_goal("the xyzzy").message
        assert "may have 20 characters, got 29" in setup.set_goal("the xyzzy" + " and so on" * 2).message
