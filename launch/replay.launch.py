# SPDX-License-Identifier: Apache-2.0
"""Play a bag and segment its images, in the bag's own time. Takes every argument of segment.launch.py, too.

ros2 launch virst_ros replay.launch.py bag:=~/bags/kitchen goal:="the red cup" image_topic:=/head/color/image_raw
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    SetLaunchConfiguration,
    TimerAction,
)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

HERE = Path(__file__).parent
BOOLEAN = ["true", "false"]

ARGUMENTS = [
    DeclareLaunchArgument("bag", description="folder or file of the bag, for example ~/bags/kitchen"),
    DeclareLaunchArgument("rate", default_value="1.0", description="speed of the replay; 0.5 is half as fast"),
    DeclareLaunchArgument("start_s", default_value="0.0", description="seconds of the bag that are skipped"),
    DeclareLaunchArgument(
        "loop", default_value="false", choices=BOOLEAN, description="start again at the end; tracking starts over, too"
    ),
    DeclareLaunchArgument(
        "wait_s", default_value="5.0", description="seconds until the bag starts: the model has to be loaded first"
    ),
]


def play(context: LaunchContext) -> list:
    value = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    bag = Path(value["bag"]).expanduser()
    if not bag.exists():
        raise FileNotFoundError(f"bag: there is no {bag}; name the folder that `ros2 bag record` has written")
    # --clock: everything runs in the time of the recording, so ages and timeouts are right at any speed.
    command = ["ros2", "bag", "play", str(bag), "--clock", "100", "--rate", value["rate"]]
    if float(value["start_s"]) > 0.0:
        command += ["--start-offset", value["start_s"]]
    if value["loop"] == "true":
        command.append("--loop")
    player = ExecuteProcess(name="bag", cmd=command, output="screen")
    return [TimerAction(period=float(value["wait_s"]), actions=[player])]


def generate_launch_description() -> LaunchDescription:
    segment = IncludeLaunchDescription(PythonLaunchDescriptionSource(str(HERE / "segment.launch.py")))
    # The bag first: when it is not there, nothing must have been started.
    return LaunchDescription(
        [*ARGUMENTS, OpaqueFunction(function=play), SetLaunchConfiguration("use_sim_time", "true"), segment]
    )
