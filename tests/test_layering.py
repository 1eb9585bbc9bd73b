# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. Read off the source, so that imports inside functions count too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine"

# Part of the engine -> parts that it may import. A part is a file or a folder directly in engine/. One more has rules
# of its own: "backends.base", the interface of a stage.
# cli joins everything, and nothing else imports it.
WORDS = {"types", "config", "errors", "timing"}
STAGES = WORDS | {"model", "backends.base"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "config": {"errors"},
    "timing": {"types", "errors"},
    "depth": set(),
    "visualize": {"types", "errors"},
    "backends.base": WORDS,
    "backends": STAGES,
    "model": STAGES,
    "fast": STAGES,
    "slow": STAGES | {"weights"},
    # What puts a model together from its file: the stages of the fast path and the reasoner of the slow one.
    "weights": STAGES | {"backends", "slow"},
    "instance_tracks": WORDS | {"fast"},
    # The two files that join the fast path and the slow one.
    "camera_stream": WORDS | {"fast", "slow", "backends.base", "instance_tracks"},
    "session": WORDS | {"camera_stream", "fast", "slow", "backends.base", "weights"},
    "export": STAGES | {"fast", "backends", "weights"},
    "sim": {"types", "errors", "config"},
    "data": WORDS | {"sim", "model"},
    "train": STAGES | {"backends", "data", "sim", "weights", "evaluate"},
    "video": STAGES | {"weights", "session", "fast", "slow", "visualize"},
    "evaluate": STAGES
    | {"backends", "data", "export", "sim", "weights", "session", "fast", "slow", "visualize", "video"},
}
ALLOWED["cli"] = set(ALLOWED)

# Optional or heavy packages belong into a file named after them; these files are the agreed exceptions.
HEAVY = {
    "mujoco": (),
    "onnx": (),
    "onnxruntime": (),
    "tensorrt": (),
    "tensorrt_rtx": (),
    "sam2": (),
    "zmq": (),
    "msgpack": ("slow/wire.py",),
    "transformers": ("model/video_language.py",),  # the language model is a part of VIRST
    "tensorboard": ("train/*.py",),
    "typer": ("cli.py", "slow/zmq_server.py", "train/command.py"),
    "rich": ("cli.py", "train/*.py"),
    "matplotlib": ("evaluate/*.py",),
    "rosbags": (),
    "bitsandbytes": ("model/quantised.py",),
}
ROS = ("rclpy", "launch", "launch_ros", "ament_index_python", "builtin_interfaces", "virst_ros")


def is_ros(module: str) -> bool:
    top = module.split(".")[0]
    return top in ROS or top.endswith(("_msgs", "_srvs", "_interfaces"))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, anywhere in it. `from a import b` gives a and a.b: b may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""


def part_of(module_path: str) -> str:
    """`slow.wire.encode` -> slow; `backends.base.StageSizes` -> backends.base."""
    own = "backends.base" if f"{module_path}.".startswith("backends.base.") else ""
    return own or module_path.split(".")[0]


def engine_files() -> list[Path]:
    return sorted(path for path in ENGINE.rglob("*.py") if path != ENGINE / "__init__.py")


def test_the_rules_name_every_part_of_the_engine() -> None:
    parts = {part_of(".".join(path.relative_to(ENGINE).with_suffix("").parts)) for path in engine_files()}
    assert parts <= ALLOWED.keys()


@pytest.mark.parametrize("path", engine_files(), ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_the_engine_imports_only_in_the_allowed_direction(path: Path) -> None:
    own = part_of(".".join(path.relative_to(ENGINE).with_suffix("").parts))
    for module in imports(path):
        assert not is_ros(module), f"{path.name} imports {module}: no ROS in the engine"
        assert module.split(".")[0] != "engine", f"{path.name}: the import name is virst_engine"
        if module.startswith("virst_engine."):
            other = part_of(module.removeprefix("virst_engine."))
            assert other == own or other in ALLOWED[own], f"{path.name} ({own}) imports {module} ({other})"


def reachable(part: str) -> set[str]:
    """The parts that the rules let `part` import, directly or through others."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        new = ALLOWED[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_fast_and_slow_know_nothing_of_each_other() -> None:
    assert "slow" not in reachable("fast")
    assert "fast" not in reachable("slow")


@pytest.mark.parametrize("path", engine_files(), ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_heavy_packages_stay_in_their_own_files(path: Path) -> None:
    name = path.relative_to(ENGINE).as_posix()
    for module in imports(path):
        package = module.split(".")[0]
        if package not in HEAVY:
            continue
        named_after = package in path.stem or (package.startswith("onnx") and "onnx" in path.stem)
        agreed = any(fnmatch(name, pattern) for pattern in HEAVY[package])
        assert named_after or agreed, f"{name} imports {package}; it belongs into a file named after it"


def test_only_the_ros_package_and_the_launch_file_import_ros() -> None:
    folders = ("examples", "scripts", "docs")
    for path in [ROOT / "setup.py", *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]:
        found = [module for module in imports(path) if is_ros(module) and not module.startswith("virst_ros")]
        assert found == [], f"{path} imports {found}"


def test_the_launch_file_needs_nothing_of_ours() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        assert [module for module in imports(path) if module.startswith(("virst_engine", "virst_ros"))] == []


WITHOUT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError("not installed in this test: " + name, name=name)

sys.meta_path.insert(0, Missing())
for module in {modules!r}:
    importlib.import_module(module)
"""


@pytest.mark.parametrize(
    ("missing", "modules"),
    [
        (
            ["rclpy", "virst_msgs", "sensor_msgs", "std_msgs", "rcl_interfaces", "launch", "virst_ros"],
            ["virst_engine", "virst_engine.session", "virst_engine.cli", "virst_engine.slow.zmq_server"],
        ),
        (["rclpy", "virst_msgs", "sensor_msgs", "std_msgs", "rcl_interfaces"], ["virst_ros.parameters"]),
        # A robot needs neither the simulator nor what belongs to training, and the segmenter no language model.
        (
            ["mujoco", "onnx", "onnxruntime", "tensorrt", "tensorboard", "matplotlib", "transformers"],
            ["virst_engine", "virst_engine.session"],
        ),
    ],
    ids=["engine without ROS", "parameter file without ROS", "session without optional packages"],
)
def test_imports_work_without(missing: list[str], modules: list[str]) -> None:
    code = WITHOUT.format(missing=missing, modules=modules)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
