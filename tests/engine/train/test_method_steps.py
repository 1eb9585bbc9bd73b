# SPDX-License-Identifier: Apache-2.0
"""Training of `visa` and `tempvrs`: who learns from what, what stays, and what each loss wants."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.data.fake_scenes import NOTHING, THE_BALL, FakeScene
from tests.engine.model.small_models import SMALL, small_virst
from tests.engine.model.test_window_methods import LANGUAGE, TEMPVRS, VIDEO, VISA, small
from tests.engine.train.test_steps import learning
from virst_engine.data.clips import Batch, BatchSource
from virst_engine.model.tempvrs import TempVrsConfig
from virst_engine.model.visa import VisaConfig
from virst_engine.model.words import WordTokenizer
from virst_engine.train import method_steps
from virst_engine.train.config import LossWeights, StageConfig, TrainConfig, method_training
from virst_engine.train.method_steps import MethodModel, MethodReadOuts, best_frames, tempvrs_step, visa_step
from virst_engine.train.steps import weighted
from virst_engine.train.trainer import Trainer
from virst_engine.types import ImageFeatures

FROZEN = ("seg_model.", "reasoner.video_encoder.")
FRAMES = VISA.window_frames


def stage(kind: str) -> StageConfig:
    return StageConfig(kind, kind, 2, 1e-3, FROZEN, clips=2, sentences=2, clip_frames=FRAMES, anchors=1)


def parts(config: VisaConfig | TempVrsConfig) -> tuple[MethodModel, MethodReadOuts]:
    virst = small_virst(replace(SMALL, video=VIDEO, language=LANGUAGE))
    model = MethodModel(small(config), virst.seg_model, SMALL.fusion.feature_level)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return model.train(), MethodReadOuts(model.reasoner, colours=2, shapes=2)


def batch_of(kind: str, said=(THE_BALL, NOTHING)) -> Batch:
    scenes = [FakeScene(0, said), FakeScene(1, said)]
    return BatchSource(scenes, WordTokenizer(SMALL.words), stage(kind).clip_plan(1), (0,), 2)[0]


LOSSES = {
    "bce", "dice", "occlusion", "iou", "presence", "query_place", "query_attribute", "visual_target",
    "visual_landmark", "token",
}  # fmt: skip


def test_visa_learns_all_of_its_parts_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, heads = parts(VISA)
    losses = visa_step(model, heads, batch_of("visa"))
    assert losses.keys() == LOSSES | {"sampler"}
    weighted(losses, LossWeights()).backward()
    names = learning(model)
    assert not [name for name in names if name.startswith(FROZEN)]
    for part in ("sampler.percentage.", "sampler.context.", "seg_embedding", "text_hidden_fcs.0.", "occ_predictor.",
                 "language_model.layers.0.", "mm_projector.0.", "fine_projector.0.", "frame_embedding"):  # fmt: skip
        assert any(name.startswith(f"reasoner.{part}") for name in names), part
    assert not {name for name, p in heads.named_parameters() if p.grad is None}


def test_the_sampler_of_visa_learns_from_its_own_answer_alone() -> None:
    model, heads = parts(VISA)
    losses = visa_step(model, heads, batch_of("visa"))
    losses["sampler"].backward()
    assert {name.split(".")[1] for name in learning(model)} == {"sampler"}


@pytest.mark.parametrize("supervision", ["clip", "frame"])
def test_tempvrs_learns_all_of_its_parts_and_nothing_else(supervision: str) -> None:
    torch.manual_seed(0)
    model, heads = parts(replace(TEMPVRS, supervision=supervision))
    losses = tempvrs_step(model, heads, batch_of("tempvrs"))
    assert losses.keys() == LOSSES
    weighted(losses, LossWeights()).backward()
    names = learning(model)
    assert not [name for name in names if name.startswith(FROZEN)]
    for part in ("tep_embedding", "tep_mlp.0.", "tep_mlp.4.", "seg_embedding", "text_hidden_fcs.2.",
                 "language_model.layers.0.", "mm_projector.0.", "fine_projector.0.", "frame_embedding"):  # fmt: skip
        assert any(name.startswith(f"reasoner.{part}") for name in names), part


@pytest.mark.parametrize("supervision", ["clip", "frame"])
def test_tep_is_told_where_the_target_is_visible(supervision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that is seen in frames 4 to 6 only: in the clip of frames 4 to 6, the third of four."""
    model, heads = parts(replace(TEMPVRS, supervision=supervision))
    batch = batch_of("tempvrs")
    visible = torch.zeros_like(batch.visible)
    visible[:, 4:7] = True
    batch = replace(batch, visible=visible)
    right = torch.tensor([0, 0, 1, 0]) if supervision == "clip" else visible[0].long()
    for sign, expected in ((1.0, 0.0), (-1.0, 60.0)):
        told = sign * 60.0 * (2.0 * right.float() - 1.0)
        monkeypatch.setattr(model.reasoner.tep_mlp, "forward", lambda tep, told=told: told.expand(len(tep), -1))
        loss = float(tempvrs_step(model, heads, batch)["presence"])
        assert loss == pytest.approx(expected, abs=1e-5)


def test_each_token_is_asked_for_what_its_place_shows() -> None:
    """Slow frames have four tokens, fast ones one, the newest sixteen more."""
    covered = torch.zeros(1, 10, 32, 32)
    covered[0, 0, :16, :16] = 1.0  # the first token of the first slow frame
    covered[0, 1, :, :16] = 1.0  # half of a fast frame
    covered[0, 9, 24:, 24:] = 1.0  # one cell of the newest
    shares = method_steps._shares_of_tokens(small(TEMPVRS), covered)[0]
    assert shares[:4].tolist() == [1, 0, 0, 0]
    assert float(shares[4]) == pytest.approx(0.5)
    assert shares[-16:].tolist() == [0.0] * 15 + [1.0]
    assert shares[-20:-16].tolist() == [0, 0, 0, 0.25]
    assert len(shares) == 4 * 4 + 6 + 16


def test_the_best_frame_is_the_newest_that_shows_about_as_much_as_any() -> None:
    truth = torch.zeros(3, 4, 10, 10)
    truth[0, :, :5] = 1.0
    truth[0, 3, :3] = 0.0  # most of it has left
    truth[1, 1, :2] = 1.0
    best, exists = best_frames(truth)
    assert best[:2].tolist() == [2, 1]
    assert exists.tolist() == [True, True, False]


@pytest.mark.parametrize("kind", ["visa", "tempvrs"])
def test_a_prompt_is_decoded_on_its_own_frame_against_that_frames_truth(kind, monkeypatch) -> None:
    """Every frame has a grey of its own, and so has its truth, and the prompt of each clip of `tempvrs`."""
    torch.manual_seed(0)
    model, heads = parts(VISA if kind == "visa" else TEMPVRS)
    batch = batch_of(kind)
    clips, frames = batch.frames_rgb_u8.shape[:2]
    grey = 20 * torch.arange(clips)[:, None] + torch.arange(frames)
    assert len(set(grey.flatten().tolist())) == clips * frames
    batch = replace(
        batch,
        frames_rgb_u8=grey[..., None, None, None].expand(batch.frames_rgb_u8.shape).to(torch.uint8),
        truth=grey[batch.clip_of_row][..., None, None].expand(batch.truth.shape) / 255.0,
        visible=torch.ones_like(batch.visible),
    )
    decoded = []
    monkeypatch.setattr(method_steps, "normalise", lambda frames: frames.permute(0, 3, 1, 2).float())
    monkeypatch.setattr(
        model.seg_model, "encode_image", lambda pixels, level: ImageFeatures(*[pixels[:, :1, :1, :1]] * 4)
    )
    monkeypatch.setattr(model.seg_model, "without_memory", lambda features: features.top)
    monkeypatch.setattr(model.seg_model, "decode_mask", lambda features, conditioned, prompts: (features, prompts))
    answer_of = type(model.reasoner).prompts

    def prompts(reasoner, *arguments):
        output = answer_of(reasoner, *arguments)
        if kind == "tempvrs":
            of_clip = torch.arange(output.prompts.shape[1]) * TEMPVRS.phases
            output = replace(output, prompts=of_clip[None, :, None, None].expand(output.prompts.shape).float())
        return output

    def losses_of(decoding, truth, seen):
        features, prompt_tokens = decoding
        decoded.append((features.top.flatten(), truth[:, 0, 0] * 255.0, prompt_tokens.sparse[:, 0, 0]))
        return {}

    monkeypatch.setattr(type(model.reasoner), "prompts", prompts)
    monkeypatch.setattr(method_steps, "mask_losses", losses_of)
    (visa_step if kind == "visa" else tempvrs_step)(model, heads, batch)
    assert len(decoded) == (1 if kind == "visa" else method_steps.NODES)
    for seen, truth, prompt in decoded:
        torch.testing.assert_close(seen, truth, atol=1e-3, rtol=0)
        frame = truth - 20 * batch.clip_of_row
        assert ((frame >= -0.01) & (frame < frames)).all(), "of the row's own clip"
        if kind == "tempvrs":
            torch.testing.assert_close(prompt, frame, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["visa", "tempvrs"])
def test_a_run_stops_and_goes_on_as_if_it_never_stopped(kind: str, tmp_path: Path) -> None:
    ends = []
    for folder, stops in ((tmp_path / "one", False), (tmp_path / "two", True)):
        torch.manual_seed(0)
        config = TrainConfig((stage(kind),), clip_stride=1, bf16=False)

        def trainer(config=config, folder=folder) -> Trainer:
            model, heads = parts(VISA if kind == "visa" else TEMPVRS)
            scenes = [FakeScene(0, (THE_BALL, NOTHING)), FakeScene(1, (THE_BALL, NOTHING))]
            return Trainer(model, heads, config, scenes, folder=folder, loader_workers=0)

        run = trainer()
        if stops:
            assert not run.run(until=-math.inf)
            run = trainer()
            run.resume()
        assert run.run()
        ends.append(run.model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_both_methods_train_on_windows_of_the_same_length_without_the_segmenter() -> None:
    for kind in ("visa", "tempvrs"):
        config = method_training(kind)
        (only,) = config.stages
        assert (only.kind, config.clip_stride, only.clip_frames) == (kind, 1, 22)
        assert "seg_model.".startswith(only.frozen)
        assert "reasoner.video_encoder.".startswith(only.frozen)
