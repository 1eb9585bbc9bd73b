# SPDX-License-Identifier: Apache-2.0
"""What a training run does, stage by stage, as data. `tabletop_tiny_training` made the shipped weights."""

from dataclasses import dataclass, field
from typing import Literal

from virst_engine.data.clips import ClipPlan
from virst_engine.sim.expressions import ABSENT_SHARE
from virst_engine.sim.grammar import KINDS_FULL


@dataclass(frozen=True)
class LossWeights:
    """Equation 15 (bce, dice, token, occlusion, iou) and terms of our own that short training needs."""

    bce: float = 2.0
    dice: float = 1.0
    token: float = 0.3
    presence: float = 1.0  # whether the target is visible, from the prompts before they are decoded (not in VIRST)
    occlusion: float = 1.0  # the paper's 0.05 never learnt absence at this scale
    iou: float = 0.05
    attention: float = 0.5  # second fusion's last attention map against the target's cells (not in VIRST)
    token_attribute: float = 2.0  # colours and shapes held by Second ST-Fusion's tokens (not in VIRST)
    query_attribute: float = 1.0  # colours and shapes that the [ST] tokens ask for (not in VIRST)
    attribute: float = 0.2  # colour and shape of every cell of the image encoder (not in VIRST)
    video_attribute: float = 0.2  # and of the video encoder
    query_place: float = 1.0  # row and column of the target, from the [ST] tokens (not in VIRST)
    visual_target: float = 4.0  # whether the target is in a visual token, from the language model (not in VIRST)
    visual_landmark: float = 4.0  # whether the landmark is in a visual token, half-way through (not in VIRST)
    visual_motion: float = 4.0  # shift of the object in every visual token, before the language model (not in VIRST)
    motion: float = 0.2  # shift of every cell's object, from the video encoder (not in VIRST)
    sampler: float = 0.5  # the answer of VISA's frame sampler
    score: float = 1.0  # of a detector: whether a patch is the middle of what the words mean
    match: float = 1.0  # of a detector: whether the object under a patch is what the words mean
    box: float = 5.0  # of a detector: L1 of the boxes
    overlap: float = 2.0  # of a detector: generalised IoU of the boxes


@dataclass(frozen=True)
class StageConfig:
    """One stage. `kind` pretraining is extra to the paper: its parts come pre-trained, ours start from nothing."""

    name: str
    kind: Literal["video", "pretraining", "image", "propagation", "visa", "tempvrs", "detector"]
    steps: int
    learning_rate: float
    frozen: tuple[str, ...] = ()  # prefixes of parameter names
    slower: tuple[str, ...] = ()  # prefixes of those that learn at a quarter of the rate
    clips: int = 8  # scenes per step
    sentences: int = 6  # per scene
    anchors: int = 3  # alpha of Algorithm 1
    clip_frames: int = 8  # T_seg
    propagation_frames: int = 5  # n_prop of Algorithm 1
    kinds: tuple[str, ...] = ()  # of sentences; empty: all that a scene allows
    patches: int = 0  # that a detector sees of a frame, those on objects first; 0: all
    absent_share: float = ABSENT_SHARE  # of sentences whose target does not exist
    mirrored_share: float = 0.5  # of clips: a recorded scene is worth two
    warmup_steps: int = 50
    final_rate: float = 0.05  # share of the learning rate left at the end of the cosine
    weights: LossWeights = field(default_factory=LossWeights)

    def clip_plan(self, stride: int) -> ClipPlan:
        return ClipPlan(
            self.clips,
            self.sentences,
            self.clip_frames,
            self.propagation_frames if self.kind == "propagation" else 0,
            self.anchors,
            stride,
            self.kinds,
            is_wordless=self.kind in ("video", "pretraining"),
            absent_share=self.absent_share,
            mirrored_share=self.mirrored_share,
        )


@dataclass(frozen=True)
class TrainConfig:
    stages: tuple[StageConfig, ...]
    seed: int = 0
    weight_decay: float = 0.05
    clip_gradient: float = 1.0
    clip_stride: int = 3  # recorded frames (10 Hz) between frames of a clip: 0.3 s
    checkpoint_every: int = 100
    bf16: bool = True  # where the device computes with it


Method = Literal["visa", "tempvrs"]
NOUN_PHRASE = "phrase"  # of a detector: the kind of "the red ball", which is no sentence of the grammar
METHOD_WINDOW = 22  # frames at the recordings' 10 Hz: the time of a clip of `tabletop-tiny`, three times as dense


def method_training(method: Method, scale: float = 1.0) -> TrainConfig:
    """The methods beside VIRST: their language model goes on from that of `tabletop-tiny`, on the same scenes.

    SAM 2 and the video encoder stay as they are, so that all methods have the same segmenter and see the same.
    """
    static = ("attribute", "relation", "superlative", "reasoning")
    return TrainConfig(
        clip_stride=1,
        stages=(
            StageConfig(
                method, method, max(1, round(1200 * scale)), 8e-4, frozen=("seg_model.", "reasoner.video_encoder."),
                clips=6, sentences=6, clip_frames=METHOD_WINDOW, anchors=1,
                kinds=(*KINDS_FULL, *static, "relation", *2 * ("motion",)), absent_share=0.35,
                weights=LossWeights(occlusion=1.0, presence=2.0, iou=0.1),
            ),
        ),
    )  # fmt: skip


def detector_training(scale: float = 1.0) -> TrainConfig:
    """The detector of the method grounding: single frames, each with many phrases.

    Names come first: they are short, and cost nothing to make. All but the last steps see the patches on objects and
    some of the bare table, which takes a third of the time; the last ones see whole frames, as the detector will.
    """
    seen = ("attribute", "attribute", "superlative", "superlative", "reasoning", "plural", "relation")
    sentences = (*seen, "motion", "order", "event", "count")

    def stage(
        name: str, steps: int, rate: float, kinds: tuple[str, ...], patches: int, warmup: int = 50, final: float = 0.3
    ) -> StageConfig:
        return StageConfig(
            name, "detector", max(1, round(steps * scale)), rate, clips=16, sentences=8, clip_frames=1, anchors=1,
            kinds=kinds, patches=patches, absent_share=0.35, warmup_steps=warmup, final_rate=final,
            weights=LossWeights(attribute=0.5),
        )  # fmt: skip

    return TrainConfig(
        bf16=False,  # matrices as small as these are faster in float32
        stages=(
            stage("detector-names", 1600, 1.5e-3, (NOUN_PHRASE,), 72),
            stage("detector", 1200, 1e-3, sentences, 72),
            stage("detector-whole", 300, 4e-4, sentences, 0, warmup=10, final=0.03),
        ),
    )


def tabletop_tiny_training(scale: float = 1.0) -> TrainConfig:
    """Pre-training, then the paper's three stages (section 3.5); `scale` multiplies all steps.

    The order is that of what has to break first: without it a part learns to answer for all objects at once, and the
    part after it learns to ignore what it is told.
    """

    def steps(n: int) -> int:
        return max(1, round(n * scale))

    encoders = ("seg_model.image_encoder.", "video_encoder.")
    static = ("attribute", "relation", "superlative", "reasoning")
    return TrainConfig(
        stages=(
            # Both encoders learn what is where.
            StageConfig(
                "video-encoder", "video", steps(2000), 2e-3, clips=10, sentences=1, clip_frames=4,
                weights=LossWeights(video_attribute=1.0, motion=2.0),
            ),
            StageConfig(
                "segmenter", "pretraining", steps(1500), 1e-3, clips=12, sentences=4, clip_frames=2,
                weights=LossWeights(bce=1.0, attribute=2.0),
            ),
            # The paper's alignment. First what a name means, in one frame, while SAM 2 is frozen: prompts that say
            # nothing yet would teach its decoder to ignore them. Then every sentence that one frame answers.
            StageConfig(
                "alignment-names", "image", steps(700), 1.5e-3, frozen=("seg_model.", "video_encoder."), clips=16,
                sentences=5, clip_frames=1, anchors=1, kinds=("attribute",),
                weights=LossWeights(attention=3.0, token=0.1),
            ),
            StageConfig(
                "alignment", "image", steps(2000), 1e-3, frozen=encoders, slower=("seg_model.",), clips=16, sentences=6,
                clip_frames=1, anchors=1, kinds=static, weights=LossWeights(attention=2.0),
            ),
            # Where a thing is beside another, and that none is there: relations are where absence is hardest to tell.
            # The image encoder learns on here: single frames show it the most scenes.
            StageConfig(
                "alignment-landmarks", "image", steps(1400), 1e-3, frozen=encoders[1:], slower=("seg_model.",),
                clips=16, sentences=6, clip_frames=1, anchors=1,
                kinds=(*static, *2 * ("relation",), "attribute", "plural"), absent_share=0.45, final_rate=0.3,
                weights=LossWeights(attention=2.0, occlusion=2.0, presence=2.0),
            ),
            # Half a clip is enough for everything but the order of events, and costs less. Motion, which few scenes
            # have at any one time, is asked for more often: with a third of the sentences it was not learnt at all.
            StageConfig(
                "few-image-short", "image", steps(1500), 8e-4, frozen=encoders, slower=("seg_model.",), clips=10,
                clip_frames=4, anchors=2, kinds=(*static, *6 * ("motion",), "plural"), final_rate=0.6,
                weights=LossWeights(attention=2.0),
            ),
            # The video encoder learns on, slowly: the language model has to go on understanding it.
            StageConfig(
                "few-image", "image", steps(2000), 7e-4, frozen=encoders[:1], slower=("seg_model.", encoders[1]),
                anchors=2, kinds=(*KINDS_FULL, *static, "relation", *2 * ("motion",)), absent_share=0.42,
                weights=LossWeights(attention=2.0, occlusion=2.0, presence=2.0, iou=0.3),
            ),
            # Longer than n_prop = 5 of the paper: every row of the FIFO memory's temporal encoding has to be seen.
            StageConfig(
                "propagation", "propagation", steps(250), 3e-4, frozen=encoders, clips=6, sentences=4, anchors=2,
                propagation_frames=7, warmup_steps=20, weights=LossWeights(attention=1.0, occlusion=2.0, iou=0.3),
            ),
        )
    )  # fmt: skip
