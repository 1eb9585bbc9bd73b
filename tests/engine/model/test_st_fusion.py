# SPDX-License-Identifier: Apache-2.0
"""ST-Fusion against equations 9 to 11 written out once more, plainly: loops, explicit heads, one query at a time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engine.model.small_models import liven
from virst_engine.model.config import FusionConfig, VirstConfig
from virst_engine.model.st_fusion import InitialStFusion, SecondStFusion, dense_position, frame_aware_tokenizer

C, HIDDEN, N, T, SIDE = 32, 24, 3, 4, 16  # SIDE / 8 = 2
FUSION = FusionConfig(st_tokens=N, heads=2, initial_heads=3, layers=2, feedforward=40, max_frames=T + 3)
ONE = torch.zeros(1, dtype=torch.long)  # one row, about clip 0


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def initial_of(seed: int = 0) -> InitialStFusion:
    module = InitialStFusion(C, HIDDEN, FUSION)
    liven(module, seed)
    return module


def second_of(config: FusionConfig = FUSION, seed: int = 0) -> SecondStFusion:
    module = SecondStFusion(C, HIDDEN, config)
    liven(module, seed)
    return module


def maps_of(batch: int = 1, frames: int = T) -> Tensor:
    return torch.randn(batch, frames, C, SIDE, SIDE)


# --- the plain re-computation --------------------------------------------------------------------------------------


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def attend(q: Tensor, ks: list[Tensor], vs: list[Tensor], heads: int) -> Tensor:
    """One query vector, keys and values already projected."""
    d = q.numel() // heads
    parts = []
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        scores = torch.stack([q[own] @ k[own] for k in ks]) / math.sqrt(d)
        weights = scores.exp() / scores.exp().sum()
        parts.append(sum(w * v[own] for w, v in zip(weights, vs, strict=True)))
    return torch.cat(parts)


def multihead(module: nn.MultiheadAttention, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    wq, wk, wv = module.in_proj_weight.chunk(3)
    bq, bk, bv = module.in_proj_bias.chunk(3)
    projected = attend(wq @ query + bq, [wk @ k + bk for k in keys], [wv @ v + bv for v in values], module.num_heads)
    return module.out_proj.weight @ projected + module.out_proj.bias


def turned(x: Tensor, heads: int, axis: int, positions: tuple[float, ...]) -> Tensor:
    """Rotate interleaved pairs of each head: `axis` channels per position, in order; the rest stays."""
    d = x.numel() // heads
    out = x.clone()
    for head in range(heads):
        for number, position in enumerate(positions):
            for i in range(axis // 2):
                at = head * d + number * axis + 2 * i
                angle = position * 10000 ** -(2 * i / axis)
                a, b = x[at], x[at + 1]
                out[at] = a * math.cos(angle) - b * math.sin(angle)
                out[at + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def plain_initial(module: InitialStFusion, st: Tensor, maps: Tensor) -> Tensor:
    keys = []
    for frame in maps:
        down = module.spatial_down(frame[None])[0]
        for y in range(down.shape[1]):
            for x in range(down.shape[2]):
                token = module.vision_proj(normed(down[:, y, x], module.spatial_norm))
                keys.append(normed(token, module.norm_kv))
    return torch.stack(
        [e + module.gate * multihead(module.cross_attn, normed(e, module.norm_q), keys, keys) for e in st]
    )


def plain_second(module: SecondStFusion, st: Tensor, down: Tensor, position: Tensor | None = None) -> Tensor:
    """Prompts by (frame, token)."""
    config, frames = module.config, len(down)
    axis = C // config.heads // 3 // 2 * 2
    memory, values, places = [], [], []
    for t in range(frames):
        for y in range(down.shape[2]):
            for x in range(down.shape[3]):
                memory.append(normed(down[t, :, y, x], module.memory_norm))
                values.append(memory[-1] + (0 if position is None else position[:, y, x]))
                places.append((float(t), float(y), float(x)))
    queries = {(n, t): module.seg_proj(st[n]) for n in range(len(st)) for t in range(frames)}
    for layer in module.decoder:
        everyone = list(queries.values())
        cross = layer.cross_attn
        keys = [turned(cross.k_proj(m), config.heads, axis, p) for m, p in zip(memory, places, strict=True)]
        projected = [cross.v_proj(v) for v in values]
        updated = {}
        for (n, t), query in queries.items():
            x = normed(query + multihead(layer.self_attn, query, everyone, everyone), layer.norm1)
            q = turned(cross.q_proj(x), config.heads, axis, (float(t),))
            x = normed(x + cross.o_proj(attend(q, keys, projected, config.heads)), layer.norm2)
            hidden = F.gelu(layer.ff[0](x))
            updated[n, t] = normed(x + layer.ff[2](hidden), layer.norm3)
        queries = updated
    return torch.stack([torch.stack([queries[n, t] for n in range(len(st))]) for t in range(frames)])


# --- tests ---------------------------------------------------------------------------------------------------------


def test_the_tokenizer_halves_the_side_three_times_and_keeps_the_channels() -> None:
    tokenizer = frame_aware_tokenizer(C, FUSION.tokenizer_strides)
    assert tokenizer(torch.randn(1, C, 64, 64)).shape == (1, C, 8, 8)
    assert bool((tokenizer(torch.randn(1, C, 32, 32)) >= 0).all())  # the last one, too, has a ReLU
    assert [type(layer) for layer in tokenizer] == [nn.Conv2d, nn.ReLU] * 3
    assert frame_aware_tokenizer(C, (2, 2, 1))(torch.randn(1, C, 32, 32)).shape == (1, C, 8, 8)  # tabletop-tiny
    assert second_of().video_maps(maps_of(batch=2)).shape == (2, T, C, SIDE // 8, SIDE // 8)
    assert initial_of().video_tokens(maps_of(batch=2)).shape == (2, T * (SIDE // 8) ** 2, HIDDEN)


def test_initial_fusion_is_equation_9() -> None:
    module, st, maps = initial_of(), torch.randn(2, N, HIDDEN), maps_of(batch=2)
    fused = module(st, module.video_tokens(maps))
    for row in range(2):
        assert torch.allclose(fused[row], plain_initial(module, st[row], maps[row]), atol=1e-5)


def test_the_gate_starts_at_a_tenth_and_closes_initial_fusion_at_zero() -> None:
    module, st, maps = InitialStFusion(C, HIDDEN, FUSION), torch.randn(1, N, HIDDEN), maps_of()
    assert float(module.gate) == pytest.approx(0.1)
    assert not torch.allclose(module(st, module.video_tokens(maps)), st, atol=1e-4)
    module.gate.zero_()
    assert torch.equal(module(st, module.video_tokens(maps)), st)


@pytest.mark.parametrize("in_values", [False, True])
def test_second_fusion_is_equations_10_and_11(in_values: bool) -> None:
    module = second_of(replace(FUSION, position_in_values=in_values))
    st, down, position = torch.randn(2, N, HIDDEN), module.video_maps(maps_of(batch=2)), torch.randn(C, 2, 2)
    prompts, _ = module(st, down, torch.arange(2), position)
    assert prompts.shape == (2, T, N, C)
    for row in range(2):
        expected = plain_second(module, st[row], down[row], position if in_values else None)
        assert torch.allclose(prompts[row], expected, atol=2e-5)


def test_rows_share_the_keys_of_their_clip() -> None:
    """Three sentences about two clips: the same prompts as each with its own copy of its clip."""
    module, st = second_of(), torch.randn(3, N, HIDDEN)
    down, clip_of_row = module.video_maps(maps_of(batch=2)), torch.tensor([1, 0, 1])
    shared, logits = module(st, down, clip_of_row)
    copied, copied_logits = module(st, down[clip_of_row], torch.arange(3))
    assert torch.allclose(shared, copied, atol=1e-6)
    assert logits is not None
    assert copied_logits is not None
    assert torch.allclose(logits, copied_logits, atol=1e-6)


def test_a_new_layer_looks_at_what_its_query_resembles() -> None:
    fresh = SecondStFusion(C, HIDDEN, FUSION).decoder[0].cross_attn
    assert torch.equal(fresh.q_proj.weight, fresh.k_proj.weight)
    assert torch.allclose(fresh.q_proj.weight @ fresh.q_proj.weight.T, torch.eye(C), atol=1e-5)


def test_rotations_tell_frames_and_places_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    module, st, maps = second_of(), torch.randn(1, N, HIDDEN), maps_of()
    down = module.video_maps(maps)
    prompts, _ = module(st, down, ONE)
    assert not torch.allclose(prompts[:, 0], prompts[:, 1], atol=1e-3)
    monkeypatch.setattr("virst_engine.model.st_fusion.rotate", lambda x, cos, sin: x)
    flat, _ = module(st, down, ONE)
    assert torch.allclose(flat[:, 0], flat[:, 1], atol=1e-5)  # without them, all frames get the same prompts
    shuffled, _ = module(st, down.flip(1, 3, 4), ONE)
    assert torch.allclose(flat, shuffled, atol=1e-5)  # and video is a bag of cells


def test_attention_logits_depend_on_the_distance_in_time_only() -> None:
    """The same picture in every frame: the logit of (query frame, key frame) is a function of their difference."""
    module, st = second_of(replace(FUSION, layers=1)), torch.randn(1, N, HIDDEN)
    module.decoder[0].self_attn.out_proj.weight.zero_()
    down = module.video_maps(maps_of(frames=1).expand(-1, T, -1, -1, -1))
    _, logits = module(st, down, ONE)
    assert logits is not None
    assert logits.shape == (1, FUSION.heads, N, T, T, 2, 2)
    assert torch.allclose(logits[:, :, :, :-1, :-1], logits[:, :, :, 1:, 1:], atol=1e-5)
    assert not torch.allclose(logits[:, :, :, 0, 1], logits[:, :, :, 1, 0], atol=1e-3)
    assert not torch.allclose(logits[..., 0, 1], logits[..., 1, 0], atol=1e-3)  # y and x turn different channels


def test_attention_logits_are_those_of_the_last_layer() -> None:
    module, st = second_of(), torch.randn(1, N, HIDDEN)
    seen = []
    for layer in module.decoder:
        layer.cross_attn.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
    _, logits = module(st, module.video_maps(maps_of()), ONE)
    assert logits is not None
    assert len(seen) == 2
    assert torch.equal(logits, seen[-1].unflatten(3, (T, 2, 2)).unflatten(2, (N, T)))


def test_frames_are_queried_all_at_once_so_self_attention_connects_them() -> None:
    module, st, maps = second_of(), torch.randn(1, N, HIDDEN), maps_of()
    before, _ = module(st, module.video_maps(maps), ONE)
    maps[:, 3] += 1.0
    after, _ = module(st, module.video_maps(maps), ONE)
    assert bool(((after - before).abs().amax(dim=(0, 2, 3)) > 1e-4).all())


def test_without_second_fusion_the_projected_tokens_are_repeated_over_time() -> None:
    module, st = second_of(replace(FUSION, second_fusion=False)), torch.randn(2, N, HIDDEN)
    prompts, logits = module(st, module.video_maps(maps_of(batch=2)), torch.arange(2))
    assert logits is None
    for t in range(T):
        assert torch.equal(prompts[:, t], module.seg_proj(st))


def test_a_clip_of_too_many_frames_is_refused() -> None:
    module, st = second_of(), torch.randn(1, N, HIDDEN)
    assert module(st, module.video_maps(maps_of(frames=FUSION.max_frames)), ONE)[0].shape[1] == FUSION.max_frames
    with pytest.raises(ValueError, match="at most 7 frames"):
        module(st, module.video_maps(maps_of(frames=FUSION.max_frames + 1)), ONE)


def test_the_dense_position_is_averaged_down_to_the_fusion_grid() -> None:
    position = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert dense_position(position, 2, 2).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]


def test_full_size_has_the_parameters_and_the_names_of_the_published_checkpoint() -> None:
    config = VirstConfig()
    with torch.device("meta"):
        initial = InitialStFusion(config.sam2.channels, config.language.hidden, config.fusion)
        second = SecondStFusion(config.sam2.channels, config.language.hidden, config.fusion)
    assert sum(p.numel() for p in initial.parameters()) / 1e6 == pytest.approx(54.1, abs=0.05)
    assert sum(p.numel() for p in second.parameters()) / 1e6 == pytest.approx(4.80, abs=0.005)

    def both(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    down = both("spatial_down.0", "spatial_down.2", "spatial_down.4")
    attention = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert set(initial.state_dict()) == {
        *down, *both("spatial_norm", "vision_proj", "norm_q", "norm_kv"), "gate",
        *(f"cross_attn.{name}" for name in attention),
    }  # fmt: skip
    layer = {
        *both(*(f"cross_attn.{name}_proj" for name in "qkvo"), "ff.0", "ff.2", "norm1", "norm2", "norm3"),
        *(f"self_attn.{name}" for name in attention),
    }
    assert set(second.state_dict()) == {
        *down, *both("memory_norm", "seg_proj"), *(f"decoder.{i}.{name}" for i in (0, 1) for name in layer)
    }  # fmt: skip
    assert initial.cross_attn.head_dim == 448
    assert second.decoder[0].ff[0].out_features == 1024
