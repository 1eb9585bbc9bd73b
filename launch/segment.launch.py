# SPDX-License-Identifier: Apache-2.0
"""Segment one camera's images: the segmenter node, the reasoner process, and if wanted a simulated camera.

ros2 launch virst_ros segment.launch.py image_topic:=/camera/color/image_raw goal:="the cup left of the laptop"
ros2 launch virst_ros segment.launch.py sim:=true goal:="the red ball"
ros2 launch virst_ros segment.launch.py --show-args
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import Node

HERE = Path(__file__).parent  # the same tree in the source and in share/virst_ros
BOOLEAN = ["true", "false"]
AS_IN_FILE = ["", *BOOLEAN]
# Fast DDS 3, from ROS 2 Kilted on, renamed the variable that names its profile.
OLD_FAST_DDS = os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy")
PROFILE_VARIABLE = f"{'FASTRTPS' if OLD_FAST_DDS else 'FASTDDS'}_DEFAULT_PROFILES_FILE"

ARGUMENTS = [
    DeclareLaunchArgument(
        "image_topic", default_value="/camera/color/image_raw", description="colour images to segment"
    ),
    DeclareLaunchArgument(
        "camera_info_topic",
        default_value="/camera/color/camera_info",
        description="their calibration, passed on with each mask",
    ),
    DeclareLaunchArgument(
        "depth_topic", default_value="", description="depth images registered with the colour images; empty = none"
    ),
    DeclareLaunchArgument(
        "namespace", default_value="", description="namespace of the segmenter: masks on <namespace>/segmenter/mask"
    ),
    DeclareLaunchArgument(
        "camera_name", default_value="", description="name by which goals choose this camera; empty = as in params_file"
    ),
    DeclareLaunchArgument(
        "params_file",
        default_value=str(HERE / "params" / "default.yaml"),
        description="parameters of the segmenter; the arguments here go before it",
    ),
    DeclareLaunchArgument(
        "goal", default_value="", description="a sentence that is set from the start; empty = as in params_file"
    ),
    DeclareLaunchArgument(
        "device",
        default_value="",
        description="torch device of segmenter and reasoner, for example cuda:0; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "weights",
        default_value="",
        description="safetensors file for segmenter and reasoner; empty = as in params_file, else the shipped one",
    ),
    DeclareLaunchArgument(
        "autostart",
        default_value="",
        choices=AS_IN_FILE,
        description="configure and activate the segmenter by itself; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value="",
        choices=AS_IN_FILE,
        description="take the time from /clock; empty = as in params_file, else false",
    ),
    DeclareLaunchArgument(
        "log_level",
        default_value="info",
        choices=["debug", "info", "warn", "error", "fatal"],
        description="what the nodes and the reasoner log",
    ),
    DeclareLaunchArgument(
        "reasoner",
        default_value="true",
        choices=BOOLEAN,
        description="start the reasoner process; false = one is running already at reasoner_endpoint",
    ),
    DeclareLaunchArgument(
        "reasoner_endpoint",
        default_value="",
        description="ZeroMQ address at which segmenter and reasoner meet; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "curve_keys",
        default_value="",
        description="folder of the CURVE keys of both, needed for a tcp:// address; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "sim", default_value="false", choices=BOOLEAN, description="start a simulated camera that publishes on /camera"
    ),
    DeclareLaunchArgument("sim_seed", default_value="1000000", description="number of the simulated scene"),
    DeclareLaunchArgument(
        "rviz", default_value="false", choices=BOOLEAN, description="start RViz with a view of images and masks"
    ),
]

# Launch argument -> parameter of the segmenter.
TEXT_PARAMETERS = {
    "camera_name": "camera_name",
    "goal": "initial_goal",
    "device": "model.device",
    "weights": "model.weights",
    "reasoner_endpoint": "reasoner.endpoint",
    "curve_keys": "reasoner.curve_keys",
}
BOOLEAN_PARAMETERS = ("autostart", "use_sim_time")
# Parameter of the segmenter -> option of virst-reasoner: where the two must agree, or usually do.
REASONER_OPTIONS = {
    "reasoner.endpoint": "--endpoint",
    "reasoner.curve_keys": "--curve-keys",
    "model.name": "--model",
    "model.weights": "--weights",
    "model.device": "--device",
}
# Python's logging and ROS 2 name two levels differently.
REASONER_LOG_LEVELS = {"warn": "warning", "fatal": "error"}


def parameters_in_file(path: Path, node: str) -> dict[str, Any]:
    """What a parameter file sets for the node of that full name, flat (`model.weights`); later sections win."""
    found: dict[str, Any] = {}

    def flatten(prefix: str, tree: dict[str, Any]) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{name}.", value)
            else:
                found[prefix + name] = value

    def visit(pattern: str, tree: Any) -> None:
        for name, below in (tree or {}).items():
            if name != "ros__parameters":
                visit(f"{pattern}/{name.strip('/')}", below)
            elif re.fullmatch(_expression(pattern), node):
                flatten("", below or {})

    visit("", yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def _expression(pattern: str) -> str:
    """`*` stands for one part of a node's name, `**` for any number of them."""
    parts = {"**": "(/[^/]+)*", "*": "/[^/]+"}
    return "".join(parts.get(part, f"/{re.escape(part)}") for part in pattern.strip("/").split("/"))


def reasoner_program() -> list[str]:
    """The reasoner of the installation that the segmenter is taken from; else one on PATH, else this Python's."""
    try:
        prefix = Path(get_package_prefix("virst_ros"))
    except PackageNotFoundError:
        candidates = []
    else:  # colcon installs programs in the first place, pip in the second
        candidates = [prefix / "lib" / "virst_ros" / "virst-reasoner", prefix / "bin" / "virst-reasoner"]
    for program in candidates:
        if os.access(program, os.X_OK):
            return [str(program)]
    on_path = shutil.which("virst-reasoner")
    return [on_path] if on_path else [sys.executable, "-m", "virst_engine.slow.zmq_server"]


def start(context: LaunchContext) -> list:
    """The processes for the arguments as they were given; an empty argument leaves params_file as it is."""
    value = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    ros_arguments = ["--log-level", value["log_level"]]

    parameters: dict[str, Any] = {
        parameter: value[argument] for argument, parameter in TEXT_PARAMETERS.items() if value[argument]
    }
    parameters |= {name: value[name] == "true" for name in BOOLEAN_PARAMETERS if value[name]}
    sim_time = {name: parameters[name] for name in ("use_sim_time",) if name in parameters}
    remappings = [("image", value["image_topic"]), ("camera_info", value["camera_info_topic"])]
    if value["depth_topic"]:
        parameters["use_depth"] = True
        remappings.append(("depth", value["depth_topic"]))

    processes = [
        Node(
            package="virst_ros",
            executable="segmenter",
            name="segmenter",
            namespace=value["namespace"],
            parameters=[value["params_file"], *([parameters] if parameters else [])],
            remappings=remappings,
            ros_arguments=ros_arguments,
            output="screen",
        )
    ]
    if value["reasoner"] == "true":
        namespace = value["namespace"].strip("/")
        node = f"/{namespace}/segmenter" if namespace else "/segmenter"
        agreed = parameters_in_file(Path(value["params_file"]), node) | parameters
        # Not a ROS node: it speaks ZeroMQ only, and may run on another machine. launch_ros.Node would give it
        # --ros-args, which it does not know.
        command = [*reasoner_program(), "--log-level", REASONER_LOG_LEVELS.get(value["log_level"], value["log_level"])]
        for parameter, option in REASONER_OPTIONS.items():
            if agreed.get(parameter):
                command += [option, str(agreed[parameter])]
        processes.append(ExecuteProcess(name="reasoner", cmd=command, output="screen", respawn=True, respawn_delay=2.0))
    if value["sim"] == "true":
        processes.append(
            Node(
                package="virst_ros",
                executable="sim_camera",
                name="camera",
                parameters=[{"seed": int(value["sim_seed"]), **sim_time}],
                ros_arguments=ros_arguments,
                output="screen",
            )
        )
    if value["rviz"] == "true":
        processes.append(
            Node(
                package="rviz2",
                executable="rviz2",
                name="rviz",
                arguments=["-d", str(HERE / "rviz" / "virst.rviz")],
                parameters=[sim_time] if sim_time else [],
                output="log",
            )
        )
    return processes


def generate_launch_description() -> LaunchDescription:
    # Without it, Fast DDS loses best-effort images above half a megabyte between processes.
    profile = EnvironmentVariable(PROFILE_VARIABLE, default_value=str(HERE / "fastdds_profile.xml"))
    return LaunchDescription(
        [*ARGUMENTS, SetEnvironmentVariable(PROFILE_VARIABLE, profile), OpaqueFunction(function=start)]
    )
