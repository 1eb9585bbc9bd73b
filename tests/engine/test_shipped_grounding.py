# SPDX-License-Identifier: Apache-2.0
"""The detector that ships with `tabletop-tiny`: small, no file but data, and it finds what a phrase names."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from virst_engine.config import EngineConfig, ModelParameters
from virst_engine.data.clips import visible_ids
from virst_engine.errors import SceneError, WeightsError
from virst_engine.session import Session
from virst_engine.sim.dataset import record_scene
from virst_engine.sim.expressions import VOCABULARY
from virst_engine.sim.recording import Recording
from virst_engine.sim.spec import COLOURS, SHAPES
from virst_engine.slow.reasoner import InProcessClient
from virst_engine.slow.transformers_detector import THRESHOLDS, TransformersDetector, load_detector
from virst_engine.types import Frame, ObjectState
from virst_engine.weights import SHIPPED, detector_folder, detector_identity, load_grounding, load_stages
from virst_ros.demo.recorded_run import load_recording

MODEL = ModelParameters()
FOLDER = SHIPPED / "tabletop-tiny-grounding"
HELD_OUT_SEEDS = (1_000_000, 1_000_001, 1_000_002)


@pytest.fixture(scope="module")
def detector() -> TransformersDetector:
    return load_detector(FOLDER)


@pytest.fixture(scope="module")
def scenes() -> list[Recording]:
    try:
        return [record_scene(seed, "full", duration_s=2.4) for seed in HELD_OUT_SEEDS]
    except SceneError as error:
        pytest.skip(f"no rendering here: {error}")


def box_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    edges = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return np.array(edges, np.float32)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    size = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    common = size.prod()
    return float(common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common))


def test_the_folder_is_a_small_snapshot_without_code() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= files
    assert not [name for name in files if not name.endswith((".json", ".safetensors", ".txt"))]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 15e6
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    assert card["finished"] is True
    assert "/" not in card["command"]  # no folders of the machine it was made on
    assert detector_folder("", MODEL) == FOLDER
    assert detector_identity("", MODEL) == detector_identity(str(FOLDER), ModelParameters(name="sam2.1-tiny"))


def test_each_word_of_the_grammar_is_known_and_no_word_is_refused(detector: TransformersDetector) -> None:
    tokenizer = detector._processor.tokenizer
    assert [word for word in VOCABULARY if len(tokenizer.tokenize(word)) != 1] == []
    image = np.zeros((48, 64, 3), np.uint8)
    for phrase in ("the giraffe with a hat", "röte kugel 7", "红色的球", "!?"):
        assert detector.detect(image, phrase).boxes.shape[1] == 4


def test_names_are_found_and_what_is_not_there_scores_low(
    detector: TransformersDetector, scenes: list[Recording]
) -> None:
    """A detector that knows nothing gives every phrase of a scene the same box, and score."""
    assert detector.threshold == THRESHOLDS["owlvit"]
    overlaps, present, absent = [], [], []
    for scene in scenes:
        assert scene.image_rgb_u8 is not None
        assert scene.instance_mask is not None
        for t in (3, 20):
            image, mask = scene.image_rgb_u8[t], scene.instance_mask[t]
            seen = visible_ids(mask)
            names = [(scene.spec.objects[i].colour, scene.spec.objects[i].shape) for i in seen]
            for i, name in zip(seen, names, strict=True):
                if names.count(name) > 1:
                    continue
                found = detector.detect(image, "the " + " ".join(name))
                present.append(found.scores[0] if len(found.scores) else 0.0)
                overlaps.append(iou(found.boxes[0], box_of(mask == i + 1)) if len(found.boxes) else 0.0)
            colours = {colour for colour, _ in names}
            for colour in [c for c in COLOURS if c not in colours][:4]:
                found = detector.detect(image, f"the {colour} {SHAPES[t % len(SHAPES)]}")
                absent.append(found.scores[0] if len(found.scores) else 0.0)
    assert np.mean(overlaps) > 0.6
    assert np.mean(np.array(present) >= detector.threshold) > 0.75
    assert np.mean(np.array(absent) < detector.threshold) > 0.75


@pytest.mark.slow
def test_a_phrase_gets_its_object_and_no_other() -> None:
    recording = load_recording()
    goals = {"the red ball": 1, "the green box": 4, "the banana": None}
    base = EngineConfig()
    config = replace(base, reasoner=replace(base.reasoner, method="grounding"))
    overlaps = []
    with Session(config, load_stages(MODEL), InProcessClient(load_grounding("", MODEL))) as session:
        for number in range(60):
            if number == 10:
                for sentence in goals:
                    session.set_goal(sentence, goal_id=sentence)
            frame = Frame(recording.images_rgb_u8[number], round(1e9 * number / recording.rate_hz))
            for found in session.step(frame).objects:
                label = goals[found.goal_id]
                if label is None:
                    assert found.state is not ObjectState.TRACKING, f"frame {number}"
                else:
                    truth = recording.instance_masks[number] == label
                    overlaps.append((found.mask & truth).sum() / (found.mask | truth).sum())
    assert len(overlaps) == 100
    assert np.mean(overlaps) > 0.7


@pytest.mark.parametrize("name", ["sam2.1-tiny", "virst-7b"])
def test_other_models_have_no_detector_of_their_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"needs --detector.*{name} has none of its own"):
        load_grounding("", ModelParameters(name=name, weights=str(tmp_path)))
