# SPDX-License-Identifier: Apache-2.0
"""The dataclasses that cross borders between parts; nothing here computes.

Letters of shapes: b batch, o objects (slots), t frames of a clip, n prompt tokens, c channels, h w the stride-16 grid,
s memory slots, r pointer rows. Images are RGB uint8, stamps are nanoseconds, `step` counts processed frames.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class ObjectState(Enum):
    """What is known of a goal's object in one frame; the values are those of virst_msgs/SegmentedObject."""

    SEARCHING = 0  # no answer of the reasoner yet, or none that is sure enough to begin with
    TRACKING = 1  # seen now, or missed for fewer than tracking.lost_after_steps frames: then its mask is empty
    LOST = 2  # was tracked, not visible now; memory is kept
    NOT_FOUND = 3  # the reasoner's newest answer says there is no such object


@dataclass(frozen=True)
class Frame:
    """One camera image as it enters the engine. The array is not copied: the caller must not write to it afterwards."""

    image_rgb_u8: UInt8[np.ndarray, "height width 3"]
    stamp_ns: int
    camera: str = "camera"


@dataclass(frozen=True)
class StageSizes:
    """Shapes that are fixed when a model is built (SAM 2 names in brackets)."""

    image_size: int  # side of the square model input, pixels
    channels: int  # d_model of the neck (256 at full size)
    memory_channels: int  # mem_dim (64)
    grid: int  # side of the stride-16 grid
    mask: int  # side of the low-resolution mask: 4 x grid
    memory_frames: int  # num_maskmem: P = 7, rows of maskmem_tpos_enc
    video_size: int = 128  # side of the square frames that the reasoner's video encoder reads, pixels
    prompt_tokens: int = 0  # most rows of PromptTokens.sparse; 0: any number
    reads_boxes: bool = True  # False: trained with points and never with the corners of a box, as tabletop-tiny was


@dataclass(frozen=True)
class ImageFeatures:
    """What the image encoder makes of frames, once; shared by all objects, goals and the reasoner's fusion.

    SAM 2 names: `top` is backbone_fpn[-1] before no_mem_embed, `high_res_s0/s1` are backbone_fpn[0/1] after
    sam_mask_decoder.conv_s0 / conv_s1, `fusion` is the level that the frame-aware tokenizer of ST-Fusion reads.
    """

    top: Float[Tensor, "b c h w"]
    high_res_s0: Float[Tensor, "b c0 h0 w0"]
    high_res_s1: Float[Tensor, "b c1 h1 w1"]
    fusion: Float[Tensor, "b cf hf wf"]


@dataclass(frozen=True)
class PromptTokens:
    """What the mask decoder reads of the prompts of o objects, whatever they were made from."""

    sparse: Float[Tensor, "o n c"]  # embedded points and box corners, or VIRST's embeddings in their place
    valid: Bool[Tensor, "o n"] | None = None  # rows that are there; None: all of them
    multimask: Bool[Tensor, " o"] | None = None  # three masks, best predicted IoU; None: as the model is configured
    dense: Float[Tensor, "o c h w"] | None = None  # what a mask prompt adds to the features, less no_mask_embed


@dataclass(frozen=True)
class MaskPrediction:
    """The mask decoder's word on each object in one frame."""

    mask_logits: Float[Tensor, "o hm wm"]  # stride 4 of the model input; > 0 is object
    iou: Float[Tensor, " o"]  # predicted IoU of that mask, 0..1 when trained
    object_score_logits: Float[Tensor, " o"]  # <= 0: the object is not visible in this frame
    pointer: Float[Tensor, "o c"]  # SAM 2's object pointer (no_obj_ptr already mixed in where absent)


@dataclass(frozen=True)
class MemoryEntry:
    """One frame's memory of each object."""

    spatial: Float[Tensor, "o m h w"]  # memory encoder output, without its temporal encoding
    pointer: Float[Tensor, "o c"]


@dataclass(frozen=True)
class MemoryTensors:
    """A fixed-shape view of the memory banks of all objects, as the memory attention stage reads it."""

    spatial: Float[Tensor, "o s m h w"]
    spatial_tpos: Int[Tensor, "o s"]  # row of maskmem_tpos_enc: P-1 for anchors, k-1 for the k-th newest frame
    spatial_valid: Bool[Tensor, "o s"]
    pointers: Float[Tensor, "o r c"]
    pointer_distance: Float[Tensor, "o r"]  # steps between now and the pointer's frame, >= 0
    pointer_valid: Bool[Tensor, "o r"]


@dataclass(frozen=True)
class Clip:
    """The T_seg frames of the window that the reasoner sees, oldest first."""

    steps: Int[np.ndarray, " t"]  # int64
    stamps_ns: Int[np.ndarray, " t"]  # int64
    frames_rgb_u8: UInt8[np.ndarray, "t hv wv 3"]  # resized to the reasoner's input size
    fusion: Float[np.ndarray, "t cf hf wf"]  # float16, ImageFeatures.fusion of the same frames
    camera: str = "camera"


@dataclass(frozen=True)
class ReasonerRequest:
    request_id: int
    epoch: int
    goal_id: str
    sentence: str
    clip: Clip
    wants_words: bool = False  # the sentence is a question of the user's; its goal id is one that no goal can have


@dataclass(frozen=True)
class Prompt:
    """Embeddings that stand in place of SAM's point prompts, for one frame and no other; or boxes in their place."""

    step: int
    stamp_ns: int
    embeddings: Float[np.ndarray, "n c"]  # float32; (0, 0) where there are boxes
    confidence: float = 1.0  # 0..1, the reasoner's own: that the target is visible in this frame
    # float32; left, top, right, bottom in shares of the image's width and height. The object is what all of them show.
    boxes: Float[np.ndarray, "k 4"] | None = None

    @classmethod
    def of_boxes(cls, step: int, stamp_ns: int, boxes: Float[np.ndarray, "k 4"], confidence: float = 1.0) -> "Prompt":
        """Boxes (k >= 1) in place of embeddings."""
        return cls(step, stamp_ns, np.zeros((0, 0), np.float32), confidence, boxes)


@dataclass(frozen=True)
class ReasonerAnswer:
    """The reasoner's answer to one request: prompts, words where these were wanted, or an `error` that says why not."""

    request_id: int
    epoch: int
    goal_id: str
    prompts: tuple[Prompt, ...]  # at most one per frame of the clip, oldest first; all of one kind
    error: str = ""
    timings_ms: dict[str, float] = field(default_factory=dict)
    words: str = ""


@dataclass(frozen=True)
class ClickPrompt:
    """A box, points, or both, in pixels of the camera's image; x to the right, y down, from the top left corner.

    Raises ValueError for what is neither, and for labels other than 0 and 1.
    """

    points_px: Float[np.ndarray, "p 2"] | None = None  # x, y
    labels: Int[np.ndarray, " p"] | None = None  # 1: on the object, 0: not on it; None: all 1
    box_px: tuple[float, float, float, float] | None = None  # left, top, right, bottom

    def __post_init__(self) -> None:
        points = np.zeros((0, 2), np.float32) if self.points_px is None else np.asarray(self.points_px, np.float32)
        labels = np.ones(len(points), np.int64) if self.labels is None else np.asarray(self.labels, np.int64)
        if points.ndim != 2 or points.shape[1] != 2 or labels.shape != (len(points),):
            raise ValueError(f"points must be p x 2 with p labels, got {points.shape} and {labels.shape}")
        if not len(points) and self.box_px is None:
            raise ValueError("a prompt needs points, a box, or both")
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("labels must be 1 (on the object) or 0 (not on it)")
        if not np.isfinite(points).all() or not np.isfinite(self.box_px or 0.0).all():
            raise ValueError("coordinates must be finite numbers of pixels")
        if self.box_px is not None and len(self.box_px) != 4:
            raise ValueError(f"a box is left, top, right, bottom, got {len(self.box_px)} numbers")
        if self.box_px is not None and not (self.box_px[0] < self.box_px[2] and self.box_px[1] < self.box_px[3]):
            raise ValueError(f"a box is left, top, right, bottom with left < right and top < bottom, got {self.box_px}")
        object.__setattr__(self, "points_px", points)
        object.__setattr__(self, "labels", labels)


@dataclass(frozen=True)
class MaskPrompt:
    """The object's mask itself, at the camera's size; all False: the object is not in this frame.

    Raises ValueError for what is no mask.
    """

    mask: Bool[np.ndarray, "height width"]

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != np.bool_ or not self.mask.size:
            raise ValueError(f"a mask must be height x width of bool, got {self.mask.shape} of {self.mask.dtype}")


@dataclass(frozen=True)
class Goal:
    """A sentence that the user set. Its object is the union of everything the sentence means.

    A goal that is split owns the single objects of that union, too: its instances, which are found in each camera. An
    object that the user pointed out has a goal without a sentence: the reasoner is never asked about it.
    """

    goal_id: str
    object_id: str
    sentence: str
    camera: str = ""  # '' = every camera
    instance_id: int = 0  # 1..254, the object's value in the mask image
    max_instances: int = 1  # single objects that it is split into at most, in each camera; 1: only the union


@dataclass(frozen=True)
class KnownObject:
    """One object of a goal, the union or one of its instances, as it was in the newest frame."""

    object_id: str
    instance_id: int
    state: ObjectState
    part_of: str = ""  # of an instance: the object id of its union


@dataclass(frozen=True)
class ObjectResult:
    """One object in one frame."""

    object_id: str
    goal_id: str
    instance_id: int
    state: ObjectState
    mask: Bool[np.ndarray, "height width"]  # camera size; all False unless seen now
    score: float  # 0..1: predicted IoU x probability of presence; 0 unless seen now
    prompt_age_s: float  # since the capture of the newest anchor's frame; inf when there is none
    reasoner_latency_s: float  # of the newest answer; nan when there is none
    message: str = ""  # for people: why it is not tracking, or what was wrong with the newest answer while it is
    part_of: str = ""  # of an instance: the object id of the union that it is a part of
    sentence: str = ""  # of its goal, which may be cleared by now; empty for what was pointed out


@dataclass(frozen=True)
class FrameResult:
    """Everything that belongs to one frame; `stamp_ns` is the frame's own."""

    stamp_ns: int
    step: int
    camera: str
    objects: tuple[ObjectResult, ...]
    timings_ms: dict[str, float]  # per stage, summed over objects
    degradation: str = ""  # for people: what is left out because of tracking.deadline_ms, and why; empty: nothing is
