# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs: every choice that moves its figures."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from virst_engine.config import (
    METHOD_WINDOWS,
    START_PRESENCE,
    EngineConfig,
    EngineParameters,
    MemoryParameters,
    ModelParameters,
    ReasonerParameters,
    TrackingParameters,
)
from virst_engine.sim.scenes import LONGEST_SCRIPT_S, is_long
from virst_engine.video.offline import AnchorStrategy

FIRST_EVALUATION_SEED = 1_000_000  # training never reaches it
FAMILIES = ("plain", "full")
MODES = ("offline", "stream", "realtime")
PHRASINGS = ("train", "held-out", "all")

RATE_HZ = 10  # of the recordings
FRAMES = 48  # per scene, but in long ones
SETTLED_FRAMES = 10  # a second after the goal any answer to it is there; from then on the score knows no waiting
GOAL_FRAME = 21  # the goal is set when one clip window (8 frames 0.3 s apart) has been seen; scoring starts here


@dataclass(frozen=True)
class EvaluationSettings:
    """One evaluation; the ablations and the parameters that are compared are the last fields."""

    family: str = "plain"
    first_scene: int = FIRST_EVALUATION_SEED
    last_scene: int = FIRST_EVALUATION_SEED + 200  # not included
    mode: str = "stream"
    phrasings: str = "train"
    per_scene: int = 4
    long_s: float = 0.0  # scenes of so many seconds on which things go on happening; 0: short ones
    method: str = "virst"  # reasoner.method
    detector: str = ""  # grounding only: folder of the detector; empty: the shipped one
    reasoner_weights: str = ""  # visa and tempvrs only; empty: the shipped ones
    top_k: int = 0  # tempvrs only: clips that become nodes; 0: the model's
    weights: str = ""  # of the model; empty: the shipped ones
    device: str = "cpu"
    threads: int = 1
    reasoner_delay_s: float = 0.0  # realtime only
    frame_time_s: float = 0.0  # realtime only
    shuffle_sentences: bool = False
    no_refresh: bool = False
    first_anchor_only: bool = False
    no_initial_fusion: bool = False
    no_second_fusion: bool = False
    anchors: str = "dynamic"  # offline only: AnchorStrategy
    anchor_count: int = 0  # offline only: of dynamic ones; 0 = Algorithm 2's
    alpha: int = MemoryParameters.anchors_attended
    start_presence: float = TrackingParameters.start_presence
    keep_answers: int = TrackingParameters.keep_answers
    pooled_keys: bool = False
    backend: str = "auto"
    stages: str = ""  # folder of exported stages; empty: torch
    reasoner: tuple[tuple[str, int | float], ...] = ()  # other parameters of the reasoner: (("clip_frames", 32),)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("family", self.family, FAMILIES),
            ("mode", self.mode, MODES),
            ("phrasings", self.phrasings, PHRASINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not 0 <= self.first_scene < self.last_scene:
            raise ValueError(f"scenes must be FIRST < LAST, got {self.first_scene}:{self.last_scene}")
        if self.long_s and not is_long(self.family, self.long_s):
            raise ValueError(f"long scenes are of the family full, and last more than {LONGEST_SCRIPT_S:.0f} s")
        if self.no_refresh and self.mode == "offline":
            raise ValueError("no_refresh needs mode stream or realtime: the whole-video mode asks once anyway")
        if self.mode == "offline" and self.method == "grounding":
            raise ValueError("mode offline needs a method that understands a whole video: a detector sees one frame")
        AnchorStrategy(self.anchors, self.anchor_count)
        if self.mode != "offline" and (self.anchors, self.anchor_count) != ("dynamic", 0):
            raise ValueError("anchors and anchor_count need mode offline: a stream makes anchors of every answer")
        if self.detector and self.method != "grounding":
            raise ValueError(f"a detector is for the method grounding, not for {self.method}")
        if self.top_k and self.method != "tempvrs":
            raise ValueError(f"top_k is for the method tempvrs, not for {self.method}")
        chooses_frames = self.method in METHOD_WINDOWS
        if self.reasoner_weights and not chooses_frames:
            raise ValueError(f"reasoner_weights are for {', '.join(METHOD_WINDOWS)}, not for {self.method}")
        if chooses_frames and (self.anchors != "dynamic" or self.anchor_count or self.first_anchor_only):
            raise ValueError(f"{self.method} chooses its anchors itself: leave out what chooses others")
        if self.method != "virst" and (self.no_initial_fusion or self.no_second_fusion):
            raise ValueError(f"ST-Fusion is a part of virst, not of {self.method}")
        if self.per_scene < 1:
            raise ValueError(f"per_scene must be >= 1, got {self.per_scene}")
        if self.reasoner_delay_s < 0 or self.frame_time_s < 0:
            raise ValueError("reasoner_delay_s and frame_time_s must be >= 0")

    @property
    def scenes(self) -> range:
        return range(self.first_scene, self.last_scene)

    @property
    def frames(self) -> int:
        return round(self.long_s * RATE_HZ) if self.long_s else FRAMES

    def engine_config(self) -> EngineConfig:
        """The engine's parameters under these settings; raises ValueError where one is out of range."""
        tracking = TrackingParameters(start_presence=self.start_presence, keep_answers=self.keep_answers)
        if self.no_refresh or self.first_anchor_only:  # no second answer will come to confirm the first
            tracking = replace(tracking, confirm_answers=1)
        unknown = sorted({name for name, _ in self.reasoner} - {f.name for f in fields(ReasonerParameters)})
        if unknown:
            raise ValueError(f"this version has no parameter reasoner.{unknown[0]}")
        chosen: dict[str, Any] = dict(self.reasoner)
        return EngineConfig(
            model=ModelParameters(weights=self.weights, device=self.device, threads=self.threads),
            engine=EngineParameters(backend=self.backend, path=self.stages, pooled_keys=self.pooled_keys),
            memory=MemoryParameters(anchors_attended=self.alpha),
            tracking=tracking,
            reasoner=ReasonerParameters(method=self.method, weights=self.reasoner_weights, **chosen),
        )

    def anchor_strategy(self, seed: int) -> AnchorStrategy:
        """Of the whole-video mode; `seed` for random ones."""
        if self.first_anchor_only:
            return AnchorStrategy("first-frame")
        return AnchorStrategy(self.anchors, self.anchor_count, seed)

    def described(self) -> dict[str, Any]:
        """The settings as they stand in a report."""
        values = asdict(self)
        first, last = values.pop("first_scene"), values.pop("last_scene")
        values["start_presence"] = self.start_presence or START_PRESENCE[self.method]
        values["weights"] = self.weights or "shipped"
        values["detector"] = (Path(self.detector).name or "shipped") if self.method == "grounding" else ""
        values["reasoner_weights"] = Path(self.reasoner_weights).name or "shipped"
        values["reasoner"] = dict(self.reasoner)
        return {
            **values,
            "scenes": f"{first}:{last}",
            "scenes_count": last - first,
            "rate_hz": RATE_HZ,
            "frames": self.frames,
            "goal_frame": GOAL_FRAME,
        }
