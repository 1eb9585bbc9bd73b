# SPDX-License-Identifier: Apache-2.0
"""The method `virst` at full size: one forward pass, and only frames that are new go through the video encoder.

What a frame gives does not depend on the sentence, so it is kept while the frame is in the window: ST-Fusion's maps
frame by frame, visual tokens by short clips, because the frames of one see each other. A short clip that is not full is
made again when frames are added to it, which costs no more than a new one would. Streams choose frames on a grid of
time (frame_window.py), so that the frames of a window are those of the one before, but for a few.

A question is answered by the language model alone, about the same visual tokens.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from virst_engine.errors import Unanswered, WeightsError
from virst_engine.model.chat_tokenizer import ChatTokenizer
from virst_engine.model.pixels import normalise
from virst_engine.model.virst_7b import FusionMaps, Virst7b
from virst_engine.slow.reasoner import refuse_words
from virst_engine.slow.wire import MAX_WORDS_CHARACTERS
from virst_engine.timing import StageTimer
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

WINDOWS = 16  # of all cameras of all robots; one more and the one that was not asked about for longest is forgotten
CLIPS_AT_ONCE = 4  # short clips in one batch of the video encoder: bounds its activations
LONGEST_ANSWER_TOKENS = 96  # goals wait meanwhile, and reasoner.ttl_s passes

FrameKey = bytes  # what a frame shows, not when: cameras and clients cannot be mixed up


@dataclass
class _Window:
    """What is kept of the frames of one camera of one robot."""

    camera: str
    keys: frozenset[FrameKey]  # of the newest clip
    short_clips: list[tuple[FrameKey, ...]]  # oldest first; all but the last are full
    visual: dict[tuple[FrameKey, ...], Float[Tensor, "v d"]]
    maps: dict[FrameKey, FusionMaps]


class Virst7bReasoner:
    """`Reasoner` on a Virst7b.

    `answer` raises BadGoal for a sentence that cannot be read, WeightsError for a clip of another model, VirstError for
    a question where the weights have no head that writes words, Unanswered where it has none to say.
    """

    def __init__(self, model: Virst7b, tokenizer: ChatTokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        config = model.config
        fusion_side = config.sam2.grid * (4, 2, 1)[config.fusion.feature_level]
        self._frame_shape = (config.vision.image_size, config.vision.image_size, 3)
        self._fusion_shape = (config.sam2.channels, fusion_side, fusion_side)
        self._windows: list[_Window] = []  # the newest last

    @torch.inference_mode()
    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        """One prompt for each frame that ST-Fusion sees: all of the clip, or `seg_frames` of them. Or words."""
        if not self._model.has_words:
            refuse_words(request, "virst-7b without lm_head (convert the weights with the whole base model)")
        start = time.perf_counter()
        timer = StageTimer(self._device)
        words = self._words(request, timer) if request.wants_words else ""
        prompts = () if request.wants_words else self._prompts(request, timer)
        timings = timer.ms() | {"total": (time.perf_counter() - start) * 1e3}
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts, "", timings, words)

    def _prompts(self, request: ReasonerRequest, timer: StageTimer) -> tuple[Prompt, ...]:
        model, clip = self._model, request.clip
        row = self._tokenizer.row(request.sentence, model.config.fusion.st_tokens)
        self._check(clip)
        first = _first_of_each_step(clip)
        keys = [frame_key(clip.frames_rgb_u8[at]) for at in first]
        window = self._window(clip.camera, keys)
        with timer.stage("video_encoder"):
            visual = self._visual_tokens(window, keys, clip, first)
        with timer.stage("fusion_maps"):
            seen = choose_seg_frames(len(first), model.config.seg_frames, model.config.seg_sampling)
            maps = self._maps(window, keys, clip, first, seen)
        with timer.stage("language_model"):
            rows = model.prompts(visual, maps, row).cpu().numpy()
        by_step = {int(clip.steps[first[at]]): embeddings for at, embeddings in zip(seen, rows, strict=True)}
        return tuple(
            Prompt(step, stamp_ns, by_step[step])
            for step, stamp_ns in zip(clip.steps.tolist(), clip.stamps_ns.tolist(), strict=True)
            if step in by_step
        )

    def _words(self, request: ReasonerRequest, timer: StageTimer) -> str:
        row = self._tokenizer.question(request.sentence)
        self._check(request.clip)
        first = _first_of_each_step(request.clip)
        keys = [frame_key(request.clip.frames_rgb_u8[at]) for at in first]
        with timer.stage("video_encoder"):
            visual = self._visual_tokens(self._window(request.clip.camera, keys), keys, request.clip, first)
        with timer.stage("language_model"):
            tokens = self._model.answer_tokens(
                visual, row, marks=self._tokenizer.marks, ends=self._tokenizer.ends, longest=LONGEST_ANSWER_TOKENS
            )
        words = self._tokenizer.words(tokens)[:MAX_WORDS_CHARACTERS]
        if not words:
            raise Unanswered("the model has no word for an answer; ask in other words")
        return words

    def _window(self, camera: str, keys: Sequence[FrameKey]) -> _Window:
        """What is kept of the stream that this clip continues, or nothing yet.

        Robots call their cameras alike, and a pool does not say who asks: frames tell which stream it is.
        """
        known = [window for window in reversed(self._windows) if window.camera == camera]
        found = max(known, key=lambda window: len(window.keys.intersection(keys)), default=None)
        if found is None or not found.keys.intersection(keys):
            found = _Window(camera, frozenset(), [], {}, {})
        found.keys = frozenset(keys)
        self._windows = [*(window for window in self._windows if window is not found), found][-WINDOWS:]
        return found

    def _visual_tokens(
        self, window: _Window, keys: Sequence[FrameKey], clip: Clip, first: Sequence[int]
    ) -> Float[Tensor, "v d"]:
        """The tokens of all short clips of the window, oldest first; those that are new are encoded."""
        length = self._model.config.vision.clip_frames
        window.short_clips = arrange_short_clips(window.short_clips, keys, length)
        window.visual = {group: window.visual[group] for group in window.short_clips if group in window.visual}
        new = [group for group in window.short_clips if group not in window.visual]
        place = dict(zip(keys, first, strict=True))
        for start in range(0, len(new), CLIPS_AT_ONCE):
            batch = new[start : start + CLIPS_AT_ONCE]
            # A short clip that is not full repeats its newest frame.
            at = [[place[group[min(number, len(group) - 1)]] for number in range(length)] for group in batch]
            frames = torch.from_numpy(clip.frames_rgb_u8[np.array(at).ravel()]).to(self._device)
            tokens = self._model.encode_short_clips(normalise(frames).unflatten(0, (len(batch), length)))
            window.visual |= dict(zip(batch, tokens, strict=True))
        return torch.cat([window.visual[group] for group in window.short_clips])

    def _maps(
        self, window: _Window, keys: Sequence[FrameKey], clip: Clip, first: Sequence[int], seen: Sequence[int]
    ) -> FusionMaps:
        """What ST-Fusion reads of the frames `seen`; those that are new are encoded, those that left are forgotten."""
        window.maps = {key: window.maps[key] for key in keys if key in window.maps}
        new = list(dict.fromkeys(keys[at] for at in seen if keys[at] not in window.maps))
        if new:
            place = dict(zip(keys, first, strict=True))
            fusion = torch.from_numpy(clip.fusion[[place[key] for key in new]]).to(self._device, torch.float32)
            made = self._model.encode_maps(fusion)
            for number, key in enumerate(new):
                own = slice(number, number + 1)
                window.maps[key] = FusionMaps(None if made.initial is None else made.initial[own], made.second[own])
        found = [window.maps[keys[at]] for at in seen]
        initial = [maps.initial for maps in found if maps.initial is not None]
        return FusionMaps(torch.cat(initial) if initial else None, torch.cat([maps.second for maps in found]))

    @property
    def _device(self) -> torch.device:
        return self._model.st_embedding.device

    def _check(self, clip: Clip) -> None:
        frame, fusion = clip.frames_rgb_u8.shape[1:], clip.fusion.shape[1:]
        if (frame, fusion) != (self._frame_shape, self._fusion_shape):
            raise WeightsError(
                f"the clip was made by another model: its frames are {frame} and its features {fusion}, this reasoner "
                f"reads {self._frame_shape} and {self._fusion_shape}; start both with the same weights"
            )
        longest = self._model.config.vision.max_frames
        if not 0 < len(clip.steps) <= longest:
            raise WeightsError(
                f"this model reads clips of 1 to {longest} frames, got {len(clip.steps)}; "
                "change the parameter reasoner.clip_frames"
            )


def arrange_short_clips(
    before: Sequence[tuple[FrameKey, ...]], keys: Sequence[FrameKey], length: int
) -> list[tuple[FrameKey, ...]]:
    """Short clips of at most `length` frames for a window of `keys`, oldest first; only the last may not be full.

    Those of `before` stay as they are where their frames follow each other in the window. One whose oldest frames have
    left stays while its newest is there: taking it apart would move the border of every one after it. Where the window
    is another one, or frames came in between, they are arranged anew.
    """
    kept: list[tuple[FrameKey, ...]] = []
    covered = 0
    for group in before:
        if len(group) < length:
            break
        inside = [key for key in group if key in keys]
        if not inside and not kept:
            continue  # has left the window
        expected = list(keys[covered : covered + len(inside)])
        has_left = not kept and list(group[length - len(inside) :]) == inside
        if not inside or inside != expected or not (len(inside) == length or has_left):
            break
        kept.append(group)
        covered += len(inside)
    rest = keys[covered:]
    return kept + [tuple(rest[start : start + length]) for start in range(0, len(rest), length)]


def choose_seg_frames(count: int, most: int, sampling: str) -> list[int]:
    """Positions, ascending, of the frames of ST-Fusion among `count`: all of them, or `most`.

    Evenly from the first to the last, or at random: always the same for the same count, unlike the released code.
    """
    if count <= most:
        return list(range(count))
    if sampling == "random":
        return sorted(random.Random(count).sample(range(count), most))
    return [round(number * (count - 1) / max(most - 1, 1)) for number in range(most)] if most > 1 else [count - 1]


def _first_of_each_step(clip: Clip) -> list[int]:
    first: dict[int, int] = {}
    for at, step in enumerate(clip.steps.tolist()):
        first.setdefault(step, at)
    return list(first.values())


def frame_key(frame_rgb_u8: UInt8[np.ndarray, "h w 3"]) -> FrameKey:
    """What tells a frame from others: its content."""
    return hashlib.blake2b(np.ascontiguousarray(frame_rgb_u8).data, digest_size=16).digest()
