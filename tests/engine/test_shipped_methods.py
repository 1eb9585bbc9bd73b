# SPDX-License-Identifier: Apache-2.0
"""The reasoners of `visa` and `tempvrs` that ship with the package, closed loop, in the process and beside it."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from virst_engine.config import METHOD_WINDOWS, EngineConfig, ModelParameters
from virst_engine.model.methods import load_method
from virst_engine.model.stored import read_metadata, read_model_card
from virst_engine.session import Session
from virst_engine.slow.reasoner import InProcessClient
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.types import Frame, ObjectState
from virst_engine.weights import (
    SHIPPED,
    load_method_config,
    load_reasoner,
    load_stages,
    method_weights_path,
    reasoner_identity,
)
from virst_ros.demo.recorded_run import RecordedRun, load_recording

METHODS = tuple(METHOD_WINDOWS)
FRAME_BY_FRAME = "tabletop-tiny-tempvrs-frame.safetensors"
WINDOW = 45  # frames at 20 Hz: the window is full
WATCHED = 60
MODEL = ModelParameters()


def config_of(method: str) -> EngineConfig:
    base = EngineConfig()
    return replace(base, reasoner=replace(base.reasoner, method=method))


@pytest.fixture(scope="module")
def recording() -> RecordedRun:
    return load_recording()


def frame_of(recording: RecordedRun, number: int) -> Frame:
    """After its end the last one stays."""
    image = recording.images_rgb_u8[min(number, len(recording) - 1)]
    return Frame(image, round(1e9 * number / recording.rate_hz))


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize(("method", "name"), [(method, "") for method in METHODS] + [("tempvrs", FRAME_BY_FRAME)])
def test_the_file_is_small_and_fits_the_code_and_the_segmenter(method: str, name: str) -> None:
    chosen = str(SHIPPED / name) if name else ""
    path = method_weights_path(MODEL, method, chosen)
    assert path.stat().st_size <= 30e6
    config = load_method_config(MODEL, method, chosen)
    assert load_method(path).config == config
    if method == "tempvrs":
        assert config.supervision == ("frame" if name else "clip")
    card = read_model_card(path, read_metadata(path, "virst-reasoner-1", ""), "")
    assert card["finished"] is True
    assert "/" not in str(card["command"])  # no folders of the machine it was made on


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_sentence_gets_its_object_and_no_other(method: str, recording: RecordedRun) -> None:
    goals = {"the red ball": 1, "the box left of the blue can": 3, "the thing that can roll": 1, "the purple egg": None}
    overlaps: dict[str, list[float]] = {sentence: [] for sentence in goals}
    with Session(config_of(method), load_stages(MODEL), InProcessClient(load_reasoner(MODEL, method))) as session:
        for number in range(WINDOW + WATCHED):
            if number == WINDOW:
                for sentence in goals:
                    session.set_goal(sentence, goal_id=sentence)
            for found in session.step(frame_of(recording, number)).objects:
                label = goals[found.goal_id]
                if label is None:
                    assert not found.mask.any(), f"frame {number}"
                else:
                    overlaps[found.goal_id].append(overlap(found.mask, recording.instance_masks[number] == label))
    for sentence, label in goals.items():
        if label is not None:
            assert len(overlaps[sentence]) == WATCHED
            assert np.mean(overlaps[sentence]) > 0.7, sentence


@pytest.mark.parametrize("method", METHODS)
def test_a_question_is_answered_in_words(method: str, recording: RecordedRun) -> None:
    with Session(config_of(method), load_stages(MODEL), InProcessClient(load_reasoner(MODEL, method))) as session:
        for number in range(WINDOW):
            session.step(frame_of(recording, number))
        question = session.ask("the red ball")
        session.step(frame_of(recording, WINDOW))
        session.step(frame_of(recording, WINDOW + 1))
        assert question.result(timeout=0) == "red ball"


@pytest.mark.parametrize("method", METHODS)
def test_the_reasoner_process_answers_a_session_of_the_same_method(
    method: str, recording: RecordedRun, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/reasoner"
    command = [sys.executable, "-m", "virst_engine.slow.zmq_server", "--endpoint", endpoint, "--method", method]
    client = ZmqReasonerClient(endpoint, model=reasoner_identity(MODEL, method))
    process = subprocess.Popen([*command, "--threads", "1", "--nice", "0"], stderr=subprocess.PIPE, text=True)
    try:
        with Session(config_of(method), load_stages(MODEL), client) as session:
            session.set_goal("the red ball")
            end, number, found = time.monotonic() + 120.0, 0, None
            while time.monotonic() < end and (found is None or found.state is not ObjectState.TRACKING):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                (found,) = session.step(frame_of(recording, number)).objects
                number += 1
                time.sleep(0.05)
            assert found is not None
            assert found.state is ObjectState.TRACKING, found.message
    finally:
        process.terminate()
        process.wait(timeout=30)
        if process.stderr is not None:
            process.stderr.close()
