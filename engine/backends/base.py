# SPDX-License-Identifier: Apache-2.0
"""What the fast path needs of a model: four stages, and what turns a user's prompts into their tokens."""

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from virst_engine.types import (
    ImageFeatures,
    MaskPrediction,
    MemoryEntry,
    MemoryTensors,
    PromptTokens,
    StageSizes,
)


@runtime_checkable  # the type checker of the tests asks for it
class Stages(Protocol):
    """The exported unit of work. All calls are deterministic and keep no state: memory is an argument.

    What a stage returns may be overwritten by its next call: copy what has to outlive it.
    """

    sizes: StageSizes
    takes_several_frames: bool  # one call of each stage may serve the frames of several cameras
    takes_fewer_memories: bool  # their number may change from frame to frame, and fewer cost less

    def at_image_size(self, image_size: int) -> "Stages | None":
        """These stages, with the same weights, for images of another size; None where theirs is fixed."""
        ...

    def image_encoder(self, pixels: Float[Tensor, "b 3 size size"]) -> ImageFeatures:
        """`pixels`: normalised (ImageNet mean and deviation), squashed to the model's square input. b = 1 unless
        `takes_several_frames`."""
        ...

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: Int[Tensor, " o"] | None = None
    ) -> Float[Tensor, "o c h w"]:
        """Condition one frame (b = 1) on the memories of o objects; rows without a valid one are undefined.

        `frame_of`, for stages that take several frames: which of b frames each object is looked for in.
        """
        ...

    def mask_decoder(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"] | None,
        prompts: PromptTokens | None,
    ) -> MaskPrediction:
        """Decode o objects (b = 1 or b = o). `conditioned` None: an anchor, without memory; `prompts` None: tracking.

        Raises ValueError when both are None.
        """
        ...

    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: Bool[Tensor, " o"] | None = None
    ) -> MemoryEntry:
        """Encode the predicted masks (b = 1 or b = o) into memories; `binarize`: those that a user has approved."""
        ...

    def click_tokens(
        self,
        points: Float[Tensor, "o p 2"],
        labels: Int[Tensor, "o p"],
        mask_logits: Float[Tensor, "o hm wm"] | None = None,
    ) -> PromptTokens:
        """Points in pixels of the model's input; labels 1 object, 0 not, 2 and 3 corners of a box, -1 padding.

        `mask_logits`: the mask that they correct.
        """
        ...

    def mask_prediction(self, features: ImageFeatures, mask: Float[Tensor, "o 1 size size"]) -> MaskPrediction:
        """A user's mask (0 or 1, at the model's input size) as if the decoder had predicted it, pointer included."""
        ...
