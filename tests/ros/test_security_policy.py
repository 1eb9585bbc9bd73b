# SPDX-License-Identifier: Apache-2.0
"""launch/segmenter.policy.xml, for SROS 2, allows exactly the endpoints that the node has."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from tests.ros.ros_graph import wait_until
from virst_ros import vision_outputs
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros

POLICY = Path(__file__).parents[2] / "launch" / "segmenter.policy.xml"
WITH_VISION_MSGS = {"/segmenter/detections", "/segmenter/label_info"}
NOT_BEFORE_IRON = {"/segmenter/get_type_description"}


class Policy:
    """What the file allows, with full names, for a node in the root namespace."""

    def __init__(self, cameras=()):
        root = ET.parse(POLICY).getroot()
        (self.enclave,) = root.findall("enclaves/enclave")
        (self.profile,) = self.enclave.findall("profiles/profile")
        self.cameras = cameras
        topics = self.profile.findall("topics")
        self.of_each_camera = topics[1], topics[2]

    def allowed(self, group, qualifier):
        found = set()
        for element in self.profile.findall(group):
            assert set(element.attrib.values()) == {"ALLOW"}
            if qualifier in element.attrib:
                for name in element:
                    found |= {self.full(each) for each in self.repeated(name.text, element in self.of_each_camera)}
        return found

    def repeated(self, name, is_of_each_camera):
        """As the file's comment says."""
        if not (self.cameras and is_of_each_camera):
            return [name]
        return [name.replace("~/", f"~/{each}/") if name[0] == "~" else f"{each}/{name}" for each in self.cameras]

    def full(self, name):
        if name[0] == "/":
            return name
        return name.replace("~", f"/{self.profile.get('node')}") if name[0] == "~" else f"/{name}"


def names(by_node):
    """Of an endpoint kind, without those that make up the action."""
    return {name for name, _ in by_node("segmenter", "/") if "/_action/" not in name}


def wait_for(by_node, wanted):
    """Until the node has all of these; says which it has not."""
    missing = [set(wanted)]

    def has_all():
        missing[0] = wanted - names(by_node)
        return not missing[0]

    try:
        wait_until(has_all)
    except AssertionError as error:
        raise AssertionError(f"{error}; missing: {sorted(missing[0])}") from None


def start(graph, engine, **parameters):
    node = graph.add(SegmenterNode, engine, autostart=False, use_depth=True, **parameters)
    node.trigger_configure()
    node.trigger_activate()
    assert node.state == "active"
    wait_until(lambda: graph.node.count_publishers("/segmenter/transition_event"))
    return node


def test_the_file_is_a_policy_for_one_enclave():
    root = ET.parse(POLICY).getroot()
    assert (root.tag, root.attrib) == ("policy", {"version": "0.2.0"})
    policy = Policy()
    assert policy.enclave.get("path") == "/segmenter"
    assert (policy.profile.get("ns"), policy.profile.get("node")) == ("/", "segmenter")
    for element in policy.profile:
        listed = [name.text for name in element]
        assert listed == sorted(set(listed)), "each name once, in order"
        assert {name.tag for name in element} == {element.tag.removesuffix("s")}


def test_it_publishes_exactly_what_it_may(graph, engine):
    start(graph, engine)
    may = Policy().allowed("topics", "publish")
    if vision_outputs.load_vision_msgs() is None:
        assert may >= WITH_VISION_MSGS
        may -= WITH_VISION_MSGS
    wait_for(graph.node.get_publisher_names_and_types_by_node, may)
    assert names(graph.node.get_publisher_names_and_types_by_node) == may


@pytest.mark.parametrize(("transport", "unused"), [("raw", "/image/compressed"), ("compressed", "/image")])
def test_it_subscribes_to_exactly_what_it_may(graph, engine, transport, unused):
    start(graph, engine, image_transport=transport, use_sim_time=True)
    may = Policy().allowed("topics", "subscribe")
    assert unused in may
    wait_for(graph.node.get_subscriber_names_and_types_by_node, may - {unused})
    assert names(graph.node.get_subscriber_names_and_types_by_node) == may - {unused}


def test_it_serves_exactly_what_it_may(graph, engine):
    from rclpy.action import get_action_server_names_and_types_by_node

    start(graph, engine)
    policy = Policy()
    may = policy.allowed("services", "reply")
    wait_for(graph.node.get_service_names_and_types_by_node, may - NOT_BEFORE_IRON)
    assert may - NOT_BEFORE_IRON <= names(graph.node.get_service_names_and_types_by_node) <= may
    actions = {name for name, _ in get_action_server_names_and_types_by_node(graph.node, "segmenter", "/")}
    assert actions == policy.allowed("actions", "execute")
    clients = {name for name, _ in graph.node.get_client_names_and_types_by_node("segmenter", "/")}
    assert clients == policy.allowed("services", "request") == policy.allowed("actions", "call") == set()


def test_several_cameras_have_the_names_that_the_comment_says(graph, engine):
    start(graph, engine, cameras=["left", "right"])
    policy, tester = Policy(cameras=("left", "right")), graph.node
    publish, subscribe = policy.allowed("topics", "publish"), policy.allowed("topics", "subscribe")
    wait_until(lambda: tester.count_publishers("/segmenter/right/mask") and tester.count_subscribers("/right/depth"))
    assert {"/segmenter/left/mask", "/segmenter/right/mask"} <= publish
    assert names(tester.get_publisher_names_and_types_by_node) <= publish
    assert publish - names(tester.get_publisher_names_and_types_by_node) <= {
        f"/segmenter/{camera}/{topic}" for camera in ("left", "right") for topic in ("detections", "label_info")
    }
    unused = {"/clock", "/left/image/compressed", "/right/image/compressed"}
    assert names(tester.get_subscriber_names_and_types_by_node) == subscribe - unused
