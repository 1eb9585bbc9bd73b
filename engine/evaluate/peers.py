# SPDX-License-Identifier: Apache-2.0
"""Trackers side by side: what each of them is to the comparison, the video that all of them see, and ours.

`sam2_peer.py` and `transformers_peer.py` hold the others.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from virst_engine.backends.base import Stages
from virst_engine.config import MemoryParameters, ModelParameters, TrackingParameters
from virst_engine.fast.postprocess import empty_mask, mask_at_size
from virst_engine.fast.tracker import Tracker
from virst_engine.model.config import Sam2Config, sam2_1, tabletop_tiny
from virst_engine.model.sam2 import NO_OBJECT_LOGIT, Sam2
from virst_engine.timing import StageTimer
from virst_engine.types import (
    ClickPrompt,
    Frame,
    ImageFeatures,
    MaskPrediction,
    MemoryEntry,
    MemoryTensors,
    PromptTokens,
    StageSizes,
)
from virst_engine.weights import SAM2_IMAGE_SIZE, SAM2_PREFIX, is_sam2, load_segmenter

STAGES = ("preprocess", "image_encoder", "memory_attention", "mask_decoder", "memory_encoder", "postprocess")
MOST_OBJECTS = 8  # in the video
RING_STEPS = 4  # of our tracker: clicks are never late here, and the peers keep no features for late answers either
# Added to the score of presence of random weights: an object that is not there would be less work for some.
ALWAYS_PRESENT = 100.0


class System(Protocol):
    """A tracker as its users drive it: a video and boxes in its first frame, then frame after frame."""

    name: str
    bytes_per_frame_ahead: int  # what `begin` loads for every frame to come

    def begin(self, prompts: Sequence[ClickPrompt]) -> Bool[np.ndarray, "o height width"]:
        """Start over at frame 0 of the video, one object per prompt; its masks."""
        ...

    def step(self, number: int, timer: StageTimer) -> Bool[np.ndarray, "o height width"]:
        """The next frame's masks at the camera's size, on the host; `number` counts from 1, none is left out."""
        ...

    def logits(self) -> Float[Tensor, "o hm wm"]:
        """The newest frame's low-resolution masks before they were resized; NO_OBJECT_LOGIT where it is not there."""
        ...

    def end(self) -> None:
        """Forget the video."""
        ...


class Footage:
    """Eight discs that move over noise, played back and forth. Square, of the model's size: nobody has to resize.

    What all systems see are the JPEG files that sam2 reads, decoded once more.
    """

    def __init__(self, folder: Path, size: int, pictures: int = 64) -> None:
        """`pictures`: how many differ; they are written into `folder`."""
        self._folder, self.size = folder, size
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        ground = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
        colours = [tuple(int(c) for c in colour) for colour in rng.integers(0, 255, (MOST_OBJECTS, 3))]
        radius = size / 14
        self.pictures: list[UInt8[np.ndarray, "size size 3"]] = []
        for t in range(pictures):
            picture = ground.copy()
            for i, colour in enumerate(colours):
                x, y = (round(v) for v in self._centre(i, t, pictures))
                cv2.circle(picture, (x, y), round(radius), colour, -1)
            file = folder / f"picture_{t}.jpg_"  # sam2 takes every .jpg of a folder
            Image.fromarray(picture).save(file, format="JPEG", quality=95)
            with Image.open(file) as decoded:
                self.pictures.append(np.array(decoded.convert("RGB")))
        self.prompts = tuple(self._box(i, radius) for i in range(MOST_OBJECTS))

    def frame(self, number: int) -> UInt8[np.ndarray, "size size 3"]:
        return self.pictures[self._picture(number)]

    def as_folder(self, frames: int) -> Path:
        """A folder with `frames` JPEG files, 0.jpg and on: links to the few pictures."""
        video = self._folder / f"video_{frames}"
        video.mkdir(exist_ok=True)
        for number in range(frames):
            link = video / f"{number}.jpg"
            if not link.is_symlink():
                os.symlink(self._folder / f"picture_{self._picture(number)}.jpg_", link)
        return video

    def _picture(self, number: int) -> int:
        last = len(self.pictures) - 1
        phase = number % max(1, 2 * last)
        return min(phase, 2 * last - phase)

    def _centre(self, i: int, t: int, pictures: int) -> tuple[float, float]:
        column, row = i % 4, i // 4
        swing = 0.05 * np.sin(2 * np.pi * t / pictures + i), 0.08 * np.sin(2 * np.pi * t / pictures + 2 * i)
        return self.size * (0.125 + 0.25 * column + swing[0]), self.size * (0.25 + 0.5 * row + swing[1])

    def _box(self, i: int, radius: float) -> ClickPrompt:
        x, y = self._centre(i, 0, len(self.pictures))
        left, top = max(0.0, x - radius), max(0.0, y - radius)
        return ClickPrompt(box_px=(left, top, min(float(self.size), x + radius), min(float(self.size), y + radius)))


# Weights


def comparison_config(parameters: ModelParameters) -> Sam2Config:
    """The dimensions of SAM 2 in this model, at its image size. Raises ValueError for a size that cannot be."""
    if is_sam2(parameters):
        return sam2_1(parameters.name.removeprefix(SAM2_PREFIX), parameters.image_size or SAM2_IMAGE_SIZE)
    # The reference has no limit to the age of pointers. It only moves results, never the work.
    config = replace(tabletop_tiny(()).sam2, pointer_distance_limit=0)
    return replace(config, image_size=parameters.image_size or config.image_size)


def comparison_model(parameters: ModelParameters, seed: int = 0) -> Sam2:
    """SAM 2 with the weights of a file or, where none is named, with random ones whose objects are always visible.

    Raises WeightsError for a file that cannot be used, ValueError as `comparison_config`.
    """
    config = comparison_config(parameters)
    if not parameters.weights:
        return random_model(config, seed).to(parameters.device)
    trained, _ = load_segmenter(parameters)
    return _with_config(trained, config)


def random_model(config: Sam2Config, seed: int = 0) -> Sam2:
    """Seeded weights that leave no part without effect, and no object absent.

    As they are initialised, embeddings are near zero and masks are nearly flat: nothing would depend on memory.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Sam2(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                deviation = 0.7 if parameter.shape[:-1].numel() < 10 else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += ALWAYS_PRESENT
    return model.eval()


def with_pooled_memory(model: Sam2, pool: int = 2) -> Sam2:
    """The same weights, not copied, with pool x pool cells of a memory as one key of memory attention."""
    return _with_config(model, replace(model.config, memory_pool=pool))


def _with_config(model: Sam2, config: Sam2Config) -> Sam2:
    changed = Sam2(config).to(model.no_mem_embed.device)
    changed.load_state_dict(model.state_dict(), strict=True, assign=True)
    return changed.eval()


# Ours


class OurTracker:
    """`fast/tracker.py` with SAM 2's own rules of memory: every frame is written, one anchor is attended."""

    bytes_per_frame_ahead = 0

    def __init__(self, name: str, stages: Stages, footage: Footage, device: str) -> None:
        self.name = name
        self._stages, self._footage, self._device = stages, footage, device
        self._tracker: Tracker | None = None
        self._objects = 0

    @staticmethod
    def memory_parameters() -> MemoryParameters:
        return MemoryParameters(rules="sam2", anchor_slots=1, anchors_attended=1, ring_steps=RING_STEPS)

    def begin(self, prompts: Sequence[ClickPrompt]) -> Bool[np.ndarray, "o height width"]:
        self._objects = len(prompts)
        self._tracker = Tracker(
            self._stages,
            self.memory_parameters(),
            TrackingParameters(max_objects=self._objects),
            device=self._device,
        )
        step = self._tracker.step(Frame(self._footage.frame(0), 0)).step
        for slot, prompt in enumerate(prompts):
            self._tracker.prompt(slot, step, prompt)
        return self._masks()

    def step(self, number: int, timer: StageTimer) -> Bool[np.ndarray, "o height width"]:
        assert self._tracker is not None
        self._tracker.step(Frame(self._footage.frame(number), number), timer)
        with timer.stage("postprocess"):
            return self._masks()

    def logits(self) -> Float[Tensor, "o hm wm"]:
        assert self._tracker is not None
        found = [self._tracker.sighting(slot) for slot in range(self._objects)]
        masks = [
            s.mask_logits if s.presence > 0.5 else torch.full_like(s.mask_logits, NO_OBJECT_LOGIT)
            for s in found
            if s is not None
        ]
        return torch.stack(masks).float().cpu()

    def end(self) -> None:
        self._tracker = None

    def _masks(self) -> Bool[np.ndarray, "o height width"]:
        assert self._tracker is not None
        size = self._footage.size
        masks = np.stack([empty_mask(size, size)] * self._objects)
        for slot in range(self._objects):
            sighting = self._tracker.sighting(slot)
            if sighting is not None and sighting.is_present:
                masks[slot] = mask_at_size(sighting.host_logits, size, size)
        return masks


class CountingStages:
    """Stages of a torch model that add up the floating-point operations of what passes through them."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self.sizes: StageSizes = stages.sizes
        self.takes_several_frames = self.takes_fewer_memories = False
        self.flop: dict[str, float] = {}

    def at_image_size(self, image_size: int) -> None:
        """Nothing else is counted."""

    def image_encoder(self, pixels: Float[Tensor, "1 3 size size"]) -> ImageFeatures:
        with self._counting("image_encoder"):
            return self._stages.image_encoder(pixels)

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: Int[Tensor, " o"] | None = None
    ) -> Float[Tensor, "o c h w"]:
        assert frame_of is None
        with self._counting("memory_attention"):
            return self._stages.memory_attention(features, memory)

    def mask_decoder(
        self, features: ImageFeatures, conditioned: Float[Tensor, "o c h w"] | None, prompts: PromptTokens | None
    ) -> MaskPrediction:
        with self._counting("mask_decoder"):
            return self._stages.mask_decoder(features, conditioned, prompts)

    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: Bool[Tensor, " o"] | None = None
    ) -> MemoryEntry:
        with self._counting("memory_encoder"):
            return self._stages.memory_encoder(features, prediction, binarize)

    def click_tokens(
        self,
        points: Float[Tensor, "o p 2"],
        labels: Int[Tensor, "o p"],
        mask_logits: Float[Tensor, "o hm wm"] | None = None,
    ) -> PromptTokens:
        return self._stages.click_tokens(points, labels, mask_logits)

    def mask_prediction(self, features: ImageFeatures, mask: Float[Tensor, "o 1 size size"]) -> MaskPrediction:
        return self._stages.mask_prediction(features, mask)

    def _counting(self, stage: str) -> "_Count":
        return _Count(self.flop, stage)


def flop_per_frame(stages: Stages, footage: Footage, objects: int, device: str) -> dict[str, float]:
    """Stage -> floating-point operations (two per multiply-add) of one frame of ours; torch runs it once more."""
    counting = CountingStages(stages)
    tracker = OurTracker("count", counting, footage, device)
    tracker.begin(footage.prompts[:objects])
    for number in range(1, FULL_MEMORY_FRAMES + 1):  # memories that are not there yet are not attended
        counting.flop.clear()
        tracker.step(number, StageTimer(device))
    return dict(counting.flop)


FULL_MEMORY_FRAMES = 17  # from here on all memories and pointers are there


@dataclass
class _Count(AbstractContextManager[None]):
    flop: dict[str, float]
    stage: str

    def __post_init__(self) -> None:
        # torch counts the attention kernels of GPUs only.
        on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
        self._counter = FlopCounterMode(display=False, custom_mapping=on_cpu)

    def __enter__(self) -> None:
        self._counter.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._counter.__exit__(*exception)
        self.flop[self.stage] = self.flop.get(self.stage, 0.0) + self._counter.get_total_flops()


def _attention_flop(q: Any, k: Any, v: Any, *arguments: Any, **named: Any) -> int:
    """From the shapes of queries, keys and values."""
    return int(sdpa_flop_count(q, k, v))


# Peers


class StageClock:
    """Times functions of another library as stages of the frame that is being processed."""

    def __init__(self) -> None:
        self.timer: StageTimer | None = None

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as `stage` while there is a timer."""

        def run(*arguments: Any, **named: Any) -> Any:
            with self.timer.stage(stage) if self.timer is not None else nullcontext():
                return function(*arguments, **named)

        return run


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """What users of sam2 and transformers wrap their calls in for bf16 and fp16; nothing for fp32."""
    kind = torch.device(device).type
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(kind, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the host, to give to a peer; no copies where they are there already."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}
