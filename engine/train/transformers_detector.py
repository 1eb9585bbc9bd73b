# SPDX-License-Identifier: Apache-2.0
"""A zero-shot detector at toy scale for the method grounding: an OWL-ViT of `transformers`, trained from nothing.

Frames are seen as a grid of patches, and every patch has a box and, for each phrase, a score. OWL-ViT matches patches
and objects anew in every step; here the patch in the middle of an object answers for it, which needs no search, and
every other patch on it learns its box and its name beside, which a short training needs.

The folder that is written is a snapshot like those of the hub: `load_detector` reads it as any other, also with
transformers 4. Training needs transformers 5.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection

from virst_engine.data.clips import MIN_VISIBLE_SHARE, Batch, BatchSource, ClipPlan, RecordedScene
from virst_engine.model.pixels import IMAGE_DEVIATION, IMAGE_MEAN, normalise
from virst_engine.sim.expressions import VOCABULARY
from virst_engine.sim.spec import MAX_OBJECTS
from virst_engine.train.losses import attribute_loss
from virst_engine.train.steps import Losses

CARD = "card.json"
THRESHOLD = 0.15  # of an OWL-ViT's score, where `load_detector` reads it
IMAGE_SIZE, PATCH, LONGEST = 128, 8, 32  # pixels, pixels, tokens
START, END, PAD, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<pad>", "<unk>"
HELD_OUT = 40  # every so many-th scene is not learnt from: it chooses the threshold
FOCUS, POSITIVE = 2.0, 0.3  # gamma and alpha of the focal loss, as OWL-ViT has them
COVERED = 0.3  # share of a patch from which it learns the box of an object


def build_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Byte pairs in which each of the words is one token. Other words fall apart into smaller ones, down to bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    pairs.train_from_iterator(sorted(set(words)), trainer)
    learnt = json.loads(pairs.to_str())["model"]
    # CLIP reads a sentence at the token with the highest number: the end has to be the last one.
    tokens = dict.fromkeys(
        [PAD, UNKNOWN, *letters, *(f"{letter}</w>" for letter in letters), *learnt["vocab"], START, END]
    )
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        model_max_length=LONGEST,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
    )


def build_config(tokens: int, *, width: int = 128, layers: int = 4) -> OwlViTConfig:
    """Of a detector whose tokenizer has so many tokens."""
    return OwlViTConfig(
        text_config={
            "vocab_size": tokens,
            "hidden_size": width,
            "hidden_act": "gelu",
            "intermediate_size": 2 * width,
            "num_hidden_layers": min(layers, 2),
            "num_attention_heads": 4,
            "max_position_embeddings": LONGEST,
            "pad_token_id": 0,
            "bos_token_id": tokens - 2,
            "eos_token_id": tokens - 1,
        },
        vision_config={
            "hidden_size": width,
            "hidden_act": "gelu",
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
        projection_dim=width,
    )


@dataclass(frozen=True)
class DetectorConfig:
    """What `Trainer` asks of a model's configuration."""

    name: str
    owl: OwlViTConfig

    def to_json(self) -> str:
        parts = (self.owl, self.owl.text_config, self.owl.vision_config)
        return json.dumps([json.loads(part.to_json_string(use_diff=False)) for part in parts])


class PhraseTokenizer:
    """`clips.Tokenizer` on that of the detector."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, sentence: str) -> list[int]:
        return list(self._tokenizer(sentence, truncation=True)["input_ids"])


@dataclass(frozen=True)
class Found:
    """Of the patches of `clips` frames: how well `phrases` fit them, and the box of what is there."""

    cosines: Float[Tensor, "clips phrases patches"]
    logits: Float[Tensor, "clips phrases patches"]
    scale: Float[Tensor, "clips 1 patches"]  # of the logits: they are (cosine + shift) * scale
    boxes: Float[Tensor, "clips patches 4"]  # centre, width and height in shares of the image
    features: Float[Tensor, "clips patches d"]


class DetectorModel(nn.Module):
    """An OWL-ViT in training, with its tokenizer."""

    def __init__(self, name: str, *, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.clip_tokenizer = build_tokenizer(VOCABULARY)
        self.tokenizer = PhraseTokenizer(self.clip_tokenizer)
        self.config = DetectorConfig(name, build_config(len(self.clip_tokenizer), width=width, layers=layers))
        self.owl = OwlViTForObjectDetection(self.config.owl)
        head = self.owl.class_head
        with torch.no_grad():  # nearly all patches are the middle of nothing: a score begins at a half per cent
            for layer, bias in ((head.logit_scale, 9.0), (head.logit_shift, -0.5)):
                layer.weight.zero_()
                layer.bias.fill_(bias)
            self.owl.box_head.dense2.weight.zero_()  # and every box is its patch

    def forward(self, batch: Batch, kept: Int[Tensor, "clips patches"] | None = None) -> Found:
        """Of a batch with one frame per clip and as many sentences for each; `kept`: the patches that are seen."""
        pixels = normalise(batch.frames_rgb_u8[:, 0])
        if pixels.shape[-1] != IMAGE_SIZE:
            pixels = F.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="area")
        features = self._features(pixels, kept)
        # The batch's sentences end where their row ends; OWL-ViT's begin where it begins.
        order = batch.text_valid.long().argsort(dim=1, descending=True, stable=True)
        text, valid = batch.text.gather(1, order), batch.text_valid.gather(1, order)
        read = self.owl.owlvit.text_model(input_ids=text, attention_mask=valid.long())
        phrases = self.owl.owlvit.text_projection(read.pooler_output).unflatten(0, (len(pixels), -1))
        head = self.owl.class_head  # its forward, which keeps the cosines to itself
        cosines = F.normalize(phrases, dim=-1) @ F.normalize(head.dense0(features), dim=-1).transpose(1, 2)
        shift, scale = head.logit_shift(features).transpose(1, 2), head.logit_scale(features).transpose(1, 2)
        scale = head.elu(scale) + 1
        bias = self.owl.box_bias if kept is None else self.owl.box_bias[kept]
        boxes = (self.owl.box_head(features) + bias).sigmoid()
        return Found(cosines, (cosines + shift) * scale, scale, boxes, features)

    def _features(
        self, pixels: Float[Tensor, "clips 3 h w"], kept: Int[Tensor, "clips patches"] | None
    ) -> Float[Tensor, "clips patches d"]:
        """`OwlViTForObjectDetection.image_embedder`, of some of the patches."""
        vision = self.owl.owlvit.vision_model
        tokens = vision.embeddings(pixels)
        if kept is not None:
            patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat((tokens[:, :1], patches), dim=1)
        seen = vision.encoder(inputs_embeds=vision.pre_layernorm(tokens)).last_hidden_state
        seen = vision.post_layernorm(seen)
        return self.owl.layer_norm(seen[:, 1:] * seen[:, :1])


class DetectorReadOuts(nn.Module):
    """Read-outs of what a patch has to know; used in training only, no part of the weights."""

    def __init__(self, width: int, colours: int, shapes: int) -> None:
        super().__init__()
        self.colour, self.shape = nn.Linear(width, colours + 1), nn.Linear(width, shapes + 1)
        self.match_scale, self.match_shift = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-0.3))


@dataclass(frozen=True)
class Objects:
    """What is where in the frames of a batch, by patch, and which of it the sentences mean."""

    cover: Float[Tensor, "clips n patches"]  # share of the patch that the object covers
    middle: Float[Tensor, "clips n patches"]  # 1 for the patch in the middle of what shows, if enough does
    boxes: Float[Tensor, "clips n 4"]  # left, top, right, bottom in shares of the image
    meant: Float[Tensor, "clips phrases n"]  # 1 where the sentence means the object

    def of(self, kept: Int[Tensor, "clips patches"]) -> "Objects":
        """Of some of the patches."""
        columns = kept[:, None].expand(-1, self.cover.shape[1], -1)
        return Objects(self.cover.gather(2, columns), self.middle.gather(2, columns), self.boxes, self.meant)


def detector_step(model: DetectorModel, heads: DetectorReadOuts, batch: Batch, patches: int = 0) -> Losses:
    """`patches`: so many are seen of each frame, those on objects first; 0: all. Most of a table is bare."""
    objects, kept = objects_of(batch), None
    if patches:
        kept = patches_to_see(objects, patches)
        objects = objects.of(kept)
    found = model(batch, kept)
    top, owner = objects.cover.max(dim=1)  # the object that a patch shows most of
    is_on_one = top > 0.5
    meant = objects.meant.gather(2, owner[:, None].expand(-1, objects.meant.shape[1], -1))
    match_logits = (found.cosines + heads.match_shift) * heads.match_scale
    match = F.binary_cross_entropy_with_logits(match_logits, meant, reduction="none")
    weight = is_on_one[:, None].float().expand_as(match)
    wanted = objects.boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    learns_box = (top > COVERED) | (objects.middle.amax(dim=1) > 0)
    losses: Losses = {
        "score": focal_loss(found.logits, (objects.meant @ objects.middle).clamp(max=1.0)),
        "match": (match * weight).sum() / weight.sum().clamp(min=1.0),
    }
    losses |= box_losses(found.boxes[learns_box], wanted[learns_box])
    attribute = found.features.new_zeros(())
    side = IMAGE_SIZE // PATCH
    for head, labels in ((heads.colour, batch.colour), (heads.shape, batch.shape)):
        nearest = F.interpolate(labels[:, :1].float(), (side, side), mode="nearest-exact").flatten(1).long()
        nearest = nearest if kept is None else nearest.gather(1, kept)
        attribute = attribute + attribute_loss(head(found.features).transpose(1, 2)[:, :, None], nearest[:, None])
    losses["attribute"] = attribute / 2
    return losses


def objects_of(batch: Batch) -> Objects:
    """The truth of the first frame of each clip."""
    labels = torch.arange(1, MAX_OBJECTS + 1)
    masks = (batch.instance_masks[:, :1] == labels[:, None, None].to(batch.instance_masks.device)).float()
    clips, side = len(masks), IMAGE_SIZE // PATCH
    cover = F.adaptive_avg_pool2d(masks, side).flatten(2)
    seen = masks.mean((2, 3)) > MIN_VISIBLE_SHARE
    middle = F.one_hot(middle_patches(cover), side * side).float() * seen[..., None]
    half = F.avg_pool2d(masks, 2)
    truth = batch.truth[:, 0].unflatten(0, (clips, -1))
    covered = [torch.minimum(truth, half[:, k, None]).sum((2, 3)) for k in range(MAX_OBJECTS)]
    share = torch.stack(covered, dim=2) / half.sum((2, 3)).clamp(min=1e-6)[:, None]
    return Objects(cover, middle, mask_boxes(masks > 0), (share > 0.5).float())


def patches_to_see(objects: Objects, count: int) -> Int[Tensor, "clips count"]:
    """In order: the middles, patches on objects, and others at random."""
    rank = torch.rand_like(objects.cover[:, 0]) + (objects.cover.amax(1) > 0).float() + 2 * objects.middle.amax(1)
    return rank.topk(count, dim=1).indices.sort(dim=1).values


def middle_patches(cover: Float[Tensor, "clips n patches"]) -> Int[Tensor, "clips n"]:
    """The patch nearest to the centroid of an object, of those that show enough of it."""
    side = round(cover.shape[-1] ** 0.5)
    numbers = torch.arange(side * side, device=cover.device)
    places = torch.stack((numbers % side, numbers // side), dim=1).float()
    centroid = cover @ places / cover.sum(2, keepdim=True).clamp(min=1e-6)
    distance = torch.cdist(centroid, places.expand(len(cover), -1, -1))
    is_enough = cover >= 0.5 * cover.amax(dim=2, keepdim=True)
    return distance.masked_fill(~is_enough, torch.inf).argmin(dim=2)


def mask_boxes(masks: Bool[Tensor, "clips n h w"]) -> Float[Tensor, "clips n 4"]:
    """Left, top, right and bottom in shares of the image; 0 for an empty mask."""
    edges = []
    for is_there in (masks.any(2), masks.any(3)):  # columns, rows
        length = is_there.shape[-1]
        numbers = torch.arange(length, device=masks.device)
        first = torch.where(is_there, numbers, length).amin(-1)
        end = torch.where(is_there, numbers + 1, 0).amax(-1)
        edges.append((first.clamp(max=end) / length, end / length))
    (left, right), (top, bottom) = edges
    return torch.stack((left, top, right, bottom), dim=-1).float()


def focal_loss(
    logits: Float[Tensor, "clips phrases patches"], target: Float[Tensor, "clips phrases patches"]
) -> Float[Tensor, ""]:
    """Per object that is meant; what is already told well counts little."""
    error = (target - logits.sigmoid()).abs()
    weight = (POSITIVE * target + (1 - POSITIVE) * (1 - target)) * error**FOCUS
    loss = weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss.sum() / target.sum().clamp(min=1.0)


def box_losses(boxes: Float[Tensor, "k 4"], truth: Float[Tensor, "k 4"]) -> Losses:
    """`boxes` by centre and size, `truth` by corners."""
    if not len(boxes):
        return {"box": boxes.sum(), "overlap": boxes.sum()}
    size = truth[:, 2:] - truth[:, :2]
    by_centre = torch.cat((truth[:, :2] + size / 2, size), dim=1)
    iou, hull_share = overlaps(corners(boxes), truth)
    return {"box": (boxes - by_centre).abs().sum(1).mean(), "overlap": (1 - iou + hull_share).mean()}


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Centre, width and height become left, top, right and bottom."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


def overlaps(a: Float[Tensor, "k 4"], b: Float[Tensor, "k 4"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Intersection over union of pairs, and the share of their common hull that neither covers."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(dim=1)

    common = area(torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:]))
    union = area(a[:, :2], a[:, 2:]) + area(b[:, :2], b[:, 2:]) - common
    hull = area(torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:]))
    return common / union.clamp(min=1e-9), (hull - union) / hull.clamp(min=1e-9)


def split_scenes(scenes: Sequence[RecordedScene]) -> tuple[list[RecordedScene], list[RecordedScene]]:
    """(scenes to learn from, scenes that choose the threshold). Of fewer than HELD_OUT, all are both."""
    held_out = list(scenes[HELD_OUT - 1 :: HELD_OUT])
    if not held_out:
        return list(scenes), list(scenes)
    return [scene for i, scene in enumerate(scenes) if i % HELD_OUT != HELD_OUT - 1], held_out


@dataclass(frozen=True)
class Calibration:
    """What was found on scenes that were not learnt from."""

    shift: float  # added to the bias of `logit_shift`
    phrases: int
    present_found: float  # share of phrases of something visible whose best score reaches the threshold
    absent_refused: float  # share of phrases of nothing visible whose best score stays below it
    box_iou: float  # mean of the best box with the nearest target's, of phrases of something visible


@torch.no_grad()
def calibrate(model: DetectorModel, scenes: Sequence[RecordedScene], plan: ClipPlan, *, batches: int) -> Calibration:
    """Shift the model's scores so that the usual threshold of OWL-ViT tells best what is there and what is not."""
    model.eval()
    threshold = math.log(THRESHOLD / (1 - THRESHOLD))
    shifts = torch.linspace(-0.6, 0.6, 121)
    best, present, overlap = [], [], []
    source = BatchSource(scenes, model.tokenizer, plan, (HELD_OUT,), batches)
    for batch in DataLoader(source, batch_size=None):
        found, objects = model(batch), objects_of(batch)
        meant = objects.meant * objects.middle.amax(dim=2)[:, None]
        best.append((found.logits[..., None] + shifts * found.scale[..., None]).amax(dim=2).flatten(0, 1))
        present.append(meant.amax(dim=2).flatten() > 0)
        chosen = corners(found.boxes).gather(1, found.logits.argmax(dim=2)[..., None].expand(-1, -1, 4))
        ious = [
            overlaps(chosen.flatten(0, 1), objects.boxes[:, k, None].expand_as(chosen).flatten(0, 1))[0]
            for k in range(MAX_OBJECTS)
        ]
        overlap.append((torch.stack(ious, dim=1) * meant.flatten(0, 1)).amax(dim=1))
    reaches = torch.cat(best) >= threshold
    is_there, iou = torch.cat(present), torch.cat(overlap)
    found_share, refused_share = _mean(reaches[is_there]), 1 - _mean(reaches[~is_there])
    i = int((found_share + refused_share).argmax())
    model.owl.class_head.logit_shift.bias += shifts[i]
    return Calibration(
        round(float(shifts[i]), 3),
        len(is_there),
        round(float(found_share[i]), 4),
        round(float(refused_share[i]), 4),
        round(float(iou[is_there].mean()) if bool(is_there.any()) else 0.0, 4),
    )


def _mean(reaches: Bool[Tensor, "k shifts"]) -> Float[Tensor, " shifts"]:
    return reaches.float().sum(0) / max(len(reaches), 1)


def save_detector(model: DetectorModel, folder: Path, card: dict[str, Any], calibration: Calibration) -> None:
    """Write the snapshot: configuration, weights as float16, the processor's files and CARD."""
    from transformers import OwlViTImageProcessor  # importing it warns of torchvision

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.owl.state_dict().items()}
    model.owl.save_pretrained(folder, state_dict=weights)
    images = OwlViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_DEVIATION),
    )
    # One by one: the processor that they make up is written in a way that transformers 4 cannot read.
    images.save_pretrained(folder)
    model.clip_tokenizer.save_pretrained(folder)
    told = {**card, "calibration": asdict(calibration)}
    (folder / CARD).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
