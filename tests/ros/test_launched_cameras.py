# SPDX-License-Identifier: Apache-2.0
"""What the launch file gives a segmenter, given to a real one: the cameras and their topics."""

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from functools import partial

from tests.test_launch import load_launch_file, parameters, processes
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


def launched(graph, **given):
    """An unconfigured segmenter with the topics and the cameras that these launch arguments mean."""
    with pytest.MonkeyPatch.context() as stand_ins:
        node = processes(load_launch_file(stand_ins), autostart="false", **given)["segmenter"]
    rules = [word for inside, outside in node.named["remappings"] for word in ("-r", f"{inside}:={outside}")]
    make = partial(SegmenterNode, namespace=node.named["namespace"], cli_args=["--ros-args", *rules])
    chosen = {name: parameters(node)[name] for name in ("autostart", "cameras", "camera_name", "image_transport")}
    return graph.add(make, **chosen)


def test_each_camera_of_a_segmenter_hears_its_own_topics(graph):
    node = launched(graph, camera_names="left,right", depth_topic="/{camera}/depth", namespace="robot")
    assert [(camera.name, camera.image_topic) for camera in node.cameras] == [
        ("left", "/left/color/image_raw"),
        ("right", "/right/color/image_raw"),
    ]
    assert node.resolve_topic_name("right/camera_info") == "/right/color/camera_info"
    assert node.resolve_topic_name("right/depth") == "/right/depth"
    assert node.resolve_topic_name("~/right/mask") == "/robot/segmenter/right/mask"


def test_a_list_of_one_camera_has_its_name_in_the_topics(graph):
    node = launched(graph, camera_names="top", image_topic="/image", image_transport="compressed")
    assert [(camera.name, camera.image_topic) for camera in node.cameras] == [("top", "/image/compressed")]


def test_a_segmenter_for_one_camera_has_no_list(graph, tmp_path):
    file = tmp_path / "mine.yaml"
    defaults = "camera_name: camera, image_transport: raw"
    file.write_text(f"/**: {{ros__parameters: {{cameras: [left], {defaults}}}}}")
    node = launched(graph, params_file=str(file), process_per_camera="true")
    assert (node.get_namespace(), [(camera.name, camera.image_topic) for camera in node.cameras]) == (
        "/left",
        [("left", "/left/color/image_raw")],
    )
    alone = launched(graph)
    assert [(camera.name, camera.image_topic) for camera in alone.cameras] == [("camera", "/camera/color/image_raw")]
