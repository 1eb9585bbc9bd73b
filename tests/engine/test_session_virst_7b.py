# SPDX-License-Identifier: Apache-2.0
"""`model.name: virst-7b`: published files in small to masks and words, in one process and in two; what may be wrong."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.engine.model.small_virst_7b import sure_virst_7b, write_converted
from tests.fakes import BLUE, RED, Square, Video
from virst_engine import weights
from virst_engine.backends.base import Stages
from virst_engine.cli import app
from virst_engine.config import (
    EngineConfig,
    EngineParameters,
    MemoryParameters,
    ModelParameters,
    ReasonerParameters,
    TrackingParameters,
)
from virst_engine.errors import BadGoal, WeightsError
from virst_engine.session import Session
from virst_engine.slow.reasoner import InProcessClient, Reasoner
from virst_engine.slow.virst_7b_reasoner import Virst7bReasoner
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.types import FrameResult, ObjectState, ReasonerAnswer, ReasonerRequest
from virst_engine.weights import (
    answers_questions,
    load_goal_check,
    load_reasoner,
    load_stages,
    reasoner_identity,
    understands_sentences,
    weights_identity,
    weights_path,
    weights_sha256,
)

ROOT = Path(__file__).parents[2]
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
VIDEO = Video([Square(RED, lambda t: (2, 1 + t % 10)), Square(BLUE, lambda t: (9, 10 - t % 10))], period_s=1 / 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_converted(tmp_path_factory.mktemp("virst-7b") / "weights")


def parameters_of(folder: Path, **changes: str | int) -> ModelParameters:
    return ModelParameters(name="virst-7b", weights=str(folder), **changes)  # type: ignore[arg-type]


def config_of(folder: Path, **reasoner: str | float) -> EngineConfig:
    return EngineConfig(
        model=parameters_of(folder),
        memory=MemoryParameters(ring_steps=40, min_write_iou=0.0),
        tracking=TrackingParameters(max_objects=3, start_presence=0.01, confirm_answers=1),
        reasoner=ReasonerParameters(period_s=0.5, retry_s=0.5, **reasoner),  # type: ignore[arg-type]
    )


class Watched:
    """A reasoner whose requests and answers are kept."""

    def __init__(self, reasoner: Reasoner) -> None:
        self._reasoner = reasoner
        self.met: list[tuple[ReasonerRequest, ReasonerAnswer]] = []

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.met.append((request, self._reasoner.answer(request)))
        return self.met[-1][1]


# --- one process ---------------------------------------------------------------------------------------------------


def test_a_session_answers_goals_and_questions_over_many_frames(folder: Path) -> None:
    reasoner = Watched(load_reasoner(parameters_of(folder)))
    results: list[FrameResult] = []
    with Session.open(config_of(folder), InProcessClient(reasoner)) as session:
        session.set_goal("the red square", goal_id="red")
        session.set_goal("the blue square", goal_id="blue")
        question = None
        for t in range(120):
            if t == 50:
                question = session.ask("What moves to the left?")
            results.append(session.step(VIDEO.frame(t)))
    assert question is not None
    assert question.result(timeout=0)
    goals = [(request, answer) for request, answer in reasoner.met if not request.wants_words]
    assert {request.goal_id for request, _ in goals} == {"red", "blue"}
    assert len(goals) == 2 * 8  # every half a second
    for request, answer in goals:
        assert [prompt.step for prompt in answer.prompts] == request.clip.steps.tolist()
        assert request.clip.frames_rgb_u8.shape == (8, 32, 32, 3)
        assert request.clip.fusion.shape == (8, 32, 4, 4)
    assert all(each.state is ObjectState.TRACKING for result in results for each in result.objects)
    assert max(each.prompt_age_s for result in results for each in result.objects) < 0.5  # anchors are renewed
    assert len({each.mask.tobytes() for result in results for each in result.objects}) > 50
    # Another sentence means something else in the same frames.
    assert [request.goal_id for request, _ in goals[-2:]] == ["red", "blue"]
    one, other = (np.stack([p.embeddings for p in answer.prompts]) for _, answer in goals[-2:])
    assert not np.allclose(one, other, atol=1e-3)


def test_refreshes_share_their_frames(folder: Path) -> None:
    """The clips of a stream are on a grid for this model, and spaced from the newest frame for the others."""
    reasoner = Watched(load_reasoner(parameters_of(folder)))
    with Session.open(config_of(folder, clip_frames=12), InProcessClient(reasoner)) as session:
        session.set_goal("the red square")
        for t in range(360):
            session.step(VIDEO.frame(t))
    clips = [set(request.clip.steps.tolist()) for request, _ in reasoner.met]
    assert len(clips) == 24
    for before, clip in itertools.pairwise(clips[8:]):
        assert len(clip) == 12
        assert len(clip - before) <= 3  # two cells at most begin in half a second; and the newest
    other = config_of(folder)
    assert other.clips_on_grid
    assert not EngineConfig().clips_on_grid
    assert not replace(other, reasoner=ReasonerParameters(method="grounding")).clips_on_grid


def test_the_segmenter_reads_its_own_shards_and_the_reasoner_the_others(folder: Path, tmp_path: Path) -> None:
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    of_segmenter = {each["shard"] for name, each in tensors.items() if name.startswith("seg_model.")}
    of_reasoner = {each["shard"] for name, each in tensors.items() if not name.startswith("seg_model.")}
    assert of_segmenter - of_reasoner
    assert of_reasoner - of_segmenter
    for kept, left_out, load in (
        ("robot", of_reasoner - of_segmenter, load_stages),
        ("server", of_segmenter - of_reasoner, load_reasoner),
    ):
        copy = tmp_path / kept
        shutil.copytree(folder, copy)
        for shard in left_out:
            (copy / shard).unlink()
        load(parameters_of(copy))
        assert weights_identity(parameters_of(copy)) == weights_identity(parameters_of(folder))


def test_stages_are_those_of_the_folder(folder: Path) -> None:
    stages = load_stages(parameters_of(folder))
    assert (stages.sizes.image_size, stages.sizes.video_size) == (64, 32)
    pixels = torch.randn(1, 3, 64, 64)
    own = sure_virst_7b().seg_model
    with torch.inference_mode():
        expected = own.encode_image(pixels, -1)
    assert torch.equal(stages.image_encoder(pixels).fusion, expected.fusion)
    assert torch.equal(stages.image_encoder(pixels).fusion, stages.image_encoder(pixels).top)


def test_weights_tell_who_they_are_without_being_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = parameters_of(folder)
    monkeypatch.setattr("virst_engine.model.weights_folder._sha256", lambda file: pytest.fail(f"{file} was read"))
    monkeypatch.setattr("virst_engine.model.weights_folder.safe_open", lambda *a, **b: pytest.fail("a shard was read"))
    identity = weights_identity(parameters)
    assert identity == f"virst-7b {weights_sha256(parameters)[:12]}"
    assert reasoner_identity(parameters) == identity
    assert weights_path(parameters) == folder
    assert understands_sentences(parameters)
    assert answers_questions(parameters)
    assert not answers_questions(parameters, "grounding")


def test_goals_may_hold_any_word_but_must_hold_one(folder: Path) -> None:
    check = load_goal_check(parameters_of(folder))
    check("the zebra's Ünïcode hat, 赤い箱")
    for sentence, why in (("", "no word"), ("x" * 201, "at most 200 tokens"), ("a<|im_end|>", "marks")):
        with pytest.raises(BadGoal, match=why):
            check(sentence)


def test_a_folder_without_a_words_head_answers_no_question(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "manifest.json").read_text())
    del content["tensors"]["lm_head.weight"]
    (copy / "manifest.json").write_text(json.dumps(content))
    assert not answers_questions(parameters_of(copy))
    reasoner = load_reasoner(parameters_of(copy))
    with Session.open(config_of(copy), InProcessClient(reasoner)) as session:
        session.step(VIDEO.frame(0))
        answer = session.ask("what is there")
        session.step(VIDEO.frame(1))
        assert "has no words for an answer" in str(answer.exception(timeout=0))


# --- what may be wrong ---------------------------------------------------------------------------------------------


def remove_shard(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()


def halve_numbers(folder: Path) -> None:
    """As if somebody had quantised the weights."""
    content = json.loads((folder / "manifest.json").read_text())
    for each in content["tensors"].values():
        each["dtype"] = "int8"
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (shutil.rmtree, "the weights of virst-7b are missing: no folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "a folder without manifest.json"),
        (remove_shard, "a shard is missing: no file"),
        (halve_numbers, "has the wrong type for"),
    ],
)
@pytest.mark.parametrize("load", [load_stages, load_reasoner])
def test_a_folder_that_cannot_be_used_is_told_with_the_command_that_makes_one(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], why: str, load: Callable[[ModelParameters], object]
) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(WeightsError, match=why) as raised:
        load(parameters_of(copy))
    assert "virst weights convert" in str(raised.value)
    assert str(copy) in str(raised.value)


def test_without_weights_the_commands_are_told() -> None:
    for use in (load_stages, load_reasoner, load_goal_check, weights_identity, weights_path, answers_questions):
        with pytest.raises(WeightsError, match=r"do not come with this package; `virst weights convert"):
            use(ModelParameters(name="virst-7b"))


def test_a_tokenizer_that_is_missing_is_told(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").unlink()
    for load in (load_reasoner, load_goal_check):
        with pytest.raises(
            WeightsError, match=r"holds neither tokenizer.json nor vocab.json.*convert the weights again"
        ):
            load(parameters_of(copy))
    load_stages(parameters_of(copy))  # the segmenter reads no sentence


def test_a_budget_of_memory_is_kept(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"virst-7b needs 0.0\d GiB.*the budget is 0.00 GiB.*--memory-budget-gib"):
        load_reasoner(parameters_of(folder), memory_budget_gib=1e-6)
    assert isinstance(load_reasoner(parameters_of(folder), memory_budget_gib=1.0), Virst7bReasoner)


def test_another_image_size_and_checksum_are_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"virst-7b sees images of 64 px, model.image_size is 128; set it to 0"):
        load_stages(parameters_of(folder, image_size=128))
    load_stages(parameters_of(folder, image_size=64))
    load_stages(parameters_of(folder, sha256=weights_sha256(parameters_of(folder)).upper()))
    with pytest.raises(WeightsError, match=r"have the SHA-256 [0-9a-f]{64}, model.sha256 asks for abab"):
        load_stages(parameters_of(folder, sha256="ab" * 32))


def test_an_export_of_other_weights_is_told_by_the_manifests_checksum(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def choose(*_: object, torch_stages: Callable[[int], Stages], **named: object) -> Stages:
        seen.update(named)
        return torch_stages(0)

    monkeypatch.setattr(weights, "choose_stages", choose)
    load_stages(parameters_of(folder), EngineParameters(path="/exported"))
    assert seen["weights_sha256"] == weights_sha256(parameters_of(folder))
    assert seen["video_size"] == 32


def test_fewer_bits_are_for_this_model_and_its_method(folder: Path) -> None:
    for parameters, method in (
        (ModelParameters(), "virst"),
        (ModelParameters(), "visa"),
        (parameters_of(folder), "tempvrs"),
    ):
        says = rf"weights of 8 bits are for .*virst-7b.* not {parameters.name} with the method {method}; leave out"
        with pytest.raises(WeightsError, match=says):
            load_reasoner(parameters, method, weight_bits=8)
    with pytest.raises(ValueError, match=r"reasoner.weight_bits 4 is for .* virst-7b with the method grounding; leave"):
        EngineConfig(parameters_of(folder), reasoner=ReasonerParameters(method="grounding", weight_bits=4))


@needs_bitsandbytes
def test_a_session_runs_with_a_reasoner_of_8_bits(folder: Path) -> None:
    reasoner = load_reasoner(parameters_of(folder), weight_bits=8)
    with Session.open(config_of(folder, weight_bits=8), InProcessClient(reasoner)) as session:
        session.set_goal("the red square")
        for t in range(30):
            result = session.step(VIDEO.frame(t))
    assert result.objects[0].state is ObjectState.TRACKING


def test_the_ablation_is_refused(folder: Path) -> None:
    for off in ({"initial_fusion": False}, {"second_fusion": False}):
        with pytest.raises(WeightsError, match="is not evaluated without its fusion"):
            load_reasoner(parameters_of(folder), **off)


# --- a recording ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("--offline",)])
def test_a_recording_is_segmented_by_the_program(folder: Path, tmp_path: Path, mode: tuple[str, ...]) -> None:
    """With clips of more frames than ST-Fusion sees, of which some have prompts only."""
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "manifest.json").read_text())
    content["config"]["seg_frames"] = 5
    (copy / "manifest.json").write_text(json.dumps(content))
    images = tmp_path / "images"
    images.mkdir()
    for t in range(14):
        cv2.imwrite(str(images / f"{t:03d}.png"), VIDEO.frame(t).image_rgb_u8[:, :, ::-1])
    arguments = ["segment", str(images), "--goal", "the red square", "--out", str(tmp_path / "out"), "--no-overlay"]
    run = CliRunner().invoke(
        app, [*arguments, *mode, "--model", "virst-7b", "--weights", str(copy), "--clip-frames", "9", "--threads", "1"]
    )
    assert run.exit_code == 0, run.output
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 14
    assert re.search(r"'the red square': in \d+ of 14 frames", run.output)
    refused = CliRunner().invoke(
        app, [*arguments, "--replace", "--model", "virst-7b", "--weights", str(copy), "--memory-budget-gib", "0.000001"]
    )
    assert isinstance(refused.exception, WeightsError)
    assert "the budget is" in str(refused.exception)


# --- two processes -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reasoner_process(endpoint: str, *options: str) -> "Iterator[subprocess.Popen[str]]":
    """The program itself, as a user starts it."""
    command = [sys.executable, "-m", "virst_engine.slow.zmq_server", "--endpoint", endpoint, "--threads", "1", *options]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def refreshes(session: Session, count: int) -> Iterator[FrameResult]:
    """Frames of real time until the only object had so many answers."""
    end, t, age_s = time.monotonic() + 120, 0, np.inf
    while count and time.monotonic() < end:
        result = session.step(VIDEO.frame(t))
        (found,) = result.objects
        count -= found.prompt_age_s < age_s
        t, age_s = t + 1, found.prompt_age_s
        yield result
        time.sleep(0.01)
    assert not count, found.message


@pytest.mark.parametrize("bits", ["16", pytest.param("8", marks=needs_bitsandbytes)])
def test_two_processes_answer_goals_and_questions(folder: Path, tmp_path: Path, bits: str) -> None:
    endpoint = f"ipc://{tmp_path}/reasoner"
    options = ("--model", "virst-7b", "--weights", str(folder), "--memory-budget-gib", "2", "--weight-bits", bits)
    with (
        reasoner_process(endpoint, *options),
        Session.open(config_of(folder, endpoint=endpoint, ttl_s=100.0)) as session,
    ):
        session.set_goal("the red square")
        question = None
        for result in refreshes(session, 6):
            if question is None and result.objects[0].state is ObjectState.TRACKING:
                question = session.ask("What is red?")
        assert question is not None
        assert question.result(timeout=0)
        assert result.objects[0].reasoner_latency_s > 0


def test_another_folder_is_told_by_its_identity(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "manifest.json").read_text())
    content["config"]["seg_frames"] = 3
    (copy / "manifest.json").write_text(json.dumps(content))
    endpoint = f"ipc://{tmp_path}/reasoner"
    with reasoner_process(endpoint, "--model", "virst-7b", "--weights", str(copy)):
        client = ZmqReasonerClient(endpoint, model=weights_identity(parameters_of(folder)))
        with contextlib.closing(client):
            end = time.monotonic() + 60
            while "runs other weights (virst-7b " not in client.status() and time.monotonic() < end:
                time.sleep(0.05)
            assert "runs other weights (virst-7b " in client.status()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--weights", "/nowhere"), "the weights of virst-7b are missing: no folder /nowhere; `virst weights convert"),
        ((), "do not come with this package; `virst weights convert"),
        (("--memory-budget-gib", "0.000001"), "the budget is 0.00 GiB; allow more (--memory-budget-gib)"),
        (("--memory-budget-gib", "9999"), "reasoner.memory_budget_gib must be <= 1024.0"),
        (("--weight-bits", "5"), "reasoner.weight_bits must be one of 16, 8, 4, got 5"),
        (("--weight-bits", "4", "--method", "visa"), "reasoner.weight_bits 4 is for the model virst-7b and its own"),
        (("--weight-bits", "8", "--model", "tabletop-tiny"), "virst-7b and its own method, not tabletop-tiny with the"),
    ],
)
def test_the_program_says_why_it_cannot_run(folder: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    if options and options[0] == "--memory-budget-gib":
        options = (*options, "--weights", str(folder))
    with reasoner_process(f"ipc://{tmp_path}/reasoner", "--model", "virst-7b", *options) as process:
        _, log = process.communicate(timeout=60)
        assert process.returncode == 1
        assert says in log
        assert "Traceback" not in log


def test_a_clip_of_more_frames_than_st_fusion_sees_is_answered_over_the_border(folder: Path, tmp_path: Path) -> None:
    """Prompts are for some frames of the clip then."""
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "manifest.json").read_text())
    content["config"] |= {"seg_frames": 4, "seg_sampling": "uniform"}
    (copy / "manifest.json").write_text(json.dumps(content))
    endpoint = f"ipc://{tmp_path}/reasoner"
    with (
        reasoner_process(endpoint, "--model", "virst-7b", "--weights", str(copy)),
        Session.open(config_of(copy, endpoint=endpoint, clip_frames=10, ttl_s=100.0)) as session,
    ):
        session.set_goal("the red square")
        for result in refreshes(session, 4):
            assert "other frames" not in result.objects[0].message
