# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from virst_engine.config import EngineConfig
from virst_ros import parameters
from virst_ros.parameters import NodeParameters

ROOT = Path(__file__).parents[2]


def test_the_shipped_parameter_file_is_current():
    shipped = (ROOT / "launch/params/default.yaml").read_text(encoding="utf-8")
    assert shipped == parameters.default_yaml(), "run: python -m virst_ros.parameters > launch/params/default.yaml"


def test_the_file_parses_back_to_the_defaults():
    yaml = pytest.importorskip("yaml")
    tree = yaml.safe_load(parameters.default_yaml())["/**"]["ros__parameters"]
    flat = {}
    for name, value in tree.items():
        flat |= {f"{name}.{leaf}": inner for leaf, inner in value.items()} if isinstance(value, dict) else {name: value}
    assert parameters.engine_config(flat) == EngineConfig()
    assert parameters.node_parameters(flat) == NodeParameters()
    by_name = {spec.name: spec for spec in [*parameters.engine_specs(), *parameters.node_specs()]}
    kinds = {name: list if spec.type is tuple else spec.type for name, spec in by_name.items()}
    assert {name: type(value) for name, value in flat.items()} == kinds


@pytest.mark.parametrize(
    ("cameras", "words"),
    [
        (["left", "left"], "has a name twice"),
        (["a/b"], "cannot be a part of a topic's name"),
        (["1st"], "no digit first"),
        (["x" * 65], "up to 64"),
        ([f"camera_{i}" for i in range(17)], "at most 16, got 17"),
    ],
)
def test_names_of_cameras_that_make_no_topics_are_refused(cameras, words):
    with pytest.raises(ValueError, match=words):
        parameters.node_parameters({"cameras": cameras})


def test_ros_writes_no_cameras_as_an_empty_name():
    assert parameters.node_parameters({"cameras": [""]}).cameras == ()
    assert parameters.node_parameters({"cameras": ["left", "right"]}).cameras == ("left", "right")


def test_every_engine_parameter_has_a_name_and_a_meaning():
    specs = parameters.engine_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(spec.description and "." in spec.name for spec in specs)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"memory.anchors_attended": 9}, "memory.anchors_attended must be <= memory.anchor_slots"),
        ({"memory.recent_frames": 0}, "memory.recent_frames must be >= 1, got 0"),
        ({"model.name": "other"}, "model.name must be one of"),
        ({"reasoner.period_s": float("nan")}, "reasoner.period_s must be finite"),
    ],
)
def test_nonsense_is_rejected_by_name(values, reason):
    with pytest.raises(ValueError, match=reason):
        parameters.engine_config(values)


def test_node_parameters_are_checked_too():
    with pytest.raises(ValueError, match="output_qos must be one of DEFAULT, SENSOR_DATA, SYSTEM_DEFAULT"):
        parameters.node_parameters({"output_qos": "BEST"})


@pytest.mark.ros
class TestOnANode:
    @pytest.fixture
    def node(self, graph):
        self.accepted = []
        specs = [*parameters.engine_specs(), *parameters.node_specs()]
        parameters.declare(graph.node, specs)
        gate = parameters.ParameterGate(graph.node, lambda *both: self.accepted.append(both))
        graph.node.add_on_set_parameters_callback(gate)
        return graph.node

    def set(self, node, name, value):
        from rclpy.parameter import Parameter

        return node.set_parameters([Parameter(name, value=value)])[0]

    def test_declared_defaults_read_back_as_the_default_configuration(self, node):
        values = parameters.values_of(node, [*parameters.engine_specs(), *parameters.node_specs()])
        assert parameters.engine_config(values) == EngineConfig()
        assert parameters.node_parameters(values) == NodeParameters()

    def test_descriptors_say_what_is_allowed(self, node):
        described = node.describe_parameter("memory.ring_steps")
        assert described.read_only
        assert described.description
        assert (described.integer_range[0].from_value, described.integer_range[0].to_value) == (2, 4096)
        described = node.describe_parameter("tracking.agree_iou")
        assert not described.read_only
        assert (described.floating_point_range[0].from_value, described.floating_point_range[0].to_value) == (0.0, 1.0)
        assert "SENSOR_DATA" in node.describe_parameter("input_qos").additional_constraints

    def test_a_live_parameter_changes_and_tells(self, node):
        assert self.set(node, "reasoner.period_s", 2.5).successful
        engine, _ = self.accepted[-1]
        assert engine.reasoner.period_s == 2.5

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("tracking.agree_iou", 1.5, "range"),
            ("reasoner.period_s", float("nan"), "range"),
            ("memory.ring_steps", 10, "read-only"),
            ("tracking.agree_iou", "much", "type"),
        ],
    )
    def test_nonsense_is_rejected_with_a_reason_and_nothing_changes(self, node, name, value, reason):
        before = node.get_parameter(name).value
        result = self.set(node, name, value)
        assert not result.successful
        assert reason in result.reason
        assert node.get_parameter(name).value == before
        assert not self.accepted

    def test_the_gate_checks_across_fields(self, node):
        from rclpy.parameter import Parameter

        gate = parameters.ParameterGate(node, lambda *both: self.accepted.append(both))
        result = gate([Parameter("memory.anchor_slots", value=2)])
        assert not result.successful
        assert result.reason == "memory.anchors_attended must be <= memory.anchor_slots (2), got 3"
        assert not self.accepted
