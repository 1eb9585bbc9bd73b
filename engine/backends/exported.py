# SPDX-License-Identifier: Apache-2.0
"""`Stages` on exported graphs, whoever runs them: dataclasses <-> named tensors of the shapes that were exported.

Prompts are turned into tokens by torch, from the small tables beside the graphs: their number varies, and they are
rare.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from virst_engine.backends.base import Stages
from virst_engine.backends.manifest import PROMPT_ENCODER, REMEDY, Manifest
from virst_engine.errors import BackendError, ExportError
from virst_engine.model.sam2_prompts import PromptTables
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, PromptTokens, StageSizes

Tensors = dict[str, Tensor]

TENSORS = {  # the names that every export has: inputs, outputs
    "image_encoder": (("pixels",), ("top", "high_res_s0", "high_res_s1")),
    "memory_attention": (
        ("top", "spatial", "spatial_tpos", "spatial_valid", "pointers", "pointer_distance", "pointer_valid"),
        ("conditioned",),
    ),
    "mask_decoder": (
        ("conditioned", "high_res_s0", "high_res_s1", "sparse", "sparse_valid", "multimask"),
        ("mask_logits", "iou", "object_score_logits", "pointer"),
    ),
    "memory_encoder": (("top", "mask_logits", "object_score_logits", "binarize"), ("spatial",)),
}
FRAME_INPUTS = ("top", "high_res_s0", "high_res_s1")  # the frame's; all other inputs have a row for each object


class ExportedStages(ABC):
    """A backend gives `run`; everything else about a stage is the same for all of them."""

    name = "exported"
    takes_several_frames = False  # exported for one
    takes_fewer_memories = False  # their number is fixed, too
    sizes: StageSizes

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device, *, video_size: int = 128) -> None:
        """Raises ExportError when tensors or the prompt tables are missing."""
        for stage, (inputs, outputs) in TENSORS.items():
            spec = manifest.stages[stage]
            lacking = [*(set(inputs) ^ set(spec.inputs)), *(set(outputs) - set(spec.outputs))]
            if lacking:
                raise ExportError(f"{stage} of {folder} has other tensors, for example {min(lacking)}; {REMEDY}")
        self.manifest = manifest
        self.device = device
        self.sizes = replace(manifest.sizes, video_size=video_size)
        self._prompts = load_prompt_tables(folder, self.sizes).to(device)

    @abstractmethod
    def run(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        """Run one stage for `objects` rows, 1 or more. Outputs may be overwritten by the stage's next run."""

    def at_image_size(self, image_size: int) -> Stages | None:
        """None: the size is fixed."""
        return None

    @torch.inference_mode()
    def image_encoder(self, pixels: Float[Tensor, "1 3 height width"]) -> ImageFeatures:
        """Raises BackendError for pixels of another size than the exported one."""
        size = self.sizes.image_size
        if tuple(pixels.shape[2:]) != (size, size):
            height, width = pixels.shape[2:]
            raise BackendError(
                f"{self.manifest.model} was exported for images of {size} x {size}, got {width} x {height}; "
                "set model.image_size to that, or export another size: virst export MODEL --size N"
            )
        outputs = self.run("image_encoder", {"pixels": pixels}, 1)
        top = outputs["top"]
        return ImageFeatures(top, outputs["high_res_s0"], outputs["high_res_s1"], outputs.get("fusion", top))

    @torch.inference_mode()
    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: Int[Tensor, " o"] | None = None
    ) -> Float[Tensor, "o c h w"]:
        """Raises BackendError for more memories than were exported; for fewer, slots stay empty."""
        if frame_of is not None:
            raise BackendError("exported stages see one frame at a time: call memory_attention once for each")
        slots = self._missing("memories", memory.spatial.shape[1], self.manifest.memory_slots)
        rows = self._missing("object pointers", memory.pointers.shape[1], self.manifest.pointer_rows)
        inputs = {
            "top": features.top,
            "spatial": _pad(memory.spatial, slots),
            "spatial_tpos": _pad(memory.spatial_tpos, slots),
            "spatial_valid": _pad(memory.spatial_valid, slots),
            "pointers": _pad(memory.pointers, rows),
            "pointer_distance": _pad(memory.pointer_distance, rows),
            "pointer_valid": _pad(memory.pointer_valid, rows),
        }
        return self._run("memory_attention", inputs, memory.spatial.shape[0])["conditioned"]

    @torch.inference_mode()
    def mask_decoder(
        self,
        features: ImageFeatures,
        conditioned: Float[Tensor, "o c h w"] | None,
        prompts: PromptTokens | None,
    ) -> MaskPrediction:
        """Raises BackendError for more prompt tokens than were exported."""
        if conditioned is None:
            if prompts is None:
                raise ValueError("mask_decoder needs memory-conditioned features or prompts, got neither")
            conditioned = self._prompts.without_memory(features).expand(prompts.sparse.shape[0], -1, -1, -1)
        objects, multimask = conditioned.shape[0], self.manifest.multimask_prompted
        if prompts is None:
            # SAM 2's empty point and its padding point, both labelled -1.
            empty = self._prompts.sam_prompt_encoder.not_a_point_embed.weight.expand(objects, 2, -1)
            prompts, multimask = PromptTokens(empty), self.manifest.multimask_tracking
        if prompts.dense is not None:
            conditioned = conditioned + prompts.dense
        n = prompts.sparse.shape[1]
        free = self._missing("prompt tokens", n, self.manifest.prompt_tokens)
        valid = prompts.valid if prompts.valid is not None else self._flags(objects, n, value=True)
        inputs = {
            "conditioned": conditioned,
            "high_res_s0": features.high_res_s0,
            "high_res_s1": features.high_res_s1,
            "sparse": _pad(prompts.sparse, free),
            "sparse_valid": _pad(valid, free),
            "multimask": prompts.multimask if prompts.multimask is not None else self._flags(objects, value=multimask),
        }
        outputs = self._run("mask_decoder", inputs, objects)
        return MaskPrediction(**{name: outputs[name] for name in TENSORS["mask_decoder"][1]})

    @torch.inference_mode()
    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: Bool[Tensor, " o"] | None = None
    ) -> MemoryEntry:
        objects = prediction.mask_logits.shape[0]
        inputs = {
            "top": features.top,
            "mask_logits": prediction.mask_logits,
            "object_score_logits": prediction.object_score_logits,
            "binarize": binarize if binarize is not None else self._flags(objects, value=False),
        }
        return MemoryEntry(self._run("memory_encoder", inputs, objects)["spatial"], prediction.pointer)

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

    def _run(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        """`run`; where each object has a frame of its own, one after the other: the graphs take one frame."""
        if objects < 1:
            raise BackendError(f"{stage} was called for 0 objects; a frame without objects needs no {stage}")
        if all(inputs[name].shape[0] == 1 for name in FRAME_INPUTS if name in inputs):
            return self.run(stage, inputs, objects)
        rows = ({name: value[i : i + 1] for name, value in inputs.items()} for i in range(objects))
        return concatenate(self.run(stage, row, 1) for row in rows)

    def _missing(self, what: str, found: int, exported: int) -> int:
        if found > exported:
            raise BackendError(
                f"{self.manifest.model} was exported for {exported} {what}, got {found}; ask for fewer "
                f"(memory.anchors_attended, memory.recent_frames, memory.pointers), or {REMEDY}"
            )
        return exported - found

    def _flags(self, *shape: int, value: bool) -> Tensor:
        return torch.full(shape, value, dtype=torch.bool, device=self.device)


def concatenate(parts: Iterable[Tensors]) -> Tensors:
    """Outputs of several runs of one stage, below each other. Each part is copied before the next one is asked for."""
    kept = [{name: value.clone() for name, value in part.items()} for part in parts]
    return {name: torch.cat([part[name] for part in kept]) for name in kept[0]}


def load_prompt_tables(folder: Path, sizes: StageSizes) -> PromptTables:
    """The weights that turn prompts into tokens. Raises ExportError when the file is missing or damaged."""
    path = folder / PROMPT_ENCODER
    tables = PromptTables.empty(sizes.channels, sizes.image_size)
    try:
        tables.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]  # torch lists every tensor
        raise ExportError(f"{path} cannot be read ({reason}); {REMEDY}") from error
    return tables.eval()


def _pad(x: Tensor, rows: int) -> Tensor:
    """Append `rows` zeros (False: nothing there) along axis 1."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [0, rows]) if rows else x
