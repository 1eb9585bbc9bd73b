# SPDX-License-Identifier: Apache-2.0
"""The parameters of the segmenter: the engine's tree (`EngineConfig`, named `group.field`) and the node's own.

`python -m virst_ros.parameters` prints them all with their defaults, as a parameter file; that works without ROS.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from virst_engine.config import EngineConfig, check_fields, parameter

QOS_NAMES = ("DEFAULT", "SENSOR_DATA", "SYSTEM_DEFAULT")
AUTO, ON, OFF = "auto", "on", "off"
MOST_CAMERAS, LONGEST_CAMERA = 16, 64


@dataclass(frozen=True)
class SyncParameters:
    """How depth images find the frames that they belong to."""

    queue_size: int = parameter(10, "depth images kept until the mask of their frame is there", low=1, high=100)
    # Beyond half a frame, another image's depth would be nearer.
    slop_s: float = parameter(
        0.0,
        "difference in time stamp up to which depth and image belong together, at most half of the time between two "
        "images; 0 = equal stamps only, as drivers of RGB-D cameras send them",
        low=0.0,
        high=0.5,
        live=True,
    )

    def __post_init__(self) -> None:
        check_fields("sync", self)


@dataclass(frozen=True)
class DepthParameters:
    """What is made of depth."""

    rectified: bool = parameter(
        False, "the images are rectified: camera_info's P holds for them, not its K and D", live=True
    )
    margin_px: int = parameter(
        4,
        "pixels around the target that points_without_object leaves out too: depth is blurred at an edge, and what is "
        "left of the object would be an obstacle",
        low=0,
        high=100,
        live=True,
    )
    every_px: int = parameter(
        2, "points_without_object holds every so many-th row and column", low=1, high=32, live=True
    )

    def __post_init__(self) -> None:
        check_fields("depth", self)


@dataclass(frozen=True)
class LimitParameters:
    """What one caller may ask of the node. The length of a goal is goal.max_length."""

    requests_per_s: float = parameter(
        20.0,
        "requests per second that each service, and the action, takes on average; more are refused. list_goals takes "
        "ten times as many",
        low=0.1,
        high=10_000.0,
        live=True,
    )
    burst: int = parameter(40, "requests that each of them takes at once, after a pause", low=1, high=10_000, live=True)
    objects_per_request: int = parameter(
        32, "objects that one call of add_objects may point at", low=1, high=254, live=True
    )
    image_megapixels: float = parameter(
        64.0,
        "million pixels of the largest image and depth image that are taken, and of all masks of one call of "
        "add_objects together",
        low=0.001,
        high=175.0,  # Pillow, which reads the headers of compressed ones, goes no further
    )

    def __post_init__(self) -> None:
        check_fields("limits", self)

    @property
    def image_pixels(self) -> int:
        return round(self.image_megapixels * 1e6)


@dataclass(frozen=True)
class NodeParameters:
    """What the node adds to the engine's configuration."""

    autostart: bool = parameter(True, "configure and activate without waiting for a lifecycle manager")
    camera_name: str = parameter("camera", "name of the only camera; goals may be limited to it")
    cameras: tuple = parameter(  # of str
        (),
        "names of several cameras, which share the model and the goals: images come on <name>/image, masks go to "
        "~/<name>/mask, and so on; none = one camera, on image and ~/mask",
    )
    initial_goal: str = parameter("", "goal that is set at the first activation; empty = none")
    image_transport: str = parameter(
        "raw",
        "raw = subscribe to `image`; compressed = to `image/compressed` (JPEG or PNG), for cameras behind a network",
        choices=("raw", "compressed"),
    )
    input_qos: str = parameter("SENSOR_DATA", "quality of service of image, depth and camera_info", choices=QOS_NAMES)
    input_depth: int = parameter(
        1, "images kept by the middleware; the node itself keeps only the newest", low=1, high=100
    )
    output_qos: str = parameter("DEFAULT", "quality of service of mask and camera_info", choices=QOS_NAMES)
    output_depth: int = parameter(5, "results kept by the middleware for a slow reader", low=1, high=1000)
    target: str = parameter(
        "", "object shown on target_mask and left out of points_without_object; empty = the newest goal's", live=True
    )
    use_depth: bool = parameter(
        False, "subscribe to the registered depth image: positions and boxes in objects, points, markers"
    )
    detections: str = parameter(
        AUTO,
        "publish detections and label_info, which need vision_msgs; auto = where it is installed",
        choices=(AUTO, ON, OFF),
    )
    object_masks: bool = parameter(
        False, "publish the mask of each object on objects/<object_id>/mask, a topic that comes and goes with it"
    )
    segment_timeout_s: float = parameter(
        30.0,
        "time that the action segment waits for a mask when its goal does not say",
        low=0.1,
        high=3600.0,
        live=True,
    )
    overlay: bool = parameter(True, "draw the overlay while somebody subscribes to it", live=True)
    diagnostics_period_s: float = parameter(1.0, "time between two messages on /diagnostics", low=0.05, high=60.0)
    no_image_after_s: float = parameter(
        2.0, "time without an image after which it is reported", low=0.1, high=3600.0, live=True
    )
    stop_after_failures: int = parameter(
        5, "the same unexpected failure this many times in a row stops the inference", low=1, high=1000
    )
    sync: SyncParameters = field(default_factory=SyncParameters)
    depth: DepthParameters = field(default_factory=DepthParameters)
    limits: LimitParameters = field(default_factory=LimitParameters)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(name for name in self.cameras if name))  # ROS has no empty list
        check_fields("", self)
        for name in self.cameras:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or len(name) > LONGEST_CAMERA:
                raise ValueError(
                    f"cameras: {name[:40]!r} cannot be a part of a topic's name; use up to {LONGEST_CAMERA} letters, "
                    "digits and _, no digit first"
                )
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras: {', '.join(self.cameras)} has a name twice")
        if len(self.cameras) > MOST_CAMERAS:
            raise ValueError(f"cameras must be at most {MOST_CAMERAS}, got {len(self.cameras)}")


@dataclass(frozen=True)
class ParameterSpec:
    """One ROS parameter; `low` and `high` are inclusive, None = unlimited."""

    name: str
    type: type
    default: Any
    description: str
    low: float | None
    high: float | None
    choices: tuple[str | int, ...]
    live: bool

    @property
    def constraints(self) -> str:
        """The allowed values, in words; empty when the type says it all."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f">= {self.low:g}"
        if self.high is not None:
            return f"<= {self.high:g}"
        return ""


def _spec(group: str, f: "dataclasses.Field[Any]") -> ParameterSpec:
    return ParameterSpec(
        name=f"{group}.{f.name}" if group else f.name,
        type=f.type,  # type: ignore[arg-type]  # the class itself: the configuration has no string annotations
        default=f.default,
        description=f.metadata["description"],
        low=f.metadata["low"],
        high=f.metadata["high"],
        choices=tuple(f.metadata["choices"]),
        live=f.metadata["live"],
    )


def _specs(config: type) -> list[ParameterSpec]:
    """Plain fields first, then each group: a dataclass as a field's default factory."""
    found = dataclasses.fields(config)
    plain = [_spec("", f) for f in found if f.metadata]
    grouped = [_spec(g.name, f) for g in found if not g.metadata for f in dataclasses.fields(_group(g))]
    return plain + grouped


def _group(f: "dataclasses.Field[Any]") -> Any:
    return f.default_factory


def engine_specs() -> list[ParameterSpec]:
    """The parameters of `EngineConfig`, in its order."""
    return _specs(EngineConfig)


def node_specs(parameters: type = NodeParameters) -> list[ParameterSpec]:
    """The parameters of a node's own dataclass, in its order."""
    return _specs(parameters)


def engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """The configuration that `values` (by ROS name, others ignored) describe. ValueError where one is not allowed."""
    config: EngineConfig = _configured(EngineConfig, values)
    return config


def node_parameters(values: Mapping[str, Any], parameters: type = NodeParameters) -> Any:
    """The node's own parameters out of `values`. ValueError where one is not allowed."""
    return _configured(parameters, values)


def _configured(config: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    chosen = {}
    for f in dataclasses.fields(config):
        name = f"{prefix}{f.name}"
        if not f.metadata:
            chosen[f.name] = _configured(_group(f), values, f"{name}.")
        elif name in values:
            chosen[f.name] = values[name]
    return config(**chosen)


def declare(node: Any, specs: Iterable[ParameterSpec]) -> None:
    """Declare parameters on an rclpy node, with their descriptions and ranges; read-only ones cannot change later.

    Raises:
        rclpy.exceptions.InvalidParameterValueException: a start value is outside its range.
        rclpy.exceptions.InvalidParameterTypeException: a start value has another type.
    """
    # Imported here so that the default parameter file can be printed and tested where there is no ROS.
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, ParameterType

    kinds = {
        bool: ParameterType.PARAMETER_BOOL,
        int: ParameterType.PARAMETER_INTEGER,
        float: ParameterType.PARAMETER_DOUBLE,
        str: ParameterType.PARAMETER_STRING,
        tuple: ParameterType.PARAMETER_STRING_ARRAY,
    }
    for spec in specs:
        descriptor = ParameterDescriptor(
            name=spec.name,
            type=kinds[spec.type],
            description=spec.description,
            additional_constraints=spec.constraints,
            read_only=not spec.live,
        )
        if spec.type is int and (spec.low is not None or spec.high is not None):
            low = int(spec.low) if spec.low is not None else -(2**63)
            high = int(spec.high) if spec.high is not None else 2**63 - 1
            descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
        if spec.type is float and (spec.low is not None or spec.high is not None):
            low_f = float(spec.low) if spec.low is not None else -sys.float_info.max
            high_f = float(spec.high) if spec.high is not None else sys.float_info.max
            descriptor.floating_point_range = [FloatingPointRange(from_value=low_f, to_value=high_f, step=0.0)]
        node.declare_parameter(spec.name, _ros_value(spec.default), descriptor)


def _ros_value(value: Any) -> Any:
    # rclpy takes an empty list for one of bytes.
    return (list(value) or [""]) if isinstance(value, tuple) else value


def values_of(node: Any, specs: Iterable[ParameterSpec]) -> dict[str, Any]:
    """The present values of declared parameters, by name."""
    return {spec.name: node.get_parameter(spec.name).value for spec in specs}


def limits_of(node: Any) -> LimitParameters:
    """The limits that a node with these parameters has now."""
    values = {f.name: node.get_parameter(f"limits.{f.name}").value for f in dataclasses.fields(LimitParameters)}
    return LimitParameters(**values)


class ParameterGate:
    """Accepts a change of parameters only when the whole configuration allows it, and then tells `on_change`.

    Made for `add_on_set_parameters_callback`. The checks across fields (anchors attended <= anchor slots) are the
    configuration's own. `on_change` gets both configurations as they are after the change; it must not fail.
    """

    def __init__(self, node: Any, on_change: Callable[[EngineConfig, NodeParameters], None]) -> None:
        self._node = node
        self._specs = [*engine_specs(), *node_specs()]
        self._on_change = on_change

    def __call__(self, changes: list[Any]) -> Any:
        from rcl_interfaces.msg import SetParametersResult

        values = values_of(self._node, self._specs)
        values.update({change.name: change.value for change in changes})
        try:
            engine, node = engine_config(values), node_parameters(values)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._on_change(engine, node)
        return SetParametersResult(successful=True)


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return json.dumps(_ros_value(value), ensure_ascii=False)
    if isinstance(value, float):
        text = f"{value:.12g}"
        # ROS tells a double from an integer by its decimal point.
        return text if any(mark in text for mark in ".en") or not math.isfinite(value) else f"{text}.0"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def default_yaml() -> str:
    """A parameter file with every parameter of the segmenter, its default, meaning and range."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# Every parameter of the segmenter with its default. Generated by: python -m virst_ros.parameters",
        '# "live" = may be changed while the node runs (ros2 param set).',
        "/**:",
        "  ros__parameters:",
    ]
    group_now = ""
    for spec in [*node_specs(), *engine_specs()]:
        group, _, name = spec.name.rpartition(".")
        if group != group_now:
            lines.append(f"    {group}:")
            group_now = group
        indent = "      " if group else "    "
        notes = "; ".join(text for text in (spec.description, spec.constraints, "live" if spec.live else "") if text)
        lines += [f"{indent}# {notes}", f"{indent}{name}: {_yaml_scalar(spec.default)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(default_yaml())
