# SPDX-License-Identifier: Apache-2.0
"""Training batches out of recorded scenes: clips, sentences, truth. A batch is a function of (seed, stage, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from virst_engine.errors import SceneError
from virst_engine.model.words import END, pad_rows
from virst_engine.sim.expressions import ABSENT_SHARE

MIN_VISIBLE_SHARE = 0.0004  # of the image: about 7 pixels at 128 x 128
STILL_KINDS = ("attribute", "relation", "superlative", "reasoning", "plural", "absent")  # one frame is enough evidence


@dataclass(frozen=True)
class ClipPlan:
    """What one batch is made of."""

    clips: int  # scenes
    sentences: int  # per scene
    clip_frames: int  # T_seg
    following_frames: int = 0  # after the clip, tracked from memory: n_prop of Algorithm 1
    anchors: int = 3  # alpha of Algorithm 1
    stride: int = 3  # recorded frames (10 Hz) between frames of a clip: 0.3 s
    kinds: tuple[str, ...] = ()  # of sentences; empty: all that a scene allows
    is_wordless: bool = False  # any objects of the first frame instead of sentences, for pre-training
    absent_share: float = ABSENT_SHARE  # of sentences whose target does not exist
    mirrored_share: float = 0.0  # of scenes that are shown mirrored, left and right changed in their sentences


class Sentence(Protocol):
    """What a batch needs to know of virst_engine.sim's Expression."""

    @property
    def text(self) -> str: ...
    @property
    def mirrored_text(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def target_ids(self) -> tuple[int, ...]: ...
    @property
    def landmark_ids(self) -> tuple[int, ...]: ...
    @property
    def answer(self) -> str: ...


class Tokenizer(Protocol):
    """Of the model that is trained."""

    def encode(self, sentence: str) -> list[int]: ...


class RecordedScene(Protocol):
    """One recorded scene; arrays may be memory-mapped."""

    @property
    def frames_rgb_u8(self) -> UInt8[np.ndarray, "frames size size 3"]: ...

    @property
    def instance_masks(self) -> UInt8[np.ndarray, "frames size size"]:
        """0 background, k + 1 object k, 255 the arm."""
        ...

    @property
    def colours(self) -> tuple[int, ...]:
        """The label of each object, from 1."""
        ...

    @property
    def shapes(self) -> tuple[int, ...]: ...

    def sentences(
        self,
        query_frame: int,
        count: int,
        rng: np.random.Generator,
        *,
        kinds: tuple[str, ...] = (),
        absent_share: float = ABSENT_SHARE,
    ) -> Sequence[Sentence]: ...


@dataclass(frozen=True)
class Batch:
    """Frames of `clips` scenes and `rows` sentences about them. The first `t` frames are the clip, `p` more follow."""

    frames_rgb_u8: UInt8[Tensor, "clips f size size 3"]  # f = t + p
    instance_masks: UInt8[Tensor, "clips f size size"]
    clip_frames: int  # t
    clip_of_row: Int[Tensor, " rows"]
    text: Int[Tensor, "rows length"]
    text_valid: Bool[Tensor, "rows length"]
    answer: Int[Tensor, "rows answer"]
    answer_valid: Bool[Tensor, "rows answer"]
    truth: Float[Tensor, "rows f half half"]  # share of each 2 x 2 pixel block covered by the target
    visible: Bool[Tensor, "rows f"]
    landmark: Float[Tensor, "rows t half half"]  # the same of the object that the target is told by; 0 without one
    colour: Int[Tensor, "clips f quarter quarter"]  # attribute labels of the pixels under a stride-4 grid, 0 background
    shape: Int[Tensor, "clips f quarter quarter"]
    motion: Float[Tensor, "clips t quarter quarter 2"]  # x, y shift of the object there between clip frames, 1/16 side
    target_colour: Int[Tensor, "rows targets"]  # labels of the target's objects, 0 where there are fewer
    target_shape: Int[Tensor, "rows targets"]
    kinds: tuple[str, ...]
    anchors: tuple[int, ...]  # frames of the clip that are decoded from their prompts (Algorithm 1)


@dataclass(frozen=True)
class AnyObject:
    """An object without a sentence, for pre-training."""

    target_ids: tuple[int, ...]
    landmark_ids: tuple[int, ...] = ()
    text: str = ""
    mirrored_text: str = ""
    kind: str = "object"
    answer: str = ""


def visible_ids(mask: UInt8[np.ndarray, "size size"]) -> list[int]:
    """The objects that a frame shows enough of."""
    ids, pixels = np.unique(mask, return_counts=True)
    return [int(i) - 1 for i, n in zip(ids, pixels, strict=True) if 0 < i < 255 and n > MIN_VISIBLE_SHARE * mask.size]


def visible_objects(mask: UInt8[np.ndarray, "size size"], count: int, rng: np.random.Generator) -> list[AnyObject]:
    """`count` random objects of a frame (with repeats when it shows fewer); object 0 when it shows none."""
    seen = visible_ids(mask)
    return [AnyObject((int(i),)) for i in rng.choice(seen or [0], size=count, replace=len(seen) < count)]


def propagation_frames(query: int, count: int, last: int, rng: np.random.Generator) -> list[int]:
    """Frames after the clip, oldest first, at a random stride; only the past is known to a live camera."""
    stride = int(rng.integers(1, 4))
    return [min(query + stride * (i + 1), last) for i in range(count)]


def anchor_frames(clip_frames: int, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The newest frame of a clip and others, oldest first.

    Every other time the oldest one is among them: with the newest it is what the stream makes anchors of.
    """
    others = rng.permutation(clip_frames - 1)
    if rng.random() < 0.5:
        others = np.array([0, *others[others > 0]])[: len(others)]
    return (*sorted(others[: count - 1].tolist()), clip_frames - 1)


class BatchSource(torch.utils.data.Dataset[Batch]):
    """Item i is the batch of step i of one stage. Raises SceneError for a scene that is too short for its clips."""

    def __init__(
        self,
        scenes: Sequence[RecordedScene],
        tokenizer: Tokenizer,
        plan: ClipPlan,
        seed: Sequence[int],
        steps: int,
    ) -> None:
        self.scenes, self.tokenizer, self.plan, self.seed, self.steps = scenes, tokenizer, plan, tuple(seed), steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([*self.seed, step])
        plan, t, extra = self.plan, self.plan.clip_frames, self.plan.following_frames
        frames, masks, colours, shapes, motions, sentences, rows, targets = [], [], [], [], [], [], [], []
        landmarks = []
        texts: list[str] = []
        target_colours: list[list[int]] = []
        target_shapes: list[list[int]] = []
        for clip in range(plan.clips):
            scene = self.scenes[int(rng.integers(len(self.scenes)))]
            count = len(scene.frames_rgb_u8)
            first_query = (t - 1) * plan.stride
            needed = first_query + (3 if extra else 1)
            if count < needed:
                raise SceneError(
                    f"a scene has {count} frames, but clips of {t} frames need at least {needed}; "
                    "record longer ones with `virst scenes write`"
                )
            query = int(rng.integers(first_query, count - (2 if extra else 0)))
            index = np.array([query - plan.stride * (t - 1 - i) for i in range(t)])
            said: Sequence[Sentence]
            if plan.is_wordless:
                said = visible_objects(np.asarray(scene.instance_masks[index[0]]), plan.sentences, rng)
            else:
                said = scene.sentences(query, plan.sentences, rng, kinds=plan.kinds, absent_share=plan.absent_share)
            if rng.random() < 0.15 and all(s.kind in STILL_KINDS for s in said):
                # The camera has just started: the oldest frame stands for those that were never seen.
                index = np.maximum(index, query - int(rng.integers(0, first_query + 1)))
            index = np.concatenate([index, np.array(propagation_frames(query, extra, count - 1, rng), dtype=int)])
            is_mirrored = rng.random() < plan.mirrored_share
            columns = slice(None, None, -1 if is_mirrored else 1)
            mask = np.asarray(scene.instance_masks[index])[:, :, columns]
            frames.append(np.asarray(scene.frames_rgb_u8[index])[:, :, columns])
            masks.append(mask)
            small = mask[:, 2::4, 2::4]
            colours.append(_labels(small, scene.colours))
            shapes.append(_labels(small, scene.shapes))
            motions.append(object_motion(small[:t]))
            for s in said:
                rows.append(clip)
                target_colours.append([scene.colours[i] for i in s.target_ids] or [0])
                target_shapes.append([scene.shapes[i] for i in s.target_ids] or [0])
                sentences.append(s)
                texts.append(s.mirrored_text if is_mirrored else s.text)
                targets.append(_covered(mask, s.target_ids))
                landmarks.append(_covered(mask[:t], s.landmark_ids))
        target = torch.from_numpy(np.stack(targets)).float()
        visible = target.mean((2, 3)) > MIN_VISIBLE_SHARE
        text, text_valid = pad_rows([self.tokenizer.encode(words) for words in texts], left=True)
        answer, answer_valid = pad_rows([[*self.tokenizer.encode(s.answer), END] for s in sentences])
        anchors = anchor_frames(t, plan.anchors, rng)
        return Batch(
            frames_rgb_u8=torch.from_numpy(np.stack(frames)),
            instance_masks=torch.from_numpy(np.stack(masks)),
            clip_frames=t,
            clip_of_row=torch.tensor(rows),
            text=text,
            text_valid=text_valid,
            answer=answer,
            answer_valid=answer_valid,
            truth=F.avg_pool2d(target, 2),
            visible=visible,
            landmark=F.avg_pool2d(torch.from_numpy(np.stack(landmarks)).float(), 2),
            colour=torch.from_numpy(np.stack(colours)),
            shape=torch.from_numpy(np.stack(shapes)),
            motion=torch.from_numpy(np.stack(motions)),
            target_colour=pad_rows(target_colours)[0],
            target_shape=pad_rows(target_shapes)[0],
            kinds=tuple(s.kind for s in sentences),
            anchors=anchors,
        )


def _covered(masks: UInt8[np.ndarray, "f h w"], ids: tuple[int, ...]) -> Bool[np.ndarray, "f h w"]:
    return np.isin(masks, np.array([i + 1 for i in ids], np.uint8))


def object_motion(masks: UInt8[np.ndarray, "t h w"]) -> Float[np.ndarray, "t h w 2"]:
    """How far the object under each pixel moves from a frame to the next (x, y; 1/16 of the side), from its centroids.

    Halved differences of the neighbours inside, one-sided ones at the ends; 0 where an object is out of view.
    """
    t, height, width = masks.shape
    out = np.zeros((t, height, width, 2), np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for label in np.unique(masks):
        if label in (0, 255) or t == 1:
            continue
        covered = masks == label
        count = covered.sum((1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            centre = np.stack(((covered * x).sum((1, 2)) / count, (covered * y).sum((1, 2)) / count), axis=1)
        shift = np.nan_to_num(np.gradient(centre, axis=0) * 16 / width)
        out += covered[..., None] * shift[:, None, None].astype(np.float32)
    return out


def _labels(masks: UInt8[np.ndarray, "f h w"], of_object: tuple[int, ...]) -> Int[np.ndarray, "f h w"]:
    table = np.zeros(256, np.int64)
    table[1 : 1 + len(of_object)] = of_object
    return table[masks]


def resize_frames(frames: UInt8[np.ndarray, "f h w 3"], size: int) -> UInt8[np.ndarray, "f size size 3"]:
    """Area-averaged frames of another size."""
    return np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames])
