# SPDX-License-Identifier: Apache-2.0
"""Dimensions of VIRST at full size, and the choices in which the paper and the released code differ, as two presets.

The video encoder is that of VideoChat-Flash-Qwen2-7B_res448 (arXiv 2501.00574), the segmenter sam2.1_hiera_large.
"""

import json
from dataclasses import asdict, dataclass, field, replace

from virst_engine.model.config import FusionConfig, LanguageModelConfig, Sam2Config, from_fields

SEG_TOKEN = "[SEG]"  # the checkpoint's name for [ST]
BASE_VOCABULARY = 152064  # rows of the base model's embeddings; VIRST keeps those of real tokens, and one for [SEG]

FRAME_SAMPLINGS = ("uniform", "random")
ANCHOR_RULES = ("nearest", "bracketing")


@dataclass(frozen=True)
class UmtConfig:
    """UMT-L (arXiv 2303.16058) as VideoChat-Flash uses it: 23 of its 24 blocks; and the merging of its tokens."""

    image_size: int = 448
    patch_size: int = 16
    channels: int = 1024
    layers: int = 23
    heads: int = 16
    feedforward: int = 4096
    clip_frames: int = 4  # frames that attend to each other and whose tokens are merged together: a short clip
    trained_grid: int = 14  # side of the grid that the positional encoding is computed for, before it is enlarged
    tokens_per_frame: int = 16  # that token merging leaves; all frames of a short clip share theirs
    max_frames: int = 64  # of one clip

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size must be a multiple of vision.patch_size ({self.patch_size}), got {self.image_size}"
            )
        if self.channels % self.heads:
            raise ValueError(f"vision.channels must be a multiple of vision.heads ({self.heads}), got {self.channels}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_clip(self) -> int:
        return self.clip_frames * self.tokens_per_frame


@dataclass(frozen=True)
class Virst7bConfig:
    """All dimensions and choices; the defaults are the published model's dimensions and the paper's choices.

    `seg_sampling`: how the frames of ST-Fusion are taken out of those that the language model sees, where there are
    more than `seg_frames`: evenly (the paper), or at random (the released code; here always the same for a clip).
    `anchor_rule`: which alpha anchors a frame attends to in the published, non-causal inference: the nearest in time
    (the paper's algorithm 2), or first the nearest before and the nearest after (SAM 2, the released code). Without
    anchors of the future, as in a stream, both are the same.
    """

    name: str = "virst-7b"
    sam2: Sam2Config = field(default_factory=Sam2Config)
    vision: UmtConfig = field(default_factory=UmtConfig)
    language: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    fusion: FusionConfig = field(default_factory=lambda: FusionConfig(shared_st_embedding=False))
    seg_frames: int = 32  # T_seg at most
    seg_sampling: str = "uniform"
    anchor_rule: str = "nearest"

    def __post_init__(self) -> None:
        if self.seg_sampling not in FRAME_SAMPLINGS:
            raise ValueError(f"seg_sampling must be one of {', '.join(FRAME_SAMPLINGS)}, got {self.seg_sampling!r}")
        if self.anchor_rule not in ANCHOR_RULES:
            raise ValueError(f"anchor_rule must be one of {', '.join(ANCHOR_RULES)}, got {self.anchor_rule!r}")
        if not 1 <= self.seg_frames <= self.fusion.max_frames:
            raise ValueError(
                f"seg_frames must be 1 to fusion.max_frames ({self.fusion.max_frames}), got {self.seg_frames}"
            )

    @property
    def st_rows(self) -> int:
        """Rows of E_ST: one that all [ST] tokens share, or one for each."""
        return 1 if self.fusion.shared_st_embedding else self.fusion.st_tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Virst7bConfig":
        """Raises KeyError, TypeError or ValueError on anything that `to_json` did not write."""
        raw = json.loads(text)
        parts = {"sam2": Sam2Config, "vision": UmtConfig, "language": LanguageModelConfig, "fusion": FusionConfig}
        built = {key: from_fields(kind, raw[key]) for key, kind in parts.items()}
        config: Virst7bConfig = from_fields(Virst7bConfig, raw | built)
        return config


def with_preset(config: Virst7bConfig, preset: str) -> Virst7bConfig:
    """`config` with the choices of the paper, or those of the released code and its commands. ValueError for others."""
    if preset == "paper":
        fusion = replace(config.fusion, shared_st_embedding=False, initial_fusion=True)
        return replace(config, fusion=fusion, seg_sampling="uniform", anchor_rule="nearest")
    if preset == "released":
        fusion = replace(config.fusion, shared_st_embedding=True, initial_fusion=False)
        return replace(config, fusion=fusion, seg_sampling="random", anchor_rule="bracketing")
    raise ValueError(f"the preset must be paper or released, got {preset!r}")
