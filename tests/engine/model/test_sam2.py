# SPDX-License-Identifier: Apache-2.0
"""Our stages against sam2's own SAM2Base, built from its published configuration at small widths, equal weights."""

from dataclasses import replace
from functools import partial
from importlib.resources import files

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base

from tests.engine.model.small_models import SMALL_SAM2, liven
from virst_engine.backends.torch_backend import without_empty_slots
from virst_engine.model.config import Sam2Config, tabletop_tiny
from virst_engine.model.sam2 import Sam2
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryTensors, PromptTokens

# SAM2Base builds its mask decoder with these widths, whatever its configuration says.
BUILT_IN = {"decoder_feedforward": 2048, "iou_hidden": 256}
CONFIGS = {
    "tabletop-tiny": replace(tabletop_tiny(("ball",)).sam2, pointer_distance_limit=0, **BUILT_IN),
    "multimask": replace(SMALL_SAM2, **BUILT_IN),
}
NOW = 20
ANCHOR_FRAMES = (0, 4, 9)
RECENT_FRAMES = range(10, 20)


def reference_of(config: Sam2Config) -> SAM2Base:
    """sam2.1_hiera_l.yaml with our widths: everything that is not a width stays as Meta published it."""
    tree = OmegaConf.load(str(files("sam2") / "configs/sam2.1/sam2.1_hiera_l.yaml")).model
    background, c, m = config.position_background, config.channels, config.memory_channels
    encoder, attention, memory = tree.image_encoder, tree.memory_attention, tree.memory_encoder
    tree.image_size, tree.num_maskmem = config.image_size, config.memory_frames
    tree.max_obj_ptrs_in_encoder = config.max_pointers
    encoder.trunk.embed_dim, encoder.trunk.num_heads = config.embed_dim, config.num_heads
    encoder.trunk.stages = list(config.stages)
    encoder.trunk.global_att_blocks = list(config.global_attention_blocks)
    encoder.trunk.window_spec = list(config.window_spec)
    encoder.trunk.window_pos_embed_bkg_spatial_size = [background, background]
    encoder.neck.d_model = encoder.neck.position_encoding.num_pos_feats = c
    encoder.neck.backbone_channel_list = config.backbone_channels
    encoder.neck.fpn_top_down_levels = list(config.top_down_levels)
    attention.d_model = attention.layer.d_model = c
    attention.num_layers, attention.layer.dim_feedforward = config.memory_layers, config.memory_feedforward
    for part in (attention.layer.self_attention, attention.layer.cross_attention):
        part.embedding_dim, part.feat_sizes = c, [config.grid, config.grid]
    attention.layer.cross_attention.kv_in_dim = m
    memory.out_dim = memory.position_encoding.num_pos_feats = m
    memory.fuser.layer.dim = memory.in_dim = c
    memory.mask_downsampler.embed_dim = c
    model: SAM2Base = instantiate(tree, _recursive_=True)
    return model.eval()


class Pair:
    """Our Sam2 and sam2's with the same weights, and one frame as each of them wants it."""

    def __init__(self, config: Sam2Config) -> None:
        self.config = config
        self.reference = liven(reference_of(config))
        self.ours = Sam2(config).eval()
        self.ours.load_state_dict(self.reference.state_dict(), strict=True)
        self.pixels = torch.randn(1, 3, config.image_size, config.image_size)
        with torch.no_grad():
            self.features = self.ours.encode_image(self.pixels)
            out = self.reference.forward_image(self.pixels)
        _, self.vision, self.position, self.sizes = self.reference._prepare_backbone_features(out)

    def conditioned(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.config.channels, self.config.grid, self.config.grid)

    def centre_scores(self, conditioned: torch.Tensor) -> None:
        """Shift the presence head so that about half of these rows hold an object."""
        scores = self.ours.decode_mask(self.features, conditioned, None).object_score_logits
        for model in (self.ours, self.reference):
            model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data -= scores.mean()

    def heads(self, conditioned: torch.Tensor, **prompt: object) -> tuple[torch.Tensor, ...]:
        rows = conditioned.shape[0]
        high_res = [level.expand(rows, -1, -1, -1) for level in (self.features.high_res_s0, self.features.high_res_s1)]
        return self.reference._forward_sam_heads(conditioned, high_res_features=high_res, **prompt)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(1)
    return Pair(request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def test_parameter_names_and_shapes_are_those_of_sam2(pair: Pair) -> None:
    ours = {name: tensor.shape for name, tensor in pair.ours.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in pair.reference.state_dict().items()}


def test_full_size_has_the_names_and_the_parameters_of_sam2_hiera_large(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = OmegaConf.load(str(files("sam2") / "configs/sam2.1/sam2.1_hiera_l.yaml")).model
    with torch.device("meta"):
        ours = Sam2(Sam2Config())
        monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))  # Hiera reads its numbers
        reference = instantiate(tree)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(224.4, abs=0.05)


def test_image_features_are_those_of_sam2(pair: Pair) -> None:
    levels = pair.reference.image_encoder(pair.pixels)["backbone_fpn"]
    out = pair.reference.forward_image(pair.pixels)
    assert torch.allclose(pair.features.top, out["vision_features"], atol=1e-6)
    assert torch.allclose(pair.features.high_res_s0, out["backbone_fpn"][0], atol=1e-6)
    assert torch.allclose(pair.features.high_res_s1, out["backbone_fpn"][1], atol=1e-6)
    for level in range(3):
        fusion = pair.ours.encode_image(pair.pixels, level).fusion
        assert torch.allclose(fusion, levels[level], atol=1e-6)


def remembered(pair: Pair, frames: tuple[int, ...]) -> dict[int, dict[str, object]]:
    """What SAM2VideoPredictor keeps of each frame."""
    c, m, grid = pair.config.channels, pair.config.memory_channels, pair.config.grid
    position = pair.ours.memory_encoder.position_encoding(torch.zeros(1, m, grid, grid))
    return {
        t: {
            "maskmem_features": torch.randn(1, m, grid, grid),
            "maskmem_pos_enc": [position],
            "obj_ptr": torch.randn(1, c),
        }
        for t in frames
    }


def sam2_recall(
    pair: Pair, anchors: dict[int, dict[str, object]], recent: dict[int, dict[str, object]]
) -> torch.Tensor:
    return pair.reference._prepare_memory_conditioned_features(
        frame_idx=NOW,
        is_init_cond_frame=False,
        current_vision_feats=pair.vision[-1:],
        current_vision_pos_embeds=pair.position[-1:],
        feat_sizes=pair.sizes[-1:],
        output_dict={"cond_frame_outputs": anchors, "non_cond_frame_outputs": recent},
        num_frames=NOW + 1,
    )


def slots_of(pair: Pair, anchors: dict[int, dict[str, object]], recent: dict[int, dict[str, object]]) -> MemoryTensors:
    """The same memories in slots, all of them valid: anchors, then recent frames from the newest back."""
    newest_first = sorted(recent, reverse=True)
    near = newest_first[: pair.config.memory_frames - 1]
    pointed = newest_first[: pair.config.max_pointers - 1]
    spatial = [anchors[t] for t in anchors] + [recent[t] for t in near]
    pointers = [anchors[t] for t in anchors] + [recent[t] for t in pointed]
    tpos = [pair.config.memory_frames - 1] * len(anchors) + [NOW - t - 1 for t in near]
    distance = [float(NOW - t) for t in (*anchors, *pointed)]
    return MemoryTensors(
        spatial=torch.stack([memory["maskmem_features"] for memory in spatial], dim=1),
        spatial_tpos=torch.tensor([tpos]),
        spatial_valid=torch.ones(1, len(tpos), dtype=torch.bool),
        pointers=torch.stack([memory["obj_ptr"] for memory in pointers], dim=1),
        pointer_distance=torch.tensor([distance]),
        pointer_valid=torch.ones(1, len(distance), dtype=torch.bool),
    )


def test_memory_attention_with_pointers_is_that_of_sam2(pair: Pair) -> None:
    anchors, recent = remembered(pair, ANCHOR_FRAMES), remembered(pair, tuple(RECENT_FRAMES))
    memory = slots_of(pair, anchors, recent)
    expected = sam2_recall(pair, anchors, recent)
    assert torch.allclose(pair.ours.attend_memory(pair.features, memory), expected, atol=1e-5)

    # The comparison notices every input: temporal rows of anchors and of recent frames, pointers and their distances.
    p = pair.config.memory_frames
    older = torch.where(memory.spatial_tpos == p - 1, memory.spatial_tpos, (memory.spatial_tpos + 1) % (p - 1))
    for changed in (
        replace(memory, spatial_tpos=torch.where(memory.spatial_tpos == p - 1, 0, memory.spatial_tpos)),
        replace(memory, spatial_tpos=older),
        replace(memory, pointer_distance=memory.pointer_distance + 1),
        replace(memory, pointers=memory.pointers.roll(1, dims=1)),
        replace(memory, pointer_valid=torch.zeros_like(memory.pointer_valid)),
    ):
        assert not torch.allclose(pair.ours.attend_memory(pair.features, changed), expected, atol=1e-4)


def test_invalid_slots_are_as_if_they_were_not_there(pair: Pair) -> None:
    anchors, recent = remembered(pair, ANCHOR_FRAMES[:1]), remembered(pair, tuple(RECENT_FRAMES)[-3:])
    few = slots_of(pair, anchors, recent)
    expected = sam2_recall(pair, anchors, recent)
    assert torch.allclose(pair.ours.attend_memory(pair.features, few), expected, atol=1e-5)

    c, m, grid = pair.config.channels, pair.config.memory_channels, pair.config.grid
    spatial, pointers = torch.full((1, 9, m, grid, grid), 50.0), torch.full((1, 12, c), 50.0)
    tpos, distance = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 12)
    spatial_valid, pointer_valid = torch.zeros(1, 9, dtype=torch.bool), torch.zeros(1, 12, dtype=torch.bool)
    at, pointer_at = [0, 3, 5, 8], [1, 2, 6, 11]
    spatial[:, at], tpos[:, at], spatial_valid[:, at] = few.spatial, few.spatial_tpos, True
    pointers[:, pointer_at], distance[:, pointer_at] = few.pointers, few.pointer_distance
    pointer_valid[:, pointer_at] = True
    many = MemoryTensors(spatial, tpos, spatial_valid, pointers, distance, pointer_valid)
    assert torch.allclose(pair.ours.attend_memory(pair.features, many), expected, atol=1e-5)


def test_each_object_attends_to_its_own_memory_and_one_without_stays_finite(pair: Pair) -> None:
    one = slots_of(pair, remembered(pair, ANCHOR_FRAMES), remembered(pair, tuple(RECENT_FRAMES)))
    other = slots_of(pair, remembered(pair, ANCHOR_FRAMES), remembered(pair, tuple(RECENT_FRAMES)))
    nothing = replace(
        one, spatial_valid=torch.zeros_like(one.spatial_valid), pointer_valid=torch.zeros_like(one.pointer_valid)
    )
    rows = [vars(memory).values() for memory in (one, nothing, other)]
    both = MemoryTensors(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    recalled = pair.ours.attend_memory(pair.features, both)
    assert torch.allclose(recalled[:1], pair.ours.attend_memory(pair.features, one), atol=1e-5)
    assert torch.allclose(recalled[2:], pair.ours.attend_memory(pair.features, other), atol=1e-5)
    assert bool(torch.isfinite(recalled).all())


def test_a_pointer_older_than_the_limit_looks_like_one_at_the_limit(pair: Pair) -> None:
    limited = Sam2(replace(pair.config, pointer_distance_limit=12)).eval()
    limited.load_state_dict(pair.ours.state_dict())
    memory = slots_of(pair, remembered(pair, ANCHOR_FRAMES), remembered(pair, tuple(RECENT_FRAMES)))
    at_limit = replace(memory, pointer_distance=memory.pointer_distance.clamp(max=12.0))
    aged = replace(memory, pointer_distance=torch.where(memory.pointer_distance > 12.0, 1e6, memory.pointer_distance))
    expected = pair.ours.attend_memory(pair.features, at_limit)
    assert torch.allclose(limited.attend_memory(pair.features, aged), expected, atol=1e-6)
    assert not torch.allclose(pair.ours.attend_memory(pair.features, aged), expected, atol=1e-4)


def test_a_frame_without_memory_is_that_of_sam2(pair: Pair) -> None:
    expected = pair.reference._prepare_memory_conditioned_features(
        frame_idx=0,
        is_init_cond_frame=True,
        current_vision_feats=pair.vision[-1:],
        current_vision_pos_embeds=pair.position[-1:],
        feat_sizes=pair.sizes[-1:],
        output_dict={"cond_frame_outputs": {}, "non_cond_frame_outputs": {}},
        num_frames=1,
    )
    assert torch.allclose(pair.ours.without_memory(pair.features), expected, atol=1e-6)


def assert_same_prediction(ours: MaskPrediction, theirs: tuple[torch.Tensor, ...]) -> None:
    _, _, ious, low_res, _, pointer, score = theirs
    assert torch.allclose(ours.object_score_logits, score[:, 0], atol=1e-5)
    assert torch.allclose(ours.iou, ious.amax(dim=1), atol=1e-5)
    assert torch.allclose(ours.pointer, pointer, atol=1e-5)
    # SAM 2 erases the mask of an absent object at once; we keep the logits and erase them where they are used.
    erased = torch.where(score[:, :, None] > 0, ours.mask_logits, NO_OBJ_SCORE)
    assert torch.allclose(erased, low_res[:, 0], atol=1e-4)


def test_decoding_a_tracked_frame_is_that_of_sam2(pair: Pair) -> None:
    conditioned = pair.conditioned(6)
    pair.centre_scores(conditioned)
    ours = pair.ours.decode_mask(pair.features, conditioned, None)
    assert 0 < int((ours.object_score_logits > 0).sum()) < 6
    assert_same_prediction(ours, pair.heads(conditioned, multimask_output=pair.config.multimask_tracking))
    absent = ours.object_score_logits <= 0
    assert torch.equal(ours.pointer[absent], pair.ours.no_obj_ptr.expand(int(absent.sum()), -1))


def test_a_prompt_stands_in_place_of_sam2s_embedded_points(pair: Pair) -> None:
    conditioned = pair.conditioned(3)
    points = torch.rand(3, 2, 2) * pair.config.image_size
    labels = torch.ones(3, 2, dtype=torch.int32)
    prompts = pair.reference.sam_prompt_encoder._embed_points(points, labels, pad=True)
    theirs = pair.heads(
        conditioned,
        point_inputs={"point_coords": points, "point_labels": labels},
        multimask_output=pair.config.multimask_prompted,
    )
    ours = pair.ours.decode_mask(pair.features, conditioned, PromptTokens(prompts))
    assert_same_prediction(ours, theirs)
    assert not torch.allclose(ours.mask_logits, pair.ours.decode_mask(pair.features, conditioned, None).mask_logits)


@pytest.mark.parametrize("prompted", [True, False])
def test_three_masks_or_one_are_chosen_for_prompts_and_for_tracking_apart(prompted: bool) -> None:
    torch.manual_seed(3)
    one_mask = {"multimask_prompted": not prompted, "multimask_tracking": prompted}
    pair = Pair(replace(SMALL_SAM2, **BUILT_IN, **one_mask))
    conditioned = pair.conditioned(4)
    points, labels = torch.rand(4, 1, 2) * 64, torch.ones(4, 1, dtype=torch.int32)
    prompts = pair.reference.sam_prompt_encoder._embed_points(points, labels, pad=True) if prompted else None
    inputs = {"point_inputs": {"point_coords": points, "point_labels": labels}} if prompted else {}
    ours = pair.ours.decode_mask(pair.features, conditioned, None if prompts is None else PromptTokens(prompts))
    assert_same_prediction(ours, pair.heads(conditioned, multimask_output=False, **inputs))
    three = pair.heads(conditioned, multimask_output=True, **inputs)[2].amax(dim=1)
    assert not torch.allclose(ours.iou, three, atol=1e-4)


def test_memories_are_those_of_sam2(pair: Pair) -> None:
    conditioned = pair.conditioned(6)
    pair.centre_scores(conditioned)
    ours = pair.ours.decode_mask(pair.features, conditioned, None)
    *_, high_res, pointer, score = pair.heads(conditioned, multimask_output=pair.config.multimask_tracking)
    vision = [level.expand(-1, 6, -1) for level in pair.vision]
    expected, _ = pair.reference._encode_new_memory(vision, pair.sizes, high_res, score, is_mask_from_pts=False)
    entry = pair.ours.encode_memory(pair.features, ours)
    assert torch.allclose(entry.spatial, expected, atol=1e-4)
    assert torch.allclose(entry.pointer, pointer, atol=1e-5)
    absent = replace(ours, object_score_logits=torch.full((6,), -1.0))
    assert not torch.allclose(pair.ours.encode_memory(pair.features, absent).spatial, expected, atol=1e-3)


def test_objects_share_one_frame_or_bring_their_own(pair: Pair) -> None:
    conditioned = pair.conditioned(2)
    both = ImageFeatures(*(torch.cat((level, level)) for level in vars(pair.features).values()))
    shared = pair.ours.decode_mask(pair.features, conditioned, None)
    own = pair.ours.decode_mask(both, conditioned, None)
    assert torch.allclose(shared.mask_logits, own.mask_logits, atol=1e-5)
    entries = pair.ours.encode_memory(pair.features, shared), pair.ours.encode_memory(both, own)
    assert torch.allclose(entries[0].spatial, entries[1].spatial, atol=1e-5)


def test_sizes_name_the_shapes_of_the_stages(pair: Pair) -> None:
    sizes = pair.ours.sizes
    prediction = pair.ours.decode_mask(pair.features, pair.conditioned(1), None)
    entry = pair.ours.encode_memory(pair.features, prediction)
    assert pair.pixels.shape[-1] == sizes.image_size
    assert pair.features.top.shape == (1, sizes.channels, sizes.grid, sizes.grid)
    assert prediction.mask_logits.shape == (1, sizes.mask, sizes.mask)
    assert entry.spatial.shape == (1, sizes.memory_channels, sizes.grid, sizes.grid)
    assert sizes.memory_frames == pair.ours.maskmem_tpos_enc.shape[0]


def test_slots_that_no_object_uses_can_be_left_out(pair: Pair) -> None:
    anchors, recent = remembered(pair, ANCHOR_FRAMES), remembered(pair, tuple(RECENT_FRAMES))
    full = slots_of(pair, anchors, recent)
    some = replace(full, spatial_valid=full.spatial_valid.clone(), pointer_valid=full.pointer_valid.clone())
    some.spatial_valid[:, [1, 2, 5]] = False
    some.pointer_valid[:, [0, 4]] = False
    trimmed = without_empty_slots(some)
    assert trimmed.spatial.shape[1] == full.spatial.shape[1] - 3
    assert trimmed.pointers.shape[1] == full.pointers.shape[1] - 2
    expected = pair.ours.attend_memory(pair.features, some)
    assert torch.allclose(pair.ours.attend_memory(pair.features, trimmed), expected, atol=1e-5)
    assert without_empty_slots(full) is full


def test_pooled_keys_are_the_means_of_their_cells_with_the_weight_of_all(pair: Pair) -> None:
    """Where the cells of a key are equal and RoPE is switched off, pooling changes nothing."""
    pooled = Sam2(pair.config).eval()
    pooled.load_state_dict(pair.ours.state_dict())
    pooled.pool_memory(2)
    memory = slots_of(pair, remembered(pair, ANCHOR_FRAMES), remembered(pair, tuple(RECENT_FRAMES)))
    flat = memory.spatial.mean(dim=(3, 4), keepdim=True).expand_as(memory.spatial)
    memory = replace(memory, spatial=flat)
    full = Sam2(pair.config).eval()
    full.load_state_dict(pair.ours.state_dict())
    for model in (pooled, full):
        model.memory_position.zero_()
        model.memory_cos.fill_(1.0)
        model.memory_sin.zero_()
    expected = full.attend_memory(pair.features, memory)
    assert torch.allclose(pooled.attend_memory(pair.features, memory), expected, atol=1e-5)
    # Without the logarithm of their number, pooled keys would lose three quarters of their weight to the pointers.
    pooled.config = replace(pooled.config, memory_pool=1)
    memory = replace(memory, spatial=memory.spatial[..., ::2, ::2])
    assert not torch.allclose(pooled.attend_memory(pair.features, memory), expected, atol=1e-3)


def test_another_image_size_has_the_same_weights_and_is_as_if_built_so(pair: Pair) -> None:
    own = pair.ours
    size = own.config.image_size + 32
    other, built = own.at_image_size(size), Sam2(replace(own.config, image_size=size)).eval()
    built.load_state_dict(own.state_dict())
    assert {id(p) for p in other.parameters()} == {id(p) for p in own.parameters()}
    assert other.sizes == built.sizes
    assert own.sizes.image_size == size - 32
    pixels = torch.randn(1, 3, size, size)
    points, labels = torch.tensor([[[20.0, 30.0], [60.0, 70.0]]]), torch.tensor([[2, 3]])
    seen = []
    for model in (other, built):
        with torch.inference_mode():
            features = model.encode_image(pixels)
            prompts = model.prompts
            anchor = model.decode_mask(features, prompts.without_memory(features), prompts.clicks(points, labels))
            entry = model.encode_memory(features, anchor)
            memory = MemoryTensors(
                spatial=entry.spatial[:, None], spatial_tpos=torch.tensor([[0]]), spatial_valid=torch.tensor([[True]]),
                pointers=entry.pointer[:, None], pointer_distance=torch.tensor([[1.0]]),
                pointer_valid=torch.tensor([[True]]),
            )  # fmt: skip
            seen.append(model.decode_mask(features, model.attend_memory(features, memory), None).mask_logits)
    assert seen[0].shape[-1] == size // 4
    assert torch.equal(*seen)


@pytest.mark.parametrize("size", [0, 16, 100])
def test_an_image_size_that_is_no_multiple_of_32_is_refused(pair: Pair, size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pair.ours.at_image_size(size)
