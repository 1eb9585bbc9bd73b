# SPDX-License-Identifier: Apache-2.0
"""Forward passes of the stages: who learns from what, which frames are remembered, and on which device."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.engine.data.fake_scenes import NOTHING, THE_BALL, FakeScene
from tests.engine.model.small_models import SMALL, small_virst
from virst_engine.data.clips import Batch, BatchSource
from virst_engine.model.video_language import VisualTokens
from virst_engine.model.virst import ClipEncoding, PromptOutput, Virst
from virst_engine.model.words import WordTokenizer
from virst_engine.train import steps
from virst_engine.train.config import LossWeights, StageConfig
from virst_engine.train.steps import (
    ReadOuts,
    TrainingMemory,
    image_step,
    pretraining_step,
    propagation_step,
    weighted,
)
from virst_engine.train.trainer import run_step
from virst_engine.types import MaskPrediction, MemoryEntry, MemoryTensors, PromptTokens

C, M, GRID, P = SMALL.sam2.channels, SMALL.sam2.memory_channels, SMALL.sam2.grid, SMALL.sam2.memory_frames
IMAGE = StageConfig("image", "image", 5, 1e-3, clips=2, sentences=2, clip_frames=3, anchors=2)
PROPAGATION = replace(IMAGE, name="propagation", kind="propagation", propagation_frames=3)
PRETRAINING = replace(IMAGE, name="pretraining", kind="pretraining")
VIDEO = replace(IMAGE, name="video", kind="video")


def batch_of(stage: StageConfig, step: int = 0, said: tuple[Any, ...] = (THE_BALL, NOTHING)) -> Batch:
    scenes = [FakeScene(0, said), FakeScene(1, said)]
    return BatchSource(scenes, WordTokenizer(SMALL.words), stage.clip_plan(2), (0,), stage.steps)[step]


def parts() -> tuple[Virst, ReadOuts]:
    heads = ReadOuts(SMALL, colours=2, shapes=2)
    return small_virst().train(), heads


def learning(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}


def on_meta(batch: Batch) -> Batch:
    return Batch(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in vars(batch).items()})


@pytest.mark.parametrize("stage", [VIDEO, PRETRAINING, IMAGE, PROPAGATION], ids=lambda stage: stage.name)
def test_no_tensor_is_left_on_another_device(stage: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device computes nothing, but refuses, like a GPU, to mix with the CPU."""
    model, heads = parts()

    def understood(inputs_embeds: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=inputs_embeds * 2, hidden_states=[inputs_embeds] * 9)

    monkeypatch.setattr(model.language_model, "forward", understood)  # transformers looks into its masks
    losses = run_step(stage, model.to("meta"), heads.to("meta"), on_meta(batch_of(stage)))
    total = weighted(losses, LossWeights())
    assert {value.device.type for value in losses.values()} == {"meta"}
    assert total.shape == ()


def test_weighted_is_the_sum_of_equation_15() -> None:
    losses = {"bce": torch.tensor(2.0), "dice": torch.tensor(3.0), "iou": torch.tensor(5.0)}
    weights = LossWeights(bce=10.0, dice=1.0, iou=0.05)
    assert float(weighted(losses, weights)) == pytest.approx(23.25)


def test_image_step_decodes_the_anchors_with_their_own_prompts_and_features() -> None:
    model, heads = parts()
    model.eval()
    batch = batch_of(IMAGE)
    _, newest = image_step(model, heads, batch, train_segmenter=True)
    encoded = steps.encode(model, batch, train_segmenter=True)
    maps = encoded.features.fusion.unflatten(0, (-1, encoded.frames))
    clip = model.encode_cells(encoded.video_cells, maps)
    prompts = model.prompts(clip, batch.clip_of_row, batch.text, batch.text_valid).prompts
    frame = batch.anchors[-1]
    assert frame == batch.clip_frames - 1
    for row, clip in enumerate(batch.clip_of_row.tolist()):
        features = encoded.of(torch.tensor([clip * 3 + frame]))
        alone = model.seg_model.decode_mask(
            features, model.seg_model.without_memory(features), PromptTokens(prompts[row : row + 1, frame])
        )
        assert torch.allclose(newest.mask_logits[row], alone.mask_logits[0], atol=1e-4)


def test_image_step_compares_with_the_truth_of_the_anchor_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = steps.mask_losses

    def spy(prediction: MaskPrediction, truth: Tensor, visible: Tensor) -> dict[str, Tensor]:
        seen.append((truth, visible))
        return original(prediction, truth, visible)

    monkeypatch.setattr(steps, "mask_losses", spy)
    model, heads = parts()
    batch = batch_of(IMAGE, step=1)
    image_step(model, heads, batch, train_segmenter=True)
    (truth, visible), rows, k = seen[0], len(batch.clip_of_row), len(batch.anchors)
    for row in range(rows):
        for i, frame in enumerate(batch.anchors):
            assert torch.equal(truth[row * k + i], batch.truth[row, frame])
            assert bool(visible[row * k + i]) == bool(batch.visible[row, frame])


@pytest.mark.parametrize("train_segmenter", [True, False])
def test_the_image_encoder_learns_only_where_it_should(train_segmenter: bool) -> None:
    model, heads = parts()
    losses, _ = image_step(model, heads, batch_of(IMAGE), train_segmenter=train_segmenter)
    weighted(losses, LossWeights()).backward()
    names = learning(model)
    assert any(name.startswith("seg_model.image_encoder.") for name in names) == train_segmenter
    for part in (
        "st_embedding", "initial_seg_fusion_module.gate", "initial_seg_fusion_module.spatial_down.0.weight",
        "seg_prompter.spatial_down.0.weight", "seg_prompter.decoder.0.cross_attn.q_proj.weight", "frame_embedding",
        "mm_projector.0.weight", "video_encoder.stem.0.conv1.weight", "language_model.embed_tokens.weight",
        "lm_head.weight", "seg_model.sam_mask_decoder.obj_score_token.weight",
    ):  # fmt: skip
        assert part in names


def test_each_loss_reaches_the_parts_that_it_is_for() -> None:
    batch = batch_of(IMAGE)
    for name, part in (
        ("token", "lm_head.weight"),
        ("attention", "seg_prompter.decoder.1.cross_attn.k_proj.weight"),
        ("occlusion", "seg_model.sam_mask_decoder.pred_obj_score_head.layers.2.weight"),
        ("iou", "seg_model.sam_mask_decoder.iou_prediction_head.layers.2.weight"),
        ("bce", "seg_model.sam_mask_decoder.output_upscaling.0.weight"),
    ):
        model, heads = parts()
        image_step(model, heads, batch, train_segmenter=True)[0][name].backward()
        assert part in learning(model), name


def test_attribute_losses_teach_both_encoders() -> None:
    model, heads = parts()
    batch = batch_of(IMAGE)
    losses = steps.attribute_losses(heads, steps.encode(model, batch, train_segmenter=True), batch)
    assert set(losses) == {"attribute", "video_attribute", "motion"}
    weighted(losses, LossWeights()).backward()
    names = learning(model)
    assert any(name.startswith("seg_model.image_encoder.neck") for name in names)
    assert "video_encoder.stem.0.conv1.weight" in names
    assert learning(heads) == {name for name, _ in heads.named_parameters() if name.startswith(("seg_", "video_"))}


def test_frozen_encoders_have_no_attribute_losses() -> None:
    model, heads = parts()
    model.video_encoder.requires_grad_(False)
    batch = batch_of(IMAGE)
    assert steps.attribute_losses(heads, steps.encode(model, batch, train_segmenter=False), batch) == {}


def test_the_video_stage_teaches_the_video_encoder_alone() -> None:
    model, heads = parts()
    losses = steps.video_step(model, heads, batch_of(VIDEO))
    weighted(losses, LossWeights()).backward()
    assert {name.split(".")[0] for name in learning(model)} == {"video_encoder"}
    assert learning(heads) == {name for name, _ in heads.named_parameters() if name.startswith("video_")}


def test_the_motion_loss_is_zero_for_the_shift_of_the_object_in_each_cell() -> None:
    _, heads = parts()
    batch = batch_of(VIDEO)
    clips, t = batch.colour.shape[:2]
    colour = torch.zeros_like(batch.colour)
    colour[:, :, :4, :2] = 1  # half of the first cell of a 4 x 4 grid: the other half says nothing
    motion = torch.zeros_like(batch.motion)
    motion[:, :, :4, :2] = torch.tensor([0.5, -0.25])
    batch = replace(batch, colour=colour, motion=motion)
    found = torch.randn(clips, t, 16, 2)
    found[:, :, 0] = torch.tensor([0.5, -0.25])
    heads.video_motion.forward = lambda cells: found
    cells = torch.zeros(clips, t, 16, SMALL.video.channels)
    assert float(steps.video_attribute_losses(heads, cells, batch)["motion"]) == pytest.approx(0.0, abs=1e-6)
    found[:, :, 0, 0] += 1.0
    assert float(steps.video_attribute_losses(heads, cells, batch)["motion"]) == pytest.approx(0.75 / 2, abs=1e-5)


def test_the_motion_loss_weighs_what_moves_as_much_as_all_that_stands_still() -> None:
    """Otherwise "nothing moves" is a good answer: on a table most objects stand still."""
    _, heads = parts()
    batch = batch_of(VIDEO)
    clips, t = batch.colour.shape[:2]
    motion = torch.zeros_like(batch.motion)
    motion[:, :, :4, :4] = torch.tensor([1.5, 0.0])  # the first cell of a 4 x 4 grid; the other fifteen stand still
    batch = replace(batch, colour=torch.ones_like(batch.colour), motion=motion)
    heads.video_motion.forward = lambda cells: torch.zeros(clips, t, 16, 2)
    cells = torch.zeros(clips, t, 16, SMALL.video.channels)
    assert float(steps.video_attribute_losses(heads, cells, batch)["motion"]) == pytest.approx(1.25 / 2, abs=1e-5)


def test_token_attributes_teach_what_second_fusion_looks_at() -> None:
    model, heads = parts()
    batch = batch_of(IMAGE)
    image_step(model, heads, batch, train_segmenter=True)[0]["token_attribute"].backward()
    assert learning(heads) == {name for name, _ in heads.named_parameters() if name.startswith("token_")}
    names = learning(model)
    assert "seg_prompter.spatial_down.4.weight" in names
    assert not [name for name in names if name.startswith(("language_model.", "seg_model.sam_", "video_encoder."))]


def test_query_attributes_teach_the_language_model_what_is_asked_for() -> None:
    model, heads = parts()
    image_step(model, heads, batch_of(IMAGE), train_segmenter=True)[0]["query_attribute"].backward()
    assert learning(heads) == {name for name, _ in heads.named_parameters() if name.startswith("token_")}
    names = learning(model)
    assert "language_model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if name.startswith(("seg_prompter.decoder.", "seg_model.sam_"))]


def test_query_attributes_by_hand() -> None:
    """One [ST] token; the target is both objects, then none: what is wanted is colours {1, 2}, then no colour."""
    _, heads = parts()
    batch = replace(
        batch_of(replace(IMAGE, sentences=1)),
        target_colour=torch.tensor([[1, 2], [0, 0]]),
        target_shape=torch.tensor([[0, 0], [0, 0]]),
    )
    logits = torch.tensor([[[40.0, 40.0]], [[-40.0, -40.0]]])
    heads.token_colour.forward = lambda projected: logits
    heads.token_shape.forward = lambda projected: torch.full_like(logits, -40.0)
    output = PromptOutput(torch.zeros(2, 1, 1, C), torch.zeros(2, 1), torch.zeros(2, 1, C), None, None, ())
    assert float(steps.query_attribute_losses(heads, output, batch)["query_attribute"]) < 1e-6
    heads.token_colour.forward = lambda projected: -logits
    assert float(steps.query_attribute_losses(heads, output, batch)["query_attribute"]) == pytest.approx(20.0)


def test_visual_tokens_have_to_carry_the_motion_before_the_language_model_reads_them() -> None:
    fine = replace(SMALL, video=replace(SMALL.video, fine_newest=True))
    model, heads = small_virst(fine).train(), ReadOuts(fine, colours=2, shapes=2)
    batch = batch_of(replace(IMAGE, sentences=1))
    clips, t = batch.colour.shape[0], batch.clip_frames
    motion = torch.zeros_like(batch.motion)
    motion[:, :, :8, :8] = torch.tensor([0.5, -0.25])  # the first of four tokens of a frame, four of sixteen details
    batch = replace(batch, colour=torch.ones_like(batch.colour), motion=motion)

    clip = steps._encode_clip(model, steps.encode(model, batch, train_segmenter=False), batch)
    steps.visual_motion_losses(heads, clip, batch, fine.video)["visual_motion"].backward()
    names = learning(model)
    assert {"mm_projector.0.weight", "fine_projector.0.weight"} <= names
    assert not [name for name in names if name.startswith("language_model.")]

    scaled = steps.VISUAL_MOTION_SCALE * torch.tensor([0.5, -0.25])
    found = torch.zeros(clips, 4 * t + 16, 2)
    found[:, : 4 * t : 4] = scaled
    found[:, [4 * t + cell for cell in (0, 1, 4, 5)]] = scaled
    heads.visual_motion.forward = lambda tokens: found
    assert float(steps.visual_motion_losses(heads, clip, batch, fine.video)["visual_motion"]) == pytest.approx(0.0)
    found[:, 4 * t :] = 0.0  # the details know nothing: half of the moving ones' error, in one of two views
    left = (0.5**2 + 0.25**2) * 0.5 / 0.5
    assert float(steps.visual_motion_losses(heads, clip, batch, fine.video)["visual_motion"]) == pytest.approx(left / 4)


def test_place_losses_by_hand() -> None:
    """The target fills the lower right quarter of the newest frame: the last of four visual tokens per frame has it.

    The landmark fills the upper left quarter of the oldest one.
    """
    _, heads = parts()
    batch = batch_of(replace(IMAGE, sentences=1))
    rows, t = batch.truth.shape[0], batch.clip_frames
    truth = torch.zeros_like(batch.truth)
    half = truth.shape[-1] // 2
    truth[:, t - 1, half:, half:] = 1.0
    visible = torch.zeros_like(batch.visible)
    visible[0, t - 1] = True
    landmark = torch.zeros_like(batch.landmark)
    landmark[:, 0, :half, :half] = 1.0
    batch = replace(batch, truth=truth, visible=visible, landmark=landmark)
    place = torch.full((rows, 1, 2, steps.PLACES), -60.0)
    place[0, :, :, steps.PLACES // 2 :] = 0.0  # row 1 is wrong, but its target is not to be seen
    marked = torch.full((rows, 4 * t, 1), -60.0)
    marked[:, -1] = 60.0
    heads.query_place.forward = lambda projected: place.flatten(2)
    hidden = torch.zeros(rows, 4 * t, SMALL.language.hidden)
    for head in heads.visual_target:
        head.forward = lambda states: marked
    heads.visual_landmark.forward = lambda states: marked.flip(1)
    presence = torch.zeros(rows, t)
    output = PromptOutput(torch.zeros(rows, t, 1, C), presence, torch.zeros(rows, 1, C), None, None, (hidden, hidden))
    losses = steps.place_losses(heads, output, batch, SMALL.video)
    assert float(losses["query_place"]) == pytest.approx(np.log(steps.PLACES / 2), abs=1e-5)  # spread over half of them
    assert float(losses["visual_target"]) < 1e-6
    assert float(losses["visual_landmark"]) < 1e-6
    marked[:, 0] = 60.0
    assert float(steps.place_losses(heads, output, batch, SMALL.video)["visual_target"]) == pytest.approx(
        60.0 / (4 * t), rel=1e-4
    )
    marked = torch.cat((marked, torch.full((rows, 16, 1), -60.0)), dim=1)
    marked[:, 0] = -60.0
    marked[:, [4 * t + cell for cell in (10, 11, 14, 15)]] = 60.0  # the quarter's cells among the details
    fine = replace(SMALL.video, fine_newest=True)
    assert float(steps.place_losses(heads, output, batch, fine)["visual_target"]) < 1e-6


def test_visual_tokens_mark_the_landmark_before_the_target() -> None:
    """What tells the target is known half-way: no loss on the target reads that state, only the landmark's does."""
    _, heads = parts()
    batch = batch_of(IMAGE)
    rows, t = batch.truth.shape[:2]
    hidden = [torch.randn(rows, 4 * t, SMALL.language.hidden, requires_grad=True) for _ in range(2)]
    zeros = torch.zeros(rows, t, 1, C), torch.zeros(rows, t), torch.zeros(rows, 1, C)
    losses = steps.place_losses(heads, PromptOutput(*zeros, None, None, tuple(hidden)), batch, SMALL.video)
    for name, reads in (("visual_landmark", [True, False]), ("visual_target", [False, True])):
        gradients = torch.autograd.grad(losses[name], hidden, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == reads


def test_presence_is_learnt_from_every_frame_of_the_clip() -> None:
    model, heads = parts()
    batch = batch_of(IMAGE)
    image_step(model, heads, batch, train_segmenter=True)[0]["presence"].backward()
    names = learning(model)
    assert {"occ_predictor.weight", "seg_prompter.decoder.0.ff.0.weight"} <= names
    assert "language_model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if name.startswith("seg_model.sam_mask_decoder.")]
    visible = batch.visible[:, : batch.clip_frames]
    for sign, expected in ((60.0, 0.0), (-60.0, 60.0)):
        logits = sign * (2.0 * visible.float() - 1.0)
        rows, t = logits.shape
        output = PromptOutput(torch.zeros(rows, t, 1, C), logits, torch.zeros(rows, 1, C), None, None, ())
        losses = steps._language_losses(output, batch)
        assert float(losses["presence"]) == pytest.approx(expected, abs=1e-5)


def test_place_losses_teach_the_language_model_to_look() -> None:
    model, heads = parts()
    losses = image_step(model, heads, batch_of(IMAGE), train_segmenter=True)[0]
    (losses["query_place"] + losses["visual_target"]).backward()
    names = learning(model)
    assert {"language_model.layers.0.self_attn.q_proj.weight", "mm_projector.0.weight"} <= names
    assert not [name for name in names if name.startswith(("seg_prompter.decoder.", "seg_model.sam_"))]


def test_a_token_holds_the_colours_that_cover_enough_of_it() -> None:
    _, heads = parts()
    batch = batch_of(IMAGE, said=(THE_BALL,))
    clips, t = batch.colour.shape[0], batch.clip_frames
    colour = torch.zeros_like(batch.colour)  # 16 x 16, a token is 8 x 8 of it
    colour[0, 0, :2, :2] = 2  # 4 of 64: held
    colour[0, 1, 9, 9] = 1  # 1 of 64: too little
    batch = replace(batch, colour=colour, shape=torch.zeros_like(colour))
    held = torch.zeros(clips, t, 2, 2, 2)
    held[0, 0, 0, 0, 1] = 1.0
    visual = VisualTokens(torch.zeros(clips, 1, 1), torch.ones(1, dtype=torch.bool))
    clip = ClipEncoding(visual, None, torch.randn(clips, t, C, 2, 2))
    with torch.no_grad():
        heads.token_shape.weight.zero_()
        heads.token_shape.bias.fill_(-60.0)  # no shape: right, and worth nothing
        for sign, right in ((1.0, True), (-1.0, False)):
            logits = sign * (held * 2 - 1) * 60.0
            heads.token_colour.forward = lambda tokens, logits=logits: logits
            loss = float(steps.token_attribute_losses(heads, clip, batch)["token_attribute"])
            assert (loss < 1e-6) == right
            assert right or loss == pytest.approx(30.0)


def test_a_cell_has_the_label_that_covers_most_of_it() -> None:
    labels = torch.zeros(1, 4, 8, dtype=torch.long)
    labels[0, :2, :4] = 2
    labels[0, 2:, :2] = 1
    labels[0, 3, :1] = 2
    labels[0, 0, 7] = 1
    # Of 16 pixels: label 2 on 9 and label 1 on 3; one pixel, too few to tell; none.
    cells = torch.cat((labels[:, :, :4], labels[:, :, 4:], torch.zeros(1, 4, 4, dtype=torch.long)))
    assert steps._dominant(cells, 3, 1).flatten().tolist() == [2, -1, 0]


def test_a_point_prompt_lies_on_the_target() -> None:
    model, _ = parts()
    batch = batch_of(PRETRAINING)
    truth = torch.zeros_like(batch.truth)
    truth[:, 0, 5, 9] = 1.0  # of 32 x 32; at 64 pixels the block begins at (18, 10)
    prompts = steps._point_prompts(model, replace(batch, truth=truth))
    points = torch.tensor([[[18.0, 10.0]]]).expand(len(truth), -1, -1)
    expected = model.seg_model.sam_prompt_encoder._embed_points(points, torch.ones(len(truth), 1), pad=True)
    assert torch.allclose(prompts, expected, atol=1e-5)


class Watched:
    """A Sam2 whose memory reads are kept."""

    def __init__(self, model: Virst, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[MemoryTensors] = []
        attend = model.seg_model.attend_memory

        def spy(features: Any, memory: MemoryTensors) -> Tensor:
            self.reads.append(memory)
            return attend(features, memory)

        monkeypatch.setattr(model.seg_model, "attend_memory", spy)


def test_propagation_reads_anchors_then_what_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads = parts()
    watched = Watched(model, monkeypatch)
    batch = batch_of(PROPAGATION)
    assert batch.anchors[-1] == 2
    propagation_step(model, heads, batch)
    assert len(watched.reads) == 3
    k = len(batch.anchors)
    for number, read in enumerate(watched.reads):
        now = 11 + number  # clip frames 0, 5, 10; then every step
        assert read.pointer_distance[0].tolist() == [now - 5 * a for a in batch.anchors] + [
            float(i + 1) for i in range(number)
        ]
        # The truth decides what is remembered: nothing of a target that is not there.
        seen = batch.visible[:, [*batch.anchors, *(3 + i for i in reversed(range(number)))]]
        assert torch.equal(read.spatial_valid, seen)
        for row, valid in enumerate(seen.tolist()):
            assert read.spatial_tpos[row, :k].tolist() == [P - 1] * k
            written = [
                int(tpos) for tpos, is_valid in zip(read.spatial_tpos[row, k:], valid[k:], strict=True) if is_valid
            ]
            assert written == list(range(len(written)))
        assert torch.equal(read.pointer_valid, seen)


def test_propagation_teaches_anchors_through_the_memory() -> None:
    """Gradients of later frames flow back into the prompts (equation 14)."""
    model, heads = parts()
    batch = batch_of(PROPAGATION, said=(THE_BALL,))
    _, newest = propagation_step(model, heads, batch)
    newest.mask_logits.sum().backward()
    names = learning(model)
    for part in (
        "seg_model.maskmem_tpos_enc", "seg_model.memory_encoder.out_proj.weight", "seg_model.obj_ptr_tpos_proj.weight",
        "seg_model.memory_attention.layers.0.cross_attn_image.v_proj.weight", "seg_model.no_mem_embed",
        "seg_prompter.decoder.0.cross_attn.q_proj.weight", "st_embedding",
    ):  # fmt: skip
        assert part in names


def test_an_object_without_any_anchor_is_expected_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    visible_seen: list[Tensor] = []
    original = steps.mask_losses

    def spy(prediction: MaskPrediction, truth: Tensor, visible: Tensor) -> dict[str, Tensor]:
        visible_seen.append(visible)
        return original(prediction, truth, visible)

    monkeypatch.setattr(steps, "mask_losses", spy)
    model, heads = parts()
    batch = batch_of(PROPAGATION, said=(THE_BALL,))
    hidden = batch.visible.clone()
    hidden[0, :3] = False  # hidden during the whole clip, then seen
    propagation_step(model, heads, replace(batch, visible=hidden))
    assert bool(hidden[0, 3:].all())
    for after_clip in visible_seen[len(batch.anchors) :]:
        assert after_clip.tolist() == [False, *([True] * (len(hidden) - 1))]


def test_pretraining_prompts_the_first_frame_and_tracks_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads = parts()
    watched = Watched(model, monkeypatch)
    losses, newest = pretraining_step(model, heads, batch_of(PRETRAINING), train_segmenter=True)
    assert [read.spatial_tpos[0].tolist() for read in watched.reads] == [[P - 1], [P - 1, 0]]
    assert [read.pointer_distance[0].tolist() for read in watched.reads] == [[5.0], [10.0, 5.0]]
    assert "token" not in losses
    newest.mask_logits.sum().backward()
    assert "seg_model.sam_prompt_encoder.point_embeddings.1.weight" in learning(model)


def test_pretraining_with_frozen_encoders_teaches_decoder_and_memory_only() -> None:
    model, heads = parts()
    losses, _ = pretraining_step(model, heads, batch_of(PRETRAINING), train_segmenter=False)
    assert "attribute" not in losses
    weighted(losses, LossWeights()).backward()
    names = learning(model)
    assert not [name for name in names if name.startswith(("seg_model.image_encoder.", "video_encoder."))]
    assert "seg_model.memory_encoder.out_proj.weight" in names
    assert "seg_model.sam_mask_decoder.transformer.layers.0.self_attn.q_proj.weight" in names


def test_one_frame_is_enough_for_pretraining() -> None:
    model, heads = parts()
    batch = batch_of(replace(PRETRAINING, clip_frames=1))
    losses, newest = pretraining_step(model, heads, batch, train_segmenter=False)
    assert newest.mask_logits.shape[0] == len(batch.clip_of_row)
    assert all(bool(torch.isfinite(value)) for value in losses.values())


def test_training_memory_holds_p_minus_1_recent_frames_and_three_anchors() -> None:
    memory, rows = TrainingMemory(small_virst()), 2

    def entry(number: float) -> MemoryEntry:
        return MemoryEntry(torch.full((rows, M, GRID, GRID), number), torch.full((rows, C), number))

    for step in (0, 5, 10, 15):
        memory.remember_anchor(step, entry(float(step)), torch.tensor([step > 0, False]))
    for step in range(16, 24):
        memory.remember_recent(step, entry(float(step)), torch.tensor([True, step % 2 == 0]))
    read = memory.read(24)
    kept = [5.0, 10.0, 15.0, *(24.0 - k for k in range(1, P))]
    assert read.spatial[0, :, 0, 0, 0].tolist() == kept
    assert read.pointers[1, :, 0].tolist() == kept
    assert read.pointer_distance[0].tolist() == [24.0 - step for step in kept]
    # As in the memory bank of a stream, "k frames back" means k writes back; what is not valid has no meaning.
    assert read.spatial_tpos[0].tolist() == [P - 1] * 3 + [0, 1, 2, 3]
    assert read.spatial_tpos[1, [4, 6]].tolist() == [0, 1]  # steps 22 and 20
    assert read.spatial_valid[0].tolist() == [True] * (2 + P)
    assert read.spatial_valid[1].tolist() == [False] * 3 + [step % 2 == 0 for step in kept[3:]]
    assert memory.any_anchor.tolist() == [True, False]
