# SPDX-License-Identifier: Apache-2.0
"""VIRST at full size: UMT-L, token merging, Qwen2-7B, ST-Fusion and sam2.1_hiera_large (arXiv 2603.27060, figure 2).

ST-Fusion, the language model and SAM 2 are the classes that `tabletop-tiny` has, too; the video encoder and the
language model's input are VideoChat-Flash's. The parts may have different types: the video encoder and the language
model run in bfloat16 where they are stored so, ST-Fusion and SAM 2 stay in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from virst_engine.model.chat_tokenizer import ChatRow
from virst_engine.model.checkpoint import parameters_without_numbers
from virst_engine.model.sam2 import Sam2
from virst_engine.model.st_fusion import InitialStFusion, SecondStFusion
from virst_engine.model.token_merging import merge_tokens
from virst_engine.model.umt import UmtEncoder
from virst_engine.model.video_language import build_language_model
from virst_engine.model.virst_7b_config import Virst7bConfig


@dataclass(frozen=True)
class FusionMaps:
    """What ST-Fusion reads of frames; depends on each frame alone, so that frames can be cached one by one."""

    initial: Float[Tensor, "t tokens d"] | None  # S_down for Initial ST-Fusion; None when it is off
    second: Float[Tensor, "t c hd wd"]  # S_down for Second ST-Fusion


class MergedProjector(nn.Module):
    """Tokens of a short clip, merged, at the language model's width (`mm_projector`, tome16_mlp_hd64)."""

    def __init__(self, channels: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, tokens: Float[Tensor, "b tokens c"], wanted: int) -> Float[Tensor, "b wanted d"]:
        out: Tensor = self.mlp(merge_tokens(tokens, wanted, self.heads))
        return out


class Virst7b(nn.Module):
    """All networks. `seg_model` alone is the segmenter; the rest is the reasoner."""

    def __init__(self, config: Virst7bConfig) -> None:
        super().__init__()
        self.config = config
        channels, hidden, fusion = config.sam2.channels, config.language.hidden, config.fusion
        self.seg_model = Sam2(config.sam2)
        self.vision_tower = UmtEncoder(config.vision)
        self.mm_projector = MergedProjector(config.vision.channels, hidden, config.vision.heads)
        self.language_model = build_language_model(config.language)
        self.lm_head = nn.Linear(hidden, config.language.vocabulary, bias=False)
        self.st_embedding = nn.Parameter(torch.randn(config.st_rows, hidden) * 0.02)  # E_ST
        self.initial_seg_fusion_module = InitialStFusion(channels, hidden, fusion)
        self.seg_prompter = SecondStFusion(channels, hidden, fusion)
        self.occ_predictor = nn.Linear(channels, 1)  # in the checkpoint, but untrained there: not asked

    @staticmethod
    def without_numbers(config: Virst7bConfig) -> "Virst7b":
        """Ready to be loaded: parameters on the meta device, computed tables on the CPU; in evaluation mode."""
        with torch.device("meta"):
            model = Virst7b(config)
        with parameters_without_numbers():
            model.seg_model = Sam2(config.sam2)
        language = model.language_model
        language.rotary_emb = type(language.rotary_emb)(language.config)
        return model.eval()

    def encode_short_clips(self, frames: Float[Tensor, "clips t 3 size size"]) -> Float[Tensor, "clips v d"]:
        """Visual tokens of short clips of `vision.clip_frames` frames each; `frames`: normalised, any float type.

        Raises ValueError for short clips of another length.
        """
        vision = self.config.vision
        if frames.shape[1] != vision.clip_frames:
            raise ValueError(
                f"a short clip has {vision.clip_frames} frames (vision.clip_frames), got {frames.shape[1]}"
            )
        tokens = self.vision_tower(frames.to(self.vision_tower.vision_layernorm.weight.dtype))
        return self.mm_projector(tokens, vision.tokens_per_clip).to(self.language_model.embed_tokens.weight.dtype)

    def encode_maps(self, fusion: Float[Tensor, "t c h w"]) -> FusionMaps:
        """`fusion`: ImageFeatures.fusion of frames, the level that `fusion.feature_level` names."""
        maps = fusion[:, None].to(self.seg_prompter.seg_proj.weight.dtype)
        initial = self.initial_seg_fusion_module.video_tokens(maps) if self.config.fusion.initial_fusion else None
        return FusionMaps(initial, self.seg_prompter.video_maps(maps)[:, 0])

    def prompts(self, visual: Float[Tensor, "v d"], maps: FusionMaps, row: ChatRow) -> Float[Tensor, "t n c"]:
        """One forward pass: the prompt embeddings of every frame of `maps`, float32.

        `visual`: the tokens of all short clips, oldest first. [ST] hidden states are read at their own positions.
        """
        st = self.st_embedding.expand(self.config.fusion.st_tokens, -1)[None]
        if maps.initial is not None:
            st = self.initial_seg_fusion_module(st.to(maps.initial.dtype), maps.initial.flatten(0, 1)[None])
        sequence = self._sequence(visual, row)
        places = torch.tensor(row.st, device=visual.device) + len(row.before) + len(visual)
        sequence = sequence.index_copy(0, places, st[0].to(sequence.dtype))
        hidden = self.language_model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0]
        first = torch.zeros(1, dtype=torch.long, device=visual.device)
        prompts, _ = self.seg_prompter(hidden[places][None].to(maps.second.dtype), maps.second[None], first)
        out: Tensor = prompts[0].float()
        return out

    @property
    def has_words(self) -> bool:
        """Whether `lm_head` was loaded."""
        return self.lm_head.weight.device.type != "meta"

    def answer_tokens(
        self, visual: Float[Tensor, "v d"], row: ChatRow, *, marks: Sequence[int], ends: Sequence[int], longest: int
    ) -> list[int]:
        """What follows a question about a clip, each token the likeliest after those before it; the end is left out.

        Keys and values of what was read are kept, so that each further token costs one step. At most `longest` tokens;
        none of `marks`, which are no text.
        """
        barred = torch.tensor([mark for mark in marks if mark not in ends], dtype=torch.long, device=visual.device)
        sequence, cache = self._sequence(visual, row)[None], None
        tokens: list[int] = []
        while len(tokens) < longest:
            understood = self.language_model(inputs_embeds=sequence, past_key_values=cache, use_cache=True)
            logits = self.lm_head(understood.last_hidden_state[0, -1]).float()
            token = int(logits.index_fill(0, barred, float("-inf")).argmax())
            if token in ends:
                break
            tokens.append(token)
            cache = understood.past_key_values
            sequence = self.language_model.embed_tokens(torch.tensor([[token]], device=visual.device))
        return tokens

    def _sequence(self, visual: Float[Tensor, "v d"], row: ChatRow) -> Float[Tensor, "all d"]:
        """What the language model reads: the sentence around the clip."""
        embed, device = self.language_model.embed_tokens, visual.device
        before, after = (embed(torch.tensor(tokens, device=device)) for tokens in (row.before, row.after))
        return torch.cat((before, visual.to(before.dtype), after))
