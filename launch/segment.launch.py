# SPDX-License-Identifier: Apache-2.0
"""Segment one camera's images: the segmenter node, the reasoner process, and if wanted a simulated camera.

ros2 launch virst_ros segment.launch.py image_topic:=/camera/color/image_raw goal:="the cup left of the laptop"
ros2 launch virst_ros segment.launch.py sim:=true goal:="the red ball"
ros2 launch virst_ros segment.launch.py --show-args
"""

import os
from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import Node

HERE = Path(__file__).parent  # the same tree in the source and in share/virst_ros
BOOLEAN = ["true", "false"]
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
        "device", default_value="", description="torch device, for example cuda:0; empty = as in params_file"
    ),
    DeclareLaunchArgument(
        "autostart", default_value="true", choices=BOOLEAN, description="configure and activate the segmenter by itself"
    ),
    DeclareLaunchArgument(
        "use_sim_time", default_value="false", choices=BOOLEAN, description="take the time from /clock"
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
        default_value="ipc:///tmp/virst_reasoner",
        description="ZeroMQ address at which segmenter and reasoner meet",
    ),
    DeclareLaunchArgument(
        "sim", default_value="false", choices=BOOLEAN, description="start a simulated camera that publishes on /camera"
    ),
    DeclareLaunchArgument("sim_seed", default_value="1000000", description="number of the simulated scene"),
]

# Python's logging and ROS 2 name two levels differently.
REASONER_LOG_LEVELS = {"warn": "warning", "fatal": "error"}


def start(context: LaunchContext) -> list:
    """The processes for the arguments as they were given; an empty argument leaves params_file as it is."""
    value = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    ros_arguments = ["--log-level", value["log_level"]]
    use_sim_time = value["use_sim_time"] == "true"

    parameters = {
        "autostart": value["autostart"] == "true",
        "use_sim_time": use_sim_time,
        "reasoner.endpoint": value["reasoner_endpoint"],
    }
    for argument, parameter in {
        "camera_name": "camera_name",
        "goal": "initial_goal",
        "device": "model.device",
    }.items():
        if value[argument]:
            parameters[parameter] = value[argument]
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
            parameters=[value["params_file"], parameters],
            remappings=remappings,
            ros_arguments=ros_arguments,
            output="screen",
        )
    ]
    if value["reasoner"] == "true":
        # Not a ROS node: it speaks ZeroMQ only, and may run on another machine.
        command = ["python3", "-m", "virst_engine.slow.zmq_server", "--endpoint", value["reasoner_endpoint"]]
        command += ["--log-level", REASONER_LOG_LEVELS.get(value["log_level"], value["log_level"])]
        if value["device"]:
            command += ["--device", value["device"]]
        processes.append(ExecuteProcess(name="reasoner", cmd=command, output="screen"))
    if value["sim"] == "true":
        processes.append(
            Node(
                package="virst_ros",
                executable="sim_camera",
                name="camera",
                parameters=[{"seed": int(value["sim_seed"]), "use_sim_time": use_sim_time}],
                ros_arguments=ros_arguments,
                output="screen",
            )
        )
    return processes


def generate_launch_description() -> LaunchDescription:
    # Without it, Fast DDS loses best-effort images above half a megabyte between processes.
    profile = EnvironmentVariable(PROFILE_VARIABLE, default_value=str(HERE / "fastdds_profile.xml"))
    return LaunchDescription(
        [*ARGUMENTS, SetEnvironmentVariable(PROFILE_VARIABLE, profile), OpaqueFunction(function=start)]
    )
