# SPDX-License-Identifier: Apache-2.0
"""The weights that ship with the package, closed loop: a sentence, a video, the right masks."""

from collections.abc import Iterator

import numpy as np
import pytest

from virst_engine.config import EngineConfig, ModelParameters
from virst_engine.model.config import tabletop_tiny
from virst_engine.session import Session
from virst_engine.sim.expressions import VOCABULARY
from virst_engine.slow.reasoner import InProcessClient, NoReasoner
from virst_engine.types import ClickPrompt, Frame, ObjectState
from virst_engine.weights import load_model, load_reasoner, load_stages, read_card, weights_path
from virst_ros.demo.recorded_run import RecordedRun, load_recording

WINDOW = 45  # frames at 20 Hz: the reasoner's clip is full
WATCHED = 60


@pytest.fixture(scope="module")
def recording() -> RecordedRun:
    return load_recording()


@pytest.fixture
def session() -> Iterator[Session]:
    config = EngineConfig()
    with Session(config, load_stages(config.model), InProcessClient(load_reasoner(config.model))) as open_session:
        yield open_session


def test_the_file_is_small_and_fits_the_code() -> None:
    path = weights_path(ModelParameters())
    assert path.stat().st_size <= 20e6
    assert load_model(path).config == tabletop_tiny(VOCABULARY)
    assert "/" not in str(read_card(path)["command"])  # no folders of the machine it was made on


@pytest.mark.slow
def test_a_sentence_gets_its_object_and_no_other(session: Session, recording: RecordedRun) -> None:
    """Three kinds of sentences and one about nothing, over three seconds of video after the reasoner's window."""
    goals = {"the red ball": 1, "the box left of the blue can": 3, "the thing that can roll": 1, "the purple egg": None}
    overlaps: dict[str, list[float]] = {sentence: [] for sentence in goals}
    for number in range(WINDOW + WATCHED):
        if number == WINDOW:
            for sentence in goals:
                session.set_goal(sentence, goal_id=sentence)
        result = session.step(Frame(recording.images_rgb_u8[number], round(1e9 * number / recording.rate_hz)))
        for found in result.objects:
            label = goals[found.goal_id]
            if label is None:
                assert not found.mask.any(), f"frame {number}"
                assert found.state in (ObjectState.SEARCHING, ObjectState.NOT_FOUND)
                continue
            truth = recording.instance_masks[number] == label
            overlaps[found.goal_id].append((found.mask & truth).sum() / (found.mask | truth).sum())
    for sentence, label in goals.items():
        if label is not None:
            assert len(overlaps[sentence]) == WATCHED
            assert np.mean(overlaps[sentence]) > 0.7, sentence


def test_what_a_box_points_out_is_tracked(recording: RecordedRun) -> None:
    truth = recording.instance_masks == 1
    rows, columns = np.nonzero(truth[0])
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    prompt = ClickPrompt(box_px=tuple(map(float, box)))
    overlaps = []
    with Session(EngineConfig(), load_stages(ModelParameters()), NoReasoner()) as session:
        for number in range(40):
            if number == 1:
                session.add_object(prompt)
            result = session.step(Frame(recording.images_rgb_u8[number], round(1e9 * number / recording.rate_hz)))
            if number > 1:
                mask = result.objects[0].mask
                overlaps.append((mask & truth[number]).sum() / (mask | truth[number]).sum())
    assert np.mean(overlaps) > 0.7
