# SPDX-License-Identifier: Apache-2.0
"""Segment the images of one camera or several: a segmenter that sees them all, a reasoner, and what shows the results.

ros2 launch virst_ros segment.launch.py image_topic:=/camera/color/image_raw goal:="the cup left of the laptop"
ros2 launch virst_ros segment.launch.py sim:=true depth_topic:=/camera/depth/image_raw goal:="the red ball"
ros2 launch virst_ros segment.launch.py camera_names:=left,right image_topic:=/{camera}/image_raw
ros2 launch virst_ros segment.launch.py sim:=true camera_names:=left,right goal:="the red ball"
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
PATIENCE_S = "15"  # after SIGINT: on a busy machine it takes seconds to finish a frame and give a model back
ONLY_CAMERA = "camera"  # what {camera} stands for when no names are given
BOOLEAN = ["true", "false"]
AS_IN_FILE = ["", *BOOLEAN]
# Fast DDS 3, from ROS 2 Kilted on, renamed the variable that names its profile.
OLD_FAST_DDS = os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy")
PROFILE_VARIABLE = f"{'FASTRTPS' if OLD_FAST_DDS else 'FASTDDS'}_DEFAULT_PROFILES_FILE"

ARGUMENTS = [
    DeclareLaunchArgument(
        "image_topic",
        default_value="/{camera}/color/image_raw",
        description="colour images to segment; {camera} is the camera's name, `camera` where none are named. "
        "/compressed is appended where image_transport is compressed",
    ),
    DeclareLaunchArgument(
        "camera_info_topic",
        default_value="/{camera}/color/camera_info",
        description="their calibration, passed on with each mask",
    ),
    DeclareLaunchArgument(
        "depth_topic", default_value="", description="depth images registered with the colour images; empty = none"
    ),
    DeclareLaunchArgument(
        "depth_camera_info_topic",
        default_value="",
        description="calibration of the depth images, if they have another size; empty = that of the colour images",
    ),
    DeclareLaunchArgument(
        "image_transport",
        default_value="",
        choices=["", "raw", "compressed"],
        description="how the colour images come; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "namespace", default_value="", description="namespace of the segmenter: masks on <namespace>/segmenter/mask"
    ),
    DeclareLaunchArgument(
        "camera_name",
        default_value="",
        description="name by which goals choose the only camera; empty = as in params_file. For several: camera_names",
    ),
    DeclareLaunchArgument(
        "camera_names",
        default_value="",
        description="several cameras of one segmenter, separated by commas: masks on "
        "<namespace>/segmenter/<camera>/mask; {camera} in the topic arguments stands for each name; empty = those that "
        "the parameter `cameras` names in params_file, else one camera",
    ),
    DeclareLaunchArgument(
        "process_per_camera",
        default_value="false",
        choices=BOOLEAN,
        description="a segmenter for each camera in <namespace>/<camera> instead, each with its own copy of the model "
        "and its own goals, for example on a GPU each: masks on <namespace>/<camera>/segmenter/mask",
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
        "target",
        default_value="",
        description="object shown on target_mask and left out of points_without_object; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "overlay",
        default_value="",
        choices=AS_IN_FILE,
        description="draw the overlay while somebody looks at it; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "detections",
        default_value="",
        choices=["", "auto", "on", "off"],
        description="publish detections and label_info (vision_msgs); empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "model", default_value="", description="model of segmenter and reasoner; empty = as in params_file"
    ),
    DeclareLaunchArgument(
        "backend",
        default_value="",
        choices=["", "auto", "torch", "onnxruntime", "tensorrt"],
        description="what runs the segmenter's stages; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "engine_path",
        default_value="",
        description="folder of the exported stages (virst export); empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "precision",
        default_value="",
        choices=["", "fp32", "bf16", "fp16"],
        description="number format of the torch backend; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "device",
        default_value="",
        description="torch device of segmenter and reasoner, for example cuda:0; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "weights",
        default_value="",
        description="safetensors file for segmenter and reasoner, for virst-7b its folder; empty = as in params_file, "
        "else the shipped one",
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
        "method",
        default_value="",
        choices=["", "virst", "visa", "tempvrs", "grounding"],
        description="how segmenter and reasoner turn sentences into prompts; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "reasoner_weights",
        default_value="",
        description="safetensors file of the reasoner of the method visa or tempvrs; empty = as in params_file, else "
        "the shipped one",
    ),
    DeclareLaunchArgument(
        "detector",
        default_value="",
        description="folder of the zero-shot detector that the reasoner of the method grounding looks with; empty = "
        "the one of tabletop-tiny, which other models do not have",
    ),
    DeclareLaunchArgument(
        "memory_budget_gib",
        default_value="",
        description="memory of its device that the reasoner of virst-7b may take, GiB; empty = as in params_file",
    ),
    DeclareLaunchArgument(
        "weight_bits",
        default_value="",
        choices=["", "16", "8", "4"],
        description="bits of each weight of virst-7b's language model, 8 and 4 need bitsandbytes; empty = as in "
        "params_file",
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
        "sim",
        default_value="false",
        choices=BOOLEAN,
        description="start a simulated camera that publishes on /camera, or one for each named camera on /<camera>",
    ),
    DeclareLaunchArgument(
        "sim_seed",
        default_value="1000000",
        description="number of the simulated scene; a second camera films the scene of the next number, and so on",
    ),
    DeclareLaunchArgument(
        "rviz",
        default_value="false",
        choices=BOOLEAN,
        description="start RViz with a view of images, clouds and boxes; a window for each camera",
    ),
    DeclareLaunchArgument(
        "fixed_frame",
        default_value="{camera}_color_optical_frame",
        description="frame in which RViz shows clouds and boxes: the images' own, or one that tf connects with it; "
        "{camera} as in the topics",
    ),
    DeclareLaunchArgument(
        "foxglove",
        default_value="false",
        choices=BOOLEAN,
        description="start foxglove_bridge; in Foxglove open ws://<host>:<foxglove_port>, import foxglove/virst.json",
    ),
    DeclareLaunchArgument("foxglove_port", default_value="8765", description="port of foxglove_bridge"),
]

# Launch argument -> parameter of the segmenter.
TEXT_PARAMETERS = {
    "camera_name": "camera_name",
    "goal": "initial_goal",
    "target": "target",
    "detections": "detections",
    "image_transport": "image_transport",
    "model": "model.name",
    "backend": "engine.backend",
    "engine_path": "engine.path",
    "precision": "engine.precision",
    "device": "model.device",
    "weights": "model.weights",
    "method": "reasoner.method",
    "reasoner_weights": "reasoner.weights",
    "reasoner_endpoint": "reasoner.endpoint",
    "curve_keys": "reasoner.curve_keys",
}
NUMBER_PARAMETERS = {"memory_budget_gib": "reasoner.memory_budget_gib"}
INTEGER_PARAMETERS = {"weight_bits": "reasoner.weight_bits"}
BOOLEAN_PARAMETERS = ("autostart", "use_sim_time", "overlay")
# Launch argument -> topic of a camera, in the segmenter's namespace.
TOPICS = {
    "image_topic": "image",
    "camera_info_topic": "camera_info",
    "depth_topic": "depth",
    "depth_camera_info_topic": "depth/camera_info",
}
# What rviz/virst.rviz shows, relative to a camera's outputs.
RVIZ_TOPICS = ("overlay", "mask", "points", "points_without_object", "markers")
# Parameter of the segmenter -> option of virst-reasoner: where the two must agree, or usually do.
REASONER_OPTIONS = {
    "reasoner.endpoint": "--endpoint",
    "reasoner.curve_keys": "--curve-keys",
    "model.name": "--model",
    "model.weights": "--weights",
    "model.device": "--device",
    "reasoner.method": "--method",
    "reasoner.weights": "--reasoner-weights",
    "reasoner.memory_budget_gib": "--memory-budget-gib",
    "reasoner.weight_bits": "--weight-bits",
}
DETECTING = "grounding"  # the method that needs a detector
HAS_DETECTOR = "tabletop-tiny"  # the model that is shipped with one
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
    parameters: dict[str, Any] = {
        parameter: value[argument] for argument, parameter in TEXT_PARAMETERS.items() if value[argument]
    }
    parameters |= {name: value[name] == "true" for name in BOOLEAN_PARAMETERS if value[name]}
    parameters |= {
        parameter: as_number(argument, value[argument])
        for argument, parameter in NUMBER_PARAMETERS.items()
        if value[argument]
    }
    parameters |= {
        parameter: int(value[argument]) for argument, parameter in INTEGER_PARAMETERS.items() if value[argument]
    }
    if value["depth_topic"]:
        parameters["use_depth"] = True
    sim_time = {name: parameters[name] for name in ("use_sim_time",) if name in parameters}
    file, node = Path(value["params_file"]), full_name(value["namespace"], "segmenter")
    in_file = parameters_in_file(file, node)
    cameras = camera_names(value, in_file)

    processes = []
    if value["process_per_camera"] == "true":
        spaces = {camera: full_name(value["namespace"], camera) for camera in cameras}
        has = {camera: parameters_in_file(file, f"{space}/segmenter") | parameters for camera, space in spaces.items()}
        for camera, space in spaces.items():
            alone = parameters | {"cameras": [""], "camera_name": camera}
            processes.append(segmenter(value, alone, space, remappings(value, has[camera], "", camera)))
        agreed = has[cameras[0]]
        outputs = {camera: f"{space}/segmenter" for camera, space in spaces.items()}
    elif cameras:
        agreed = in_file | parameters
        topics = [rule for camera in cameras for rule in remappings(value, agreed, f"{camera}/", camera)]
        processes.append(segmenter(value, parameters | {"cameras": cameras}, value["namespace"], topics))
        outputs = {camera: f"{node}/{camera}" for camera in cameras}
    else:
        agreed = in_file | parameters
        topics = remappings(value, agreed, "", ONLY_CAMERA)
        processes.append(segmenter(value, parameters, value["namespace"], topics))
        outputs = {ONLY_CAMERA: node}

    if value["reasoner"] == "true":
        processes.append(reasoner(value, agreed))
    if value["sim"] == "true":
        for number, camera in enumerate(outputs):
            scene = {"seed": int(value["sim_seed"]) + number, "frame_id": f"{camera}_color_optical_frame"}
            processes.append(
                Node(
                    package="virst_ros",
                    executable="sim_camera",
                    name=camera,
                    parameters=[scene | sim_time],
                    ros_arguments=["--log-level", value["log_level"]],
                    output="screen",
                    sigterm_timeout=PATIENCE_S,
                )
            )
    if value["rviz"] == "true":
        for camera, place in outputs.items():
            processes.append(
                Node(
                    package="rviz2",
                    executable="rviz2",
                    name="rviz",
                    namespace=full_name(value["namespace"], camera) if cameras else value["namespace"],
                    arguments=[
                        *("-d", str(HERE / "rviz" / "virst.rviz")),
                        *("-f", value["fixed_frame"].replace("{camera}", camera)),
                    ],
                    parameters=[sim_time] if sim_time else [],
                    remappings=[(f"/segmenter/{topic}", f"{place}/{topic}") for topic in RVIZ_TOPICS],
                    output="log",
                )
            )
    if value["foxglove"] == "true":
        processes.append(
            Node(
                package="foxglove_bridge",
                executable="foxglove_bridge",
                name="foxglove_bridge",
                parameters=[{"port": int(value["foxglove_port"]), **sim_time}],
                output="screen",
            )
        )
    return processes


def as_number(argument: str, text: str) -> float:
    """Raises ValueError that names the argument."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{argument} must be a number, got {text!r}") from None


def full_name(namespace: str, name: str) -> str:
    """Of what is called so in a namespace: a node, or a namespace again."""
    return "/" + "/".join(part for part in (namespace.strip("/"), name) if part)


def camera_names(value: dict[str, str], in_file: dict[str, Any]) -> list[str]:
    """The cameras of camera_names, else of the parameter file; none where one camera has no name. Raises ValueError."""
    source = "camera_names"
    cameras = [name.strip() for name in value["camera_names"].split(",") if name.strip()]
    if not cameras:
        source = f"cameras in {value['params_file']}"
        named = in_file.get("cameras") or []
        cameras = [str(name) for name in (named if isinstance(named, list) else [named]) if name]
    if not cameras:
        if value["process_per_camera"] == "true":
            raise ValueError("process_per_camera needs the names of the cameras, as in camera_names:=left,right")
        return []
    if value["camera_name"]:
        raise ValueError(
            f"camera_name is {value['camera_name']}, but {source} names {', '.join(cameras)}: leave camera_name out, "
            "goals choose by those names"
        )
    for name in cameras:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{source}: {name!r} is no name in ROS (letters, digits, _; no digit first)")
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"{source}: {', '.join(cameras)} names a camera twice")
    for argument in TOPICS:
        if len(cameras) > 1 and value[argument] and "{camera}" not in value[argument]:
            raise ValueError(
                f"{source}: there are {len(cameras)} cameras, but {argument} is {value[argument]} for all of them: put "
                "{camera} where their names differ, as in /{camera}/color/image_raw"
            )
    return cameras


def remappings(value: dict[str, str], agreed: dict[str, Any], prefix: str, camera: str) -> list[tuple[str, str]]:
    """From the segmenter's names for the topics of a camera to the camera's own."""
    rules = []
    for argument, topic in TOPICS.items():
        name = value[argument].replace("{camera}", camera)
        if name:
            ending = "/compressed" if topic == "image" and agreed.get("image_transport") == "compressed" else ""
            rules.append((f"{prefix}{topic}{ending}", f"{name}{ending}"))
    return rules


def segmenter(value: dict[str, str], parameters: dict[str, Any], namespace: str, topics: list[tuple[str, str]]) -> Node:
    return Node(
        package="virst_ros",
        executable="segmenter",
        name="segmenter",
        namespace=namespace,
        parameters=[value["params_file"], *([parameters] if parameters else [])],
        remappings=topics,
        ros_arguments=["--log-level", value["log_level"]],
        output="screen",
        sigterm_timeout=PATIENCE_S,
    )


def reasoner(value: dict[str, str], agreed: dict[str, Any]) -> ExecuteProcess:
    """The reasoner, with the parameters of the segmenter that must agree with its own. Raises ValueError."""
    # Not a ROS node: it speaks ZeroMQ only, and may run on another machine. launch_ros.Node would give it
    # --ros-args, which it does not know.
    command = [*reasoner_program(), "--log-level", REASONER_LOG_LEVELS.get(value["log_level"], value["log_level"])]
    for parameter, option in REASONER_OPTIONS.items():
        if agreed.get(parameter):
            command += [option, str(agreed[parameter])]
    method = agreed.get("reasoner.method") or "virst"
    detector, model = value["detector"], agreed.get("model.name") or HAS_DETECTOR
    if detector and method != DETECTING:
        raise ValueError(f"a detector is for the method grounding, not {method}: method:=grounding")
    if method == DETECTING and not detector and model != HAS_DETECTOR:
        raise ValueError(
            f"the method grounding needs a detector, {model} has none of its own: detector:=FOLDER, a snapshot of one "
            "of transformers"
        )
    if detector:
        command += ["--detector", detector]
    return ExecuteProcess(
        name="reasoner", cmd=command, output="screen", respawn=True, respawn_delay=2.0, sigterm_timeout=PATIENCE_S
    )


def generate_launch_description() -> LaunchDescription:
    # Without it, Fast DDS loses best-effort images above half a megabyte between processes.
    profile = EnvironmentVariable(PROFILE_VARIABLE, default_value=str(HERE / "fastdds_profile.xml"))
    return LaunchDescription(
        [*ARGUMENTS, SetEnvironmentVariable(PROFILE_VARIABLE, profile), OpaqueFunction(function=start)]
    )
