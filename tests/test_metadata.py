# SPDX-License-Identifier: Apache-2.0
"""What describes the packages agrees with itself and with what is there."""

import ast
import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def package_xml(path: str) -> ET.Element:
    return ET.parse(ROOT / path).getroot()


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, object]:
    """What setup.py passes to setuptools.setup()."""
    code = (
        "import json, setuptools, runpy\n"
        "setuptools.setup = lambda **arguments: print(json.dumps(arguments))\n"
        "runpy.run_path('setup.py')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(out.stdout.splitlines()[-1])


def test_name_version_and_licence_agree(setup_arguments: dict[str, object]) -> None:
    ours, messages = package_xml("package.xml"), package_xml("msgs/package.xml")
    assert ours.findtext("name") == setup_arguments["name"] == "virst_ros"
    assert messages.findtext("name") == "virst_msgs"
    assert ours.findtext("version") == messages.findtext("version") == setup_arguments["version"]
    assert ours.findtext("license") == messages.findtext("license") == setup_arguments["license"] == "Apache-2.0"
    assert (ours.get("format"), messages.get("format")) == ("3", "3")
    for root in (ours, messages):
        maintainer = root.find("maintainer")
        assert maintainer is not None
        # catkin_pkg rejects an address without a top-level domain of two letters, and colcon then mistakes the type.
        assert re.fullmatch(r"[^@\s]+@[\w.-]+\.[a-z]{2,}", maintainer.get("email", ""))


def test_the_licence_is_there_in_full() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_source_file_names_its_licence() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".msg", ".srv", ".toml", ".yaml", ".yml", ".cfg", ".sh"}
    sources = [ROOT / name for name in tracked.stdout.splitlines() if Path(name).suffix in suffixes]
    sources = [path for path in sources if path.is_file() and path.name != "pyproject.toml"]
    without = [
        str(path.relative_to(ROOT))
        for path in sources
        if "SPDX-License-Identifier: Apache-2.0" not in "\n".join(path.read_text(encoding="utf-8").splitlines()[:3])
    ]
    assert len(sources) > 20
    assert without == []


def test_every_program_exists(setup_arguments: dict[str, object]) -> None:
    entry_points = setup_arguments["entry_points"]["console_scripts"]  # type: ignore[index]
    assert {line.split(" = ")[0] for line in entry_points} >= {"virst", "virst-reasoner", "segmenter", "sim_camera"}
    for line in entry_points:
        module, function = line.split(" = ")[1].split(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, line
        assert spec.origin is not None, line
        # Read, not imported: the nodes need rclpy.
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, line


def test_ros2_run_finds_the_programs() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["develop"]["script_dir"] == config["install"]["install_scripts"] == "$base/lib/virst_ros"


def test_installed_are_the_launch_files_and_the_marker(setup_arguments: dict[str, object]) -> None:
    installed = {target: set(files) for target, files in setup_arguments["data_files"]}  # type: ignore[attr-defined]
    assert installed["share/ament_index/resource_index/packages"] == {"resource/virst_ros"}
    assert installed["share/virst_ros"] == {"package.xml"}
    assert {"launch/segment.launch.py", "launch/fastdds_profile.xml"} <= installed["share/virst_ros/launch"]
    assert "launch/params/default.yaml" in installed["share/virst_ros/launch/params"]
    for files in installed.values():
        assert all((ROOT / file).is_file() for file in files)


def test_every_package_is_installed(setup_arguments: dict[str, object]) -> None:
    expected = set()
    for package, top in (("virst_engine", ROOT / "engine"), ("virst_ros", ROOT / "virst_ros")):
        folders = {path.parent for path in top.rglob("__init__.py")}
        expected |= {".".join((package, *folder.relative_to(top).parts)) for folder in folders}
        with_code = {path.parent for path in top.rglob("*.py")}
        assert with_code <= folders, "a folder with modules has no __init__.py, so it would not be installed"
    assert set(setup_arguments["packages"]) == expected  # type: ignore[call-overload]


def test_every_data_file_is_installed(setup_arguments: dict[str, object]) -> None:
    for package, folder in (("virst_engine", ROOT / "engine"), ("virst_ros", ROOT / "virst_ros")):
        patterns = setup_arguments["package_data"].get(package, [])  # type: ignore[attr-defined]
        installed = {path for pattern in patterns for path in folder.glob(pattern)}
        for path in folder.rglob("*"):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
            if path.is_file() and not hidden and path.suffix != ".py" and path.name not in ("ruff.toml", "README.md"):
                assert path in installed, f"{path} would be missing after an installation"


def test_the_message_files_are_the_ones_that_are_generated() -> None:
    text = (ROOT / "msgs" / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\s+((?:msg|srv|action)/\w+\.(?:msg|srv|action))$", text, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT / "msgs"))
        for kind in ("msg", "srv", "action")
        for path in (ROOT / "msgs" / kind).glob(f"*.{kind}")
    }
    assert listed == there
    declared = {element.text for element in package_xml("msgs/package.xml").findall("depend")}
    dependencies = re.search(r"DEPENDENCIES ([\w ]+)", text)
    assert dependencies is not None
    assert set(dependencies[1].split()) == declared


def test_the_node_declares_the_ros_packages_that_it_imports() -> None:
    declared = {element.text for element in package_xml("package.xml").findall("exec_depend")}
    imported: set[str] = set()
    for path in [*(ROOT / "virst_ros").rglob("*.py"), *(ROOT / "launch").glob("*.launch.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    ros = {name for name in imported if name.endswith(("_msgs", "_srvs", "_interfaces")) or name in ("rclpy", "launch")}
    ros |= imported & {"launch_ros", "builtin_interfaces", "lifecycle_msgs"}
    assert ros <= declared


def test_colcon_finds_both_packages() -> None:
    colcon = Path(sys.executable).with_name("colcon")
    found = str(colcon) if colcon.is_file() else shutil.which("colcon")
    if found is None:
        pytest.skip("colcon is not installed; ./scripts/setup installs it")
    out = subprocess.run([found, "list"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    packages = {tuple(line.split("\t")) for line in out.stdout.splitlines()}
    assert packages == {
        ("virst_msgs", "msgs", "(ros.ament_cmake)"),
        ("virst_ros", ".", "(ros.ament_python)"),
    }
