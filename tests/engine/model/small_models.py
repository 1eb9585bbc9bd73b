# SPDX-License-Identifier: Apache-2.0
"""Models with every part at widths that run in milliseconds, and weights that leave no part without effect."""

from dataclasses import replace

import torch
from torch import nn

from virst_engine.model.config import (
    FusionConfig,
    LanguageModelConfig,
    Sam2Config,
    VideoEncoderConfig,
    VirstConfig,
)
from virst_engine.model.virst import Virst
from virst_engine.model.words import SPECIAL_TOKENS

WORDS = ("the", "red", "blue", "ball", "box", "left", "of", "big", "can", "is", "there")

SMALL_SAM2 = Sam2Config(
    image_size=64,
    embed_dim=16,
    num_heads=1,
    stages=(1, 1, 2, 1),
    global_attention_blocks=(3,),
    window_spec=(8, 4, 4, 2),
    position_background=4,
    top_down_levels=(2, 3),
    channels=32,
    memory_channels=16,
    memory_layers=3,
    memory_feedforward=48,
    memory_frames=5,
    max_pointers=8,
    decoder_feedforward=64,
    iou_hidden=16,
    fuser_layer_scale=0.1,
    dropout=0.0,
    multimask_prompted=True,
    multimask_tracking=True,
)

SMALL = VirstConfig(
    name="small",
    sam2=SMALL_SAM2,
    video=VideoEncoderConfig(
        image_size=64, stem_channels=(8, 8, 16, 16), layers=1, heads=2, feedforward=32, clip_frames=4, max_frames=16
    ),
    language=LanguageModelConfig(
        hidden=32, layers=2, heads=4, kv_heads=2, feedforward=48,
        vocabulary=len(WORDS) + SPECIAL_TOKENS, rope_theta=1e4, max_positions=256,
    ),
    fusion=FusionConfig(
        st_tokens=3, shared_st_embedding=False, initial_heads=4, heads=2, layers=2, feedforward=48, max_frames=16,
        feature_level=0, position_in_values=True,
    ),
    words=WORDS,
)  # fmt: skip


def liven(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a size that matters: embeddings that start near zero would hide what they are for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                deviation = 0.7 if parameter.shape[:-1].numel() < 10 else 1.0 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return module.eval()


def small_virst(config: VirstConfig = SMALL, seed: int = 0) -> Virst:
    """In evaluation mode; the same weights for the same seed, constants included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Virst(config)
    liven(model, seed)
    return model


def with_fusion(config: VirstConfig = SMALL, **changes: object) -> VirstConfig:
    return replace(config, fusion=replace(config.fusion, **changes))  # type: ignore[arg-type]
