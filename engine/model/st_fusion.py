# SPDX-License-Identifier: Apache-2.0
"""Spatio-Temporal Fusion (VIRST, section 3.3): segmentation-aware video features meet the language model's [ST] tokens.

Parameter names and shapes are those of the published checkpoint (`initial_seg_fusion_module`, `seg_prompter`), so the
full-size classes load it by name. The code is our own, written from the paper and from facts about the format.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from virst_engine.model.config import FusionConfig
from virst_engine.model.rope import axis_angles, rotate


def frame_aware_tokenizer(channels: int, strides: tuple[int, ...]) -> nn.Sequential:
    """A convolution per stride, each with ReLU: S_seg -> S_down, 8 x 8 tokens per frame (equations 7 and 8).

    The paper's strides are 2, 2, 2.
    """
    layers: list[nn.Module] = []
    for stride in strides:
        layers += [nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _tokenize(tokenizer: nn.Sequential, maps: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c hd wd"]:
    batch, frames = maps.shape[:2]
    return tokenizer(maps.flatten(0, 1)).unflatten(0, (batch, frames))


class InitialStFusion(nn.Module):
    """F_Init = E_ST + gate * CrossAttn(E_ST, S_down), before the language model (equation 9)."""

    def __init__(self, channels: int, hidden: int, config: FusionConfig) -> None:
        super().__init__()
        self.spatial_down = frame_aware_tokenizer(channels, config.tokenizer_strides)
        self.spatial_norm = nn.LayerNorm(channels)
        self.vision_proj = nn.Linear(channels, hidden)
        self.norm_q = nn.LayerNorm(hidden)
        self.norm_kv = nn.LayerNorm(hidden)
        self.cross_attn = nn.MultiheadAttention(hidden, config.initial_heads, batch_first=True)
        self.gate = nn.Parameter(torch.tensor(0.1))

    def video_tokens(self, maps: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b tokens d"]:
        """S_down, flattened and projected to the language model's width; computed once for all sentences of a clip."""
        tokens = _tokenize(self.spatial_down, maps).flatten(3).transpose(2, 3).flatten(1, 2)
        return self.norm_kv(self.vision_proj(self.spatial_norm(tokens)))

    def forward(self, st: Float[Tensor, "b n d"], video_tokens: Float[Tensor, "b tokens d"]) -> Float[Tensor, "b n d"]:
        attended = self.cross_attn(self.norm_q(st), video_tokens, video_tokens, need_weights=False)[0]
        return st + self.gate * attended


class RotaryCrossAttention(nn.Module):
    """Cross-attention whose queries turn with time and whose keys turn with time, y and x (3D RoPE)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)
        # Training from nothing: attention starts as similarity, a query looks at what it resembles.
        nn.init.orthogonal_(self.q_proj.weight)
        self.k_proj.load_state_dict(self.q_proj.state_dict())

    def _split(self, x: Float[Tensor, "b tokens c"]) -> Float[Tensor, "b heads tokens d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        queries: Float[Tensor, "b q c"],
        keys: Float[Tensor, "clips k c"],
        values: Float[Tensor, "clips k c"],
        clip_of_row: Int[Tensor, " b"],
        query_angles: Float[Tensor, "q pairs_t"],
        key_angles: Float[Tensor, "k pairs"],
    ) -> tuple[Float[Tensor, "b q c"], Float[Tensor, "b heads q k"]]:
        """Returns the attended values and the attention logits (before the softmax).

        Keys and values are projected once per clip, however many rows ask about it.
        """
        q = rotate(self._split(self.q_proj(queries)), query_angles.cos(), query_angles.sin())
        k = rotate(self._split(self.k_proj(keys)), key_angles.cos(), key_angles.sin())[clip_of_row]
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        out = logits.softmax(-1) @ self._split(self.v_proj(values))[clip_of_row]
        return self.o_proj(out.transpose(1, 2).flatten(2)), logits


class SecondFusionLayer(nn.Module):
    """Post-norm decoder layer: self-attention over all N*T queries, rotary cross-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.cross_attn = RotaryCrossAttention(channels, heads)
        self.ff = nn.Sequential(nn.Linear(channels, feedforward), nn.GELU(), nn.Linear(feedforward, channels))
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self,
        x: Float[Tensor, "b q c"],
        memory: Float[Tensor, "clips k c"],
        values: Float[Tensor, "clips k c"],
        clip_of_row: Int[Tensor, " b"],
        query_angles: Float[Tensor, "q pairs_t"],
        key_angles: Float[Tensor, "k pairs"],
    ) -> tuple[Float[Tensor, "b q c"], Float[Tensor, "b heads q k"]]:
        x = self.norm1(x + self.self_attn(x, x, x, need_weights=False)[0])
        attended, logits = self.cross_attn(x, memory, values, clip_of_row, query_angles, key_angles)
        x = self.norm2(x + attended)
        return self.norm3(x + self.ff(x)), logits


class SecondStFusion(nn.Module):
    """[ST] tokens after the language model -> N prompt embeddings for each frame (equations 10 and 11)."""

    def __init__(self, channels: int, hidden: int, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_down = frame_aware_tokenizer(channels, config.tokenizer_strides)
        self.memory_norm = nn.LayerNorm(channels)
        self.seg_proj = nn.Linear(hidden, channels)
        self.decoder = nn.ModuleList(
            SecondFusionLayer(channels, config.heads, config.feedforward) for _ in range(config.layers)
        )

    def video_maps(self, maps: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c hd wd"]:
        """S_down of this stage; computed once for all sentences of a clip."""
        return _tokenize(self.spatial_down, maps)

    def forward(
        self,
        st: Float[Tensor, "b n d"],
        down: Float[Tensor, "clips t c hd wd"],
        clip_of_row: Int[Tensor, " b"],
        position: Float[Tensor, "c hd wd"] | None = None,
    ) -> tuple[Float[Tensor, "b t n c"], Float[Tensor, "b heads n t t hd wd"] | None]:
        """Row i asks about clip `clip_of_row[i]`.

        `position`: the mask decoder's dense positional encoding, added to the values when configured. Returns the
        prompts and the last layer's attention logits (None without second fusion). Raises ValueError for a clip longer
        than `max_frames`.
        """
        frames, height, width = down.shape[1], *down.shape[3:]
        if frames > self.config.max_frames:
            raise ValueError(
                f"a clip may have at most {self.config.max_frames} frames (fusion.max_frames), got {frames}"
            )
        queries = self.seg_proj(st)
        tokens = queries.shape[1]
        expanded = queries[:, :, None].expand(-1, -1, frames, -1)  # temporal expansion, N-major
        if not self.config.second_fusion:
            return expanded.transpose(1, 2), None
        memory = self.memory_norm(down.flatten(3).transpose(2, 3).flatten(1, 2))  # frame-major, then y, x
        values = memory
        if position is not None and self.config.position_in_values:
            values = memory + position.flatten(1).T.repeat(frames, 1)

        # Each axis owns the largest even share of d_head: 10, 10, 10 of 32; two channels stay unrotated.
        axis = memory.shape[-1] // self.config.heads // 3 // 2 * 2
        t, y, x = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float32, device=down.device) for n in (frames, height, width)), indexing="ij"
        )
        key_angles = torch.cat([axis_angles(p.flatten(), axis) for p in (t, y, x)], dim=1)
        times = torch.arange(frames, dtype=torch.float32, device=down.device)
        query_angles = axis_angles(times, axis).repeat(tokens, 1)

        out, logits = expanded.flatten(1, 2), None
        for layer in self.decoder:
            out, logits = layer(out, memory, values, clip_of_row, query_angles, key_angles)
        prompts = out.unflatten(1, (tokens, frames)).transpose(1, 2)
        assert logits is not None
        return prompts, logits.unflatten(3, (frames, height, width)).unflatten(2, (tokens, frames))


def dense_position(position: Float[Tensor, "1 c h w"], height: int, width: int) -> Float[Tensor, "c hd wd"]:
    """SAM's dense positional encoding, averaged down to the fusion grid."""
    return F.adaptive_avg_pool2d(position, (height, width))[0]
