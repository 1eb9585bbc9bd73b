# SPDX-License-Identifier: Apache-2.0
"""The launch files with stand-ins for ROS 2's launch packages, which exist only in a sourced ROS 2; the layouts."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from virst_engine.config import METHODS, EngineConfig
from virst_ros.parameters import engine_specs, node_specs

LAUNCH = Path(__file__).parents[1] / "launch"
LAUNCH_FILE, REPLAY_FILE = LAUNCH / "segment.launch.py", LAUNCH / "replay.launch.py"


class Recorded:
    """Keeps what it was made with, as launch's actions and substitutions would."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        self.positional, self.named = positional, named
        self.name = positional[0] if positional else named.get("name")


class FakeContext:
    def __init__(self, values: dict[str, str]) -> None:
        self.values = values


class FakeConfiguration(Recorded):
    def perform(self, context: FakeContext) -> str:
        return context.values[self.name]


@pytest.fixture
def launch_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launch file, loaded as if ROS 2 Kilted were sourced."""
    monkeypatch.setenv("ROS_DISTRO", "kilted")
    return load_launch_file(monkeypatch)


def load_launch_file(monkeypatch: pytest.MonkeyPatch, path: Path = LAUNCH_FILE) -> Any:
    def kind(name: str, base: type = Recorded) -> type:
        return type(name, (base,), {})

    names = {
        "launch": {"LaunchContext": FakeContext, "LaunchDescription": kind("LaunchDescription")},
        "launch.actions": {
            name: kind(name)
            for name in (
                *("DeclareLaunchArgument", "ExecuteProcess", "OpaqueFunction", "SetEnvironmentVariable"),
                *("IncludeLaunchDescription", "SetLaunchConfiguration", "TimerAction"),
            )
        },
        "launch.launch_description_sources": {"PythonLaunchDescriptionSource": kind("PythonLaunchDescriptionSource")},
        "launch.substitutions": {
            "EnvironmentVariable": kind("EnvironmentVariable"),
            "LaunchConfiguration": FakeConfiguration,
        },
        "launch_ros": {},
        "launch_ros.actions": {"Node": kind("Node")},
        "ament_index_python": {},
        "ament_index_python.packages": {"PackageNotFoundError": KeyError, "get_package_prefix": {}.__getitem__},
    }
    for name, contents in names.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def processes(launch_module: Any, **given: str) -> dict[str, Recorded]:
    """What starts for these arguments, by program."""
    return {
        process.named.get("executable", process.named.get("name")): process
        for process in all_processes(launch_module, **given)
    }


def all_processes(launch_module: Any, **given: str) -> list[Recorded]:
    values = {argument.name: argument.named["default_value"] for argument in launch_module.ARGUMENTS}
    assert given.keys() <= values.keys()
    return launch_module.start(FakeContext({**values, **given}))


def parameters(node: Recorded) -> dict[str, Any]:
    file, *arguments = node.named["parameters"]
    text = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    flat: dict[str, Any] = {}

    def flatten(prefix: str, tree: dict[str, Any]) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    flatten("", text["/**"]["ros__parameters"])
    return flat | (arguments[0] if arguments else {})


def test_every_argument_is_declared_with_its_meaning(launch_module: Any) -> None:
    names = [argument.name for argument in launch_module.ARGUMENTS]
    assert {
        *("image_topic", "camera_info_topic", "depth_topic", "namespace", "camera_name", "params_file", "goal"),
        *("log_level", "use_sim_time", "autostart", "sim", "reasoner", "weights", "curve_keys", "rviz"),
        *("camera_names", "depth_camera_info_topic", "image_transport", "target", "overlay", "detections", "model"),
        *("fixed_frame", "foxglove", "foxglove_port", "backend", "engine_path", "precision", "process_per_camera"),
        *("method", "reasoner_weights", "detector", "memory_budget_gib", "weight_bits"),
    } <= set(names)
    assert len(names) == len(set(names))
    for argument in launch_module.ARGUMENTS:
        assert len(argument.named["description"]) > 15, argument.name
        assert argument.named["default_value"] in argument.named.get("choices", [argument.named["default_value"]])


def test_the_description_declares_all_arguments_and_sets_the_fast_dds_profile(launch_module: Any) -> None:
    (entities,) = launch_module.generate_launch_description().positional
    assert entities[: len(launch_module.ARGUMENTS)] == launch_module.ARGUMENTS
    set_profile, function = entities[len(launch_module.ARGUMENTS) :]
    name, value = set_profile.positional
    assert name == "FASTDDS_DEFAULT_PROFILES_FILE"
    assert value.name == name  # a profile that the user chose stays
    assert Path(value.named["default_value"]).is_file()
    assert function.named["function"] is launch_module.start


def test_the_profile_is_named_as_older_releases_expect_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DISTRO", "humble")
    assert load_launch_file(monkeypatch).PROFILE_VARIABLE == "FASTRTPS_DEFAULT_PROFILES_FILE"


def reasoner_options(started: dict[str, Recorded]) -> dict[str, str]:
    command = started["reasoner"].named["cmd"]
    first = next(i for i, word in enumerate(command) if word.startswith("--"))
    return dict(zip(command[first::2], command[first + 1 :: 2], strict=True))


def test_without_arguments_segmenter_and_reasoner_agree_on_the_defaults(launch_module: Any) -> None:
    started = processes(launch_module)
    assert started.keys() == {"segmenter", "reasoner"}
    config = EngineConfig()
    assert parameters(started["segmenter"])["reasoner.endpoint"] == config.reasoner.endpoint
    options = reasoner_options(started)
    assert (options["--endpoint"], options["--model"]) == (config.reasoner.endpoint, config.model.name)
    assert "--weights" not in options


def test_arguments_reach_segmenter_and_reasoner(launch_module: Any) -> None:
    started = processes(
        launch_module, weights="/w.safetensors", curve_keys="/keys", reasoner_endpoint="tcp://a:1", device="cuda:1"
    )
    options, got = reasoner_options(started), parameters(started["segmenter"])
    for parameter, option, value in (
        ("model.weights", "--weights", "/w.safetensors"),
        ("reasoner.curve_keys", "--curve-keys", "/keys"),
        ("reasoner.endpoint", "--endpoint", "tcp://a:1"),
        ("model.device", "--device", "cuda:1"),
    ):
        assert got[parameter] == options[option] == value


@pytest.mark.parametrize(
    ("namespace", "section"),
    [
        ("", "/**"),
        ("", "segmenter"),
        ("", "/segmenter"),
        ("", "/**/segmenter"),
        ("robot", "/robot/segmenter"),
        ("/robot", "/*/segmenter"),
        ("robot", "/robot/**"),
    ],
)
def test_the_reasoner_gets_what_the_parameter_file_says(
    launch_module: Any, tmp_path: Path, namespace: str, section: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"{section}: {{ros__parameters: {{model.weights: /w.safetensors, autostart: false, use_sim_time: true, "
        "reasoner: {endpoint: 'ipc:///elsewhere', curve_keys: /keys}}}\n"
        "/someone_else: {ros__parameters: {model: {weights: /other.safetensors}}}\n"
    )
    started = processes(launch_module, params_file=str(file), namespace=namespace)
    options = reasoner_options(started)
    assert options["--weights"] == "/w.safetensors"
    assert options["--endpoint"] == "ipc:///elsewhere"
    assert options["--curve-keys"] == "/keys"
    assert started["segmenter"].named["parameters"] == [str(file)], "nothing overrides the file"


def test_sections_of_other_nodes_are_not_the_reasoners(launch_module: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("/robot/segmenter: {ros__parameters: {model: {weights: /w.safetensors}}}\n/empty:\n")
    for namespace in ("", "other", "robot/head"):
        assert "--weights" not in reasoner_options(processes(launch_module, params_file=str(file), namespace=namespace))


def test_method_detector_and_memory_budget_reach_the_reasoner(launch_module: Any) -> None:
    started = processes(launch_module, method="grounding", detector="/gdino", model="sam2.1-small")
    options, got = reasoner_options(started), parameters(started["segmenter"])
    assert (options["--method"], options["--detector"], got["reasoner.method"]) == ("grounding", "/gdino", "grounding")
    assert "--memory-budget-gib" not in options
    options = reasoner_options(processes(launch_module, method="grounding"))
    assert options["--method"] == "grounding"
    assert "--detector" not in options, "tabletop-tiny brings its own"
    started = processes(launch_module, model="virst-7b", weights="/virst-7b", memory_budget_gib="40", weight_bits="8")
    options, got = reasoner_options(started), parameters(started["segmenter"])
    assert (options["--model"], options["--weights"], options["--method"]) == ("virst-7b", "/virst-7b", "virst")
    assert (options["--memory-budget-gib"], got["reasoner.memory_budget_gib"]) == ("40.0", 40.0)
    assert (options["--weight-bits"], got["reasoner.weight_bits"]) == ("8", 8)
    assert "--detector" not in options
    started = processes(launch_module, method="tempvrs", reasoner_weights="/t.safetensors")
    options, got = reasoner_options(started), parameters(started["segmenter"])
    assert (options["--method"], options["--reasoner-weights"]) == ("tempvrs", "/t.safetensors")
    assert got["reasoner.weights"] == "/t.safetensors"


def test_the_methods_are_those_that_there_are(launch_module: Any) -> None:
    (method,) = (argument for argument in launch_module.ARGUMENTS if argument.name == "method")
    assert method.named["choices"] == ["", *METHODS]


def test_the_parameter_file_may_choose_method_and_memory_budget(launch_module: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("/**: {ros__parameters: {reasoner: {method: grounding, memory_budget_gib: 24.0}}}")
    options = reasoner_options(processes(launch_module, params_file=str(file), detector="/owl"))
    assert (options["--method"], options["--detector"], options["--memory-budget-gib"]) == ("grounding", "/owl", "24.0")
    options = reasoner_options(processes(launch_module, params_file=str(file), method="virst"))
    assert options["--method"] == "virst"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"method": "grounding", "model": "sam2.1-small"},
            "grounding needs a detector, sam2.1-small has none of its own: detector:=FOLDER",
        ),
        ({"detector": "/gdino"}, "a detector is for the method grounding, not virst: method:=grounding"),
        ({"memory_budget_gib": "much"}, "memory_budget_gib must be a number, got 'much'"),
    ],
)
def test_a_reasoner_that_cannot_be_is_named(launch_module: Any, given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        processes(launch_module, **given)


def test_a_reasoner_elsewhere_has_a_detector_of_its_own(launch_module: Any) -> None:
    started = processes(launch_module, method="grounding", reasoner="false")
    assert started.keys() == {"segmenter"}
    assert parameters(started["segmenter"])["reasoner.method"] == "grounding"


def test_the_reasoner_is_started_again_when_it_ends(launch_module: Any) -> None:
    reasoner = processes(launch_module)["reasoner"]
    assert reasoner.named["respawn"] is True
    assert reasoner.named["respawn_delay"] == 2.0


@pytest.mark.parametrize("place", ["lib/virst_ros", "bin"])
def test_the_reasoner_comes_from_the_installation_of_the_segmenter(
    launch_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setattr(launch_module, "get_package_prefix", {"virst_ros": str(tmp_path)}.__getitem__)
    program = tmp_path / place / "virst-reasoner"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert launch_module.reasoner_program() == [str(program)]


def test_without_an_installation_the_reasoner_is_found_on_path_or_in_this_python(
    launch_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    python, flag, module = launch_module.reasoner_program()
    assert (python, flag) == (sys.executable, "-m")
    assert importlib.util.find_spec(module) is not None
    program = tmp_path / "virst-reasoner"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert launch_module.reasoner_program() == [str(program)]


def test_the_reasoner_understands_what_it_is_started_with(launch_module: Any) -> None:
    started = processes(
        launch_module, device="cuda:0", log_level="warn", weights="/w", curve_keys="/k", memory_budget_gib="20.5",
        weight_bits="4", method="grounding", detector="/d", reasoner_weights="/r",
    )  # fmt: skip
    options = [word for pair in reasoner_options(started).items() for word in pair]
    app = typer.Typer()
    app.command()(importlib.import_module("virst_engine.slow.zmq_server")._command)
    result = CliRunner().invoke(app, [*options, "--help"])
    assert result.exit_code == 0, result.output
    assert "No such option" not in result.output


@pytest.mark.parametrize(
    "given",
    [
        {},
        {
            "camera_name": "left",
            "goal": "the red ball",
            "device": "cuda:0",
            "depth_topic": "/d",
            "use_sim_time": "true",
            "autostart": "false",
            "target": "goal_1",
            "detections": "off",
            "image_transport": "compressed",
            "overlay": "false",
            "backend": "onnxruntime",
            "engine_path": "/exported",
            "precision": "bf16",
            "model": "virst-7b",
            "weights": "/virst-7b",
            "method": "virst",
            "memory_budget_gib": "40",
            "weight_bits": "4",
            "reasoner_weights": "/r",
        },
    ],
)
def test_the_segmenter_knows_every_parameter_it_gets(launch_module: Any, given: dict[str, str]) -> None:
    known = {spec.name: spec for spec in [*engine_specs(), *node_specs()]}
    got = parameters(processes(launch_module, **given)["segmenter"])
    assert got.pop("use_sim_time", False) is (given.get("use_sim_time") == "true")  # rclpy's own
    assert got["autostart"] is (given.get("autostart") != "false")
    assert got["overlay"] is (given.get("overlay") != "false")
    assert got["target"] == given.get("target", "")
    assert got.keys() <= known.keys()
    for name, value in got.items():
        assert type(value) is {tuple: list}.get(known[name].type, known[name].type), name


def test_arguments_go_before_the_parameter_file_and_empty_ones_do_not(launch_module: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("/**: {ros__parameters: {initial_goal: the cup, camera_name: head, model: {device: cuda:1}}}")
    plain = parameters(processes(launch_module, params_file=str(file))["segmenter"])
    assert (plain["initial_goal"], plain["camera_name"], plain["model.device"]) == ("the cup", "head", "cuda:1")
    changed = parameters(processes(launch_module, params_file=str(file), goal="the can")["segmenter"])
    assert (changed["initial_goal"], changed["camera_name"]) == ("the can", "head")


def test_topics_are_remapped(launch_module: Any) -> None:
    node = processes(launch_module, image_topic="/a", camera_info_topic="/b", namespace="robot")["segmenter"]
    assert node.named["remappings"] == [("image", "/a"), ("camera_info", "/b")]
    assert node.named["namespace"] == "robot"
    with_depth = processes(launch_module, depth_topic="/c", depth_camera_info_topic="/d")["segmenter"]
    assert {("depth", "/c"), ("depth/camera_info", "/d")} <= set(with_depth.named["remappings"])
    assert parameters(with_depth)["use_depth"] is True
    compressed = processes(launch_module, image_topic="/a", image_transport="compressed")["segmenter"]
    assert compressed.named["remappings"][0] == ("image/compressed", "/a/compressed")


def test_without_topics_the_camera_is_the_simulated_ones(launch_module: Any) -> None:
    node = processes(launch_module)["segmenter"]
    assert node.named["remappings"] == [
        ("image", "/camera/color/image_raw"),
        ("camera_info", "/camera/color/camera_info"),
    ]


def test_compressed_images_are_remapped_when_the_parameter_file_asks_for_them(
    launch_module: Any, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("segmenter: {ros__parameters: {image_transport: compressed}}")
    node = processes(launch_module, params_file=str(file), image_topic="/a")["segmenter"]
    assert node.named["remappings"][0] == ("image/compressed", "/a/compressed")
    raw = processes(launch_module, params_file=str(file), image_topic="/a", image_transport="raw")["segmenter"]
    assert raw.named["remappings"][0] == ("image", "/a")


def test_several_cameras_share_a_segmenter(launch_module: Any) -> None:
    node, reasoner = all_processes(
        launch_module, camera_names="left, right", namespace="robot", depth_topic="/{camera}/depth", goal="the can"
    )
    assert reasoner.named["name"] == "reasoner"
    assert (node.named["namespace"], node.named["name"]) == ("robot", "segmenter")
    got = parameters(node)
    assert (got["cameras"], got["initial_goal"], got["use_depth"]) == (["left", "right"], "the can", True)
    assert node.named["remappings"] == [
        ("left/image", "/left/color/image_raw"),
        ("left/camera_info", "/left/color/camera_info"),
        ("left/depth", "/left/depth"),
        ("right/image", "/right/color/image_raw"),
        ("right/camera_info", "/right/color/camera_info"),
        ("right/depth", "/right/depth"),
    ]


def test_one_named_camera_is_a_list_of_one(launch_module: Any) -> None:
    node = processes(launch_module, camera_names="left", image_topic="/image", image_transport="compressed")[
        "segmenter"
    ]
    assert parameters(node)["cameras"] == ["left"]
    assert node.named["remappings"][0] == ("left/image/compressed", "/image/compressed")


def test_a_parameter_file_may_name_the_cameras(launch_module: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "/robot/segmenter: {ros__parameters: {cameras: [left, right]}}\n"
        "/other/segmenter: {ros__parameters: {cameras: ['']}}\n"
    )
    node = processes(launch_module, params_file=str(file), namespace="robot")["segmenter"]
    assert node.named["parameters"] == [str(file), {"cameras": ["left", "right"]}]
    assert [rule[0] for rule in node.named["remappings"]] == [
        *("left/image", "left/camera_info"),
        *("right/image", "right/camera_info"),
    ]
    for namespace in ("", "other"):
        node = processes(launch_module, params_file=str(file), namespace=namespace)["segmenter"]
        assert [rule[0] for rule in node.named["remappings"]] == ["image", "camera_info"]
    chosen = processes(launch_module, params_file=str(file), namespace="robot", camera_names="top")["segmenter"]
    assert chosen.named["parameters"][1]["cameras"] == ["top"]
    assert [rule[0] for rule in chosen.named["remappings"]] == ["top/image", "top/camera_info"]


@pytest.mark.parametrize("names", ["left,right", ""], ids=["by argument", "by the file"])
def test_a_process_per_camera_has_its_own_namespace_and_device(launch_module: Any, tmp_path: Path, names: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "/**: {ros__parameters: {cameras: [left, right]}}\n"
        "/robot/left/segmenter: {ros__parameters: {model: {device: 'cuda:1'}}}\n"
        "/robot/right/segmenter: {ros__parameters: {image_transport: compressed}}\n"
    )
    left, right, reasoner = all_processes(
        launch_module,
        params_file=str(file),
        camera_names=names,
        namespace="robot",
        process_per_camera="true",
        goal="the can",
    )
    for node, camera in ((left, "left"), (right, "right")):
        assert node.named["namespace"] == f"/robot/{camera}"
        of_file, given = node.named["parameters"]
        assert of_file == str(file)
        assert given == {"cameras": [""], "camera_name": camera, "initial_goal": "the can"}
        ending = {"left": "", "right": "/compressed"}[camera]
        assert node.named["remappings"] == [
            (f"image{ending}", f"/{camera}/color/image_raw{ending}"),
            ("camera_info", f"/{camera}/color/camera_info"),
        ]
    assert reasoner_options({"reasoner": reasoner})["--device"] == "cuda:1", "as the first segmenter"


def test_the_parameter_files_of_the_documentation_work(launch_module: Any, tmp_path: Path) -> None:
    text = (LAUNCH.parent / "docs" / "cameras.md").read_text(encoding="utf-8")
    shared, apart = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    known = {spec.name for spec in [*engine_specs(), *node_specs()]}
    file = tmp_path / "documented.yaml"
    for content, nodes in ((shared, ["/segmenter"]), (apart, ["/left/segmenter", "/right/segmenter"])):
        file.write_text(content)
        for node in nodes:
            found = launch_module.parameters_in_file(file, node)
            assert found
            assert found.keys() <= known

    file.write_text(shared)
    node = processes(launch_module, params_file=str(file))["segmenter"]
    rules = [f"{inside}:={outside}" for inside, outside in node.named["remappings"]]
    assert rules == re.findall(r"-r (\S+:=\S+)", text), "by hand as by the launch file"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"camera_names": "left,right", "image_topic": "/image"}, "image_topic is /image for all of them"),
        ({"camera_names": "left,left"}, "names a camera twice"),
        ({"camera_names": "left,1st"}, "'1st' is no name in ROS"),
        ({"camera_names": "left/right"}, "'left/right' is no name in ROS"),
        ({"camera_names": "l\u00e4ngs"}, "'l\u00e4ngs' is no name in ROS"),
        ({"camera_names": "left,right", "camera_name": "head"}, "leave camera_name out"),
        ({"process_per_camera": "true"}, "needs the names of the cameras"),
    ],
)
def test_cameras_that_cannot_be_are_named(launch_module: Any, given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        all_processes(launch_module, **given)


def test_wrong_cameras_of_a_parameter_file_are_named_with_the_file(launch_module: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("/**: {ros__parameters: {cameras: [left, left]}}\n")
    with pytest.raises(ValueError, match=re.escape(f"cameras in {file}: left, left names a camera twice")):
        all_processes(launch_module, params_file=str(file))


def test_reasoner_and_simulated_camera_can_be_chosen(launch_module: Any) -> None:
    assert processes(launch_module, reasoner="false").keys() == {"segmenter"}
    with_camera = processes(launch_module, sim="true", sim_seed="7")
    assert with_camera.keys() == {"segmenter", "reasoner", "sim_camera"}
    assert with_camera["sim_camera"].named["name"] == "camera"
    assert with_camera["sim_camera"].named["parameters"] == [{"seed": 7, "frame_id": "camera_color_optical_frame"}]
    in_sim_time = processes(launch_module, sim="true", use_sim_time="true")
    assert in_sim_time["sim_camera"].named["parameters"][0]["use_sim_time"] is True


@pytest.mark.parametrize("apart", ["false", "true"])
def test_each_named_camera_is_simulated_on_the_topics_that_are_segmented(launch_module: Any, apart: str) -> None:
    started = all_processes(
        launch_module, sim="true", sim_seed="7", camera_names="left,right", process_per_camera=apart
    )
    cameras = [node for node in started if node.named.get("executable") == "sim_camera"]
    assert [(node.named["name"], node.named["parameters"]) for node in cameras] == [
        ("left", [{"seed": 7, "frame_id": "left_color_optical_frame"}]),
        ("right", [{"seed": 8, "frame_id": "right_color_optical_frame"}]),
    ]
    listened = {
        topic
        for node in started
        if node.named.get("executable") == "segmenter"
        for _, topic in node.named["remappings"]
        if topic.endswith("image_raw")
    }
    assert listened == {f"/{node.named['name']}/color/image_raw" for node in cameras}


def test_rviz_starts_when_it_is_chosen(launch_module: Any) -> None:
    rviz = processes(launch_module, rviz="true")["rviz2"]
    assert rviz.named["arguments"][::2] == ["-d", "-f"]
    file, frame = rviz.named["arguments"][1::2]
    assert Path(file).is_file()
    assert frame == "camera_color_optical_frame"
    assert rviz.named["parameters"] == []
    assert all(topic == shown for topic, shown in rviz.named["remappings"])
    assert rviz.named["package"] == "rviz2"


def test_rviz_shows_the_topics_of_the_namespace(launch_module: Any) -> None:
    rviz = processes(launch_module, rviz="true", namespace="robot")["rviz2"]
    moved = dict(rviz.named["remappings"])
    assert moved.keys() == shown_in_rviz()
    assert moved["/segmenter/overlay"] == "/robot/segmenter/overlay"


@pytest.mark.parametrize(
    ("apart", "place"), [("false", "/robot/segmenter/{}"), ("true", "/robot/{}/segmenter")], ids=["one", "apart"]
)
def test_rviz_has_a_window_for_each_camera(launch_module: Any, apart: str, place: str) -> None:
    started = all_processes(
        launch_module, rviz="true", namespace="robot", camera_names="left,right", process_per_camera=apart
    )
    windows = [node for node in started if node.named.get("executable") == "rviz2"]
    assert len({(node.named["namespace"], node.named["name"]) for node in windows}) == 2
    for window, camera in zip(windows, ("left", "right"), strict=True):
        moved = dict(window.named["remappings"])
        assert moved.keys() == shown_in_rviz()
        assert moved["/segmenter/points"] == f"{place.format(camera)}/points"
        assert window.named["arguments"][-1] == f"{camera}_color_optical_frame"


def shown_in_rviz() -> set[str]:
    tree = yaml.safe_load((LAUNCH / "rviz" / "virst.rviz").read_text(encoding="utf-8"))
    displays = tree["Visualization Manager"]["Displays"]
    assert {display["Class"] for display in displays} <= {
        f"rviz_default_plugins/{kind}" for kind in ("Image", "PointCloud2", "MarkerArray")
    }
    for display in displays:
        best_effort = display["Topic"]["Reliability Policy"] == "Best Effort"
        assert best_effort or display["Class"].endswith("MarkerArray"), "large data must not be held up by a viewer"
    return {display["Topic"]["Value"] for display in displays}


def test_foxglove_starts_when_it_is_chosen(launch_module: Any) -> None:
    bridge = processes(launch_module, foxglove="true", foxglove_port="9000")["foxglove_bridge"]
    assert bridge.named["parameters"] == [{"port": 9000}]
    assert "foxglove_bridge" not in processes(launch_module)


def published_topics() -> set[str]:
    """What the node publishes, read off its source: this test needs no ROS."""
    source = (LAUNCH.parent / "virst_ros" / "outputs.py").read_text(encoding="utf-8")
    return {f"/segmenter/{topic}" for topic in re.findall(r'self\.make\(\w+, "([\w/]+)"', source)} | {"/diagnostics"}


def test_the_foxglove_layout_shows_what_there_is() -> None:
    layout = json.loads((LAUNCH / "foxglove" / "virst.json").read_text(encoding="utf-8"))
    topics, services = set(), set()
    for name, panel in layout["configById"].items():
        if name.startswith("Image!"):
            topics.add(panel["imageMode"]["imageTopic"])
        elif name.startswith("3D!"):
            topics |= panel["topics"].keys()
        elif name.startswith("RawMessages!"):
            topics.add(panel["topicPath"])
        elif name.startswith("Plot!"):
            topics |= {path["value"].split(".")[0] for path in panel["paths"]}
        elif name.startswith("DiagnosticSummary!"):
            topics.add(panel["topicToRender"])
        elif name.startswith("CallService!"):
            services.add(panel["serviceName"])
            json.loads(panel["requestPayload"])
        else:
            pytest.fail(f"a panel of unknown kind: {name}")
    assert topics <= published_topics()
    assert services <= {"/segmenter/set_goal", "/segmenter/clear_goal"}

    placed = []

    def visit(tree: Any) -> None:
        if isinstance(tree, str):
            placed.append(tree)
        else:
            visit(tree["first"])
            visit(tree["second"])

    visit(layout["layout"])
    assert sorted(placed) == sorted(layout["configById"]), "every panel has one place"


def test_the_documented_command_makes_a_layout_for_one_of_several_cameras(tmp_path: Path) -> None:
    text = (LAUNCH.parent / "docs" / "cameras.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"sed -E '([^']+)'", text)
    layout = LAUNCH / "foxglove" / "virst.json"
    made = subprocess.run(["sed", "-E", script, layout], capture_output=True, text=True, check=True).stdout
    before, after = (json.loads(source)["configById"] for source in (layout.read_text(encoding="utf-8"), made))
    assert after["Image!overlay"]["imageMode"]["imageTopic"] == "/segmenter/left/overlay"
    clouds_before, clouds_after = (panels["3D!places"]["topics"].keys() for panels in (before, after))
    assert clouds_after == {topic.replace("/segmenter/", "/segmenter/left/") for topic in clouds_before}
    assert after["3D!places"]["followTf"] == "left_color_optical_frame"
    assert after["CallService!set_goal"] == before["CallService!set_goal"]
    told = [panel["value"] for panel in after["Plot!age"]["paths"]] + [after["RawMessages!objects"]["topicPath"]]
    assert all(topic.startswith("/segmenter/left/objects") for topic in told)
    assert after["DiagnosticSummary!all"] == before["DiagnosticSummary!all"]


def test_rviz_shows_what_there_is() -> None:
    assert shown_in_rviz() <= published_topics()


class TestReplay:
    @pytest.fixture
    def replay(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        return load_launch_file(monkeypatch, REPLAY_FILE)

    def command(self, replay: Any, **given: str) -> tuple[float, list[str]]:
        values = {argument.name: argument.named.get("default_value") for argument in replay.ARGUMENTS}
        (timer,) = replay.play(FakeContext({**values, **given}))
        (player,) = timer.named["actions"]
        return timer.named["period"], player.named["cmd"]

    def test_every_argument_is_described(self, replay: Any) -> None:
        for argument in replay.ARGUMENTS:
            assert len(argument.named["description"]) > 15, argument.name
        assert [argument.name for argument in replay.ARGUMENTS if "default_value" not in argument.named] == ["bag"]

    def test_the_bag_is_played_with_its_clock_after_the_model_is_loaded(self, replay: Any, tmp_path: Path) -> None:
        period, command = self.command(replay, bag=str(tmp_path))
        assert period == 5.0
        assert command == ["ros2", "bag", "play", str(tmp_path), "--clock", "100", "--rate", "1.0"]

    def test_arguments_reach_the_player(self, replay: Any, tmp_path: Path) -> None:
        period, command = self.command(replay, bag=str(tmp_path), rate="0.5", start_s="3.5", loop="true", wait_s="0")
        assert period == 0.0
        assert command[-3:] == ["--start-offset", "3.5", "--loop"]
        assert command[command.index("--rate") + 1] == "0.5"

    def test_a_missing_bag_is_told(self, replay: Any, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there is no"):
            self.command(replay, bag=str(tmp_path / "nothing"))

    def test_the_segmenter_runs_in_the_bags_time(self, replay: Any) -> None:
        (entities,) = replay.generate_launch_description().positional
        assert entities[: len(replay.ARGUMENTS)] == replay.ARGUMENTS
        player, set_time, include = entities[len(replay.ARGUMENTS) :]  # a missing bag must not leave a segmenter behind
        assert set_time.positional == ("use_sim_time", "true")
        (source,) = include.positional
        assert Path(source.positional[0]) == LAUNCH_FILE
        assert player.named["function"] is replay.play


def test_the_real_launch_packages_accept_the_file() -> None:
    pytest.importorskip("launch_ros", reason="ROS 2's launch is not installed (its wheels leave it out)")
    from launch import LaunchContext
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    context = LaunchContext()
    for file, least in ((LAUNCH_FILE, 32), (REPLAY_FILE, 37)):
        description = PythonLaunchDescriptionSource(str(file)).get_launch_description(context)
        names = [argument.name for argument in description.get_launch_arguments()]
        assert len(names) >= least
        assert len(set(names)) == len(names)
