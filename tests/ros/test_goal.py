# SPDX-License-Identifier: Apache-2.0
"""`virst-goal` as a process against a node with a fake engine, over the real middleware."""

import os
import subprocess
import sys
import threading

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("virst_msgs.msg")

from typer.testing import CliRunner
from virst_msgs.srv import ListGoals, SetGoal

from tests.ros.ros_graph import wait_until, words
from virst_ros.goal import app
from virst_ros.segmenter_node import SegmenterNode

pytestmark = pytest.mark.ros


@pytest.fixture
def segmenter(graph, engine):
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active")
    return node


def virst_goal(graph, *arguments):
    """(exit status, what was printed, what was complained of)"""
    ended = subprocess.run(
        [sys.executable, "-m", "virst_ros.goal", *arguments],
        env=os.environ | {"ROS_DOMAIN_ID": str(graph.domain_id), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout.strip(), ended.stderr.strip()


def test_set_list_and_clear(graph, segmenter, engine):
    status, first, complaint = virst_goal(graph, "the red ball", "--object-id", "ball")
    assert (status, complaint) == (0, "")
    assert [(goal.goal_id, goal.sentence, goal.object_id) for goal in engine.session.goals()] == [
        (first, "the red ball", "ball")
    ]
    _, second, _ = virst_goal(graph, "the cup", "--node", "segmenter")
    assert virst_goal(graph, "--list")[:2] == (
        0,
        f"{first}  SEARCHING  the red ball\n{second}  SEARCHING  the cup",
    )
    assert virst_goal(graph, "--clear", first)[:2] == (0, "1 goal(s) cleared")
    assert [goal.goal_id for goal in engine.session.goals()] == [second]
    _, third, _ = virst_goal(graph, "the can", "--replace")
    assert [goal.goal_id for goal in engine.session.goals()] == [third]
    assert virst_goal(graph, "--all")[:2] == (0, "1 goal(s) cleared")
    assert engine.session.goals() == ()


def test_a_question_is_answered_in_words(graph, engine):
    asked = []
    engine.ask = lambda question, camera: asked.append((question, camera)) or words("the red ball")
    node = graph.add(SegmenterNode, engine)
    wait_until(lambda: node.state == "active")
    assert virst_goal(graph, "--ask", "the thing that can roll", "--camera", "camera") == (0, "the red ball", "")
    assert asked == [("the thing that can roll", "camera")]
    assert virst_goal(graph, "--ask", "the xyzzy")[0::2] == (
        1,
        "virst-goal: this model does not know 'xyzzy'; say it in other words",
    )
    assert engine.session.goals() == ()


def test_a_refusal_is_told_and_ends_with_1(graph, segmenter):
    assert virst_goal(graph, "the xyzzy")[0::2] == (
        1,
        "virst-goal: this model does not know 'xyzzy'; say it in other words",
    )


def test_an_absent_segmenter_is_told_with_those_that_are_there(graph, segmenter):
    status, _, complaint = virst_goal(graph, "the cup", "--node", "/robot/segmenter", "--timeout", "8")
    assert status == 1
    assert f"nobody offers /robot/segmenter/set_goal in ROS domain {graph.domain_id}" in complaint
    assert complaint.endswith("--node; there is /segmenter")


def test_no_segmenter_at_all(graph):
    status, _, complaint = virst_goal(graph, "--list", "--timeout", "0.5")
    assert status == 1
    assert "start the segmenter, or set ROS_DOMAIN_ID" in complaint


def test_a_segmenter_that_hangs_is_not_waited_for(graph):
    released = threading.Event()

    def hang(_, response):
        released.wait(60)
        return response

    graph.node.create_service(ListGoals, "/segmenter/list_goals", hang)
    graph.node.create_service(SetGoal, "/segmenter/set_goal", hang)
    try:
        status, _, complaint = virst_goal(graph, "--list", "--timeout", "8")
    finally:
        released.set()
    assert status == 1
    assert "/segmenter/list_goals has not answered within 8 s" in complaint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one of"),
        (("  ",), "give one of"),
        (("the cup", "--list"), "give one of"),
        (("--all", "--clear", "goal_1"), "give one of"),
        (("--clear", ""), "give one of"),
        (("--list", "--replace"), "belong to a sentence"),
        (("--list", "--instances", "3"), "belong to a sentence"),
        (("--timeout", "0", "the cup"), "timeout"),
        (("the cup", "--ask", "the can"), "give one of"),
        (("--ask", " "), "give one of"),
        (("--ask", "the can", "--replace"), "belong to a sentence"),
        (("--list", "--camera", "front"), "belongs to a sentence or a question"),
    ],
)
def test_a_wrong_use_is_told_and_ends_with_2(arguments, says):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_a_name_that_no_node_can_have(graph):
    status, _, complaint = virst_goal(graph, "the cup", "--node", "my segmenter")
    assert status == 1
    assert "--node 'my segmenter' is no node's name" in complaint


def test_the_help_names_every_option():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in (
        "--clear",
        "--all",
        "--list",
        "--node",
        "--object-id",
        "--replace",
        "--instances",
        "--timeout",
        "--ask",
    ):
        assert option in result.output
