# SPDX-License-Identifier: Apache-2.0
"""transformers' Sam2VideoModel (5.23) with a streaming session, driven as its documentation does.

The session grows with the video: frames, masks at full size and memories stay in it. What Sam2VideoProcessor does
around the model is done here in the same steps: the class itself needs torchvision, and time for checking its input,
which the peer is spared.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig
from transformers.models.sam2_video.configuration_sam2_video import (
    Sam2VideoMaskDecoderConfig,
    Sam2VideoPromptEncoderConfig,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from virst_engine.evaluate.peers import Footage, StageClock, autocast, weights_of
from virst_engine.model.config import Sam2Config
from virst_engine.model.pixels import normalise
from virst_engine.model.sam2 import Sam2
from virst_engine.model.sam2_names import to_transformers
from virst_engine.timing import StageTimer
from virst_engine.types import ClickPrompt


def transformers_config(config: Sam2Config) -> Sam2VideoConfig:
    """The same dimensions in transformers' words."""
    c, size, grid = config.channels, config.image_size, config.grid
    background = [config.position_background, config.position_background]
    trunk = Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        image_size=[size, size],
        window_positional_embedding_background_size=background,
        blocks_per_stage=list(config.stages),
        embed_dim_per_stage=config.backbone_channels[::-1],
        num_attention_heads_per_stage=[config.num_heads * 2**i for i in range(4)],
        window_size_per_stage=list(config.window_spec),
        global_attention_blocks=list(config.global_attention_blocks),
    )
    vision = Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=config.backbone_channels,
        backbone_feature_sizes=[[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
        fpn_hidden_size=c,
        fpn_top_down_levels=list(config.top_down_levels),
    )
    decoder = Sam2VideoMaskDecoderConfig(
        hidden_size=c,
        mlp_dim=config.decoder_feedforward,
        iou_head_hidden_dim=config.iou_hidden,
        dynamic_multimask_via_stability=config.dynamic_multimask,
        dynamic_multimask_stability_delta=config.stability_delta,
        dynamic_multimask_stability_thresh=config.stability_threshold,
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=c, image_size=size),
        mask_decoder_config=decoder,
        image_size=size,
        num_maskmem=config.memory_frames,
        multimask_output_in_sam=config.multimask_prompted,
        multimask_output_for_tracking=config.multimask_tracking,
        max_object_pointers_in_encoder=config.max_pointers,
        memory_attention_hidden_size=c,
        memory_attention_num_layers=config.memory_layers,
        memory_attention_feed_forward_hidden_size=config.memory_feedforward,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=c,
        memory_encoder_output_channels=config.memory_channels,
        mask_downsampler_embed_dim=c,
        memory_fuser_embed_dim=c,
        memory_fuser_intermediate_dim=4 * c,
    )


def build_model(config: Sam2Config, device: str) -> Sam2VideoModel:
    """Without weights, in evaluation mode."""
    return Sam2VideoModel(transformers_config(config)).eval().to(device)


class TransformersSession:
    """One streaming session; it gets its frames one by one, as uint8 images."""

    name = "transformers"
    bytes_per_frame_ahead = 0

    def __init__(self, model: Sam2, footage: Footage, *, device: str = "cpu", precision: str = "fp32") -> None:
        self._footage, self._device, self._precision = footage, device, precision
        self.model = build_model(model.config, device)
        self.model.load_state_dict(to_transformers(weights_of(model)), strict=True)
        self._clock = StageClock()
        for stage, owner, method in (
            ("image_encoder", self.model, "get_image_features"),
            ("memory_attention", self.model.memory_attention, "forward"),
            ("mask_decoder", self.model, "_single_frame_forward"),
            ("memory_encoder", self.model, "_encode_new_memory"),
        ):
            setattr(owner, method, self._clock.timed(stage, getattr(owner, method)))
        self._session: Any = None
        self._output: Any = None

    def begin(self, prompts: Sequence[ClickPrompt]) -> Bool[np.ndarray, "o height width"]:
        size = self._footage.size
        session = Sam2VideoInferenceSession(
            video_height=size,
            video_width=size,
            inference_device=self._device,
            inference_state_device=self._device,
            video_storage_device=self._device,
            dtype=torch.float32,
        )
        for name, prompt in enumerate(prompts):
            # A box is its corners, labelled 2 and 3; the model's input is as large as the frame.
            corners = torch.tensor(prompt.box_px).reshape(1, 1, 2, 2)
            labels = torch.tensor([2, 3], dtype=torch.int32).reshape(1, 1, 2)
            slot = session.obj_id_to_idx(name)
            session.add_point_inputs(slot, 0, {"point_coords": corners, "point_labels": labels})
        session.obj_with_new_inputs = list(range(len(prompts)))
        self._session = session
        self._track(self._prepare(0))
        return self._masks()

    def step(self, number: int, timer: StageTimer) -> Bool[np.ndarray, "o height width"]:
        self._clock.timer = timer
        try:
            with timer.stage("preprocess"):
                pixels = self._prepare(number)
            self._track(pixels)
            with timer.stage("postprocess"):
                return self._masks()
        finally:
            self._clock.timer = None

    def logits(self) -> Float[Tensor, "o hm wm"]:
        return self._output.pred_masks[:, 0].float().cpu()

    def end(self) -> None:
        self._session = self._output = None

    def _prepare(self, number: int) -> Float[Tensor, "1 3 size size"]:
        return normalise(torch.from_numpy(self._footage.frame(number)).to(self._device))[None]

    def _track(self, pixels: Float[Tensor, "1 3 size size"]) -> None:
        with autocast(self._device, self._precision):
            self._output = self.model(inference_session=self._session, frame=pixels)

    def _masks(self) -> Bool[np.ndarray, "o height width"]:
        size = (self._footage.size, self._footage.size)
        logits = F.interpolate(self._output.pred_masks.float(), size, mode="bilinear", align_corners=False)
        masks: np.ndarray = (logits[:, 0] > 0.0).cpu().numpy()
        return masks
