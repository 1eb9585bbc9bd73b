# SPDX-License-Identifier: Apache-2.0
"""Every endpoint of an active node: name, type and quality of service, and that there are no others."""

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from rclpy.qos import DurabilityPolicy, HistoryPolicy, ReliabilityPolicy

from tests.ros.ros_graph import wait_until
from virst_ros import vision_outputs
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros

RELIABLE, BEST_EFFORT = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
VOLATILE, LATCHED = DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL

PUBLISHED = {
    "/segmenter/mask": ("sensor_msgs/msg/Image", RELIABLE, VOLATILE),
    "/segmenter/mask/compressed": ("sensor_msgs/msg/CompressedImage", RELIABLE, VOLATILE),
    "/segmenter/target_mask": ("sensor_msgs/msg/Image", RELIABLE, VOLATILE),
    "/segmenter/camera_info": ("sensor_msgs/msg/CameraInfo", RELIABLE, VOLATILE),
    "/segmenter/objects": ("virst_msgs/msg/SegmentedObjectArray", RELIABLE, LATCHED),
    "/segmenter/overlay": ("sensor_msgs/msg/Image", BEST_EFFORT, VOLATILE),
    "/segmenter/overlay/compressed": ("sensor_msgs/msg/CompressedImage", BEST_EFFORT, VOLATILE),
    "/segmenter/points": ("sensor_msgs/msg/PointCloud2", RELIABLE, VOLATILE),
    "/segmenter/points_without_object": ("sensor_msgs/msg/PointCloud2", RELIABLE, VOLATILE),
    "/segmenter/markers": ("visualization_msgs/msg/MarkerArray", RELIABLE, VOLATILE),
    "/diagnostics": ("diagnostic_msgs/msg/DiagnosticArray", RELIABLE, VOLATILE),
}
WITH_VISION_MSGS = {
    "/segmenter/detections": ("vision_msgs/msg/Detection2DArray", RELIABLE, VOLATILE),
    "/segmenter/label_info": ("vision_msgs/msg/LabelInfo", RELIABLE, LATCHED),
}
SUBSCRIBED = {
    "/image": ("sensor_msgs/msg/Image", BEST_EFFORT, VOLATILE),
    "/camera_info": ("sensor_msgs/msg/CameraInfo", BEST_EFFORT, VOLATILE),
    "/depth": ("sensor_msgs/msg/Image", BEST_EFFORT, VOLATILE),
    "/depth/camera_info": ("sensor_msgs/msg/CameraInfo", BEST_EFFORT, VOLATILE),
}
SERVICES = {
    "set_goal": "virst_msgs/srv/SetGoal",
    "clear_goal": "virst_msgs/srv/ClearGoal",
    "list_goals": "virst_msgs/srv/ListGoals",
    "add_objects": "virst_msgs/srv/AddObjects",
    "remove_object": "virst_msgs/srv/RemoveObject",
    "ask": "virst_msgs/srv/Ask",
    "enable": "std_srvs/srv/SetBool",
    "reset": "std_srvs/srv/Trigger",
}
# What rclpy adds to every node, and lifecycle to its own.
OF_ROS = ("/rosout", "/parameter_events", "/clock", "/segmenter/transition_event")
LIFECYCLE = ("change_state", "get_state", "get_available_states", "get_available_transitions", "get_transition_graph")
PARAMETERS = (
    *("describe_parameters", "get_parameter_types", "get_parameters", "get_type_description"),
    *("list_parameters", "set_parameters", "set_parameters_atomically"),
)


@pytest.fixture
def node(graph, engine):
    node = graph.add(SegmenterNode, engine, use_depth=True)
    wait_until(lambda: node.state == "active")
    return node


def endpoints(graph, by_node, by_topic):
    """Topic -> (type, reliability, durability) as another node of the graph sees them."""
    found = {}
    for topic, _ in by_node("segmenter", "/"):
        if topic in OF_ROS or "/_action/" in topic:
            continue
        (info,) = [each for each in by_topic(topic) if each.node_name == "segmenter"]
        found[topic] = (info.topic_type, info.qos_profile.reliability, info.qos_profile.durability)
    return found


def test_every_publisher_is_as_documented_and_there_are_no_others(graph, node):
    expected = dict(PUBLISHED)
    if vision_outputs.load_vision_msgs() is not None:
        expected |= WITH_VISION_MSGS
    tester = graph.node

    def published():
        return endpoints(graph, tester.get_publisher_names_and_types_by_node, tester.get_publishers_info_by_topic)

    wait_until(lambda: published().keys() >= expected.keys())
    assert published() == expected


def test_every_subscription_is_as_documented_and_there_are_no_others(graph, node):
    tester = graph.node

    def subscribed():
        return endpoints(graph, tester.get_subscriber_names_and_types_by_node, tester.get_subscriptions_info_by_topic)

    wait_until(lambda: subscribed().keys() >= SUBSCRIBED.keys())
    assert subscribed() == SUBSCRIBED


def test_every_service_and_the_action_are_as_documented_and_there_are_no_others(graph, node):
    def offered():
        services = dict(graph.node.get_service_names_and_types_by_node("segmenter", "/"))
        return {name.removeprefix("/segmenter/"): kinds for name, kinds in services.items()}

    wait_until(lambda: offered().keys() >= SERVICES.keys())
    ours = {name: kinds for name, kinds in offered().items() if "_action/" not in name}
    assert ours.keys() <= {*SERVICES, *LIFECYCLE, *PARAMETERS}
    for name, kind in SERVICES.items():
        assert ours[name] == [kind]

    from rclpy.action import get_action_server_names_and_types_by_node

    actions = wait_until(lambda: get_action_server_names_and_types_by_node(graph.node, "segmenter", "/"))
    assert actions == [("/segmenter/segment", ["virst_msgs/action/Segment"])]


def test_an_inactive_node_subscribes_to_nothing(graph, engine):
    node = graph.add(SegmenterNode, engine, autostart=False, use_depth=True)
    node.trigger_configure()
    assert node.state == "inactive"
    wait_until(lambda: graph.node.count_publishers("/segmenter/mask"))
    for topic in SUBSCRIBED:
        assert graph.node.count_subscribers(topic) == 0, topic


def test_depth_is_not_subscribed_to_unless_it_is_used(graph, engine):
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active")
    wait_until(lambda: graph.node.count_subscribers("/image"))
    assert graph.node.count_subscribers("/depth") == graph.node.count_subscribers("/depth/camera_info") == 0


def test_history_is_short_where_old_data_is_worth_nothing(node):
    depths = {
        "/segmenter/mask": 5,
        "/segmenter/objects": 1,
        "/segmenter/points": 1,
        "/segmenter/points_without_object": 1,
        "/segmenter/overlay": 1,
    }
    for publisher in node.publishers:
        wanted = depths.get(publisher.topic_name)
        if wanted is not None:
            profile = publisher.qos_profile
            assert (profile.history, profile.depth) == (HistoryPolicy.KEEP_LAST, wanted), publisher.topic_name


@pytest.mark.parametrize("namespace", ["robot", "/robot/head"])
def test_a_namespace_moves_everything_but_diagnostics(graph, engine, namespace):
    from functools import partial

    node = graph.add(partial(SegmenterNode, namespace=namespace), engine, use_depth=True)
    wait_until(lambda: node.state == "active")
    prefix = f"/{namespace.strip('/')}"
    for topic in SUBSCRIBED:
        wait_until(lambda topic=topic: graph.node.count_subscribers(f"{prefix}{topic}"))
    for topic in PUBLISHED:
        place = topic if topic == "/diagnostics" else f"{prefix}{topic}"
        wait_until(lambda place=place: graph.node.count_publishers(place))
