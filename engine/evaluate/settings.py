# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs: every choice that moves its figures."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from virst_engine.config import EngineConfig, EngineParameters, MemoryParameters, ModelParameters, TrackingParameters

FIRST_EVALUATION_SEED = 1_000_000  # training never reaches it
FAMILIES = ("plain", "full")
MODES = ("offline", "stream", "realtime")
PHRASINGS = ("train", "held-out", "all")

RATE_HZ = 10  # of the recordings
FRAMES = 48  # per scene
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
    weights: str = ""  # empty: the shipped ones
    device: str = "cpu"
    threads: int = 1
    reasoner_delay_s: float = 0.0  # realtime only
    frame_time_s: float = 0.0  # realtime only
    shuffle_sentences: bool = False
    no_refresh: bool = False
    first_anchor_only: bool = False
    no_second_fusion: bool = False
    alpha: int = MemoryParameters.anchors_attended
    start_presence: float = TrackingParameters.start_presence
    pooled_keys: bool = False
    backend: str = "auto"
    stages: str = ""  # folder of exported stages; empty: torch

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
        if self.no_refresh and self.mode == "offline":
            raise ValueError("no_refresh needs mode stream or realtime: the whole-video mode asks once anyway")
        if self.per_scene < 1:
            raise ValueError(f"per_scene must be >= 1, got {self.per_scene}")
        if self.reasoner_delay_s < 0 or self.frame_time_s < 0:
            raise ValueError("reasoner_delay_s and frame_time_s must be >= 0")

    @property
    def scenes(self) -> range:
        return range(self.first_scene, self.last_scene)

    def engine_config(self) -> EngineConfig:
        """The engine's parameters under these settings; raises ValueError where one is out of range."""
        tracking = TrackingParameters(start_presence=self.start_presence)
        if self.no_refresh or self.first_anchor_only:  # no second answer will come to confirm the first
            tracking = replace(tracking, confirm_answers=1)
        return EngineConfig(
            model=ModelParameters(weights=self.weights, device=self.device, threads=self.threads),
            engine=EngineParameters(backend=self.backend, path=self.stages, pooled_keys=self.pooled_keys),
            memory=MemoryParameters(anchors_attended=self.alpha),
            tracking=tracking,
        )

    def described(self) -> dict[str, Any]:
        """The settings as they stand in a report."""
        values = asdict(self)
        first, last = values.pop("first_scene"), values.pop("last_scene")
        values["weights"] = self.weights or "shipped"
        return {
            **values,
            "scenes": f"{first}:{last}",
            "scenes_count": last - first,
            "rate_hz": RATE_HZ,
            "frames": FRAMES,
            "goal_frame": GOAL_FRAME,
        }
