# SPDX-License-Identifier: Apache-2.0
"""The program `virst`: help everywhere, mistakes told in one line with exit code 2, results in files."""

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from virst_engine import cli
from virst_engine.errors import WeightsError

COMMANDS = [
    [],
    ["segment"],
    ["train"],
    ["evaluate"],
    ["compare"],
    ["bench"],
    ["scenes"],
    ["scenes", "write"],
    ["scenes", "show"],
    ["weights"],
    ["weights", "info"],
    ["words"],
    ["version"],
]


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command, option):
    result = run(*command, option)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_of_the_program_names_every_command():
    output = run("--help").output
    for command in ("segment", "train", "evaluate", "compare", "bench", "scenes", "weights", "version"):
        assert command in output


def test_help_does_not_load_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom virst_engine import cli\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_what_could_not_be_measured_is_null_in_json(tmp_path):
    """Memory is NaN where there is no /proc; Python would write that as a word that no other reader takes."""
    file = tmp_path / "new" / "figures.json"
    figures = {
        "memory": {"last_mib": math.nan, "frames": 3},
        "interval": (1.5, -math.inf),
        "curve": [math.inf, 2],
        "ä": True,
    }
    cli._write_json(file, figures)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse) == {
        "memory": {"last_mib": None, "frames": 3},
        "interval": [1.5, None],
        "curve": [None, 2],
        "ä": True,
    }


def test_version_lists_what_it_is_built_on():
    output = run("version").output
    assert "virst_ros " in output
    assert "torch " in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "--scenes", "a:b"], "is not FIRST:LAST"),
        (["evaluate", "--scenes", "7:7"], "holds no scene"),
        (["evaluate", "--family", "rich"], "plain"),
        (["evaluate", "--mode", "offline", "--no-refresh"], "no_refresh"),
        (["evaluate", "--anchors", "guided"], "mode offline"),
        (["evaluate", "--long", "100"], "family full"),
        (["evaluate", "--family", "full", "--long", "5"], "more than 12 s"),
        (["evaluate", "--method", "grounding", "--mode", "offline"], "whole video"),
        (["evaluate", "--detector", "owl"], "for the method grounding"),
        (["segment", "a.mp4", "--goal", "it", "--out", "b", "--anchors", "guided"], "--offline"),
        (
            ["segment", "a.mp4", "--goal", "a", "--out", "c", "--offline", "--method", "visa", "--anchors", "guided"],
            "leave out --anchors",
        ),
        (["compare"], "--json"),
        (["compare", "--list", "--long", "5"], "more than 12 s"),
        (["compare", "--json", "a.json", "--rows", "virst,nobody"], "no row or group 'nobody'"),
        (["scenes", "write", "out", "--size", "big"], "WIDTHxHEIGHT"),
        (["bench", "--frames", "1"], "10"),
        (["fly"], "No such command"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_errors_of_the_engine_are_one_line_and_exit_code_2(monkeypatch, capsys):
    def missing():
        raise WeightsError("no file; train them")

    monkeypatch.setattr(cli, "app", missing)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "virst: WeightsError: no file; train them\n"


def test_words_and_facts_of_a_weights_file(tmp_path):
    from tests.engine.model.small_models import WORDS, small_virst
    from virst_engine.weights import SHIPPED, save_model

    file = tmp_path / "small.safetensors"
    save_model(small_virst(), file, {"trained": "never"})
    assert run("words", "--weights", str(file)).output.split() == list(WORDS)
    facts = run("weights", "info", str(file)).output
    assert "small" in facts
    assert "never" in facts
    assert "sha256" in facts
    assert "tabletop-tiny" in run("weights", "info").output  # the shipped file, wherever the program is called
    visa = run("weights", "info", str(SHIPPED / "tabletop-tiny-visa.safetensors")).output
    assert "tabletop-tiny-visa" in visa
    assert "started_from" in visa
    detector = run("weights", "info", str(SHIPPED / "tabletop-tiny-grounding")).output
    assert "calibration" in detector
    assert "sha256" in detector


def test_missing_weights_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["virst", "weights", "info", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seeds"), [("3:7", range(3, 7)), ("12", range(12, 13))])
def test_ranges_of_scenes(text, seeds):
    assert cli.parse_range(text) == seeds


def test_the_rows_of_a_comparison_are_listed():
    lines = run("compare", "--list").output.splitlines()
    assert any(line.startswith("anchors-first-frame") and "first frame" in line for line in lines)
    assert len({line.split()[0] for line in lines}) == len(lines) > 20


def test_a_comparison_goes_to_its_files(monkeypatch, tmp_path):
    from tests.engine.evaluate import test_runner as fakes
    from virst_engine.evaluate import compare as module

    compare = module.compare
    monkeypatch.setattr(
        module,
        "compare",
        lambda *given, **rest: compare(*given, **rest, system_of=fakes.fake_system, case_of=fakes.fake_case),
    )
    files = [tmp_path / "new" / name for name in ("a.json", "a.md", "a.png")]
    options = ["--rows", "anchors", "--scenes-per-seed", "1", "--workers", "1"]
    result = run("compare", "--json", str(files[0]), "--markdown", str(files[1]), "--plot", str(files[2]), *options)
    assert result.exit_code == 0, result.output
    assert json.loads(files[0].read_text())["figures"]["rows"]["anchors-guided"]["ways"]["offline"]["scenes"] == 3
    assert "| first frame (`anchors-first-frame`) |" in files[1].read_text()
    assert files[2].stat().st_size > 1000


def test_figures_go_to_the_json_file_and_the_report(monkeypatch, tmp_path):
    from tests.engine.evaluate import test_runner as fakes
    from virst_engine.evaluate import modes, runner

    evaluate = runner.evaluate
    monkeypatch.setattr(modes, "load_system", fakes.fake_system)
    monkeypatch.setattr(
        runner,
        "evaluate",
        lambda settings, **rest: evaluate(settings, system_of=fakes.fake_system, case_of=fakes.fake_case, **rest),
    )
    monkeypatch.setattr("virst_engine.evaluate.pictures.write_pictures.__kwdefaults__", {"case_of": fakes.fake_case})
    json_file, report = tmp_path / "deep" / "figures.json", tmp_path / "page.md"
    result = run("evaluate", "--scenes", "10:12", "--workers", "1", "--json", str(json_file), "--report", str(report))
    assert result.exit_code == 0, result.output
    figures = json.loads(json_file.read_text())
    assert figures["overall"]["n"] == 3
    assert figures["settings"]["scenes"] == "10:12"
    assert "| attribute |" in result.output
    page = report.read_text()
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).is_file()
    assert "![absent worst]" in page


class TestCommandsOfOtherPackages:
    """Entry points of the group `virst_engine.commands`, of a package that is installed for the test."""

    MODULE = (
        "import sys\n"
        "from typing import Annotated\n"
        "import typer\n"
        "def command(times: Annotated[int, typer.Option(min=1, help='How often.')] = 1) -> None:\n"
        '    """Greet somebody."""\n'
        "    print('hello ' * times)\n"
        "def late() -> None:\n"
        '    """Greet over ROS."""\n'
        "    import rclpy_that_nobody_has\n"
    )

    @pytest.fixture
    def installed(self, tmp_path, monkeypatch):
        (tmp_path / "greeting.py").write_text(self.MODULE)
        (tmp_path / "needy.py").write_text("import rclpy_that_nobody_has\ndef command(): ...\n")
        facts = tmp_path / "greeting-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        entries = ["greet = greeting:command", "greet-late = greeting:late", "need = needy:command", "words = needy:x"]
        (facts / "entry_points.txt").write_text(f"[{cli.COMMANDS_GROUP}]\n" + "\n".join(entries) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        cli.declared_commands.cache_clear()
        yield tmp_path
        cli.declared_commands.cache_clear()
        for module in ("greeting", "needy"):
            sys.modules.pop(module, None)

    def test_they_run_with_their_options_and_explain_themselves(self, installed):
        assert run("greet", "--times", "2").output == "hello hello \n"
        assert run("greet", "--times", "0").exit_code == 2
        for option in ("-h", "--help"):
            told = run("greet", option)
            assert told.exit_code == 0
            assert "Greet somebody." in told.output
            assert "How often." in told.output

    def test_the_programs_help_lists_them(self, installed):
        output = run("--help").output
        assert "Greet somebody." in output
        assert "bench" in output

    def test_other_commands_do_not_import_them(self, installed):
        assert run("version").exit_code == 0
        assert run("bench", "--help").exit_code == 0
        assert not {"greeting", "needy"} & sys.modules.keys()

    def test_a_command_of_this_program_cannot_be_taken_over(self, installed, tmp_path):
        assert "List the words" in run("words", "--help").output

    @pytest.mark.parametrize("name", ["need", "greet-late"])
    def test_what_is_missing_for_one_is_told_and_how_to_get_it(self, installed, name, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["virst", name])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert f"`virst {name}` needs more than this Python has (No module named 'rclpy_that_nobody_has')" in told
        assert "source the ROS 2 workspace" in told

    def test_the_help_of_the_program_does_not_fail_for_one_that_cannot_be_imported(self, installed):
        assert "Cannot run here" in run("--help").output


def test_commands_of_this_repository_are_listed_without_ros():
    """In a process of its own, where no module of ROS can be imported."""
    names = {"soak"} & cli.declared_commands().keys()
    if not names:
        pytest.skip("this package was installed before it declared commands; run ./scripts/setup")
    code = (
        "import sys\n"
        "class NoRos:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('rclpy', 'virst_msgs', 'sensor_msgs', 'std_msgs'):\n"
        "            raise ModuleNotFoundError('no ' + name, name=name)\n"
        "sys.meta_path.insert(0, NoRos())\n"
        "from typer.testing import CliRunner\n"
        "from virst_engine import cli\n"
        "from virst_engine.errors import VirstError\n"
        "print(CliRunner().invoke(cli.app, ['--help']).output)\n"
        f"for name in {sorted(names)!r}:\n"
        "    assert CliRunner().invoke(cli.app, [name, '--help']).exit_code == 0\n"
        "    failed = CliRunner().invoke(cli.app, [name]).exception\n"
        "    assert isinstance(failed, VirstError) and 'source the ROS 2 workspace' in str(failed), failed\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert name in done.stdout
    assert "Cannot run here" not in done.stdout
