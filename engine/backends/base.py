# SPDX-License-Identifier: Apache-2.0
"""What the fast path needs of a model: four stages."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, StageSizes


@runtime_checkable  # the type checker of the tests asks for it
class Stages(Protocol):
    """The exported unit of work. All calls are deterministic and keep no state: memory is an argument."""

    sizes: StageSizes

    def image_encoder(self, pixels: Float[Tensor, "b 3 size size"]) -> ImageFeatures:
        """`pixels`: normalised (ImageNet mean and deviation), squashed to the model's square input."""
        ...

    def memory_attention(self, features: ImageFeatures, memory: MemoryTensors) -> Float[Tensor, "o c h w"]:
        """Condition one frame (b = 1 or b = o) on the memories of o objects; rows without a valid one are undefined."""
        ...

    def mask_decoder(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"] | None,
        prompts: Float[Tensor, "o n c"] | None,
    ) -> MaskPrediction:
        """Decode o objects. `conditioned` None: an anchor (no_mem_embed is added); `prompts` None: propagation."""
        ...

    def memory_encoder(self, features: ImageFeatures, prediction: MaskPrediction) -> MemoryEntry:
        """Encode the predicted masks of one frame (b = 1 or b = o) into memories."""
        ...
