# SPDX-License-Identifier: Apache-2.0
"""The detector in training: what it reads, which patch answers for what, that it learns, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.data.fake_scenes import NOTHING, THE_BALL, THE_BOX, Said, two_scenes
from virst_engine.data.clips import Batch, BatchSource
from virst_engine.sim.expressions import VOCABULARY
from virst_engine.slow.transformers_detector import load_detector
from virst_engine.train import transformers_detector as detector
from virst_engine.train.config import detector_training
from virst_engine.train.steps import weighted
from virst_engine.train.transformers_detector import DetectorModel, DetectorReadOuts, detector_step, objects_of

STAGE = replace(detector_training().stages[0], clips=2, sentences=3, mirrored_share=0.0)


@pytest.fixture(scope="module")
def model() -> DetectorModel:
    torch.manual_seed(0)
    return DetectorModel("tiny", width=32, layers=1)


def batch_of(model: DetectorModel, step: int = 0) -> Batch:
    return BatchSource(two_scenes(), model.tokenizer, STAGE.clip_plan(1), (0,), 100)[step]


def test_each_word_of_the_grammar_is_a_token_and_no_other_word_is_refused(model: DetectorModel) -> None:
    tokenizer = model.clip_tokenizer
    assert [word for word in VOCABULARY if len(tokenizer.tokenize(word)) != 1] == []
    for strange in ("the giraffe", "Rote Kugel, bitte!", "红色的球", "\N{OCTOPUS}", "", "x" * 200):
        ids = tokenizer(strange, truncation=True)["input_ids"]
        assert len(ids) <= detector.LONGEST
        assert ids[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values()), "CLIP reads it there"
        assert tokenizer.unk_token_id not in ids


def test_the_middle_patch_answers_for_an_object(model: DetectorModel) -> None:
    batch = batch_of(model)
    objects = objects_of(batch)
    side = detector.IMAGE_SIZE // detector.PATCH
    for clip, frame in enumerate(batch.frames_rgb_u8[:, 0, 0, 0, 1].tolist()):
        # The fake ball: rows 40 to 55, columns 8 + t to 23 + t, of 64.
        left = (8 + frame) / 64
        np.testing.assert_allclose(objects.boxes[clip, 0], [left, 40 / 64, left + 16 / 64, 56 / 64])
        (patch,) = objects.middle[clip, 0].nonzero().flatten().tolist()
        assert abs(patch // side - 11.5) <= 0.5
        assert abs(patch % side - (left + 8 / 64) * side + 0.5) <= 0.5
        assert not objects.cover[clip, 2:].any()
        assert not objects.middle[clip, 2:].any()
    meant = objects.meant.flatten(0, 1)
    for row, kind in enumerate(batch.kinds):
        wanted = {"attribute": [1.0, 0.0], "motion": [0.0, 1.0], "absent": [0.0, 0.0]}[kind]
        shown = objects.boxes[batch.clip_of_row[row], :2].any(1).float().tolist()
        assert meant[row, :2].tolist() == [a * b for a, b in zip(wanted, shown, strict=True)]


def test_losses_are_those_of_hand_made_boxes_and_scores() -> None:
    truth = torch.tensor([[0.2, 0.2, 0.6, 0.6]])
    same = detector.box_losses(torch.tensor([[0.4, 0.4, 0.4, 0.4]]), truth)
    assert float(same["box"]) == pytest.approx(0, abs=1e-6)
    assert float(same["overlap"]) == pytest.approx(0, abs=1e-6)
    apart = detector.box_losses(torch.tensor([[0.8, 0.4, 0.4, 0.4]]), truth)  # beside it: the hull is covered
    assert float(apart["box"]) == pytest.approx(0.4, abs=1e-6)
    assert float(apart["overlap"]) == pytest.approx(1, abs=1e-6)
    target = torch.zeros(1, 1, 4)
    target[0, 0, 1] = 1
    sure = torch.where(target > 0, 12.0, -12.0)
    assert float(detector.focal_loss(sure, target)) == pytest.approx(0, abs=1e-6)
    assert float(detector.focal_loss(-sure, target)) > 10
    assert float(detector.box_losses(torch.zeros(0, 4), torch.zeros(0, 4))["box"]) == 0


def test_a_patch_that_is_hidden_does_not_answer() -> None:
    cover = torch.zeros(1, 1, 16)
    cover[0, 0, [4, 7]] = 1.0  # the ends of the second row: the centroid is between, where nothing shows
    cover[0, 0, 0] = 0.9
    assert int(detector.middle_patches(cover)) in (4, 0)
    assert detector.mask_boxes(torch.zeros(1, 1, 4, 4, dtype=torch.bool)).tolist() == [[[0, 0, 0, 0]]]


def test_a_few_steps_teach_two_names_and_the_folder_is_a_detector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DetectorModel("tiny", width=32, layers=1)
    heads = DetectorReadOuts(32, colours=2, shapes=2)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3)
    totals = []
    for step in range(60):
        losses = detector_step(model, heads, batch_of(model, step), patches=0 if step % 2 else 96)
        loss = weighted(losses, STAGE.weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert np.mean(totals[-5:]) < 0.5 * np.mean(totals[:5])
    assert losses.keys() == {"score", "match", "box", "overlap", "attribute"}
    assert not [name for name, p in model.named_parameters() if p.grad is None and "logit_scale" not in name
                and "visual_projection" not in name]  # fmt: skip

    found = detector.calibrate(model, two_scenes(), STAGE.clip_plan(1), batches=8)
    assert found.phrases == 8 * 2 * 3
    assert found.present_found > 0.8
    assert found.absent_refused > 0.8
    assert found.box_iou > 0.4
    detector.save_detector(model, tmp_path / "owl", {"seed": 0}, found)
    assert json.loads((tmp_path / "owl" / detector.CARD).read_text())["calibration"]["phrases"] == found.phrases
    loaded = load_detector(tmp_path / "owl")
    assert loaded.threshold == detector.THRESHOLD
    scene = two_scenes()[0]

    def best(said: Said) -> float:
        return float(loaded.detect(scene.frames_rgb_u8[3], said.text).scores[:1].sum())

    assert best(THE_BALL) >= loaded.threshold
    assert best(THE_BOX) >= loaded.threshold
    assert best(NOTHING) < loaded.threshold
    # What is loaded computes what was trained.
    batch = batch_of(model)
    with torch.no_grad():
        ours = model.eval()(batch)
    row = next(i for i, kind in enumerate(batch.kinds) if kind == "attribute")
    clip = int(batch.clip_of_row[row])
    larger = batch.frames_rgb_u8[clip, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    theirs = loaded.detect(larger.numpy(), THE_BALL.text)
    top = int(ours.logits[clip, row - 3 * clip].argmax())
    assert theirs.scores[0] == pytest.approx(float(ours.logits[clip, row - 3 * clip, top].sigmoid()), abs=0.1)


def test_some_scenes_are_kept_from_training_where_there_are_many() -> None:
    scenes = two_scenes() * 45
    learnt, kept = detector.split_scenes(scenes)
    assert (len(learnt), len(kept)) == (88, 2)
    assert kept[0] is scenes[39]
    assert detector.split_scenes(scenes[:3]) == (scenes[:3], scenes[:3])
