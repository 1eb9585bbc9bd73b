# SPDX-License-Identifier: Apache-2.0
"""A segmenter and a reasoner whose answers can be worked out by hand, and a video to show them.

The fake network sees colours: a prompt carries a colour, a mask is where that colour is, a memory is the colour seen
under the mask. Recalling is a weighted mean over every valid memory, so a memory too many, too few or at the wrong age
changes the result in its last bits: noisy video makes comparisons of two runs sensitive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from virst_engine.config import EngineConfig, MemoryParameters, ReasonerParameters, TrackingParameters
from virst_engine.session import Session
from virst_engine.types import (
    Clip,
    Frame,
    FrameResult,
    ImageFeatures,
    MaskPrediction,
    MemoryEntry,
    MemoryTensors,
    Prompt,
    PromptTokens,
    ReasonerAnswer,
    ReasonerRequest,
    StageSizes,
)

SIDE = 32  # pixels of the fake model's input; the fake video has this size too unless told otherwise
SIZES = StageSizes(image_size=SIDE, channels=8, memory_channels=4, grid=4, mask=16, memory_frames=7, video_size=16)
RED, GREEN, BLUE = (0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9)
COLOURS = {"red": RED, "green": GREEN, "blue": BLUE}
BACKGROUND = (0.5, 0.5, 0.5)
REACH = 0.6  # L1 distance in colour within which a pixel belongs to the object
_MEAN, _STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def sizes_of(image_size: int) -> StageSizes:
    """`SIZES` for another side of the input, a multiple of 8."""
    return replace(SIZES, image_size=image_size, grid=image_size // 8, mask=image_size // 2)


class FakeStages:
    """`Stages` in closed form. Channels 0..2 are RGB 0..1; channel 3 of a prompt is the code of the frame it is for."""

    sizes = SIZES
    takes_several_frames = True
    takes_fewer_memories = True

    def __init__(self, image_size: int = SIDE) -> None:
        self.sizes = sizes_of(image_size)
        self.calls = {"image_encoder": 0, "memory_attention": 0, "mask_decoder": 0, "memory_encoder": 0}
        self.iou = 0.9  # what the decoder predicts while it tracks
        self.is_blind = False  # the decoder sees no object anywhere
        self.corrected: list[torch.Tensor | None] = []  # of each prompt of points: the mask that it corrects
        self.object_batches: list[int] = []  # objects of each memory attention call

    def at_image_size(self, image_size: int) -> "FakeStages | None":
        other = FakeStages(image_size)
        other.calls, other.object_batches = self.calls, self.object_batches
        return other

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        self.calls["image_encoder"] += 1
        rgb = pixels * _STD.reshape(1, 3, 1, 1) + _MEAN.reshape(1, 3, 1, 1)
        top = torch.zeros(rgb.shape[0], 8, self.sizes.grid, self.sizes.grid)
        top[:, :3] = F.avg_pool2d(rgb, 8)
        return ImageFeatures(top, F.avg_pool2d(rgb, 2), F.avg_pool2d(rgb, 4), F.avg_pool2d(rgb, 4))

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Channels 0..2 of every cell: the remembered colour."""
        self.calls["memory_attention"] += 1
        self.object_batches.append(memory.spatial.shape[0])
        assert bool(memory.spatial_valid.any(dim=1).all()), "memory attention on an object without memory"
        weight = memory.spatial_valid / (1.0 + memory.spatial_tpos)
        seen = memory.spatial.mean(dim=(3, 4))  # o s 4: colour x area, area
        seen = (seen * weight[..., None]).sum(dim=1)
        told_weight = memory.pointer_valid / (2.0 + memory.pointer_distance)
        told = (memory.pointers * told_weight[..., None]).sum(dim=1)  # o 8: colour, 0, 1
        colour = (seen[:, :3] + told[:, :3]) / (seen[:, 3:] + told[:, 4:5])
        conditioned = torch.zeros(colour.shape[0], 8, self.sizes.grid, self.sizes.grid)
        conditioned[:, :3] = colour[:, :, None, None]
        return conditioned

    def mask_decoder(
        self, features: ImageFeatures, conditioned: torch.Tensor | None, prompts: PromptTokens | None
    ) -> MaskPrediction:
        self.calls["mask_decoder"] += 1
        rgb = features.high_res_s0  # b 3 16 16
        if prompts is not None:
            assert conditioned is None
            told = prompts.sparse[:, 0]
            wanted = torch.stack([_colour_at(rgb, row) if row[7] > 0 else row[:3] for row in told])
            codes = read_code(features)
            assert told[:, 7].any() or torch.allclose(codes.expand(len(told)), told[:, 3], atol=1e-4), (
                "a prompt on another frame"
            )
        else:
            assert conditioned is not None
            wanted = conditioned[:, :3].mean(dim=(2, 3))
        logits = REACH - (rgb - wanted[:, :, None, None]).abs().sum(dim=1)
        is_object = (logits > 0).float()
        area = is_object.sum(dim=(1, 2))
        present = (area > 0).float() * (0.0 if self.is_blind else 1.0)
        colour = (rgb * is_object[:, None]).sum(dim=(2, 3)) / area.clamp(min=1.0)[:, None]
        pointer = torch.zeros(len(wanted), 8)
        pointer[:, :3], pointer[:, 4] = colour, present
        return MaskPrediction(logits, torch.full((len(wanted),), self.iou), 8.0 * present - 4.0, pointer)

    def click_tokens(
        self, points: torch.Tensor, labels: torch.Tensor, mask_logits: torch.Tensor | None = None
    ) -> PromptTokens:
        """Channels 4 and 5: where to look for the colour, 0..1; channel 7: that this is a click."""
        self.corrected.append(mask_logits)
        inside = (labels > 0).float()[..., None]
        tokens = torch.zeros(len(points), 1, 8)
        tokens[:, 0, 4:6] = (
            (points * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1.0) / self.sizes.image_size
        )  # the middle of a box's corners
        tokens[:, 0, 7] = 1.0
        return PromptTokens(tokens)

    def mask_prediction(self, features: ImageFeatures, mask: torch.Tensor) -> MaskPrediction:
        small = F.avg_pool2d(mask, 2)[:, 0]
        present = (small.flatten(1).amax(dim=1) > 0).float()
        colour = (features.high_res_s0 * small[:, None]).sum(dim=(2, 3)) / small.sum(dim=(1, 2)).clamp(min=1)[:, None]
        pointer = torch.zeros(len(mask), 8)
        pointer[:, :3], pointer[:, 4] = colour, present
        return MaskPrediction(small * 20 - 10, torch.ones(len(mask)), 20 * present - 10, pointer)

    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: torch.Tensor | None = None
    ) -> MemoryEntry:
        self.calls["memory_encoder"] += 1
        mask = (prediction.mask_logits > 0).float()[:, None]
        spatial = torch.cat((features.high_res_s0 * mask, mask), dim=1)
        return MemoryEntry(F.avg_pool2d(spatial, 4), prediction.pointer)


class ReusedBuffers(FakeStages):
    """Spoils what a stage has returned when the stage is called again, as CUDA graphs and engines do."""

    takes_several_frames = False

    def __init__(self) -> None:
        super().__init__()
        self._returned: dict[str, list[torch.Tensor]] = {}

    def image_encoder(self, pixels: torch.Tensor) -> ImageFeatures:
        return self._lend("image_encoder", super().image_encoder(pixels))

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._lend("memory_attention", super().memory_attention(features, memory))

    def mask_decoder(
        self, features: ImageFeatures, conditioned: torch.Tensor | None, prompts: PromptTokens | None
    ) -> MaskPrediction:
        return self._lend("mask_decoder", super().mask_decoder(features, conditioned, prompts))

    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: torch.Tensor | None = None
    ) -> MemoryEntry:
        made = super().memory_encoder(features, prediction, binarize)
        return MemoryEntry(self._lend("memory_encoder", made.spatial), made.pointer)

    def _lend(self, stage: str, made: Any) -> Any:
        for tensor in self._returned.get(stage, []):
            tensor.fill_(float("nan"))
        self._returned[stage] = [made] if isinstance(made, torch.Tensor) else list(vars(made).values())
        return made


def _colour_at(rgb: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    side = rgb.shape[-1]
    x, y = (int(min(max(float(value), 0.0), 0.999) * side) for value in token[4:6])
    return rgb[0, :, y, x]


def read_code(features: ImageFeatures) -> torch.Tensor:
    """What `Video` painted in the first cell: the number of the frame, as grey / 255."""
    return features.high_res_s0[:, :, 0, 0].mean(dim=1)


@dataclass
class Square:
    """A square of the video: cell (2 px) coordinates at frame t, None while it is not there."""

    colour: tuple[float, float, float]
    path: Callable[[int], tuple[int, int] | None]
    cells: int = 4


@dataclass
class Video:
    """Squares that move on grey, with a little noise; every frame carries its number in the top left cell."""

    squares: Sequence[Square]
    period_s: float = 0.1
    scale: tuple[int, int] = (1, 1)  # of height and width: the camera's size over SIDE
    noise: float = 3.0
    start_ns: int = 1_000_000_000

    def frame(self, t: int, scale: tuple[int, int] | None = None) -> Frame:
        rng = np.random.default_rng(t)
        image = np.empty((SIDE, SIDE, 3))
        image[:] = np.multiply(BACKGROUND, 255)
        for square in self.squares:
            rows, columns = self._cells(square, t)
            image[rows, columns] = np.multiply(square.colour, 255)
        image += rng.normal(0.0, self.noise, image.shape)
        image[:2, :2] = t % 256
        high, wide = self.scale if scale is None else scale
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        pixels = cv2.resize(pixels, (SIDE * wide, SIDE * high), interpolation=cv2.INTER_NEAREST)
        return Frame(pixels, self.start_ns + round(t * self.period_s * 1e9))

    def truth(self, t: int, square: int = 0) -> np.ndarray:
        """The mask at the size of the fake video, SIDE x SIDE."""
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[self._cells(self.squares[square], t)] = True
        return mask

    @staticmethod
    def _cells(square: Square, t: int) -> tuple[slice, slice]:
        at = square.path(t)
        if at is None:
            return slice(0, 0), slice(0, 0)
        y, x = at
        return slice(2 * y, 2 * (y + square.cells)), slice(2 * x, 2 * (x + square.cells))


def moving_square(colour: tuple[float, float, float] = RED, row: int = 2) -> Square:
    """Goes from left to right and starts again."""
    return Square(colour, lambda t: (row, 1 + t % 10))


class FakeReasoner:
    """A `Reasoner` that finds the first colour word of the sentence; `meaning` may say what a sentence means when.

    It answers a question with the question and the number of the clip's newest frame.
    """

    def __init__(self, meaning: Callable[[ReasonerRequest], tuple[float, float, float]] | None = None) -> None:
        self._meaning = meaning
        self.requests: list[ReasonerRequest] = []

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.requests.append(request)
        if request.wants_words:
            words = f"{request.sentence}: {request.clip.frames_rgb_u8[-1][0, 0].mean():.0f}"
            return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (), words=words)
        if self._meaning is not None:
            colour = self._meaning(request)
        else:
            words = [word for word in request.sentence.split() if word in COLOURS]
            colour = COLOURS[words[0]] if words else (-9.0, -9.0, -9.0)  # nothing has this colour
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts_for(request.clip, colour))


def prompts_for(clip: Clip, colour: tuple[float, float, float]) -> tuple[Prompt, ...]:
    """One prompt per frame of the clip, each naming the frame it is for."""
    prompts = []
    for step, stamp_ns, frame in zip(clip.steps.tolist(), clip.stamps_ns.tolist(), clip.frames_rgb_u8, strict=True):
        embeddings = np.zeros((2, SIZES.channels), dtype=np.float32)
        embeddings[:, :3] = colour
        embeddings[:, 3] = frame[0, 0].mean() / 255  # one cell of the video is one pixel of the reasoner's frame
        prompts.append(Prompt(step, stamp_ns, embeddings))
    return tuple(prompts)


@dataclass
class InstantClient:
    """A `ReasonerClient` that has answered when `submit` returns."""

    reasoner: FakeReasoner = field(default_factory=FakeReasoner)
    trouble: str = ""
    answers: list[ReasonerAnswer] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    is_closed: bool = False

    def submit(self, request: ReasonerRequest) -> None:
        self.answers.append(self.reasoner.answer(request))

    def cancel(self, goal_id: str) -> None:
        self.cancelled.append(goal_id)

    def poll(self) -> list[ReasonerAnswer]:
        answers, self.answers = self.answers, []
        return answers

    def status(self) -> str:
        return self.trouble

    def close(self) -> None:
        self.is_closed = True


@dataclass
class DelayedClient(InstantClient):
    """Answers `delay_steps` frames later: in the frame that is polled that many `tick`s after the request."""

    delay_steps: int = 0
    now: int = 0
    waiting: list[tuple[int, ReasonerAnswer]] = field(default_factory=list)

    def submit(self, request: ReasonerRequest) -> None:
        self.waiting.append((self.now + self.delay_steps, self.reasoner.answer(request)))

    def tick(self) -> None:
        """A new frame is about to be processed."""
        self.now += 1

    def poll(self) -> list[ReasonerAnswer]:
        done = [answer for due, answer in self.waiting if due <= self.now]
        self.waiting = [(due, answer) for due, answer in self.waiting if due > self.now]
        return done


class SilentClient(InstantClient):
    """Listens, never answers, keeps the requests."""

    def submit(self, request: ReasonerRequest) -> None:
        self.reasoner.requests.append(request)


def small_config(**changes: float | int) -> EngineConfig:
    """The default configuration with short buffers; `changes` go to the group that has the name."""
    groups = {
        "memory": MemoryParameters(ring_steps=32),
        "tracking": TrackingParameters(max_objects=3),
        "reasoner": ReasonerParameters(period_s=1000.0),
    }
    config = EngineConfig(**groups)
    for name, value in changes.items():
        group = next(g for g in groups if hasattr(groups[g], name))
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def session_of(client: InstantClient | None = None, **config: float | int) -> Session:
    return Session(small_config(**config), FakeStages(), InstantClient() if client is None else client)


def run(
    session: Session, video: Video, frames: Sequence[int], client: InstantClient | None = None
) -> list[FrameResult]:
    results = []
    for t in frames:
        if isinstance(client, DelayedClient):
            client.tick()
        results.append(session.step(video.frame(t)))
    return results
