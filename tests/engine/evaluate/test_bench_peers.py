# SPDX-License-Identifier: Apache-2.0
"""The comparison's bookkeeping: who was asked what and when, and what becomes of the times. Speed is never asserted."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.engine.backends.fake_tensorrt import fake_tensorrt
from virst_engine import cli
from virst_engine.config import ModelParameters
from virst_engine.errors import BackendError, VirstError
from virst_engine.evaluate import bench_peers
from virst_engine.evaluate.bench_peers import WARM_UP_FRAMES, PeerSettings, Speed
from virst_engine.evaluate.peers import comparison_config, random_model
from virst_engine.export.tensorrt import tensorrt_for
from virst_engine.model.sam2 import Sam2
from virst_engine.timing import StageTimer
from virst_engine.types import ClickPrompt

SMALL = ModelParameters(name="tabletop-tiny", image_size=64, threads=1)
BOX = ClickPrompt(box_px=(1.0, 1.0, 9.0, 9.0))


class Scripted:
    """A system that notes its calls; one more pixel of its second object is missing with every frame."""

    bytes_per_frame_ahead = 0

    def __init__(self, name: str, calls: list[tuple[str, int]], *, shrinks: bool = False, offset: float = 0.0) -> None:
        self.name, self._calls, self._shrinks, self._offset = name, calls, shrinks, offset
        self.prompts: list[Sequence[ClickPrompt]] = []
        self._number = 0

    def begin(self, prompts: Sequence[ClickPrompt]) -> np.ndarray:
        self.prompts.append(prompts)
        self._calls.append((self.name, 0))
        return self._masks()

    def step(self, number: int, timer: StageTimer) -> np.ndarray:
        self._calls.append((self.name, number))
        self._number = number
        with timer.stage("image_encoder"):
            return self._masks()

    def logits(self) -> torch.Tensor:
        return torch.full((2, 4, 4), self._offset * self._number)

    def end(self) -> None:
        self._calls.append((self.name, -1))

    def _masks(self) -> np.ndarray:
        masks = np.zeros((2, 10, 10), dtype=np.bool_)
        masks[:, :5] = True
        if self._shrinks:
            masks[1].reshape(-1)[: self._number] = False
        return masks


def test_systems_take_turns_at_every_frame_and_another_one_is_first_each_time() -> None:
    calls: list[tuple[str, int]] = []
    systems = [Scripted(name, calls) for name in "abc"]
    frames = 5
    speed = bench_peers.measure_speed(systems, [BOX, BOX], frames)
    assert [system.prompts for system in systems] == [[[BOX, BOX]]] * 3
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)]
    assert calls[-3:] == [("a", -1), ("b", -1), ("c", -1)]
    steps = calls[3:-3]
    for number in range(1, 1 + WARM_UP_FRAMES + frames):
        turn = steps[3 * (number - 1) : 3 * number]
        assert {n for _, n in turn} == {number}
        start = "abc"[number % 3]
        assert "".join(name for name, _ in turn) in ("abcabc"["abc".index(start) :][:3],)
    assert len(steps) == 3 * (WARM_UP_FRAMES + frames)
    for times in (speed.ms, speed.cpu_ms, speed.stage_ms):
        assert {name: len(each) for name, each in times.items()} == {"a": frames, "b": frames, "c": frames}
    assert all(timings.keys() == {"image_encoder"} for timings in speed.stage_ms["b"])


def test_agreement_is_the_worst_over_frames_and_objects() -> None:
    calls: list[tuple[str, int]] = []
    systems = [Scripted("a", calls), Scripted("b", calls, shrinks=True, offset=0.5), Scripted("c", calls)]
    speed = bench_peers.measure_speed(systems, [BOX, BOX], 2)
    last = WARM_UP_FRAMES + 2
    assert speed.iou == {"b": pytest.approx((50 - last) / 50), "c": 1.0}
    assert speed.logit_difference == {"b": pytest.approx(0.5 * last), "c": 0.0}
    assert speed.mask_percent == pytest.approx(50.0)


def test_iou_of_masks() -> None:
    one, other = np.zeros((3, 4, 4), dtype=np.bool_), np.zeros((3, 4, 4), dtype=np.bool_)
    assert bench_peers.least_iou(one, other) == 1.0
    one[0, 0], other[0, :2] = True, True
    assert bench_peers.least_iou(one, other) == 0.5
    one[2, 3, 3] = True
    assert bench_peers.least_iou(one, other) == 0.0


def test_a_ratio_is_that_of_equal_frames() -> None:
    """The machine was ten times slower in the second frame, for both."""
    assert bench_peers._ratio([1.0, 20.0, 3.0], [2.0, 20.0, 4.0]) == {
        "median": 0.75,
        "quartiles": [0.625, 0.875],
        "n": 3,
    }


def speed_of(**ms: list[float]) -> Speed:
    names = {name.replace("_", " "): values for name, values in ms.items()}
    stages = {name: [{"memory_attention": value / 2} for value in values] for name, values in names.items()}
    cpu_ms = {name: [2 * value for value in values[:1]] + values[1:] for name, values in names.items()}
    return Speed(names, cpu_ms, stages, {}, {}, 10.0)


def test_ratios_are_by_peer_and_number_of_objects() -> None:
    settings = PeerSettings(SMALL, objects=(1, 8), frames=2, backends=("torch", "onnxruntime"), pooled=True)
    rows = {
        1: speed_of(
            torch=[2.0, 2.0], onnxruntime=[1.0, 1.0], sam2=[4.0, 4.0], transformers=[8.0, 8.0],
            torch_pooled=[1.0, 1.0], onnxruntime_pooled=[0.9, 0.9],
        ),
        8: speed_of(
            torch=[9.0, 9.0], onnxruntime=[6.0, 6.0], sam2=[12.0, 12.0], transformers=[10.0, 10.0],
            torch_pooled=[3.0, 3.0], onnxruntime_pooled=[3.0, 3.0],
        ),
    }  # fmt: skip
    ratios = bench_peers._ratios(settings, rows)
    assert ratios["ratio"] == {"sam2": {"1": 0.25, "8": 0.5}, "transformers": {"1": 0.125, "8": 0.6}}
    assert ratios["ratio_of"] == "onnxruntime"
    assert ratios["ratios"]["torch"]["sam2"]["8"]["median"] == 0.75
    assert ratios["cpu_time_ratios"]["torch"]["transformers"]["1"]["median"] == 0.25
    pooled = bench_peers._pooled_ratios(settings, rows)
    assert pooled["torch"]["8"]["frame"]["median"] == pytest.approx(0.333)
    assert pooled["onnxruntime"]["8"]["memory_attention"]["median"] == 0.5


# Memory


def watched(monkeypatch: pytest.MonkeyPatch, series: list[float]) -> bench_peers.Memory:
    """What is made of this memory: at the start, then after every frame."""
    found = iter(series)
    monkeypatch.setattr(bench_peers, "used_mib", lambda device: next(found))
    return bench_peers.watch_memory(Scripted("a", []), [BOX, BOX], len(series) - 1)


def test_growth_is_fitted_to_the_frames_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 1500
    series = [90.0] + [100.0 + (200.0 if t < 500 else 0.0) + 0.25 * t for t in range(frames)]
    found = watched(monkeypatch, series)
    assert found.row["settled_frame"] == 500
    assert found.row["mb_per_1000_frames"] == pytest.approx(250 * 2**20 / 1e6, abs=0.01)
    assert (found.row["start_mib"], found.row["settled_mib"], found.row["last_mib"]) == (90.0, 225.0, 474.8)
    assert found.row["largest_change_percent"] == pytest.approx(100 * (474.75 / 225 - 1), abs=0.01)
    assert found.row["peak_mib"] > 0
    assert {"early_ms", "late_ms", "late_over_early", "late_over_early_cpu"} <= found.row.keys()
    curve = found.curve
    assert (
        len(curve["frame"])
        == len(curve["frame_ms"])
        == len(curve["cpu_ms"])
        == len(curve["memory_mib"])
        == bench_peers.CURVE_POINTS
    )
    assert curve["frame"][-1] == frames
    assert curve["memory_mib"][-1] == series[-1]


def test_a_flat_process_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(monkeypatch, [50.0, *[80.0] * 9])
    assert found.row["mb_per_1000_frames"] == 0.0
    assert found.row["largest_change_percent"] == 0.0
    assert found.row["settled_frame"] == 3


def test_memory_that_is_held_is_seen() -> None:
    held: list[np.ndarray] = []

    class Hoarder(Scripted):
        def step(self, number: int, timer: StageTimer) -> np.ndarray:
            held.append(np.ones(2**20, dtype=np.float64))  # 8 MiB
            return super().step(number, timer)

    found = bench_peers.watch_memory(Hoarder("a", []), [BOX], 12)
    assert found.row["mb_per_1000_frames"] == pytest.approx(8 * 2**20 / 1e3, rel=0.3)
    assert found.row["last_mib"] - found.row["start_mib"] > 60


# The whole run


@pytest.fixture(scope="module")
def settings() -> PeerSettings:
    return PeerSettings(SMALL, objects=(1, 2), frames=2, memory_frames=3, backends=("torch",), pooled=True)


@pytest.fixture(scope="module")
def exported() -> dict[str, Any]:
    """Ours on two backends beside one peer."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    backends = ("torch", "onnxruntime")
    small = PeerSettings(SMALL, ("sam2",), objects=(2,), frames=2, backends=backends)
    return bench_peers.run_peers(small, with_memory=False)


@pytest.fixture(scope="module")
def result(settings: PeerSettings) -> dict[str, Any]:
    """Memory is measured in this process: starting one more for each system takes long."""

    def here(settings: PeerSettings, name: str, exports: Path, on_step: Any) -> bench_peers.Memory:
        return bench_peers.measure_memory(settings, name, exports)

    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_peers, "_memory_in_own_process", here)
        found = bench_peers.run_peers(settings, on_step=done.append)
    assert [what for what in done if "objects" in what] == [
        "1 objects, 2 frames, 4 systems in turn",
        "2 objects, 2 frames, 4 systems in turn",
    ]
    return found


def test_the_run_compares_everything_with_everything(result: dict[str, Any]) -> None:
    assert result["ratio"].keys() == {"sam2", "transformers"}
    assert all(row.keys() == {"1", "2"} and min(row.values()) > 0 for row in result["ratio"].values())
    assert result["ratio_of"] == "torch"
    assert result["memory_mb_per_1000_frames"].keys() == {"torch", "sam2", "transformers"}
    assert result["systems"].keys() == {"torch", "torch pooled", "sam2", "transformers"}
    assert result["pooled"]["torch"]["2"].keys() == {"frame", "memory_attention"}
    assert result["memory"]["sam2"]["ahead_mb_per_1000_frames"] == pytest.approx(1000 * 3 * 64 * 64 * 4 / 1e6, abs=0.01)
    assert {"device", "versions", "command", "settings", "seconds"} <= result.keys()


def test_the_compared_work_is_the_same(result: dict[str, Any]) -> None:
    assert result["agreement"].keys() == result["largest_logit_difference"].keys() == {"sam2", "transformers"}
    assert min(result["agreement"].values()) > 0.95  # of few pixels: the pictures are 64 x 64
    assert max(result["largest_logit_difference"].values()) < 1e-2
    assert 0.1 < result["mask_percent_of_picture"] < 99.9


def test_stages_are_exported_once_for_all_backends_that_need_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from virst_engine.export import onnx, tensorrt

    exports: list[tuple[str, int, int]] = []
    builds: list[tuple[str, Sequence[int], str, bool]] = []
    only_rtx(monkeypatch, (8, 6))

    def export(sam2: Sam2, folder: Path, *, anchors_attended: int, **named: Any) -> None:
        folder.mkdir(parents=True)
        exports.append((folder.name, sam2.config.memory_pool, anchors_attended))

    def build(folder: Path, *, objects: Sequence[int], device: str, rtx: bool) -> None:
        builds.append((folder.name, objects, device, rtx))

    monkeypatch.setattr(onnx, "export_stages", export)
    monkeypatch.setattr(tensorrt, "build_engines", build)
    backends = ("torch", "onnxruntime", "tensorrt")
    settings = PeerSettings(replace(SMALL, device="cuda:0"), objects=(1, 4), backends=backends, pooled=True)
    model = random_model(comparison_config(SMALL))
    for name in settings.our_systems:
        bench_peers.export_system(settings, name, model, tmp_path, lambda what: None)
    assert exports == [("plain", 1, 1), ("pooled", 2, 1)]
    assert builds == [("plain", (1, 4), "cuda:0", True), ("pooled", (1, 4), "cuda:0", True)]


def only_rtx(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """As after ./scripts/setup tensorrt-rtx, on a GPU of this compute capability."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt("tensorrt_rtx", "1.7.1.116"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_tensorrt_takes_part_where_one_is_installed_that_builds_for_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    only_rtx(monkeypatch, (8, 6))
    assert bench_peers.available_backends("cuda:0") == ("torch", "torch-compiled", "tensorrt")
    only_rtx(monkeypatch, (9, 0))  # an H100
    assert bench_peers.available_backends("cuda:0") == ("torch", "torch-compiled")
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported .*; TensorRT-RTX .* has no code for SM90"):
        tensorrt_for("cuda:0")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("tensorrt", "11.1.0"))
    assert bench_peers.available_backends("cuda:0") == ("torch", "torch-compiled", "tensorrt")
    assert not tensorrt_for("cuda:0").is_rtx


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Scripted systems, of which those that are put into this set cannot be built."""
    broken: set[str] = set()

    def build(workshop: bench_peers.Workshop, name: str, frames: int) -> Scripted:
        if name in broken:
            raise BackendError(f"{name} has no kernels | here;\nuse another")
        return Scripted(name, [])

    monkeypatch.setattr(bench_peers.Workshop, "build", build)
    monkeypatch.setattr(bench_peers, "export_system", lambda *arguments: None)
    monkeypatch.setattr(bench_peers, "flop_per_frame", lambda *arguments: {})
    monkeypatch.setattr(bench_peers, "matmul_gflops", lambda *arguments: 1.0)
    monkeypatch.setattr(bench_peers, "available_backends", lambda device: ("torch", "onnxruntime"))
    return broken


def test_a_backend_that_nobody_asked_for_and_that_fails_is_skipped_and_the_others_go_on(failing: set[str]) -> None:
    failing.add("onnxruntime")
    said: list[str] = []
    settings = PeerSettings(SMALL, ("sam2",), objects=(2,), frames=2)
    found = bench_peers.run_peers(settings, on_step=said.append, with_memory=False)
    assert found["systems"].keys() == {"torch", "sam2"}
    assert found["skipped"] == {"onnxruntime": "skipped: onnxruntime has no kernels | here;\nuse another"}
    assert (found["ratio_of"], found["ratios"].keys()) == ("torch", {"torch"})
    assert found["settings"]["backends"] == ()
    assert any(step.startswith("onnxruntime skipped: ") for step in said)
    assert "| onnxruntime | skipped: onnxruntime has no kernels / here; use another |\n" in bench_peers.markdown(found)
    failing.add("torch")
    with pytest.raises(BackendError, match=r"no backend of ours runs here \(torch: torch has no kernels"):
        bench_peers.run_peers(settings, with_memory=False)


def test_a_backend_that_was_asked_for_and_fails_is_an_error(failing: set[str]) -> None:
    failing.add("onnxruntime")
    settings = PeerSettings(SMALL, ("sam2",), objects=(2,), frames=2, backends=("torch", "onnxruntime"))
    with pytest.raises(BackendError, match="onnxruntime has no kernels"):
        bench_peers.run_peers(settings, with_memory=False)
    failing.clear()
    found = bench_peers.run_peers(settings, with_memory=False)
    assert found["systems"].keys() == {"torch", "onnxruntime", "sam2"}
    assert found["skipped"] == {}


@pytest.mark.slow
def test_exported_stages_take_part(exported: dict[str, Any]) -> None:
    assert exported["systems"].keys() == {"torch", "onnxruntime", "sam2"}
    assert exported["ratios"].keys() == {"torch", "onnxruntime"}
    assert exported["ratio"] == {"sam2": {"2": exported["ratios"]["onnxruntime"]["sam2"]["2"]["median"]}}
    assert (exported["ratio_of"], exported["agreement_with"]) == ("onnxruntime", "torch")
    assert exported["agreement"].keys() == {"onnxruntime", "sam2"}
    assert min(exported["agreement"].values()) > 0.95
    assert max(exported["largest_logit_difference"].values()) < 1e-2
    gflop = {name: exported["systems"][name]["2"]["gflop"] for name in ("torch", "onnxruntime")}
    assert gflop["onnxruntime"]["image_encoder"] == gflop["torch"]["image_encoder"]
    assert gflop["onnxruntime"]["memory_attention"] < gflop["torch"]["memory_attention"]  # values after the average
    assert exported["memory"] == {}
    page = bench_peers.markdown(exported)
    assert "| onnxruntime / sam2 |" in page
    assert "`engine.backend: auto` chooses onnxruntime" in page
    assert "Least IoU of a mask with that of torch: onnxruntime" in page


def test_shares_of_the_peak_are_of_ours(result: dict[str, Any]) -> None:
    assert result["peak_gflops"]["value"] > 1
    rows = {name: row["2"] for name, row in result["systems"].items()}
    assert rows["torch"]["gflop"]["memory_attention"] > rows["torch pooled"]["gflop"]["memory_attention"] > 0
    assert 0 < rows["torch"]["share_of_peak"]["frame"] < 1
    assert "gflop" not in rows["sam2"]
    for row in rows.values():
        assert {"image_encoder", "memory_attention", "mask_decoder", "memory_encoder", "rest"} <= row["stage_ms"].keys()


def test_result_is_json_and_tables(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result))["ratio"] == result["ratio"]
    page = bench_peers.markdown(result)
    assert "| torch / sam2 |" in page
    assert "| torch / sam2, CPU time |" in page
    assert "| torch: pooled / unpooled, memory attention |" in page
    assert "| memory_attention |" in page
    assert "| transformers | 3 |" in page


def test_the_curves_are_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from virst_engine.evaluate.bench_plot import draw_curves

    draw_curves(result, tmp_path / "new" / "curves.png")
    by_cpu = (tmp_path / "new" / "curves.png").read_bytes()
    assert by_cpu.startswith(b"\x89PNG")
    on_gpu = {name: {k: v for k, v in curve.items() if k != "cpu_ms"} for name, curve in result["curves"].items()}
    draw_curves({**result, "curves": on_gpu}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() != by_cpu


def test_a_plot_without_matplotlib_names_the_remedy(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from virst_engine.evaluate.bench_plot import draw_curves

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(VirstError, match="pip install matplotlib"):
        draw_curves(result, tmp_path / "curves.png")


@pytest.mark.slow
def test_memory_is_measured_in_another_process(settings: PeerSettings, tmp_path: Path) -> None:
    held = np.ones(2**27)  # 1 GiB of this one
    found = bench_peers._memory_in_own_process(settings, "torch", tmp_path, lambda what: None)
    assert found.row["frames"] == 3
    assert found.row["peak_mib"] < held.nbytes / 2**20


def test_a_process_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, settings: PeerSettings) -> None:
    class Pool:
        def __init__(self, *arguments: Any, **named: Any) -> None: ...
        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *exception: object) -> None: ...
        def submit(self, *arguments: Any) -> None:
            raise bench_peers.BrokenProcessPool

    monkeypatch.setattr(bench_peers, "ProcessPoolExecutor", Pool)
    with pytest.raises(VirstError, match=r"memory of sam2 was ended.*--memory-frames"):
        bench_peers._memory_in_own_process(settings, "sam2", Path(), lambda what: None)


# Settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"against": ("sam3",)}, "a peer must be one of sam2, transformers, got 'sam3'"),
        ({"against": ()}, "needs peers"),
        ({"against": ("sam2", "sam2")}, "named twice"),
        ({"backends": ("tflite",)}, "a backend must be one of torch"),
        ({"objects": (0,)}, "1 to 8 objects"),
        ({"objects": (9,)}, "1 to 8 objects"),
        ({"objects": ()}, "1 to 8 objects"),
        ({"frames": 1}, "frames >= 2"),
        ({"precision": "int8"}, "precision must be one of fp32"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PeerSettings(SMALL, **change)


@pytest.mark.parametrize(
    ("device", "precision", "backends", "chosen"),
    [
        ("cpu", "fp32", ("torch", "onnxruntime"), "onnxruntime"),
        ("cpu", "fp32", ("torch",), "torch"),
        ("cpu", "fp16", ("torch", "onnxruntime"), "torch"),
        ("cuda:0", "bf16", ("torch", "torch-compiled", "onnxruntime", "tensorrt"), "tensorrt"),
        ("cuda:0", "bf16", ("torch", "torch-compiled"), "torch-compiled"),
        ("cuda:0", "fp16", ("torch", "onnxruntime"), "onnxruntime"),
        ("cpu", "fp32", ("tensorrt",), "tensorrt"),
    ],
)
def test_the_ratio_is_of_what_a_user_gets(device: str, precision: str, backends: tuple[str, ...], chosen: str) -> None:
    model = ModelParameters(name="sam2.1-tiny", device=device)
    assert PeerSettings(model, backends=backends, precision=precision).ratio_of == chosen


def test_a_gpu_brings_compiled_systems() -> None:
    on_gpu = PeerSettings(ModelParameters(name="sam2.1-large", device="cuda:0"))
    assert on_gpu.peer_systems == ("sam2", "transformers", "sam2 vos_optimized")
    assert "torch-compiled" in on_gpu.our_systems
    assert PeerSettings(SMALL, against=("transformers",)).peer_systems == ("transformers",)
    assert PeerSettings(SMALL).our_systems[0] == "torch"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "nobody"], "a peer must be one of sam2, transformers"),
        (["--against", "sam2", "--objects", "few"], "look like 1,4,8, got 'few'"),
        (["--against", "sam2", "--objects", "1,9"], "1 to 8 objects"),
        (["--against", "sam2", "--model", "sam3"], "model.name must be one of"),
        (["--against", "sam2", "--size", "100"], "multiple of 32"),
        (["--memory-frames", "100"], "memory_frames"),
    ],
)
def test_wrong_usage_of_the_command_says_why(arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert found.exit_code == 2
    assert said in " ".join(found.output.replace("│", " ").split())


def test_the_command_writes_figures_tables_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    asked: list[PeerSettings] = []
    row = {"frame": [1.0, 2.0], "frame_ms": [3.0, 4.0], "memory_mib": [5.0, 6.0]}
    made = {
        "curves": {"torch": row}, "memory": {"torch": {"mb_per_1000_frames": 0.0, "objects": 1}},
        "ratios": {"torch": {}}, "model": "m", "image_size": 64,
    }  # fmt: skip

    def run(settings: PeerSettings, **named: Any) -> dict[str, Any]:
        asked.append(settings)
        return made

    monkeypatch.setattr(bench_peers, "run_peers", run)
    monkeypatch.setattr(bench_peers, "markdown", lambda result: "| tables |")
    options = "--against sam2 --model sam2.1-tiny --size 512 --objects 1,8 --frames 40 --backends torch --pooled"
    files = {name: str(tmp_path / name) for name in ("a.json", "a.png", "a.md")}
    outputs = ["--json", files["a.json"], "--plot", files["a.png"], "--report", files["a.md"]]
    found = CliRunner().invoke(cli.app, ["bench", *options.split(), *outputs])
    assert found.exit_code == 0, found.output
    assert found.output.strip().endswith("| tables |")
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "m"
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "a.md").read_text() == "| tables |"
    model = ModelParameters(name="sam2.1-tiny", image_size=512, threads=0)
    assert asked == [PeerSettings(model, ("sam2",), (1, 8), 40, 0, ("torch",), True, "fp32")]
