# SPDX-License-Identifier: Apache-2.0
"""The segmenter: SAM 2.1's networks as four stages without state.

The modules are those of `sam2.modeling` (facebookresearch/sam2 2b90b9f), so official checkpoints fit by name. What
SAM2Base keeps in dictionaries, the caller keeps: memory comes in as `MemoryTensors`. Departures from
sam2/modeling/sam2_base.py:
- memories sit in a fixed number of slots with a key mask instead of a concatenation that grows
  (`_prepare_memory_conditioned_features`); masked softmax makes the result the same;
- RoPE is real-valued (engine/model/rope.py);
- a prompt is an embedding that stands in place of the point prompt, without padding point (VIRST).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from virst_engine.errors import VirstError
from virst_engine.model.config import Sam2Config
from virst_engine.model.rope import axial_angles, rotate
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, StageSizes

try:
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
    from sam2.modeling.sam.transformer import Attention, TwoWayTransformer
    from sam2.modeling.sam2_utils import MLP, get_1d_sine_pe
except ModuleNotFoundError as error:
    raise VirstError(
        f"the package {error.name} is missing; run ./scripts/setup, or: pip install --no-deps sam2==1.1.0"
    ) from error

NO_OBJECT_LOGIT = -1024.0  # NO_OBJ_SCORE: the mask of an object that is not there
MEMORY_MASK_SCALE, MEMORY_MASK_BIAS = 20.0, -10.0  # sigmoid_scale_for_mem_enc, sigmoid_bias_for_mem_enc


class RopeAttention(Attention):
    """sam2's RoPEAttention with its parameter names, real-valued tables and an optional key mask."""

    def forward(
        self,
        q: Float[Tensor, "b queries c"],
        k: Float[Tensor, "b keys ck"],
        v: Float[Tensor, "b keys ck"],
        query_angles: Float[Tensor, "queries pairs"],
        key_angles: Float[Tensor, "keys pairs"],
        key_valid: Bool[Tensor, "b keys"] | None = None,
    ) -> Float[Tensor, "b queries c"]:
        q = self._separate_heads(self.q_proj(q), self.num_heads)
        k = self._separate_heads(self.k_proj(k), self.num_heads)
        v = self._separate_heads(self.v_proj(v), self.num_heads)
        q = rotate(q, query_angles.cos().to(q.dtype), query_angles.sin().to(q.dtype))
        k = rotate(k, key_angles.cos().to(k.dtype), key_angles.sin().to(k.dtype))
        mask = None if key_valid is None else key_valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0)
        return self.out_proj(self._recombine_heads(out))


class _LinspaceOnCpu(TorchFunctionMode):
    """Hiera reads its stochastic depths out of a `torch.linspace` (sam2/modeling/backbones/hieradet.py at 2b90b9f):
    on the meta device there would be nothing to read."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return function(*args, **kwargs)


class Sam2(nn.Module):
    """The weights of SAM 2.1 under sam2's own names (those of SAM2Base) and the four stages that use them."""

    grid_angles: Tensor
    grid_position: Tensor
    memory_position: Tensor

    def __init__(self, config: Sam2Config) -> None:
        super().__init__()
        c, m, grid = config.channels, config.memory_channels, config.grid
        self.config = config
        with _LinspaceOnCpu():
            trunk = Hiera(
                embed_dim=config.embed_dim,
                num_heads=config.num_heads,
                stages=config.stages,
                global_att_blocks=config.global_attention_blocks,
                window_pos_embed_bkg_spatial_size=(config.position_background, config.position_background),
                window_spec=config.window_spec,
            )
        neck = FpnNeck(
            position_encoding=PositionEmbeddingSine(c, warmup_cache=False),
            d_model=c,
            backbone_channel_list=config.backbone_channels,
            fpn_interp_model="nearest",
            fpn_top_down_levels=list(config.top_down_levels),
        )
        self.image_encoder = ImageEncoder(trunk, neck, scalp=1)
        layer = MemoryAttentionLayer(
            activation="relu",
            self_attention=RopeAttention(c, num_heads=1, dropout=config.dropout),
            cross_attention=RopeAttention(c, num_heads=1, dropout=config.dropout, kv_in_dim=m),
            d_model=c,
            dim_feedforward=config.memory_feedforward,
            dropout=config.dropout,
            pos_enc_at_attn=False,
            pos_enc_at_cross_attn_keys=True,
            pos_enc_at_cross_attn_queries=False,
        )
        self.memory_attention = MemoryAttention(c, pos_enc_at_input=True, layer=layer, num_layers=config.memory_layers)
        self.memory_encoder = MemoryEncoder(
            out_dim=m,
            mask_downsampler=MaskDownSampler(embed_dim=c, kernel_size=3, stride=2, padding=1),
            fuser=Fuser(CXBlock(c, layer_scale_init_value=config.fuser_layer_scale), num_layers=2),
            position_encoding=PositionEmbeddingSine(m, warmup_cache=False),
            in_dim=c,
        )
        self.sam_prompt_encoder = PromptEncoder(
            c, (grid, grid), (config.image_size, config.image_size), mask_in_chans=16
        )
        self.sam_mask_decoder = MaskDecoder(
            transformer_dim=c,
            transformer=TwoWayTransformer(depth=2, embedding_dim=c, num_heads=8, mlp_dim=config.decoder_feedforward),
            num_multimask_outputs=3,
            iou_head_hidden_dim=config.iou_hidden,
            use_high_res_features=True,
            iou_prediction_use_sigmoid=True,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            use_multimask_token_for_obj_ptr=True,
        )
        self.obj_ptr_proj = MLP(c, c, c, 3)
        self.obj_ptr_tpos_proj = nn.Linear(c, m)
        self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.maskmem_tpos_enc = nn.Parameter(torch.zeros(config.memory_frames, 1, 1, m))
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, c))
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, c))
        self.no_obj_ptr = nn.Parameter(torch.zeros(1, c))
        self.no_obj_embed_spatial = nn.Parameter(torch.zeros(1, m))
        for table in (self.maskmem_tpos_enc, self.no_mem_embed, self.no_mem_pos_enc, self.no_obj_ptr):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.trunc_normal_(self.no_obj_embed_spatial, std=0.02)

        # Constants of a fixed input size: non-persistent, so that they are no part of a checkpoint.
        self.register_buffer("grid_angles", axial_angles(c, grid, grid), persistent=False)
        self.register_buffer(
            "grid_position", neck.position_encoding._pe(1, torch.device("cpu"), grid, grid), persistent=False
        )
        self.register_buffer(
            "memory_position",
            self.memory_encoder.position_encoding._pe(1, torch.device("cpu"), grid, grid),
            persistent=False,
        )

    @property
    def sizes(self) -> StageSizes:
        grid = self.config.grid
        return StageSizes(
            image_size=self.config.image_size,
            channels=self.config.channels,
            memory_channels=self.config.memory_channels,
            grid=grid,
            mask=4 * grid,
            memory_frames=self.config.memory_frames,
        )

    def encode_image(self, pixels: Float[Tensor, "b 3 size size"], fusion_level: int = -1) -> ImageFeatures:
        """Image encoder and the two high-resolution projections of the mask decoder (SAM2Base.forward_image)."""
        levels = self.image_encoder.neck(self.image_encoder.trunk(pixels))[0][: -self.image_encoder.scalp]
        return ImageFeatures(
            top=levels[-1],
            high_res_s0=self.sam_mask_decoder.conv_s0(levels[0]),
            high_res_s1=self.sam_mask_decoder.conv_s1(levels[1]),
            fusion=levels[fusion_level],
        )

    def attend_memory(self, features: ImageFeatures, memory: MemoryTensors) -> Float[Tensor, "o c h w"]:
        """Memory attention (SAM2Base._prepare_memory_conditioned_features), fixed slots and a key mask.

        A row without any valid memory gives finite numbers without meaning.
        """
        objects, slots, m, h, w = memory.spatial.shape
        c = self.config.channels
        spatial = memory.spatial.flatten(3).transpose(2, 3)  # o s hw m
        temporal = self.maskmem_tpos_enc[:, 0, 0][memory.spatial_tpos]  # o s m
        position = self.memory_position.flatten(2).transpose(1, 2)[:, None] + temporal[:, :, None]  # o s hw m

        splits = c // m  # one pointer becomes c / mem_dim tokens
        rows = memory.pointers.shape[1]
        pointers = memory.pointers.reshape(objects, rows * splits, m)
        distance = memory.pointer_distance
        if self.config.pointer_distance_limit:  # a live stream goes on for hours, training clips do not
            distance = distance.clamp(max=self.config.pointer_distance_limit)
        pointer_time = get_1d_sine_pe(distance / (self.config.max_pointers - 1), dim=c)
        pointer_position = self.obj_ptr_tpos_proj(pointer_time.to(pointers.dtype)).repeat_interleave(splits, dim=1)

        keys = torch.cat((spatial.flatten(1, 2), pointers), dim=1)
        key_position = torch.cat((position.flatten(1, 2), pointer_position), dim=1)
        valid = torch.cat(
            (
                memory.spatial_valid.repeat_interleave(h * w, dim=1),
                memory.pointer_valid.repeat_interleave(splits, dim=1),
            ),
            dim=1,
        )
        # A softmax over no key at all is NaN; such a row is not used by anyone, it only has to stay finite.
        valid = valid | ~valid.any(dim=1, keepdim=True)
        key_angles = torch.cat((self.grid_angles.repeat(slots, 1), self.grid_angles.new_zeros(rows * splits, c // 2)))

        net = self.memory_attention
        x = features.top + 0.1 * self.grid_position
        x = x.flatten(2).transpose(1, 2).expand(objects, -1, -1)
        for layer in net.layers:
            y = layer.norm1(x)
            x = x + layer.dropout1(layer.self_attn(y, y, y, self.grid_angles, self.grid_angles))
            y = layer.norm2(x)
            x = x + layer.dropout2(
                layer.cross_attn_image(y, keys + key_position, keys, self.grid_angles, key_angles, valid)
            )
            y = layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm3(x)))))
            x = x + layer.dropout3(y)
        return net.norm(x).transpose(1, 2).reshape(objects, c, h, w)

    def without_memory(self, features: ImageFeatures) -> Float[Tensor, "b c h w"]:
        """Features of a frame that is decoded from its prompt alone (directly_add_no_mem_embed)."""
        return features.top + self.no_mem_embed.reshape(1, -1, 1, 1)

    def decode_mask(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"],
        prompts: Float[Tensor, "o n c"] | None,
    ) -> MaskPrediction:
        """Mask decoder on conditioned features (SAM2Base._forward_sam_heads); `prompts` None: an empty prompt."""
        objects = conditioned.shape[0]
        # No prompt: SAM 2's empty point and its padding point, both labelled -1.
        empty = self.sam_prompt_encoder.not_a_point_embed.weight.expand(objects, 2, -1)
        sparse = empty if prompts is None else prompts
        multimask = self.config.multimask_tracking if prompts is None else self.config.multimask_prompted
        dense = self.sam_prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(conditioned)
        high_res = [level.expand(objects, -1, -1, -1) for level in (features.high_res_s0, features.high_res_s1)]
        masks, ious, tokens, score = self.sam_mask_decoder(
            image_embeddings=conditioned,
            image_pe=self.sam_prompt_encoder.get_dense_pe().to(conditioned.dtype),
            sparse_prompt_embeddings=sparse.to(conditioned.dtype),
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=high_res,
        )
        best = ious.argmax(dim=1)
        row = torch.arange(objects, device=best.device)
        present = (score > 0).to(tokens.dtype)
        token = tokens[row, best] if tokens.shape[1] > 1 else tokens[:, 0]
        pointer = present * self.obj_ptr_proj(token) + (1 - present) * self.no_obj_ptr
        return MaskPrediction(masks[row, best], ious[row, best], score[:, 0], pointer)

    def encode_memory(self, features: ImageFeatures, prediction: MaskPrediction) -> MemoryEntry:
        """Memory encoder (SAM2Base._encode_new_memory): soft mask, scaled; absent objects get no_obj_embed_spatial."""
        present = (prediction.object_score_logits > 0)[:, None, None, None]
        logits = torch.where(present, prediction.mask_logits[:, None], NO_OBJECT_LOGIT)
        size = (self.config.image_size, self.config.image_size)
        masks = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).to(logits.dtype)
        masks = torch.sigmoid(masks) * MEMORY_MASK_SCALE + MEMORY_MASK_BIAS
        top = features.top.expand(masks.shape[0], -1, -1, -1)
        spatial = self.memory_encoder(top, masks, skip_mask_sigmoid=True)["vision_features"]
        spatial = spatial + (~present).to(spatial.dtype) * self.no_obj_embed_spatial[..., None, None]
        return MemoryEntry(spatial, prediction.pointer)
