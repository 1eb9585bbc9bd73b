# SPDX-License-Identifier: Apache-2.0
"""The one tree of run-time parameters. ROS parameters and YAML files are generated from it, names included.

Every default works on a laptop CPU with the shipped `tabletop-tiny`. Values are rejected, never repaired.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any


def parameter(
    default: Any,
    description: str,
    *,
    low: int | float | None = None,
    high: int | float | None = None,
    choices: tuple[str | int, ...] = (),
    live: bool = False,
) -> Any:
    """A documented field: `low`..`high` inclusive, `choices` of str or int, `live` = may change while the node runs."""
    metadata = {"description": description, "low": low, "high": high, "choices": choices, "live": live}
    return field(default=default, metadata=metadata)


def check_fields(group: str, config: Any) -> None:
    """Raise ValueError, naming the field as `group.field`, unless every `parameter` allows its value."""
    for f in fields(config):
        value, low, high = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("high")
        name = f"{group}.{f.name}" if group else f.name
        wanted = f.type
        assert isinstance(wanted, type), f"{name}: parameters have plain types"
        if wanted is float and type(value) is int:
            object.__setattr__(config, f.name, float(value))
        elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{name} must be a {wanted.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if low is not None and value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
        if high is not None and value > high:
            raise ValueError(f"{name} must be <= {high}, got {value}")
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


VIRST_7B = "virst-7b"
MODELS = ("tabletop-tiny", VIRST_7B, "sam2.1-tiny", "sam2.1-small", "sam2.1-base-plus", "sam2.1-large")


@dataclass(frozen=True)
class ModelParameters:
    """The sam2.1 models have no reasoner of their own: objects come from boxes, points or masks."""

    name: str = parameter("tabletop-tiny", "model to run", choices=MODELS)
    weights: str = parameter(
        "",
        "file of the weights, for sam2.1 a checkpoint or its folder, for virst-7b the folder of virst weights convert; "
        "empty = the file shipped with the package",
    )
    sha256: str = parameter(
        "", "SHA-256 that the file of the weights must have, as virst weights info tells it; empty = any"
    )
    image_size: int = parameter(
        0, "side of the model's square input, a multiple of 32; 0 = what the model was trained at", low=0, high=4096
    )
    device: str = parameter("cpu", "torch device, for example cpu or cuda:0")
    # One thread: at this size more of them wait for each other, and collapse when the cores are busy.
    threads: int = parameter(1, "CPU threads of the segmenter; 0 = torch's choice", low=0, high=256)

    def __post_init__(self) -> None:
        check_fields("model", self)
        if self.image_size % 32:
            raise ValueError(f"model.image_size must be a multiple of 32, or 0, got {self.image_size}")


@dataclass(frozen=True)
class EngineParameters:
    """How the segmenter's stages are run."""

    backend: str = parameter(
        "auto",
        "auto = tensorrt where its engines fit this GPU, else onnxruntime where stages are exported, else torch",
        choices=("auto", "torch", "onnxruntime", "tensorrt"),
    )
    path: str = parameter("", "folder of the exported stages (virst export); empty = none, torch runs the model")
    precision: str = parameter(
        "fp32", "of torch; exported stages have their own. fp16 only where it is safe", choices=("fp32", "bf16", "fp16")
    )
    pooled_keys: bool = parameter(
        False, "2 x 2 cells of a memory become one key: faster, masks a little worse; exported stages have their own"
    )
    compiled: bool = parameter(False, "let torch.compile take minutes at the start for faster frames")

    def __post_init__(self) -> None:
        check_fields("engine", self)
        if self.backend in ("onnxruntime", "tensorrt") and not self.path:
            raise ValueError(f"engine.backend {self.backend} needs engine.path: run virst export MODEL --out DIR first")


@dataclass(frozen=True)
class MemoryParameters:
    """Sizes of the fixed buffers. VIRST, section 3.4 and appendix B: alpha = 3, P = 7."""

    anchor_slots: int = parameter(8, "anchors kept per object; the oldest but the first is replaced", low=1, high=64)
    anchors_attended: int = parameter(3, "alpha: anchors nearest in time that one frame attends to", low=1, high=16)
    recent_frames: int = parameter(6, "P - 1: FIFO memory, frames", low=1, high=6)
    pointers: int = parameter(16, "object pointers kept per object", low=1, high=16)
    min_write_iou: float = parameter(
        0.5, "a mask below this predicted IoU is not remembered", low=0.0, high=1.0, live=True
    )
    rules: str = parameter(
        "stream",
        "stream: only good masks are remembered; sam2: every frame is, as in SAM 2's own predictor",
        choices=("stream", "sam2"),
    )
    # 128 KiB a frame for tabletop-tiny; a clip's 2.1 s at 60 Hz fit in.
    ring_steps: int = parameter(128, "frames whose features are cached for late answers", low=2, high=4096)

    def __post_init__(self) -> None:
        check_fields("memory", self)
        if self.anchors_attended > self.anchor_slots:
            raise ValueError(
                f"memory.anchors_attended must be <= memory.anchor_slots ({self.anchor_slots}), "
                f"got {self.anchors_attended}"
            )


@dataclass(frozen=True)
class TrackingParameters:
    max_objects: int = parameter(
        8, "goals at once, and in each camera goals and their instances together; sizes the buffers", low=1, high=254
    )
    lost_after_steps: int = parameter(
        3,
        "processed frames without the object before TRACKING becomes LOST; frames that are left out do not count",
        low=1,
        high=1000,
        live=True,
    )
    agree_iou: float = parameter(
        0.5, "IoU from which a refreshed anchor agrees with the running mask", low=0.0, high=1.0, live=True
    )
    overrule_answers: int = parameter(
        4,
        "answers in a row that must all point at the same other thing before a settled object is given up for it",
        low=1,
        high=100,
        live=True,
    )
    keep_answers: int = parameter(
        1,
        "answers that agree with a settled object, after which no other object takes its place while it is seen: a "
        "goal is what the sentence meant when it was said; 0 = answers may always overrule it",
        low=0,
        high=100,
        live=True,
    )
    start_presence: float = parameter(
        0.0,
        "probability of presence, the reasoner's and the mask decoder's, from which an answer begins a track; one that "
        "is tracked goes on down to 0.5; 0 = what was chosen for the method",
        low=0.0,
        high=1.0,
        live=True,
    )
    confirm_answers: int = parameter(
        2,
        "answers in a row that must point at the same object before a goal that was not found is tracked",
        low=1,
        high=100,
        live=True,
    )
    instance_steps: int = parameter(
        6,
        "processed frames in which a part of a goal that is split has to be seen apart from the others before it is an "
        "instance; frames that are left out do not count",
        low=1,
        high=1000,
        live=True,
    )
    replay_steps: int = parameter(
        3, "cached frames that are replayed per new frame after a late answer", low=2, high=4096, live=True
    )
    deadline_ms: float = parameter(
        0.0,
        "time that a frame may take in the engine; while it takes more, fewer memories are read, then the input gets "
        "smaller, then frames are skipped; 0 = as long as it takes",
        low=0.0,
        high=60_000.0,
        live=True,
    )

    def __post_init__(self) -> None:
        check_fields("tracking", self)


METHODS = ("virst", "visa", "tempvrs", "grounding")
# Frames and their spacing in seconds, of methods that look at a window of their own.
METHOD_WINDOWS = {"visa": (22, 0.1), "tempvrs": (22, 0.1)}


# tracking.start_presence of each method: probabilities of different networks do not mean the same. Those of virst, visa
# and tempvrs were chosen with tabletop-tiny on scenes that neither training nor evaluations see, so that about nine in
# ten goals that are not there stay empty. A detector has a threshold of its own; SAM 2 alone has to reach this one.
START_PRESENCE = {"virst": 0.85, "visa": 0.75, "tempvrs": 0.75, "grounding": 0.93}


@dataclass(frozen=True)
class ReasonerParameters:
    method: str = parameter(
        "virst",
        "how sentences become prompts: virst = the model's own reasoner; visa, tempvrs = other ways to understand a "
        "window of frames, for tabletop-tiny; grounding = an object detector finds plain noun phrases, for any model "
        "(virst-reasoner --method METHOD)",
        choices=METHODS,
    )
    weights: str = parameter("", "visa, tempvrs: safetensors file of the reasoner; empty = the shipped one")
    endpoint: str = parameter("ipc:///tmp/virst_reasoner", "ZeroMQ address of the reasoner process")
    curve_keys: str = parameter("", "folder of CURVE keys, needed for tcp:// (virst-reasoner --make-curve-keys FOLDER)")
    period_s: float = parameter(
        1.0, "time between refreshes of a goal that is tracked, or hidden but settled", low=0.0, high=3600.0, live=True
    )
    retry_s: float = parameter(
        0.3, "least time between requests of a goal that is not tracked", low=0.0, high=3600.0, live=True
    )
    ttl_s: float = parameter(
        5.0, "a request without an answer for this long is given up and asked again", low=0.01, high=600.0, live=True
    )
    clip_frames: int = parameter(8, "virst: T_seg, frames of a clip; other methods have their own", low=1, high=100)
    clip_spacing_s: float = parameter(0.3, "virst: time between the frames of a clip", low=0.0, high=60.0)
    detector_side: int = parameter(
        800, "grounding: longer side of the frame that the detector sees, pixels; none is enlarged", low=32, high=2048
    )
    memory_budget_gib: float = parameter(
        0.0,
        "virst-7b: memory of its device that the reasoner may take (virst-reasoner --memory-budget-gib); 0 = what a "
        "GPU has free",
        low=0.0,
        high=1024.0,
    )
    weight_bits: int = parameter(
        16,
        "virst-7b: of each weight of the language model's layers (virst-reasoner --weight-bits); 16 = as stored, 8 = "
        "int8, 4 = nf4, both of which need bitsandbytes",
        choices=(16, 8, 4),
    )

    def __post_init__(self) -> None:
        check_fields("reasoner", self)

    @property
    def frames_asked(self) -> int:
        """Frames of a clip: T_seg, the window of another method, or 1 for a detector, which knows no time."""
        if self.method == "grounding":
            return 1
        return METHOD_WINDOWS[self.method][0] if self.method in METHOD_WINDOWS else self.clip_frames

    @property
    def spacing_asked_s(self) -> float:
        """Between the frames of a clip."""
        return METHOD_WINDOWS[self.method][1] if self.method in METHOD_WINDOWS else self.clip_spacing_s

    @property
    def chooses_frames(self) -> bool:
        """Whether the reasoner itself says which frames are to be anchors; otherwise some of its clip's are taken."""
        return self.method in METHOD_WINDOWS

    @property
    def reads_features(self) -> bool:
        """Whether the reasoner is sent features of the image encoder; the others see pixels alone."""
        return self.method == "virst"


@dataclass(frozen=True)
class GoalParameters:
    max_length: int = parameter(300, "characters of a goal", low=1, high=100_000)
    split_plurals: bool = parameter(
        True,
        "split a goal in the plural ('the balls', 'two boxes') into its instances where the request does not say "
        "whether to",
        live=True,
    )

    def __post_init__(self) -> None:
        check_fields("goal", self)


@dataclass(frozen=True)
class EngineConfig:
    """All parameters of one Session."""

    model: ModelParameters = field(default_factory=ModelParameters)
    engine: EngineParameters = field(default_factory=EngineParameters)
    memory: MemoryParameters = field(default_factory=MemoryParameters)
    tracking: TrackingParameters = field(default_factory=TrackingParameters)
    reasoner: ReasonerParameters = field(default_factory=ReasonerParameters)
    goal: GoalParameters = field(default_factory=GoalParameters)

    def __post_init__(self) -> None:
        if self.reasoner.weight_bits != 16 and not (self.model.name == VIRST_7B and self.reasoner.method == "virst"):
            raise ValueError(
                f"reasoner.weight_bits {self.reasoner.weight_bits} is for the model {VIRST_7B} and its own method, not "
                f"{self.model.name} with the method {self.reasoner.method}; leave it at 16"
            )

    @property
    def start_presence(self) -> float:
        """The probability of presence from which an answer begins a track: as set, or the method's."""
        return self.tracking.start_presence or START_PRESENCE[self.reasoner.method]

    @property
    def clips_on_grid(self) -> bool:
        """Whether the clips of a stream share their frames, so that the reasoner can keep what it made of them."""
        return self.model.name == VIRST_7B and self.reasoner.method == "virst"
