# SPDX-License-Identifier: Apache-2.0
"""Forward passes of training `visa` and `tempvrs`: a batch of dense windows in, named losses out.

Both learn beside SAM 2 and a video encoder that are trained and frozen: those of `tabletop-tiny`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from virst_engine.data.clips import Batch
from virst_engine.model.config import VideoEncoderConfig
from virst_engine.model.pixels import normalise
from virst_engine.model.sam2 import Sam2
from virst_engine.model.tempvrs import TempVrs
from virst_engine.model.video_language import Understood
from virst_engine.model.visa import PERCENTAGES, Visa, reference_frames
from virst_engine.train.losses import mask_losses, token_loss
from virst_engine.train.steps import MIN_TOKEN_SHARE, PLACES, Losses, token_mark
from virst_engine.types import ImageFeatures, PromptTokens

AS_GOOD = 0.9  # of the most pixels that a target shows: such a frame is as good a target frame, and the newest is taken
NODES = 2  # clips of TempVRS that are decoded per sentence and step


class MethodReadOuts(nn.Module):
    """Read-outs of what the language model has to know; used in training only, no part of the weights."""

    def __init__(self, reasoner: Visa | TempVrs, colours: int, shapes: int) -> None:
        super().__init__()
        hidden, self.layers = reasoner.config.language.hidden, reasoner.config.language.layers
        self.visual_landmark = token_mark(hidden)
        self.visual_target = nn.ModuleList(token_mark(hidden) for _ in range(self.layers - self.layers // 2))
        self.query_place = nn.Linear(hidden, 2 * PLACES)  # the row and the column of the target, from <SEG>
        self.query_colour = nn.Linear(hidden, colours)
        self.query_shape = nn.Linear(hidden, shapes)


class MethodModel(nn.Module):
    """A method's reasoner and the segmenter that its prompts are for."""

    def __init__(self, reasoner: Visa | TempVrs, seg_model: Sam2, fusion_level: int = -1) -> None:
        super().__init__()
        self.reasoner, self.seg_model, self.fusion_level = reasoner, seg_model, fusion_level

    @property
    def config(self) -> Any:
        return self.reasoner.config


def visa_step(model: MethodModel, heads: MethodReadOuts, batch: Batch) -> Losses:
    """A random target frame and random references for each sentence, as VISA trains; the sampler learns beside it."""
    visa, t = model.reasoner, batch.clip_frames
    assert isinstance(visa, Visa)
    rows = torch.arange(len(batch.clip_of_row), device=batch.text.device)
    with torch.no_grad():
        cells = visa.encode(_video(batch, visa.config.video))[batch.clip_of_row]
    targets = _random_targets(len(rows), t).to(rows.device)
    most = visa.config.references
    count = int(torch.randint(min(8, most), most + 1, ()))  # section 4.2: 8 to 12
    references = torch.tensor([_random_references(int(f), t, count, visa.config.sampling) for f in targets])
    question = visa.question_about(cells, targets, references.to(rows.device), batch.text, batch.text_valid)
    output = visa.prompts(question, batch.answer, batch.answer_valid)
    truth, seen = batch.truth[rows, targets], batch.visible[rows, targets]
    losses = _mask_losses(model, batch, batch.clip_of_row, targets, output.prompts, truth, seen)
    losses["presence"] = F.binary_cross_entropy_with_logits(output.presence_logits.float(), seen.float())
    losses |= _query_losses(heads, output.understood.queries[:, 0], truth, seen, batch, rows)
    shown = torch.cat((references.to(rows.device), targets[:, None]), dim=1).sort(dim=1).values
    side = visa.config.video.grid // visa.config.video.pool
    for name, covered in (("target", batch.truth[:, :t]), ("landmark", batch.landmark)):
        coarse = F.adaptive_avg_pool2d(covered[rows[:, None], shown], (side, side)).flatten(1)
        fine = F.adaptive_avg_pool2d(covered[rows, targets], visa.config.video.grid).flatten(1)
        losses |= _mark_losses(heads, output.understood, name, torch.cat((coarse, fine), dim=1))
    if output.understood.answer_logits is not None:
        losses["token"] = token_loss(output.understood.answer_logits, batch.answer)
    best, exists = best_frames(batch.truth[:, :t])
    wanted = (best.float() / max(t - 1, 1) * (PERCENTAGES - 1)).round().long()
    answers = visa.percentages(cells, batch.text, batch.text_valid)
    each = F.cross_entropy(answers.float(), wanted, reduction="none")
    losses["sampler"] = (each * exists.float()).sum() / exists.float().sum().clamp(min=1.0)
    return losses


def tempvrs_step(model: MethodModel, heads: MethodReadOuts, batch: Batch) -> Losses:
    """<TEP> against the clips (or frames) that show the target; masks of a few slow frames from their <SEG>."""
    tempvrs, t = model.reasoner, batch.clip_frames
    assert isinstance(tempvrs, TempVrs)
    config = tempvrs.config
    rows = torch.arange(len(batch.clip_of_row), device=batch.text.device)
    frames = _video(batch, config.video)
    visual = tempvrs.encode(frames).of_rows(batch.clip_of_row)
    question = tempvrs.question_about(visual, batch.text, batch.text_valid)
    output = tempvrs.prompts(question, batch.answer, batch.answer_valid)
    visible = batch.visible[:, :t].float()
    if config.supervision == "clip":
        each = [visible[:, :1], visible[:, 1:].unflatten(1, (-1, config.phases)).amax(dim=2)]
        wanted = torch.cat(each, dim=1)
    else:
        wanted = visible
    losses: Losses = {"presence": F.binary_cross_entropy_with_logits(output.relevance_logits.float(), wanted)}
    totals: list[Losses] = []
    queries = output.understood.queries[:, 1:].expand(-1, config.slow_frames, -1)
    newest = torch.full_like(rows, config.slow_frames - 1)
    for node in range(NODES):  # the newest clip and any other
        clips = newest if node == 0 else torch.randint(0, config.slow_frames, (len(rows),)).to(rows.device)
        at = clips * config.phases
        truth, seen = batch.truth[rows, at], batch.visible[rows, at]
        totals.append(
            _mask_losses(model, batch, batch.clip_of_row, at, output.prompts[rows, clips], truth, seen)
            | _query_losses(heads, queries[rows, clips], truth, seen, batch, rows)
        )
    losses |= {name: torch.stack([one[name] for one in totals]).mean() for name in totals[0]}
    for name, covered in (("target", batch.truth[:, :t]), ("landmark", batch.landmark)):
        losses |= _mark_losses(heads, output.understood, name, _shares_of_tokens(tempvrs, covered))
    if output.understood.answer_logits is not None:
        losses["token"] = token_loss(output.understood.answer_logits, batch.answer)
    return losses


def best_frames(truth: Float[Tensor, "rows t h w"]) -> tuple[Int[Tensor, " rows"], Any]:
    """The newest of the frames that show the target best, and whether any shows it at all."""
    area = truth.float().mean((2, 3))
    is_good = area >= AS_GOOD * area.amax(dim=1, keepdim=True)
    numbers = torch.arange(truth.shape[1], device=truth.device)
    best = torch.where(is_good, numbers, torch.zeros_like(numbers)).amax(dim=1)
    return best, area.amax(dim=1) > 0


def _video(batch: Batch, video: VideoEncoderConfig) -> Float[Tensor, "clips t 3 size size"]:
    frames = batch.frames_rgb_u8[:, : batch.clip_frames]
    pixels = normalise(frames.flatten(0, 1))
    if pixels.shape[-1] != video.image_size:
        pixels = F.interpolate(pixels, (video.image_size, video.image_size), mode="area")
    return pixels.unflatten(0, frames.shape[:2])


def _random_targets(rows: int, frames: int) -> Int[Tensor, " rows"]:
    """Any frame; every third time the newest, which the stream asks about most."""
    drawn = torch.randint(0, frames, (rows,))
    return torch.where(torch.rand(rows) < 1 / 3, torch.full_like(drawn, frames - 1), drawn)


def _random_references(target: int, frames: int, count: int, sampling: str) -> list[int]:
    if torch.rand(()) < 0.5:
        return reference_frames(target, frames, count, sampling)
    others = [t for t in range(frames) if t != target]
    return sorted(others[i] for i in torch.randperm(len(others))[:count].tolist())


def _mask_losses(
    model: MethodModel,
    batch: Batch,
    clip_of_row: Int[Tensor, " rows"],
    frame_of_row: Int[Tensor, " rows"],
    prompts: Float[Tensor, "rows n c"],
    truth: Float[Tensor, "rows h w"],
    seen: Any,
) -> Losses:
    pairs = torch.stack((clip_of_row, frame_of_row), dim=1)
    unique, index = torch.unique(pairs, dim=0, return_inverse=True)
    with torch.no_grad():
        pixels = normalise(batch.frames_rgb_u8[unique[:, 0], unique[:, 1]])
        side = model.seg_model.config.image_size
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="area")
        all_features = model.seg_model.encode_image(pixels, model.fusion_level)
        top = all_features.top[index]
        features = ImageFeatures(top, all_features.high_res_s0[index], all_features.high_res_s1[index], fusion=top)
    conditioned = model.seg_model.without_memory(features)
    return mask_losses(model.seg_model.decode_mask(features, conditioned, PromptTokens(prompts)), truth, seen)


def _query_losses(
    heads: MethodReadOuts,
    query: Float[Tensor, "rows d"],
    truth: Float[Tensor, "rows h w"],
    seen: Any,
    batch: Batch,
    rows: Int[Tensor, " rows"],
) -> Losses:
    """The <SEG> of a frame names the target's row and column there, its colour and its shape."""
    logits = heads.query_place(query).float().unflatten(-1, (2, PLACES))
    lines = F.adaptive_avg_pool1d(torch.stack((truth.mean(2), truth.mean(1)), dim=1), PLACES)
    lines = lines / lines.sum(-1, keepdim=True).clamp(min=1e-6)
    place = -(lines * logits.log_softmax(-1)).sum(-1).mean(1)
    attribute = torch.zeros((), device=query.device)
    for head, labels in ((heads.query_colour, batch.target_colour), (heads.query_shape, batch.target_shape)):
        wanted = F.one_hot(labels[rows], head.out_features + 1).amax(dim=1)[:, 1:].float()
        attribute = attribute + F.binary_cross_entropy_with_logits(head(query).float(), wanted)
    weight = seen.float()
    return {"query_place": (place * weight).sum() / weight.sum().clamp(min=1.0), "query_attribute": attribute / 2}


def _mark_losses(heads: MethodReadOuts, understood: Understood, name: str, share: Float[Tensor, "rows v"]) -> Losses:
    """Visual tokens mark the landmark half-way through the language model, and the target from then on."""
    shown = (share > MIN_TOKEN_SHARE).float()
    half_way = heads.layers // 2
    if name == "landmark":
        found = [heads.visual_landmark(understood.visual_hidden[half_way - 1])]
    else:
        hidden = understood.visual_hidden[half_way:]
        found = [head(states) for head, states in zip(heads.visual_target, hidden, strict=True)]
    losses = [F.binary_cross_entropy_with_logits(logits[..., 0].float(), shown) for logits in found]
    return {f"visual_{name}": torch.stack(losses).mean()}


def _shares_of_tokens(tempvrs: TempVrs, covered: Float[Tensor, "rows t h w"]) -> Float[Tensor, "rows v"]:
    """Share of each visual token's place that the object covers, in the order of `TempVrs.encode`."""
    config, video = tempvrs.config, tempvrs.config.video
    slow = video.grid // video.pool
    parts = []
    for t in range(covered.shape[1]):
        side = slow if t % config.phases == 0 else slow // config.fast_pool
        parts.append(F.adaptive_avg_pool2d(covered[:, t], side).flatten(1))
    parts.append(F.adaptive_avg_pool2d(covered[:, -1], video.grid).flatten(1))
    return torch.cat(parts, dim=1)
