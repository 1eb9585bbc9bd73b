# SPDX-License-Identifier: Apache-2.0
"""The segmenter: SAM 2.1's networks as four stages without state.

The modules are those of `sam2.modeling` (facebookresearch/sam2 2b90b9f), so official checkpoints fit by name. What
SAM2Base keeps in dictionaries, the caller keeps: memory comes in as `MemoryTensors`. Departures from
sam2/modeling/sam2_base.py:
- memories sit in a fixed number of slots with a key mask instead of a concatenation that grows
  (`_prepare_memory_conditioned_features`); masked softmax makes the result the same;
- RoPE is real-valued, on halves instead of pairs of channels (`RopeAttention`);
- of the decoder's four masks only the one that is wanted is drawn;
- the trunk does not work on the padding of its windows (sam2_trunk.py);
- prompts come as tokens: embedded points, or VIRST's embeddings in their place, without padding point.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from virst_engine.errors import VirstError
from virst_engine.model.config import Sam2Config
from virst_engine.model.rope import axial_angles
from virst_engine.model.sam2_prompts import PromptTables
from virst_engine.model.sam2_trunk import pad_late
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, PromptTokens, StageSizes

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
# Score of a key that is not there: its weight is exactly 0, and a row without any key stays finite, in float16 too.
NO_KEY = -30000.0
MEMORY_MASK_SCALE, MEMORY_MASK_BIAS = 20.0, -10.0  # sigmoid_scale_for_mem_enc, sigmoid_bias_for_mem_enc


Rope = tuple[Float[Tensor, "tokens pairs"], Float[Tensor, "tokens pairs"]]  # cosines, sines


class RopeAttention(Attention):
    """sam2's RoPEAttention (one head) with its parameter names, real-valued tables and an optional key mask.

    Channels 2i and 2i + 1 turn together. Here the projections' rows are taken in another order, evens before odds, for
    queries and keys alike: scores stay the same, and a rotation works on two halves that lie side by side.

    The weights of an average sum to 1, so that values can also be projected after it, which is a quarter of that work
    where memories have 64 channels. But attention of which queries and values differ in width is fused neither by GPUs
    nor by torch on CPUs.
    """

    halves: Tensor
    projects_values_first = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.num_heads == 1, "SAM 2's memory attention has one head"
        order = torch.arange(self.internal_dim)
        self.register_buffer("halves", torch.cat((order[0::2], order[1::2])), persistent=False)

    def project(self, layer: nn.Linear, x: Float[Tensor, "b tokens ck"]) -> Float[Tensor, "b tokens c"]:
        """Queries or keys, evens before odds."""
        return F.linear(x, layer.weight[self.halves], layer.bias[self.halves])

    def rotate(self, x: Float[Tensor, "o cells c"], rope: Rope) -> Float[Tensor, "o cells c"]:
        """Queries or keys of one image, turned by their place."""
        return rotate_halves(x, rope)

    def rotate_memory(
        self, x: Float[Tensor, "o keys c"], rope: Rope, slots: int | torch.SymInt
    ) -> Float[Tensor, "o keys c"]:
        """Keys of `slots` images, turned by their place, and of pointers, which have none."""
        cells = rope[0].shape[0]
        turned = rotate_halves(x[:, : slots * cells].unflatten(1, (slots, cells)), rope).flatten(1, 2)
        return torch.cat((turned, x[:, slots * cells :]), dim=1)

    def attend(
        self,
        q: Float[Tensor, "o queries c"],
        k: Float[Tensor, "o keys c"],
        v: Float[Tensor, "o keys ck"],
        bias: Float[Tensor, "o keys"] | None = None,
    ) -> Float[Tensor, "o queries c"]:
        """`q` and `k` projected and rotated, `v` not projected yet; `bias` is added to the scores."""
        mask = None if bias is None else bias[:, None, None, :]
        p = self.dropout_p if self.training else 0.0
        v = self.v_proj(v) if self.projects_values_first else v
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask, dropout_p=p)[:, 0]
        return self.out_proj(out if self.projects_values_first else self.v_proj(out))


def rotate_halves(x: Float[Tensor, "*batch tokens c"], rope: Rope) -> Float[Tensor, "*batch tokens c"]:
    """Rotate channel i of the first half with channel i of the second."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


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

    grid_cos: Tensor
    grid_sin: Tensor
    memory_cos: Tensor
    memory_sin: Tensor
    grid_position: Tensor
    memory_position: Tensor
    dense_position: Tensor

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
        self.image_encoder = ImageEncoder(pad_late(trunk), neck, scalp=1)
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

        self._bake_positions()

    def _bake_positions(self) -> None:
        """Constants of one input size: non-persistent, so that they are no part of a checkpoint."""
        grid, device = self.config.grid, self.no_mem_embed.device
        angles = axial_angles(self.config.channels, grid, grid)
        position = self.image_encoder.neck.position_encoding._pe(1, torch.device("cpu"), grid, grid)
        constants = {"grid_cos": angles.cos(), "grid_sin": angles.sin(), "grid_position": position}
        for name, table in constants.items():
            # Weights that are not loaded yet have no device; the tables stay where they were computed.
            own = table if device.type == "meta" else table.to(device)
            self.register_buffer(name, own, persistent=False)
        self.pool_memory(self.config.memory_pool)

    def pool_memory(self, pool: int) -> None:
        """Let pool x pool cells of a memory be one key from now on; the weights stay as they are."""
        c, grid = self.config.channels, self.config.grid
        if grid % pool:
            raise ValueError(f"memory_pool must divide the grid of {grid} x {grid}, got {pool}")
        self.config = replace(self.config, memory_pool=pool)
        # A pooled key stands in the middle of its cells.
        angles = axial_angles(c, grid // pool, grid // pool, stride=pool)
        position = self.memory_encoder.position_encoding._pe(1, torch.device("cpu"), grid, grid)
        constants = {
            "memory_cos": angles.cos(),
            "memory_sin": angles.sin(),
            "memory_position": F.avg_pool2d(position, pool),
        }
        for name, table in constants.items():
            self.register_buffer(name, table.to(self.grid_cos.device), persistent=False)

    def at_image_size(self, image_size: int) -> "Sam2":
        """This model for images of another size, a multiple of 32. The weights are shared, not copied.

        Raises ValueError for another size, and where `memory_pool` does not divide the grid.
        """
        if image_size < 32 or image_size % 32:
            raise ValueError(f"the image size must be a multiple of 32, 32 or more, got {image_size}")
        other = copy.copy(self)
        # What a shallow copy shares too, and what is to differ.
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.config = replace(self.config, image_size=image_size)
        grid = other.config.grid
        prompt_encoder = copy.copy(self.sam_prompt_encoder)
        prompt_encoder.input_image_size = (image_size, image_size)
        prompt_encoder.image_embedding_size = (grid, grid)
        prompt_encoder.mask_input_size = (4 * grid, 4 * grid)
        other.sam_prompt_encoder = prompt_encoder
        other._bake_positions()
        return other

    @property
    def prompts(self) -> PromptTables:
        """The parts that turn clicks and masks into tokens; they share this model's weights."""
        return PromptTables(self.sam_prompt_encoder, self.mask_downsample, self.no_mem_embed, self.no_obj_ptr)

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
            reads_boxes=self.config.reads_boxes,
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

    def attend_memory(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: Int[Tensor, " o"] | None = None
    ) -> Float[Tensor, "o c h w"]:
        """Memory attention (SAM2Base._prepare_memory_conditioned_features), fixed slots and a key mask.

        A row without any valid memory gives finite numbers without meaning. Up to the first cross attention the objects
        of a frame do not differ: that much is computed once for all of them.

        `frame_of`: which of several frames each object is looked for in; None: there is one.
        """
        tokens, queries = self.memory_queries(features)
        if frame_of is not None:
            tokens, queries = tokens[frame_of], queries[frame_of]
        return self.read_memory(tokens, queries, memory)

    def memory_queries(self, features: ImageFeatures) -> tuple[Float[Tensor, "b hw c"], Float[Tensor, "b hw c"]]:
        """What the objects of a frame share: its tokens, and the first question that they ask their memories."""
        x = (features.top + 0.1 * self.grid_position).flatten(2).transpose(1, 2)
        return self._look_around(self.memory_attention.layers[0], x)

    def read_memory(
        self,
        tokens: Float[Tensor, "b hw c"],
        queries: Float[Tensor, "b hw c"],
        memory: MemoryTensors,
        *,
        is_complete: bool = False,
    ) -> Float[Tensor, "o c h w"]:
        """The rest of `attend_memory`; `is_complete`: every slot and pointer is valid, and none is looked at for it."""
        objects, slots = memory.spatial.shape[:2]
        keys, position = self._memory_keys(memory)
        bias = self._key_bias(memory, is_complete=is_complete)
        bias = None if bias is None else bias.to(queries.dtype)
        memory_rope = (self.memory_cos, self.memory_sin)
        net, grid = self.memory_attention, self.config.grid
        x, q = tokens, queries
        for i, layer in enumerate(net.layers):
            if i:
                x, q = self._look_around(layer, x)
            attention = layer.cross_attn_image
            k = attention.rotate_memory(attention.project(attention.k_proj, keys + position), memory_rope, slots)
            x = x + layer.dropout2(attention.attend(q.expand(objects, -1, -1), k, keys, bias))
            y = layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm3(x)))))
            x = x + layer.dropout3(y)
        return net.norm(x).transpose(1, 2).unflatten(2, (grid, grid))

    def _look_around(
        self, layer: MemoryAttentionLayer, x: Float[Tensor, "b hw c"]
    ) -> tuple[Float[Tensor, "b hw c"], Float[Tensor, "b hw c"]]:
        """A layer's self attention, and the queries of its cross attention."""
        rope = (self.grid_cos, self.grid_sin)
        attention, y = layer.self_attn, layer.norm1(x)
        q = attention.rotate(attention.project(attention.q_proj, y), rope)
        k = attention.rotate(attention.project(attention.k_proj, y), rope)
        x = x + layer.dropout1(attention.attend(q, k, y))
        attention = layer.cross_attn_image
        return x, attention.rotate(attention.project(attention.q_proj, layer.norm2(x)), rope)

    def _memory_keys(self, memory: MemoryTensors) -> tuple[Float[Tensor, "o keys m"], Float[Tensor, "o keys m"]]:
        """Memories as tokens (slot by slot, then pointers), and where and when they are."""
        c, m, pool = self.config.channels, self.config.memory_channels, self.config.memory_pool
        spatial = memory.spatial
        if pool > 1:
            spatial = F.avg_pool2d(spatial.flatten(0, 1), pool).unflatten(0, spatial.shape[:2])
        spatial = spatial.flatten(3).transpose(2, 3)  # o s cells m
        temporal = self.maskmem_tpos_enc[:, 0, 0][memory.spatial_tpos]  # o s m
        place = self.memory_position.flatten(2).transpose(1, 2)[:, None] + temporal[:, :, None]  # o s cells m

        splits = c // m  # one pointer becomes c / mem_dim tokens
        pointers = memory.pointers.reshape(memory.pointers.shape[0], -1, m)
        distance = memory.pointer_distance
        if self.config.pointer_distance_limit:  # a live stream goes on for hours, training clips do not
            distance = distance.clamp(max=self.config.pointer_distance_limit)
        time = get_1d_sine_pe(distance / (self.config.max_pointers - 1), dim=c)
        age = self.obj_ptr_tpos_proj(time.to(pointers.dtype)).repeat_interleave(splits, dim=1)
        keys = torch.cat((spatial.flatten(1, 2), pointers), dim=1)
        return keys, torch.cat((place.flatten(1, 2), age), dim=1)

    def _key_bias(self, memory: MemoryTensors, *, is_complete: bool) -> Float[Tensor, "o keys"] | None:
        """What is added to the scores of keys; None: nothing.

        A pooled key speaks for pool * pool cells: the logarithm of their number keeps its share of the softmax.
        """
        pool, cells = self.config.memory_pool, self.memory_cos.shape[0]
        splits = self.config.channels // self.config.memory_channels
        if is_complete and pool == 1:
            return None
        of_spatial = torch.full_like(memory.spatial_valid, 2 * math.log(pool), dtype=torch.float32)
        of_pointers = torch.zeros_like(memory.pointer_distance, dtype=torch.float32)
        if not is_complete:
            of_spatial = torch.where(memory.spatial_valid, of_spatial, NO_KEY)
            of_pointers = torch.where(memory.pointer_valid, of_pointers, NO_KEY)
        return torch.cat(
            (of_spatial.repeat_interleave(cells, dim=1), of_pointers.repeat_interleave(splits, dim=1)), dim=1
        )

    def without_memory(self, features: ImageFeatures) -> Float[Tensor, "b c h w"]:
        """Features of a frame that is decoded from its prompt alone (directly_add_no_mem_embed)."""
        return features.top + self.no_mem_embed.reshape(1, -1, 1, 1)

    def decode_mask(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"],
        prompts: PromptTokens | None,
    ) -> MaskPrediction:
        """Mask decoder on conditioned features (SAM2Base._forward_sam_heads); `prompts` None: an empty prompt.

        Which of the four masks it is, is known before they are drawn: only that one is (two, where the stability of the
        single mask decides). `mask_logits` of an absent object are not erased.
        """
        decoder, objects = self.sam_mask_decoder, conditioned.shape[0]
        if prompts is None:
            # SAM 2's empty point and its padding point, both labelled -1.
            prompts = PromptTokens(self.sam_prompt_encoder.not_a_point_embed.weight.expand(objects, 2, -1))
            default = self.config.multimask_tracking
        else:
            default = self.config.multimask_prompted
        dense = self.sam_prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if prompts.dense is not None:
            dense = dense + prompts.dense
        own = torch.cat((decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight))
        tokens = torch.cat((own.expand(objects, -1, -1), prompts.sparse.to(own.dtype)), dim=1)
        bias = None
        if prompts.valid is not None:
            valid = torch.cat((prompts.valid.new_ones(objects, own.shape[0]), prompts.valid), dim=1)
            bias = torch.where(valid, 0.0, NO_KEY).to(tokens.dtype)
        position = self.sam_prompt_encoder.get_dense_pe().to(tokens.dtype).flatten(2).transpose(1, 2)
        image = (conditioned + dense).flatten(2).transpose(1, 2)
        tokens, image = two_way_transformer(decoder.transformer, tokens, image, position, bias)

        score = decoder.pred_obj_score_head(tokens[:, 0])[:, 0]
        ious = decoder.iou_prediction_head(tokens[:, 1])
        mask_tokens = tokens[:, 2 : 2 + decoder.num_mask_tokens]
        upscaled = self._upscale(image.transpose(1, 2).reshape(conditioned.shape), features)
        if prompts.multimask is None and not default and not self.config.dynamic_multimask:
            logits = _draw(decoder, mask_tokens[:, :1], upscaled)[:, 0]
            iou, token = ious[:, 0], mask_tokens[:, 0]
        else:
            multimask = prompts.multimask
            if multimask is None:
                multimask = torch.full_like(score, float(default)).bool()
            logits, iou, token = self._choose_mask(ious, mask_tokens, upscaled, multimask)
        present = (score > 0).to(token.dtype)[:, None]
        pointer = present * self.obj_ptr_proj(token) + (1 - present) * self.no_obj_ptr
        return MaskPrediction(logits, iou, score, pointer)

    def _upscale(self, image: Float[Tensor, "o c h w"], features: ImageFeatures) -> Float[Tensor, "o cs hm wm"]:
        grow1, norm, activation1, grow2, activation2 = self.sam_mask_decoder.output_upscaling
        x = activation1(norm(grow1(image) + features.high_res_s1))
        upscaled: Tensor = activation2(grow2(x) + features.high_res_s0)
        return upscaled

    def _choose_mask(
        self,
        ious: Float[Tensor, "o masks"],
        tokens: Float[Tensor, "o masks c"],
        upscaled: Float[Tensor, "o cs hm wm"],
        multimask: Bool[Tensor, " o"],
    ) -> tuple[Float[Tensor, "o hm wm"], Float[Tensor, " o"], Float[Tensor, "o c"]]:
        """The best of the three masks or the single one; logits, predicted IoU, token (for the object pointer).

        With `dynamic_multimask` a single mask that is not stable gives way to the best of the three, but for its token
        (MaskDecoder._dynamic_multimask_via_stability).
        """
        decoder = self.sam_mask_decoder
        best = ious[:, 1:].argmax(dim=1) + 1
        best_iou = ious.gather(1, best[:, None])[:, 0]
        drawn = _draw(decoder, tokens, upscaled, chosen=torch.stack((torch.zeros_like(best), best), dim=1))
        takes_best = multimask
        if self.config.dynamic_multimask:
            single, delta = drawn[:, 0].flatten(1), self.config.stability_delta
            union = (single > -delta).float().sum(dim=1)
            stability = torch.where(union > 0, (single > delta).float().sum(dim=1) / union.clamp(min=1.0), 1.0)
            takes_best = multimask | (stability < self.config.stability_threshold)
        logits = torch.where(takes_best[:, None, None], drawn[:, 1], drawn[:, 0])
        best_token = tokens.gather(1, best[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
        token = torch.where(multimask[:, None], best_token, tokens[:, 0])
        return logits, torch.where(takes_best, best_iou, ious[:, 0]), token

    def encode_memory(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: Bool[Tensor, " o"] | None = None
    ) -> MemoryEntry:
        """Memory encoder (SAM2Base._encode_new_memory): soft mask, scaled; absent objects get no_obj_embed_spatial.

        Args:
            binarize: objects whose mask a user has seen and approved (binarize_mask_from_pts_for_mem_enc): 0 or 1.
        """
        present = (prediction.object_score_logits > 0)[:, None, None, None]
        logits = torch.where(present, prediction.mask_logits[:, None], NO_OBJECT_LOGIT)
        size = (self.config.image_size, self.config.image_size)
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).to(logits.dtype)
        masks = torch.sigmoid(logits)
        if binarize is not None:
            masks = torch.where(binarize[:, None, None, None], (logits > 0).to(masks.dtype), masks)
        masks = masks * MEMORY_MASK_SCALE + MEMORY_MASK_BIAS
        # MemoryEncoder.forward, which projects the frame once for each object.
        net = self.memory_encoder
        spatial = net.out_proj(net.fuser(net.pix_feat_proj(features.top) + net.mask_downsampler(masks)))
        spatial = spatial + (~present).to(spatial.dtype) * self.no_obj_embed_spatial[..., None, None]
        return MemoryEntry(spatial, prediction.pointer)


def two_way_transformer(
    net: TwoWayTransformer,
    tokens: Float[Tensor, "o t c"],
    image: Float[Tensor, "o hw c"],
    image_position: Float[Tensor, "1 hw c"],
    token_bias: Float[Tensor, "o t"] | None,
) -> tuple[Float[Tensor, "o t c"], Float[Tensor, "o hw c"]]:
    """sam2's TwoWayTransformer (modeling/sam/transformer.py) with a bias on tokens as keys: NO_KEY is no token."""
    position = tokens
    for block in net.layers:
        if block.skip_first_layer_pe:
            tokens = _attend(block.self_attn, tokens, tokens, tokens, token_bias)
        else:
            q = tokens + position
            tokens = tokens + _attend(block.self_attn, q, q, tokens, token_bias)
        tokens = block.norm1(tokens)
        k = image + image_position
        tokens = block.norm2(tokens + _attend(block.cross_attn_token_to_image, tokens + position, k, image))
        tokens = block.norm3(tokens + block.mlp(tokens))
        q = tokens + position
        image = block.norm4(image + _attend(block.cross_attn_image_to_token, k, q, tokens, token_bias))
    k = image + image_position
    tokens = tokens + _attend(net.final_attn_token_to_image, tokens + position, k, image)
    return net.norm_final_attn(tokens), image


def _attend(
    attention: Attention,
    q: Float[Tensor, "o queries c"],
    k: Float[Tensor, "o keys c"],
    v: Float[Tensor, "o keys c"],
    key_bias: Float[Tensor, "o keys"] | None = None,
) -> Float[Tensor, "o queries c"]:
    projected = ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    q, k, v = (layer(x).unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for layer, x in projected)
    mask = None if key_bias is None else key_bias[:, None, None, :]
    out: Tensor = attention.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    return out


def _draw(
    decoder: MaskDecoder,
    tokens: Float[Tensor, "o masks c"],
    upscaled: Float[Tensor, "o cs hm wm"],
    *,
    chosen: Int[Tensor, "o drawn"] | None = None,
) -> Float[Tensor, "o drawn hm wm"]:
    """The masks of mask tokens 0, 1, ..., or of the chosen ones; each token has a hypernetwork of its own."""
    networks = decoder.output_hypernetworks_mlps[: tokens.shape[1]]
    weights = torch.stack([network(tokens[:, i]) for i, network in enumerate(networks)], dim=1)
    if chosen is not None:
        weights = weights.gather(1, chosen[:, :, None].expand(-1, -1, weights.shape[2]))
    return (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
