# SPDX-License-Identifier: Apache-2.0
"""The full architecture at small widths: every part has an effect, and the whole is what its parts make."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.engine.model.small_virst_7b import SMALL_7B, VOCABULARY, small_virst_7b
from tests.engine.model.test_st_fusion import plain_initial, plain_second
from tests.engine.model.test_token_merging import plain as plain_merging
from virst_engine.model.chat_tokenizer import ChatRow
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import Virst7bConfig, with_preset

T, SEG = 4, VOCABULARY - 1
ROW = ChatRow(before=(1, 2, 3), after=(4, 5, SEG, 6, SEG, SEG), st=(2, 4, 5))


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def frames_of(clips: int = 1) -> Tensor:
    return torch.randn(clips, T, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def fusion_of(frames: int = T) -> Tensor:
    return torch.randn(frames, 32, 4, 4, generator=torch.Generator().manual_seed(2))


def prompts_of(model: Virst7b, *, clips: int = 1, row: ChatRow = ROW) -> Tensor:
    visual = model.encode_short_clips(frames_of(clips)).flatten(0, 1)
    return model.prompts(visual, model.encode_maps(fusion_of(clips * T)), row)


def test_a_clip_and_a_sentence_become_prompts_for_every_frame() -> None:
    prompts = prompts_of(small_virst_7b(), clips=2)
    assert prompts.shape == (2 * T, 3, 32)
    assert prompts.dtype == torch.float32
    assert bool(prompts.isfinite().all())


def test_visual_tokens_are_merged_then_projected() -> None:
    model, frames = small_virst_7b(), frames_of(2)
    visual = model.encode_short_clips(frames)
    assert visual.shape == (2, T * 2, 32)
    for clip in range(2):
        merged = plain_merging(model.vision_tower(frames[clip : clip + 1])[0], T * 2, heads=2)
        expected = model.mm_projector.mlp(torch.stack([token for token, _ in merged]))
        assert torch.allclose(visual[clip], expected, atol=1e-4)


def test_the_whole_is_the_plain_fusion_stages_around_the_language_model() -> None:
    """Both fusion stages written out, token by token; the sequence is put together by hand."""
    model = small_virst_7b()
    visual, fusion = model.encode_short_clips(frames_of()).flatten(0, 1), fusion_of()
    st = plain_initial(model.initial_seg_fusion_module, model.st_embedding, fusion)
    table = model.language_model.embed_tokens.weight
    sequence = [table[token] for token in ROW.before] + list(visual)
    sequence += [table[4], table[5], st[0], table[6], st[1], st[2]]
    hidden = model.language_model(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0]
    read = hidden[[len(sequence) - 4, len(sequence) - 2, len(sequence) - 1]]
    down = model.seg_prompter.video_maps(fusion[None])[0]
    expected = plain_second(model.seg_prompter, read, down)
    assert torch.allclose(prompts_of(model), expected, atol=5e-5)


def test_the_language_model_is_causal_so_nothing_after_the_last_st_token_matters() -> None:
    longer = ChatRow(ROW.before, (*ROW.after, 7, 8), ROW.st)
    model = small_virst_7b()
    assert torch.allclose(prompts_of(model), prompts_of(model, row=longer), atol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        "st_embedding", "language_model.embed_tokens.weight", "language_model.layers.1.self_attn.k_proj.weight",
        "vision_tower.patch_embed.proj.weight", "vision_tower.blocks.0.attn.q_bias", "vision_tower.position",
        "vision_tower.vision_layernorm.bias", "mm_projector.mlp.2.weight", "initial_seg_fusion_module.gate",
        "initial_seg_fusion_module.spatial_down.0.weight", "initial_seg_fusion_module.vision_proj.weight",
        "seg_prompter.seg_proj.weight", "seg_prompter.spatial_down.4.weight",
        "seg_prompter.decoder.1.cross_attn.v_proj.weight", "seg_prompter.decoder.0.self_attn.in_proj_weight",
    ],
)  # fmt: skip
def test_no_part_can_be_left_out(part: str) -> None:
    model = small_virst_7b()
    before = prompts_of(model)
    tensors = {**model.state_dict(), "vision_tower.position": model.vision_tower.position}
    tensors[part].zero_()
    assert not torch.allclose(prompts_of(model), before, atol=1e-4)


def test_a_closed_gate_is_initial_fusion_off() -> None:
    model = small_virst_7b()
    off = small_virst_7b(replace(SMALL_7B, fusion=replace(SMALL_7B.fusion, initial_fusion=False)))
    assert off.encode_maps(fusion_of()).initial is None
    assert not torch.allclose(prompts_of(off), prompts_of(model), atol=1e-4)
    model.initial_seg_fusion_module.gate.zero_()
    assert torch.allclose(prompts_of(off), prompts_of(model), atol=1e-6)


def test_without_second_fusion_all_frames_get_the_same_prompts() -> None:
    model = small_virst_7b(replace(SMALL_7B, fusion=replace(SMALL_7B.fusion, second_fusion=False)))
    prompts = prompts_of(model)
    assert torch.equal(prompts[0], prompts[-1])
    assert not torch.allclose(*prompts_of(small_virst_7b())[[0, -1]], atol=1e-3)


def test_without_rotations_time_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virst_engine.model.st_fusion.rotate", lambda x, cos, sin: x)
    prompts = prompts_of(small_virst_7b())
    assert torch.allclose(prompts[0], prompts[-1], atol=1e-5)


def test_the_language_model_knows_places() -> None:
    """Rotary positions of Qwen2: the same short clips in another order are another video."""
    model = small_virst_7b()
    visual, maps = model.encode_short_clips(frames_of(2)), model.encode_maps(fusion_of(2 * T))
    one = model.prompts(visual.flatten(0, 1), maps, ROW)
    other = model.prompts(visual.flip(0).flatten(0, 1), maps, ROW)
    assert not torch.allclose(one, other, atol=1e-4)


def test_one_shared_row_or_a_row_for_each_st_token() -> None:
    shared, separate = (small_virst_7b(with_preset(SMALL_7B, preset)) for preset in ("released", "paper"))
    assert shared.st_embedding.shape == (1, 32)
    assert separate.st_embedding.shape == (3, 32)
    separate.load_state_dict({**shared.state_dict(), "st_embedding": shared.st_embedding.expand(3, -1)})
    separate.initial_seg_fusion_module.gate.zero_()  # off in the released preset
    assert torch.allclose(prompts_of(shared), prompts_of(separate), atol=1e-6)
    separate.st_embedding[1] += 1.0
    assert not torch.allclose(prompts_of(shared), prompts_of(separate), atol=1e-3)


def test_maps_of_frames_can_be_made_one_by_one() -> None:
    model, fusion = small_virst_7b(), fusion_of()
    together = model.encode_maps(fusion)
    single = [model.encode_maps(fusion[t : t + 1]) for t in range(T)]
    assert together.initial is not None
    assert torch.allclose(together.second, torch.cat([maps.second for maps in single]), atol=1e-6)
    assert torch.allclose(together.initial, torch.cat([m.initial for m in single if m.initial is not None]), atol=1e-5)


def words_of(model: Virst7b, row: ChatRow, longest: int = 12, ends: tuple[int, ...] = (SEG - 1,)) -> list[int]:
    visual = model.encode_short_clips(frames_of()).flatten(0, 1)
    return model.answer_tokens(visual, row, marks=(SEG - 2, SEG - 1, SEG), ends=ends, longest=longest)


def test_words_are_the_likeliest_ones_with_all_read_anew_for_each() -> None:
    model, row = small_virst_7b(), ChatRow((1, 2, 3), (4, 5, 6), ())
    table = model.language_model.embed_tokens.weight
    read = [*table[[1, 2, 3]], *model.encode_short_clips(frames_of()).flatten(0, 1), *table[[4, 5, 6]]]
    expected: list[int] = []
    for _ in range(12):
        hidden = model.language_model(inputs_embeds=torch.stack(read)[None]).last_hidden_state[0, -1]
        logits = model.lm_head(hidden)
        logits[[SEG - 2, SEG]] = -1e9
        expected.append(int(logits.argmax()))
        read.append(table[expected[-1]])
    assert SEG - 1 not in expected
    assert words_of(model, row) == expected
    assert words_of(model, row, longest=5) == expected[:5]
    assert words_of(model, row, ends=(expected[7],)) == expected[: expected.index(expected[7])]


@pytest.mark.parametrize(("likeliest", "found"), [((SEG, 9), [9] * 4), ((SEG - 2, 9), [9] * 4), ((SEG - 1, 9), [])])
def test_marks_are_no_words_and_an_end_ends(likeliest: tuple[int, int], found: list[int]) -> None:
    model = small_virst_7b()
    model.lm_head = torch.nn.Linear(SMALL_7B.language.hidden, VOCABULARY)
    model.lm_head.weight.zero_()
    model.lm_head.bias.zero_()
    for score, token in zip((100.0, 50.0), likeliest, strict=True):
        model.lm_head.bias[token] = score
    assert words_of(model, ChatRow((1,), (2,), ()), longest=4) == found


def test_parts_in_bfloat16_work_beside_parts_in_float32() -> None:
    model = small_virst_7b()
    expected = prompts_of(model)
    for part in (model.vision_tower, model.mm_projector, model.language_model):
        part.bfloat16()
    model.language_model.rotary_emb.float()
    prompts = prompts_of(model)
    assert prompts.dtype == torch.float32
    error = (prompts - expected).abs().mean() / expected.abs().mean()
    assert 0 < float(error) < 0.15


def test_a_short_clip_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a short clip has 4 frames"):
        small_virst_7b().encode_short_clips(torch.randn(1, 3, 3, 32, 32))


def test_a_model_without_numbers_has_the_tables_that_are_computed() -> None:
    empty, full = Virst7b.without_numbers(SMALL_7B), small_virst_7b()
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    assert not [name for name, buffer in empty.named_buffers() if buffer.device.type == "meta"]
    assert torch.equal(prompts_of(empty), prompts_of(full))
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(empty.seg_model.encode_image(pixels).top, full.seg_model.encode_image(pixels).top)


def test_full_size_has_the_size_of_the_published_files() -> None:
    """The index of VideoChat-Flash-Qwen2-7B_res448 counts 646 tensors of 15,845,235,712 bytes in bfloat16."""
    config = Virst7bConfig()
    with torch.device("meta"):
        model = Virst7b(config)
    vlm = ("vision_tower.", "mm_projector.", "language_model.", "lm_head.")
    tensors = {name: value for name, value in model.state_dict().items() if name.startswith(vlm)}
    assert len(tensors) == 646
    unused_rows = 2 * (152064 - config.language.vocabulary) * config.language.hidden
    assert 2 * (sum(value.numel() for value in tensors.values()) + unused_rows) == 15_845_235_712
    assert config.vision.tokens_per_clip == 64
