# SPDX-License-Identifier: Apache-2.0
"""Forward passes of the training stages: a batch in, named losses out."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from virst_engine.data.clips import Batch
from virst_engine.model.config import VideoEncoderConfig, VirstConfig
from virst_engine.model.pixels import normalise
from virst_engine.model.virst import ClipEncoding, PromptOutput, Virst
from virst_engine.train.config import LossWeights
from virst_engine.train.losses import attention_loss, attribute_loss, mask_losses, token_loss
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, PromptTokens

Losses = dict[str, Float[Tensor, ""]]
MIN_TOKEN_SHARE = 0.04  # of a token's pixels: from there it is expected to know the object
MOVING = 0.1  # of 1/16 of the side between frames of a clip: about 1 pixel at 128 x 128
VISUAL_MOTION_SCALE = 4.0
PLACES = 8  # rows, and columns, in which a target is located


class ReadOuts(nn.Module):
    """Linear read-outs of what every part has to know; used in training only, no part of the weights."""

    def __init__(self, config: VirstConfig, colours: int, shapes: int) -> None:
        super().__init__()
        seg_channels, video_channels = config.sam2.channels, config.video.channels
        self.seg_colour, self.seg_shape = (
            nn.Conv2d(seg_channels, colours + 1, 1),
            nn.Conv2d(seg_channels, shapes + 1, 1),
        )
        self.video_colour = nn.Linear(video_channels, colours + 1)
        self.video_shape = nn.Linear(video_channels, shapes + 1)
        self.video_motion = nn.Linear(video_channels, 2)
        # Which colours a token of Second ST-Fusion holds, and which the [ST] tokens ask for: one read-out for both, so
        # that a query resembles what it asks for.
        self.token_colour = nn.Linear(seg_channels, colours)
        self.token_shape = nn.Linear(seg_channels, shapes)
        self.visual_motion = nn.Linear(config.language.hidden, 2)  # of the object in a visual token
        self.query_place = nn.Linear(seg_channels, 2 * PLACES)  # the row and the column of the target
        hidden, self.layers = config.language.hidden, config.language.layers
        # What a visual token shows: the landmark half-way through the language model ("the blue can" in "left of the
        # blue can"), and from then on, told by it, the target.
        self.visual_landmark = token_mark(hidden)
        self.visual_target = nn.ModuleList(token_mark(hidden) for _ in range(self.layers - self.layers // 2))


def token_mark(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 1))


@dataclass(frozen=True)
class Encoded:
    """A batch after both encoders. Features are flat over (clip, frame)."""

    features: ImageFeatures
    frames: int  # f, per clip
    video_cells: Float[Tensor, "clips t cells d"]

    def of(self, index: Int[Tensor, " o"]) -> ImageFeatures:
        """What the decoder and the memory read of some frames; in place of the large fusion maps stands `top`."""
        top = self.features.top[index]
        return ImageFeatures(top, self.features.high_res_s0[index], self.features.high_res_s1[index], fusion=top)


def encode(model: Virst, batch: Batch, *, train_segmenter: bool, with_video: bool = True) -> Encoded:
    clips, frames = batch.frames_rgb_u8.shape[:2]
    pixels = normalise(batch.frames_rgb_u8.flatten(0, 1))
    seg_pixels = _resized(pixels, model.config.sam2.image_size)
    with torch.set_grad_enabled(train_segmenter and torch.is_grad_enabled()):
        features = model.seg_model.encode_image(seg_pixels, model.config.fusion.feature_level)
    if not with_video:
        return Encoded(features, frames, pixels.new_zeros(clips, 0, 0, 0))
    video = _resized(pixels, model.config.video.image_size)
    cells = model.video_encoder.cells(video.unflatten(0, (clips, frames))[:, : batch.clip_frames])
    return Encoded(features, frames, cells)


def _resized(pixels: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    return pixels if pixels.shape[-1] == side else F.interpolate(pixels, (side, side), mode="area")


def attribute_losses(heads: ReadOuts, encoded: Encoded, batch: Batch) -> Losses:
    """Every encoder that learns has to know what colour and shape every place has."""
    losses: Losses = {}
    fusion, cells = encoded.features.fusion, encoded.video_cells
    if fusion.requires_grad:
        losses["attribute"] = _seg_attribute_loss(heads, fusion, batch)
    if cells.requires_grad:
        losses |= video_attribute_losses(heads, cells, batch)
    return losses


def _seg_attribute_loss(heads: ReadOuts, fusion: Float[Tensor, "frames c h w"], batch: Batch) -> Float[Tensor, ""]:
    side = fusion.shape[-1]
    total = torch.zeros((), device=fusion.device)
    for seg_head, labels in ((heads.seg_colour, batch.colour), (heads.seg_shape, batch.shape)):
        flat = labels.flatten(0, 1)
        if flat.shape[-1] != side:
            flat = F.interpolate(flat[:, None].float(), (side, side), mode="nearest")[:, 0].long()
        total = total + attribute_loss(seg_head(fusion), flat)
    return total / 2


def video_attribute_losses(heads: ReadOuts, video_cells: Float[Tensor, "clips t cells d"], batch: Batch) -> Losses:
    """Colour and shape of every cell, and where its object is moving to."""
    t, cells = video_cells.shape[1:3]
    grid = round(cells**0.5)
    total = torch.zeros((), device=video_cells.device)
    for head, labels in ((heads.video_colour, batch.colour), (heads.video_shape, batch.shape)):
        label = _dominant(labels[:, :t].flatten(0, 1), head.out_features, grid)
        logits = head(video_cells).flatten(0, 1).transpose(1, 2).unflatten(2, (grid, grid))
        total = total + attribute_loss(logits, label)
    motion = motion_loss(heads.video_motion(video_cells), batch.colour[:, :t], batch.motion[:, :t])
    return {"video_attribute": total / 2, "motion": motion}


def motion_loss(
    found: Float[Tensor, "clips t cells 2"],
    colour: Int[Tensor, "clips t quarter quarter"],
    motion: Float[Tensor, "clips t quarter quarter 2"],
) -> Float[Tensor, ""]:
    """Where the object under each cell moves to; a cell that is mostly background does not count."""
    grid = round(found.shape[2] ** 0.5)
    covered = (colour > 0).float().flatten(0, 1)[:, None]
    window = covered.shape[-1] // grid
    share = F.avg_pool2d(covered, window)
    shift = F.avg_pool2d(motion.flatten(0, 1).movedim(-1, 1).contiguous(), window) / share.clamp(min=1e-6)
    shift = shift.flatten(2).transpose(1, 2)
    error = F.smooth_l1_loss(found.float().flatten(0, 1), shift, reduction="none", beta=0.5).sum(-1)
    seen = (share > 0.2).flatten(1)
    moves = seen & (shift.norm(dim=-1) > MOVING)
    # Most objects stand still: in a plain mean, "nothing moves" is a good answer.
    means = [(error * among).sum() / among.sum().clamp(min=1) for among in (moves, seen & ~moves)]
    return torch.stack(means).mean()


def video_step(model: Virst, heads: ReadOuts, batch: Batch) -> Losses:
    """Pre-training of the video encoder alone: what is where, and how it moves."""
    video = _resized(normalise(batch.frames_rgb_u8.flatten(0, 1)), model.config.video.image_size)
    cells = model.video_encoder.cells(video.unflatten(0, batch.frames_rgb_u8.shape[:2]))
    return video_attribute_losses(heads, cells, batch)


def token_attribute_losses(heads: ReadOuts, clip: ClipEncoding, batch: Batch) -> Losses:
    """The tokens that Second ST-Fusion looks at have to tell objects apart, or it learns to look at all of them."""
    tokens = clip.second_maps.movedim(2, -1)  # clips t hd wd c
    total = torch.zeros((), device=tokens.device)
    for head, labels in ((heads.token_colour, batch.colour), (heads.token_shape, batch.shape)):
        share = F.one_hot(labels[:, : batch.clip_frames], head.out_features + 1).float()
        share = share.flatten(0, 1).movedim(-1, 1).contiguous()
        share = F.avg_pool2d(share, share.shape[-1] // tokens.shape[2])[:, 1:]
        held = (share > MIN_TOKEN_SHARE).float().movedim(1, -1).unflatten(0, tokens.shape[:2])
        total = total + F.binary_cross_entropy_with_logits(head(tokens).float(), held)
    return {"token_attribute": total / 2}


def query_attribute_losses(heads: ReadOuts, output: PromptOutput, batch: Batch) -> Losses:
    """What every [ST] token asks for after the language model: the colours and shapes of the target's objects."""
    total = torch.zeros((), device=output.projected.device)
    for head, labels in ((heads.token_colour, batch.target_colour), (heads.token_shape, batch.target_shape)):
        wanted = F.one_hot(labels, head.out_features + 1).amax(dim=1)[:, 1:].float()
        logits = head(output.projected).float()
        total = total + F.binary_cross_entropy_with_logits(logits, wanted[:, None].expand_as(logits))
    return {"query_attribute": total / 2}


def place_losses(heads: ReadOuts, output: PromptOutput, batch: Batch, video: VideoEncoderConfig) -> Losses:
    """Where the target is: the [ST] tokens name its row and column in the newest frame, visual tokens mark it.

    Visual tokens mark the landmark first: what is left of it cannot be known before.

    Without them the language model learns to pass a sentence's words on, and relations not at all.
    """
    t = batch.clip_frames
    truth = batch.truth[:, t - 1]
    seen = batch.visible[:, t - 1].float()
    logits = heads.query_place(output.projected).float().mean(1).unflatten(-1, (2, PLACES))
    lines = torch.stack((truth.mean(2), truth.mean(1)), dim=1)  # rows, columns
    lines = F.adaptive_avg_pool1d(lines, PLACES)
    lines = lines / lines.sum(-1, keepdim=True).clamp(min=1e-6)
    place = -(lines * logits.log_softmax(-1)).sum(-1).mean(1)
    half_way = heads.layers // 2
    told_by = output.visual_hidden[half_way - 1]
    targets = zip(heads.visual_target, output.visual_hidden[half_way:], strict=True)
    marked = [_mark_loss(head(hidden), batch.truth[:, :t], video) for head, hidden in targets]
    return {
        "query_place": (place * seen).sum() / seen.sum().clamp(min=1.0),
        "visual_target": torch.stack(marked).mean(),
        "visual_landmark": _mark_loss(heads.visual_landmark(told_by), batch.landmark, video),
    }


def _mark_loss(
    logits: Float[Tensor, "rows v 1"], covered: Float[Tensor, "rows t h w"], video: VideoEncoderConfig
) -> Float[Tensor, ""]:
    """Whether each visual token shows enough of an object. `covered`: share of every place that the object covers."""
    side = video.grid // video.pool
    share = F.adaptive_avg_pool2d(covered, (side, side)).flatten(1)
    if video.fine_newest:
        fine = F.adaptive_avg_pool2d(covered[:, -1:], (video.grid, video.grid)).flatten(1)
        share = torch.cat((share, fine), dim=1)
    shown = (share > MIN_TOKEN_SHARE).float()
    return F.binary_cross_entropy_with_logits(logits[..., 0].float(), shown)


def visual_motion_losses(heads: ReadOuts, clip: ClipEncoding, batch: Batch, video: VideoEncoderConfig) -> Losses:
    """How the object in each visual token moves, before the language model.

    The read-out's scale has to be won by the tokens: next to colours and shapes motion is small in what the video
    encoder knows, and the language model overlooks it.
    """
    t, coarse = batch.clip_frames, batch.clip_frames * video.tokens_per_frame
    found = heads.visual_motion(clip.visual.tokens).float() / VISUAL_MOTION_SCALE
    losses = [motion_loss(found[:, :coarse].unflatten(1, (t, -1)), batch.colour[:, :t], batch.motion)]
    if video.fine_newest:
        losses.append(motion_loss(found[:, None, coarse:], batch.colour[:, t - 1 : t], batch.motion[:, t - 1 :]))
    return {"visual_motion": torch.stack(losses).mean()}


def _dominant(labels: Int[Tensor, "b h w"], classes: int, grid: int) -> Int[Tensor, "b grid grid"]:
    """The foreground label that covers most of a cell; -1 where it covers too little to tell, 0 where none does."""
    share = F.avg_pool2d(F.one_hot(labels, classes).movedim(-1, 1).float().contiguous(), labels.shape[-1] // grid)
    best, label = share[:, 1:].max(dim=1)
    return torch.where(best >= 0.2, label + 1, torch.where(best > 0.0, -1, 0))


def weighted(losses: Losses, weights: LossWeights) -> Float[Tensor, ""]:
    return sum((getattr(weights, name) * value for name, value in losses.items()), torch.zeros(()))


def image_step(model: Virst, heads: ReadOuts, batch: Batch, *, train_segmenter: bool) -> tuple[Losses, MaskPrediction]:
    """Stages 1 and 2 (equation 13): anchor frames decoded from their own prompts; returns the newest one's masks."""
    encoded = encode(model, batch, train_segmenter=train_segmenter)
    clip = _encode_clip(model, encoded, batch)
    output = _prompts(model, clip, batch)
    losses = attribute_losses(heads, encoded, batch) | token_attribute_losses(heads, clip, batch)
    losses |= query_attribute_losses(heads, output, batch) | _language_losses(output, batch)
    losses |= place_losses(heads, output, batch, model.config.video)
    losses |= visual_motion_losses(heads, clip, batch, model.config.video)
    index = torch.tensor(batch.anchors, device=batch.clip_of_row.device)
    rows, k = batch.clip_of_row.shape[0], len(batch.anchors)
    flat = (batch.clip_of_row[:, None] * encoded.frames + index).flatten()
    features = encoded.of(flat)
    conditioned = model.seg_model.without_memory(features)
    prediction = model.seg_model.decode_mask(
        features, conditioned, PromptTokens(output.prompts[:, index].flatten(0, 1))
    )
    losses |= mask_losses(prediction, batch.truth[:, index].flatten(0, 1), batch.visible[:, index].flatten())
    newest = torch.arange(rows, device=index.device) * k + k - 1
    return losses, _rows(prediction, newest)


def propagation_step(model: Virst, heads: ReadOuts, batch: Batch) -> tuple[Losses, MaskPrediction]:
    """Stage 3 (equation 14): anchors from prompts, then the frames after the clip from memory alone, in order."""
    encoded = encode(model, batch, train_segmenter=True)
    clip = _encode_clip(model, encoded, batch)
    output = _prompts(model, clip, batch)
    losses = attribute_losses(heads, encoded, batch) | token_attribute_losses(heads, clip, batch)
    losses |= query_attribute_losses(heads, output, batch) | _language_losses(output, batch)
    losses |= place_losses(heads, output, batch, model.config.video)
    losses |= visual_motion_losses(heads, clip, batch, model.config.video)
    memory = TrainingMemory(model)
    total: list[Losses] = []
    for frame in batch.anchors:
        features = encoded.of(batch.clip_of_row * encoded.frames + frame)
        prediction = model.seg_model.decode_mask(
            features, model.seg_model.without_memory(features), PromptTokens(output.prompts[:, frame])
        )
        total.append(mask_losses(prediction, batch.truth[:, frame], batch.visible[:, frame]))
        # A model that has not learnt presence yet would remember nothing: here the truth decides what is written.
        memory.remember_anchor(
            _step_of(batch, frame), _remembered(model, features, prediction), batch.visible[:, frame]
        )
    after = range(batch.clip_frames, encoded.frames)
    masks, newest = _propagate(model, batch, encoded, memory, after, total, prediction)
    return losses | masks, newest


def pretraining_step(
    model: Virst, heads: ReadOuts, batch: Batch, *, train_segmenter: bool
) -> tuple[Losses, MaskPrediction]:
    """Before the paper's stages: any object from a point on it in the first frame, then from memory; attributes.

    With frozen encoders (`train_segmenter` False) only the decoder and the memory learn, and steps are cheap.
    """
    encoded = encode(model, batch, train_segmenter=train_segmenter, with_video=False)
    losses = attribute_losses(heads, encoded, batch) if train_segmenter else {}
    memory = TrainingMemory(model)
    features = encoded.of(batch.clip_of_row * encoded.frames)
    prediction = model.seg_model.decode_mask(
        features, model.seg_model.without_memory(features), PromptTokens(_point_prompts(model, batch))
    )
    total = [mask_losses(prediction, batch.truth[:, 0], batch.visible[:, 0])]
    memory.remember_anchor(_step_of(batch, 0), _remembered(model, features, prediction), batch.visible[:, 0])
    masks, newest = _propagate(model, batch, encoded, memory, range(1, encoded.frames), total, prediction)
    return losses | masks, newest


def _propagate(
    model: Virst,
    batch: Batch,
    encoded: Encoded,
    memory: "TrainingMemory",
    frames: range,
    total: list[Losses],
    prediction: MaskPrediction,
) -> tuple[Losses, MaskPrediction]:
    for frame in frames:
        features = encoded.of(batch.clip_of_row * encoded.frames + frame)
        step = _step_of(batch, frame)
        conditioned = model.seg_model.attend_memory(features, memory.read(step))
        prediction = model.seg_model.decode_mask(features, conditioned, None)
        known = batch.visible[:, frame] & memory.any_anchor  # what no anchor has shown cannot be tracked
        total.append(mask_losses(prediction, batch.truth[:, frame], known))
        memory.remember_recent(step, _remembered(model, features, prediction), known)
    return {name: torch.stack([one[name] for one in total]).mean() for name in total[0]}, prediction


def _encode_clip(model: Virst, encoded: Encoded, batch: Batch) -> ClipEncoding:
    maps = encoded.features.fusion.unflatten(0, (-1, encoded.frames))[:, : batch.clip_frames]
    return model.encode_cells(encoded.video_cells, maps)


def _prompts(model: Virst, clip: ClipEncoding, batch: Batch) -> PromptOutput:
    return model.prompts(clip, batch.clip_of_row, batch.text, batch.text_valid, batch.answer, batch.answer_valid)


def _language_losses(output: PromptOutput, batch: Batch) -> Losses:
    visible = batch.visible[:, : batch.clip_frames].float()
    losses: Losses = {"presence": F.binary_cross_entropy_with_logits(output.presence_logits.float(), visible)}
    if output.answer_logits is not None:
        losses["token"] = token_loss(output.answer_logits, batch.answer)
    if output.attention_logits is not None:
        height, width = output.attention_logits.shape[-2:]
        cells = F.adaptive_avg_pool2d(batch.truth[:, : batch.clip_frames], (height, width))
        losses["attention"] = attention_loss(output.attention_logits, cells)
    return losses


def _point_prompts(model: Virst, batch: Batch) -> Float[Tensor, "rows 2 c"]:
    """One point on the target in frame 0, drawn from its own pixels (sam2: label 1, and the padding point)."""
    truth = batch.truth[:, 0].flatten(1)
    side = batch.truth.shape[-1]
    chosen = torch.multinomial(truth + 1e-9, 1)[:, 0]
    scale = model.config.sam2.image_size / side
    points = torch.stack((chosen % side, chosen // side), dim=-1).float()[:, None] * scale
    labels = points.new_ones(points.shape[:2])
    return model.seg_model.sam_prompt_encoder._embed_points(points, labels, pad=True)


def _remembered(model: Virst, features: ImageFeatures, prediction: MaskPrediction) -> MemoryEntry:
    present = MaskPrediction(
        prediction.mask_logits, prediction.iou, torch.ones_like(prediction.object_score_logits), prediction.pointer
    )
    return model.seg_model.encode_memory(features, present)


def _rows(prediction: MaskPrediction, rows: Int[Tensor, " o"]) -> MaskPrediction:
    return MaskPrediction(*(getattr(prediction, f.name)[rows] for f in fields(MaskPrediction)))


def _step_of(batch: Batch, frame: int) -> int:
    """A number of processed frames that stands for a frame of the batch: clips are sparse, what follows is dense."""
    spread = 5  # a clip frame every 0.3 s of a camera processed at about 17 Hz
    if frame < batch.clip_frames:
        return frame * spread
    return (batch.clip_frames - 1) * spread + 1 + frame - batch.clip_frames


class TrainingMemory:
    """A memory bank that gradients flow through: entries in lists, `MemoryTensors` of the fixed shape out."""

    def __init__(self, model: Virst) -> None:
        self._config = model.config.sam2
        self._anchors: list[tuple[int, MemoryEntry, Tensor]] = []
        self._recent: list[tuple[int, MemoryEntry, Tensor]] = []

    @property
    def any_anchor(self) -> Tensor:
        return torch.stack([valid for _, _, valid in self._anchors]).any(dim=0)

    def remember_anchor(self, step: int, entry: MemoryEntry, valid: Tensor) -> None:
        self._anchors.append((step, entry, valid))

    def remember_recent(self, step: int, entry: MemoryEntry, valid: Tensor) -> None:
        self._recent = [*self._recent, (step, entry, valid)][-(self._config.memory_frames - 1) :]

    def read(self, step: int) -> MemoryTensors:
        anchors, recent = self._anchors[-3:], self._recent[::-1]
        entries = anchors + recent
        objects = entries[0][2].shape[0]
        valid = torch.stack([v for _, _, v in entries], dim=1)
        # Like the memory bank of the stream: the k-th newest frame that was written, however long ago.
        rank = (valid[:, len(anchors) :].long().cumsum(dim=1) - 1).clamp(min=0)
        tpos = torch.cat((rank.new_full((objects, len(anchors)), self._config.memory_frames - 1), rank), dim=1)
        distance = torch.tensor([float(step - s) for s, _, _ in entries], device=valid.device)
        return MemoryTensors(
            spatial=torch.stack([e.spatial for _, e, _ in entries], dim=1),
            spatial_tpos=tpos,
            spatial_valid=valid,
            pointers=torch.stack([e.pointer for _, e, _ in entries], dim=1),
            pointer_distance=distance.expand(objects, -1),
            pointer_valid=valid,
        )
