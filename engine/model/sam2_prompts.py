# SPDX-License-Identifier: Apache-2.0
"""Boxes, points and masks -> what the mask decoder reads (SAM2Base._forward_sam_heads, _use_mask_as_output).

Prompts are rare, and their number varies: they run in torch on every backend, on the few small weights that are kept
here. facebookresearch/sam2 2b90b9f.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from virst_engine.errors import VirstError
from virst_engine.types import ImageFeatures, MaskPrediction, PromptTokens

try:
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
except ModuleNotFoundError as error:
    raise VirstError(
        f"the package {error.name} is missing; run ./scripts/setup, or: pip install --no-deps sam2==1.1.0"
    ) from error

BOX_CORNERS = (2, 3)  # labels of a box's top left and bottom right corner
NOT_A_POINT = -1
MASK_SCALE, MASK_BIAS = 20.0, -10.0  # out_scale, out_bias: a mask that the user gave, as logits
LARGEST_LOGIT = 32.0  # of a mask that is corrected
MOST_POINTS_FOR_THREE_MASKS = 1  # multimask_max_pt_num: one click is ambiguous, a box or two clicks are not


class PromptTables(nn.Module):
    """The parts of SAM 2 that a prompt needs besides the mask decoder, under sam2's own names."""

    no_mem_embed: Tensor
    no_obj_ptr: Tensor

    def __init__(
        self, prompt_encoder: PromptEncoder, mask_downsample: nn.Conv2d, no_mem_embed: Tensor, no_obj_ptr: Tensor
    ) -> None:
        super().__init__()
        self.sam_prompt_encoder, self.mask_downsample = prompt_encoder, mask_downsample
        self.register_buffer("no_mem_embed", no_mem_embed.detach())
        self.register_buffer("no_obj_ptr", no_obj_ptr.detach())

    @staticmethod
    def empty(channels: int, image_size: int) -> "PromptTables":
        """Tables for `load_state_dict`, without weights."""
        grid = image_size // 16
        return PromptTables(
            PromptEncoder(channels, (grid, grid), (image_size, image_size), mask_in_chans=16),
            nn.Conv2d(1, 1, kernel_size=4, stride=4),
            torch.zeros(1, 1, channels),
            torch.zeros(1, channels),
        )

    def without_memory(self, features: ImageFeatures) -> Float[Tensor, "b c h w"]:
        """Features of a frame that is decoded from its prompt alone (directly_add_no_mem_embed)."""
        return features.top + self.no_mem_embed.reshape(1, -1, 1, 1)

    def clicks(
        self,
        points: Float[Tensor, "o p 2"],
        labels: Int[Tensor, "o p"],
        mask_logits: Float[Tensor, "o hm wm"] | None = None,
    ) -> PromptTokens:
        """Points in pixels of the model's input. Labels: 1 object, 0 background, 2 and 3 corners of a box, -1 padding.

        SAM 2's padding point comes last, as one row more. `mask_logits`: the mask that the points correct
        (prev_sam_mask_logits).
        """
        sparse = self.sam_prompt_encoder._embed_points(points, labels, pad=True)
        count = (labels != NOT_A_POINT).sum(dim=1)
        dense = None
        if mask_logits is not None:
            dense = self._dense(mask_logits[:, None].clamp(-LARGEST_LOGIT, LARGEST_LOGIT))
        return PromptTokens(sparse, multimask=count <= MOST_POINTS_FOR_THREE_MASKS, dense=dense)

    def mask(self, mask: Float[Tensor, "o 1 size size"]) -> PromptTokens:
        """A mask of 0 and 1 at the model's input size, as a dense prompt beside an empty point."""
        encoder = self.sam_prompt_encoder
        objects = mask.shape[0]
        return PromptTokens(
            sparse=encoder.not_a_point_embed.weight.expand(objects, 2, -1),
            multimask=torch.zeros(objects, dtype=torch.bool, device=mask.device),
            dense=self._dense(self.mask_downsample(mask)),
        )

    def _dense(self, mask: Float[Tensor, "o 1 hm wm"]) -> Float[Tensor, "o c h w"]:
        encoder = self.sam_prompt_encoder
        dense: Tensor = encoder._embed_masks(mask) - encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return dense

    def mask_as_output(self, mask: Float[Tensor, "o 1 size size"], decoded: MaskPrediction) -> MaskPrediction:
        """The user's mask in place of the one `decoded` from it, whose object pointer stays (_use_mask_as_output)."""
        logits = mask * MASK_SCALE + MASK_BIAS
        low_res = F.interpolate(logits, scale_factor=0.25, mode="bilinear", antialias=True)[:, 0]
        present = mask.flatten(1).any(dim=1).to(mask.dtype)
        pointer = present[:, None] * decoded.pointer + (1 - present[:, None]) * self.no_obj_ptr
        return MaskPrediction(low_res, torch.ones_like(present), MASK_SCALE * present + MASK_BIAS, pointer)
