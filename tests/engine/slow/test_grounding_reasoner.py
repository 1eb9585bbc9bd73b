# SPDX-License-Identifier: Apache-2.0
"""The method `grounding`: what an answer holds, what a folder must hold, the real code path on tiny weights."""

import json
import shutil
import sys
import types
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from tests.engine.slow.messages import request_of
from tests.engine.slow.tiny_detectors import TINY
from virst_engine.errors import BadGoal, VirstError, WeightsError
from virst_engine.slow.grounding_reasoner import Detections, GroundingReasoner, phrase_of
from virst_engine.slow.transformers_detector import TransformersDetector, load_detector

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 120, 3), np.uint8)


@dataclass
class Scripted:
    boxes: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    threshold: float = 0.4
    asked: list = field(default_factory=list)

    def detect(self, image_rgb_u8, phrase):
        self.asked.append((image_rgb_u8, phrase))
        return Detections(np.array(self.boxes, np.float32).reshape(-1, 4), np.array(self.scores, np.float32))


A, B, C = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.9, 0.8), (0.0, 0.0, 0.2, 0.2)


def answer(detector, sentence="the red ball", **options):
    return GroundingReasoner(detector, **options).answer(request_of(sentence, 7, "goal", epoch=3, frames=3))


def test_the_newest_frame_alone_is_looked_at():
    detector = Scripted([A], [0.9])
    request = request_of(frames=3)
    frames = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    request = replace(request, clip=replace(request.clip, frames_rgb_u8=frames))
    given = GroundingReasoner(detector).answer(request)
    (prompt,) = given.prompts
    assert (prompt.step, prompt.stamp_ns) == (2, 200)
    assert len(detector.asked) == 1
    assert (detector.asked[0][0] == 2).all()
    assert (given.request_id, given.epoch, given.goal_id) == (request.request_id, request.epoch, request.goal_id)
    np.testing.assert_allclose(prompt.boxes, [A])
    assert prompt.embeddings.size == 0


@pytest.mark.parametrize(
    ("scores", "options", "boxes", "confidence"),
    [
        ([0.9, 0.5, 0.1], {}, [A], 1.0),
        ([0.9, 0.5, 0.1], {"most_boxes": 8}, [A, B], 1.0),
        ([0.9, 0.5, 0.45], {"most_boxes": 2}, [A, B], 1.0),
        ([0.4, 0.1, 0.1], {}, [A], 1.0),
        ([0.2, 0.1, 0.1], {"most_boxes": 8}, [A], 0.25),  # half of the threshold
        ([0.2, 0.15, 0.1], {"threshold": 0.15, "most_boxes": 8}, [A, B], 1.0),
        ([0.9, 0.5, 0.1], {"threshold": 0.95}, [A], 0.5 * 0.9 / 0.95),
    ],
)
def test_the_threshold_decides_whether_it_is_there(scores, options, boxes, confidence):
    (prompt,) = answer(Scripted([A, B, C], scores), **options).prompts
    np.testing.assert_allclose(prompt.boxes, boxes)
    assert prompt.confidence == pytest.approx(confidence, abs=1e-6)


def test_no_detection_is_no_belief():
    (prompt,) = answer(Scripted()).prompts
    assert prompt.confidence == 0.0
    np.testing.assert_array_equal(prompt.boxes, [[0, 0, 1, 1]])


def test_boxes_beyond_the_image_or_without_area_are_made_proper():
    boxes = [(-0.2, -1.0, 1.3, 0.5), (0.5, 0.5, 0.5, 0.5), (1.1, 1.2, 1.3, 1.4)]
    (prompt,) = answer(Scripted(boxes, [0.9, 0.8, 0.7]), most_boxes=3).prompts
    assert (prompt.boxes >= 0).all()
    assert (prompt.boxes <= 1).all()
    assert (prompt.boxes[:, :2] < prompt.boxes[:, 2:]).all()
    np.testing.assert_allclose(prompt.boxes[0], (0, 0, 1, 0.5))


def test_sentences_are_said_as_detectors_were_trained():
    assert phrase_of("  The red   Cup. ") == "the red cup"
    for empty in ("", " . .. "):
        with pytest.raises(BadGoal, match="names nothing"):
            phrase_of(empty)


@pytest.mark.parametrize(
    "options", [{"threshold": 1.0}, {"threshold": -0.1}, {"threshold": float("nan")}, {"most_boxes": 0}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"detector|box"):
        GroundingReasoner(Scripted(), **options)


@pytest.fixture(scope="module", params=TINY)
def folder(request, tmp_path_factory):
    if request.param == "owlv2":
        pytest.importorskip("scipy", reason="transformers needs it for OWLv2")
    return TINY[request.param](tmp_path_factory.mktemp(request.param))


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_detector_of_transformers_runs(folder):
    detector = load_detector(folder)
    found = detector.detect(IMAGE, "the red cup")
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.boxes.shape == (len(found.scores), 4)
    assert len(found.scores)
    assert (np.diff(found.scores) <= 0).all()
    assert ((found.scores > 0) & (found.scores <= 1)).all()
    again = detector.detect(IMAGE, "the red cup")
    np.testing.assert_array_equal(found.boxes, again.boxes)
    other = detector.detect(IMAGE, "blue ball")
    assert found.scores.shape != other.scores.shape or not np.allclose(found.scores, other.scores)  # it reads the words
    darker = detector.detect(IMAGE // 4, "the red cup")
    assert found.scores.shape != darker.scores.shape or not np.allclose(found.scores, darker.scores)  # and the image


class PixelProcessor:
    """Post-processing of one kind: boxes in pixels of the target size."""

    def tokenizer(self, phrase):
        return {"input_ids": phrase.split()}

    def __call__(self, *, images, text, return_tensors):
        self.asked = images.size, images.mode, text
        return BatchFeature({"pixel_values": torch.zeros(1, 3, 8, 8)})

    def post_process_grounded_object_detection(self, outputs, threshold, target_sizes):
        ((height, width),) = target_sizes
        corners = torch.tensor([[0.25 * width, 0.5 * height, width, height], [0, 0, float("nan"), 1], [0, 0, width, 1]])
        return [{"scores": torch.tensor([0.3, 0.9, 0.8]), "boxes": corners}]


def test_boxes_are_shares_of_the_image_the_best_first():
    model, processor = torch.nn.Identity(), PixelProcessor()
    model.config, model.device = types.SimpleNamespace(), "cpu"
    model.forward = lambda pixel_values: None
    found = TransformersDetector(model, processor).detect(IMAGE, "red cup")
    np.testing.assert_allclose(found.boxes, [[0, 0, 1, 1 / 60], [0.25, 0.5, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [0.8, 0.3])  # what is not finite is left out
    assert processor.asked == ((120, 60), "RGB", [["red cup"]])


def test_a_sentence_that_is_too_long_for_it_is_told(folder):
    with pytest.raises(BadGoal, match=r"reads at most \d+ tokens"):
        load_detector(folder).detect(IMAGE, "red " * 200)


def test_the_reasoner_answers_by_it(folder):
    given = answer(load_detector(folder), "a red cup.")
    (prompt,) = given.prompts
    assert prompt.boxes.shape == (1, 4)
    assert 0.0 <= prompt.confidence <= 1.0
    assert given.timings_ms["detect"] > 0


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="there is no folder"):
        load_detector(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        load_detector(tmp_path)
    broken = copy_of(folder, tmp_path)
    for file in broken.iterdir():
        if "processor" in file.name or "tokenizer" in file.name:
            file.unlink()
    with pytest.raises(WeightsError, match="has no processor"):
        load_detector(broken)
    for file in broken.glob("*.safetensors"):
        file.rename(broken / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        load_detector(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(WeightsError, match="'bert', which is no detector"):
        load_detector(broken)
    with pytest.raises(WeightsError, match="device 'cuda:99'"):
        load_detector(folder, device="cuda:99")


def test_damaged_weights_are_named(folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_detector(broken)
    from safetensors.torch import load, save_file

    tensors = load(whole)
    name = next(name for name in sorted(tensors) if "class" in name or "bbox" in name or "box_head" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lack \d tensors"):
        load_detector(broken)


def test_an_old_transformers_is_told(folder, monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__ = "4.20.0"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(WeightsError, match=r"transformers >= 4\.50"):
        load_detector(folder)


def test_a_question_is_refused_with_what_can_be_asked_instead():
    detector = Scripted([A], [0.9])
    with pytest.raises(VirstError, match=r"has no words.*set_goal.*tabletop-tiny"):
        GroundingReasoner(detector).answer(request_of("the red ball", wants_words=True))
    assert detector.asked == []
