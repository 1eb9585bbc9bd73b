# SPDX-License-Identifier: Apache-2.0
"""The stages run by torch, on any of its devices."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from virst_engine.model.sam2 import Sam2
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, StageSizes


class TorchStages:
    """`Stages` on a Sam2 in evaluation mode. Inputs must be on the model's device; no gradients are kept."""

    def __init__(self, sam2: Sam2, *, fusion_level: int, video_size: int) -> None:
        self._sam2 = sam2.eval()
        self._fusion_level = fusion_level
        self.sizes: StageSizes = replace(sam2.sizes, video_size=video_size)

    @property
    def device(self) -> torch.device:
        return self._sam2.no_mem_embed.device

    @torch.inference_mode()
    def image_encoder(self, pixels: Float[Tensor, "b 3 size size"]) -> ImageFeatures:
        return self._sam2.encode_image(pixels, self._fusion_level)

    @torch.inference_mode()
    def memory_attention(self, features: ImageFeatures, memory: MemoryTensors) -> Float[Tensor, "o c h w"]:
        return self._sam2.attend_memory(features, memory)

    @torch.inference_mode()
    def mask_decoder(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"] | None,
        prompts: Float[Tensor, "o n c"] | None,
    ) -> MaskPrediction:
        if conditioned is None:
            if prompts is None:
                raise ValueError("mask_decoder needs memory-conditioned features or prompts, got neither")
            conditioned = self._sam2.without_memory(features).expand(prompts.shape[0], -1, -1, -1)
        return self._sam2.decode_mask(features, conditioned, prompts)

    @torch.inference_mode()
    def memory_encoder(self, features: ImageFeatures, prediction: MaskPrediction) -> MemoryEntry:
        return self._sam2.encode_memory(features, prediction)
