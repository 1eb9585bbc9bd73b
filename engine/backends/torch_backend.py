# SPDX-License-Identifier: Apache-2.0
"""The stages run by torch, on any of its devices."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from virst_engine.errors import BackendError
from virst_engine.model.sam2 import Sam2
from virst_engine.types import (
    ImageFeatures,
    MaskPrediction,
    MemoryEntry,
    MemoryTensors,
    PromptTokens,
    StageSizes,
)

OBJECT_BUCKETS = (1, 4, 8)  # numbers of objects that compiled code is made for; then multiples of the last
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_TOGETHER = 2**22  # numbers in the middle of the feed-forward layers of memory attention: 16 MB
SAFE_IN_FP16 = ("image_encoder", "memory_attention")  # in the others fp16 errors grow through the recurrent memory


class TorchStages:
    """`Stages` on a Sam2 in evaluation mode. Inputs must be on the model's device; no gradients are kept.

    What goes in and comes out is float32, whatever the stages compute in.
    """

    name = "torch"

    def __init__(
        self,
        sam2: Sam2,
        *,
        fusion_level: int = -1,
        video_size: int = 128,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        """`compiled`: by torch.compile, with CUDA graphs on a GPU. The first frames with 1, with up to 4, with up to 8
        and with up to each further multiple of 8 objects take minutes; prompts are decoded as they come, not compiled.

        Raises BackendError for a precision that this device has only emulated.
        """
        self._sam2 = sam2.eval()
        self._prompts = sam2.prompts
        self._fusion_level = fusion_level
        self.sizes: StageSizes = replace(sam2.sizes, video_size=video_size)
        self.precision = precision
        self._dtype = PRECISIONS[precision]
        if self._dtype is not None and self.device.type == "cpu" and not cpu_computes_in(self._dtype):
            raise BackendError(f"this CPU computes {precision} only by emulation, 20 times slower; set fp32")
        self._encode_image: Any = sam2.encode_image
        self._attend_memory: Any = sam2.attend_memory
        self._decode_mask: Any = sam2.decode_mask
        self._encode_memory: Any = sam2.encode_memory
        if compiled:
            for stage in ("_encode_image", "_attend_memory", "_decode_mask", "_encode_memory"):
                mode = "max-autotune" if self.device.type == "cuda" else "default"
                setattr(self, stage, torch.compile(getattr(self, stage), mode=mode, dynamic=False))
        self._is_compiled = compiled
        self.takes_several_frames = not compiled  # compiled code is made for one
        self.takes_fewer_memories = not compiled  # and for one number of memories

    @property
    def device(self) -> torch.device:
        return self._sam2.no_mem_embed.device

    def at_image_size(self, image_size: int) -> "TorchStages | None":
        """The weights are shared. None for compiled code, and for a size that this model cannot have."""
        if self._is_compiled:
            return None
        try:
            sam2 = self._sam2.at_image_size(image_size)
        except ValueError:
            return None
        return TorchStages(
            sam2, fusion_level=self._fusion_level, video_size=self.sizes.video_size, precision=self.precision
        )

    @torch.inference_mode()
    def image_encoder(self, pixels: Float[Tensor, "b 3 size size"]) -> ImageFeatures:
        with self._computing("image_encoder"):
            features = self._encode_image(pixels, self._fusion_level)
        return ImageFeatures(**self._out(features))

    @torch.inference_mode()
    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: Int[Tensor, " o"] | None = None
    ) -> Float[Tensor, "o c h w"]:
        if self.device.type == "cpu" and not self._is_compiled:
            memory = without_empty_slots(memory)
        objects = memory.spatial.shape[0]
        memory = MemoryTensors(**{name: self._filled(x) for name, x in vars(memory).items()})
        with self._computing("memory_attention"):
            if self._take_turns(objects):
                conditioned = self._attend_in_turn(features, memory, frame_of)
            elif frame_of is None:
                conditioned = self._attend_memory(features, memory)
            else:
                conditioned = self._sam2.attend_memory(features, memory, frame_of)
        return self._own(conditioned)[:objects]

    def _take_turns(self, objects: int) -> bool:
        """Whether what the objects need together would leave the cache of a CPU, which has no more to do at once."""
        config = self._sam2.config
        return (
            self.device.type == "cpu"
            and not self._is_compiled
            and objects > 1
            and objects * config.grid**2 * config.memory_feedforward > MOST_TOGETHER
        )

    def _attend_in_turn(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: Int[Tensor, " o"] | None
    ) -> Float[Tensor, "o c h w"]:
        tokens, queries = self._sam2.memory_queries(features)
        frames = [0] * memory.spatial.shape[0] if frame_of is None else frame_of.tolist()
        conditioned = []
        for i, frame in enumerate(frames):
            own = without_empty_slots(MemoryTensors(**{name: x[i : i + 1] for name, x in vars(memory).items()}))
            at = slice(frame, frame + 1)
            conditioned.append(self._sam2.read_memory(tokens[at], queries[at], own))
        return torch.cat(conditioned)

    @torch.inference_mode()
    def mask_decoder(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"] | None,
        prompts: PromptTokens | None,
    ) -> MaskPrediction:
        if conditioned is None:
            if prompts is None:
                raise ValueError("mask_decoder needs memory-conditioned features or prompts, got neither")
            conditioned = self._prompts.without_memory(features).expand(prompts.sparse.shape[0], -1, -1, -1)
        objects = conditioned.shape[0]
        with self._computing("mask_decoder"):
            if prompts is None and features.top.shape[0] == 1:
                prediction = self._decode_mask(features, self._filled(conditioned), None)
            else:  # rare, and of any number of tokens
                prediction = self._sam2.decode_mask(features, conditioned, prompts)
        return MaskPrediction(**self._out(prediction, objects))

    @torch.inference_mode()
    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: Bool[Tensor, " o"] | None = None
    ) -> MemoryEntry:
        objects = prediction.mask_logits.shape[0]
        with self._computing("memory_encoder"):
            if binarize is None and features.top.shape[0] == 1:
                filled = MaskPrediction(**{name: self._filled(x) for name, x in vars(prediction).items()})
                entry = self._encode_memory(features, filled)
            else:
                entry = self._sam2.encode_memory(features, prediction, binarize)
        return MemoryEntry(**self._out(entry, objects))

    @torch.inference_mode()
    def click_tokens(
        self,
        points: Float[Tensor, "o p 2"],
        labels: Int[Tensor, "o p"],
        mask_logits: Float[Tensor, "o hm wm"] | None = None,
    ) -> PromptTokens:
        return self._prompts.clicks(points, labels, mask_logits)

    @torch.inference_mode()
    def mask_prediction(self, features: ImageFeatures, mask: Float[Tensor, "o 1 size size"]) -> MaskPrediction:
        # The decoder looks at the bare features here (SAM2Base._use_mask_as_output), not at those without memory.
        bare = features.top.expand(mask.shape[0], -1, -1, -1)
        decoded = self.mask_decoder(features, bare, self._prompts.mask(mask))
        return self._prompts.mask_as_output(mask, decoded)

    def _filled(self, x: Tensor) -> Tensor:
        """Compiled code is made for some numbers of objects: repeat the last row up to the next of these."""
        objects = x.shape[0]
        if not self._is_compiled:
            return x
        bucket = object_bucket(objects)
        return torch.cat((x, x[-1:].expand(bucket - objects, *x.shape[1:]))) if bucket > objects else x

    def _out(self, values: Any, objects: int | None = None) -> dict[str, Tensor]:
        """float32, of the first `objects` rows."""
        return {name: self._own(x)[:objects] for name, x in vars(values).items()}

    def _own(self, x: Tensor) -> Tensor:
        # A CUDA graph's outputs lie in memory that the next stage's graph may take.
        return x.float().clone() if self._is_compiled and self.device.type == "cuda" else x.float()

    def _computing(self, stage: str) -> Any:
        """Autocast to what this stage may compute in."""
        if self._is_compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        dtype = self._dtype
        if dtype is torch.float16 and stage not in SAFE_IN_FP16:
            dtype = None
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def object_bucket(objects: int) -> int:
    """The number of objects that compiled code serves this many with."""
    most = OBJECT_BUCKETS[-1]
    return next((size for size in OBJECT_BUCKETS if size >= objects), -(-objects // most) * most)


def without_empty_slots(memory: MemoryTensors) -> MemoryTensors:
    """Only the slots that some object uses: a masked key weighs nothing, but costs as much as another.

    For devices on which shapes may change from frame to frame, and a look at the mask does not wait.
    """
    slots, rows = memory.spatial_valid.any(dim=0), memory.pointer_valid.any(dim=0)
    if bool(slots.all() & rows.all()) or not bool(slots.any()):
        return memory
    return MemoryTensors(
        spatial=memory.spatial[:, slots],
        spatial_tpos=memory.spatial_tpos[:, slots],
        spatial_valid=memory.spatial_valid[:, slots],
        pointers=memory.pointers[:, rows],
        pointer_distance=memory.pointer_distance[:, rows],
        pointer_valid=memory.pointer_valid[:, rows],
    )


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for it; without them torch emulates it."""
    if dtype is torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(dtype is torch.float16 and torch.cpu._is_amx_fp16_supported())
