# SPDX-License-Identifier: Apache-2.0
"""SAM 2.1 as others build it, for comparison: sam2's own predictor and transformers' Sam2VideoModel."""

from functools import partial
from unittest import mock

import torch
from sam2.build_sam import build_sam2_video_predictor
from sam2.sam2_video_predictor import SAM2VideoPredictor
from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoPromptEncoderConfig

from virst_engine.model.config import Sam2Config

SAM2_CONFIGS = {
    "tiny": "configs/sam2.1/sam2.1_hiera_t.yaml",
    "small": "configs/sam2.1/sam2.1_hiera_s.yaml",
    "base-plus": "configs/sam2.1/sam2.1_hiera_b+.yaml",
    "large": "configs/sam2.1/sam2.1_hiera_l.yaml",
}


def sam2_predictor(config_file: str, image_size: int = 1024) -> SAM2VideoPredictor:
    """sam2's predictor with random weights, from one of its own configuration files."""
    size = f"++model.image_size={image_size}"
    return build_sam2_video_predictor(config_file, ckpt_path=None, device="cpu", hydra_overrides_extra=[size])


def sam2_predictor_without_numbers(config_file: str) -> SAM2VideoPredictor:
    """On the meta device: names and shapes of 224 million parameters in no time."""
    with (
        torch.device("meta"),
        mock.patch.object(torch, "linspace", partial(torch.linspace, device="cpu")),  # Hiera reads its numbers
        mock.patch.object(torch.cuda, "is_available", return_value=False),  # else sam2 moves its RoPE tables to the GPU
    ):
        return build_sam2_video_predictor(config_file, ckpt_path=None, device="meta")


def transformers_config(config: Sam2Config) -> Sam2VideoConfig:
    """The same dimensions in transformers' words. What the published sizes share is its default."""
    size, grid = config.image_size, config.grid
    widths, heads = config.backbone_channels[::-1], [config.num_heads * 2**i for i in range(4)]
    background = [config.position_background, config.position_background]
    trunk = Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        image_size=[size, size],
        window_positional_embedding_background_size=background,
        blocks_per_stage=list(config.stages),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=heads,
        window_size_per_stage=list(config.window_spec),
        global_attention_blocks=list(config.global_attention_blocks),
    )
    vision = Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=config.backbone_channels,
        backbone_feature_sizes=[[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
        fpn_top_down_levels=list(config.top_down_levels),
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(image_size=size),
        image_size=size,
        memory_attention_rope_feat_sizes=[grid, grid],
    )


def transformers_model(config: Sam2Config) -> Sam2VideoModel:
    """With random weights; the two copies of the prompts' positional encoding are equal, as in all published models."""
    model = Sam2VideoModel(transformers_config(config)).eval()
    matrix = model.prompt_encoder.shared_embedding.positional_embedding
    model.shared_image_embedding.positional_embedding.copy_(matrix)
    return model
