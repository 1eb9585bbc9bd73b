# SPDX-License-Identifier: Apache-2.0
"""Dimensions of the networks. The same classes build `tabletop-tiny` and the full-size model; only these differ."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

SAM2_1_SIZES = ("tiny", "small", "base-plus", "large")  # a user writes sam2.1-tiny and so on


@dataclass(frozen=True)
class Sam2Config:
    """SAM 2.1 (arXiv 2408.00714); defaults are those of sam2.1_hiera_large."""

    image_size: int = 1024
    embed_dim: int = 144
    num_heads: int = 2
    stages: tuple[int, ...] = (2, 6, 36, 4)
    global_attention_blocks: tuple[int, ...] = (23, 33, 43)
    window_spec: tuple[int, ...] = (8, 4, 16, 8)
    position_background: int = 7
    top_down_levels: tuple[int, ...] = (2, 3)  # FPN levels that receive the coarser ones
    channels: int = 256  # d_model
    memory_channels: int = 64  # mem_dim
    memory_layers: int = 4
    memory_feedforward: int = 2048
    memory_frames: int = 7  # num_maskmem = P
    max_pointers: int = 16  # max_obj_ptrs_in_encoder
    pointer_distance_limit: int = 0  # steps from which a pointer's age looks the same; 0 = none, as in SAM 2
    decoder_feedforward: int = 2048
    iou_hidden: int = 256
    fuser_layer_scale: float = 1e-6  # 0.1 for a short training from scratch
    dropout: float = 0.1
    multimask_prompted: bool = True  # three masks, best predicted IoU, where a prompt is given
    multimask_tracking: bool = True
    # Where one mask is wanted and is not stable, the best of the three instead (dynamic_multimask_via_stability).
    dynamic_multimask: bool = False
    stability_delta: float = 0.05
    stability_threshold: float = 0.98
    memory_pool: int = 1  # pool x pool cells of a memory become one key; 2 = EfficientTAM's cross attention

    @property
    def reads_boxes(self) -> bool:
        """Whether the corners of a box mean something: `virst train`, whose models draw one mask, shows points only."""
        return self.multimask_prompted

    @property
    def grid(self) -> int:
        return self.image_size // 16

    @property
    def backbone_channels(self) -> list[int]:
        """Channels of the trunk's stages, coarsest first (backbone_channel_list)."""
        return [self.embed_dim * 2**i for i in (3, 2, 1, 0)]


@dataclass(frozen=True)
class VideoEncoderConfig:
    """The small video encoder of `tabletop-tiny` (the full-size model has VideoChat-Flash's in its place)."""

    image_size: int = 128
    stem_channels: tuple[int, ...] = (32, 64, 128, 192)  # one stride-2 residual stage each
    layers: int = 2
    heads: int = 6
    feedforward: int = 512
    clip_frames: int = 4  # frames that attend to each other, as in VideoChat-Flash
    max_frames: int = 64
    pool: int = 2  # pool x pool cells become one token of the language model
    fine_newest: bool = False  # the newest frame's cells follow one by one: what is beside what takes more than `pool`

    @property
    def channels(self) -> int:
        return self.stem_channels[-1]

    @property
    def grid(self) -> int:
        return self.image_size // 2 ** len(self.stem_channels)

    @property
    def tokens_per_frame(self) -> int:
        return (self.grid // self.pool) ** 2


@dataclass(frozen=True)
class LanguageModelConfig:
    """Qwen2 of `transformers`; defaults are those of Qwen2-7B as VIRST resizes it."""

    hidden: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    feedforward: int = 18944
    vocabulary: int = 151647
    rope_theta: float = 1e6
    max_positions: int = 32768
    position_per_frame: bool = False  # the visual tokens of a frame share one position: long clips stay near the words


@dataclass(frozen=True)
class FusionConfig:
    """Spatio-Temporal Fusion (VIRST, section 3.3)."""

    st_tokens: int = 10  # N
    shared_st_embedding: bool = True  # released code: one row for all N; the paper: N rows
    initial_fusion: bool = True  # equation 9
    second_fusion: bool = True  # equations 10 and 11; False: the projected tokens are repeated over time
    initial_heads: int = 8
    heads: int = 8  # d_head 32 at 256 channels
    layers: int = 2
    feedforward: int = 1024
    max_frames: int = 100
    feature_level: int = -1  # FPN level that is tokenized: -1 = stride 16 (64 x 64 at 1024 px), 0 = stride 4
    tokenizer_strides: tuple[int, ...] = (2, 2, 2)  # 64 x 64 features -> 8 x 8 tokens
    position_in_values: bool = False  # add SAM's dense positional encoding to the second fusion's values (not in VIRST)
    predicts_presence: bool = False  # `occ_predictor` says whether the target is there; the published one is untrained


@dataclass(frozen=True)
class VirstConfig:
    """All dimensions; the defaults are the published model's, but for `video`: its encoder is another class there."""

    name: str = "virst-7b"
    sam2: Sam2Config = field(default_factory=Sam2Config)
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    language: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    words: tuple[str, ...] = ()  # the closed vocabulary of a tiny model, in token order after the special tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "VirstConfig":
        """Raises KeyError, TypeError or ValueError on anything that `to_json` did not write."""
        raw = json.loads(text)
        parts = {
            "sam2": Sam2Config,
            "video": VideoEncoderConfig,
            "language": LanguageModelConfig,
            "fusion": FusionConfig,
        }
        built = {key: from_fields(kind, raw[key]) for key, kind in parts.items()}
        return VirstConfig(name=raw["name"], words=tuple(raw["words"]), **built)


def with_parts(text: str) -> dict[str, Any]:
    """The fields of a reasoner's configuration, video encoder and language model built. Raises as `from_fields`."""
    raw: dict[str, Any] = json.loads(text)
    parts = {"video": VideoEncoderConfig, "language": LanguageModelConfig}
    return raw | {key: from_fields(kind, raw[key]) for key, kind in parts.items()}


def from_fields(kind: Any, raw: dict[str, Any]) -> Any:
    """A dataclass out of the dictionary that `asdict` and JSON made of it. ValueError for fields that it lacks."""
    unknown = set(raw) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"unknown fields of {kind.__name__}: {', '.join(sorted(unknown))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def sam2_1(size: str, image_size: int = 1024) -> Sam2Config:
    """SAM 2.1 in one of `SAM2_1_SIZES`: the numbers of sam2's configs/sam2.1/sam2.1_hiera_{t,s,b+,l}.yaml.

    `image_size`: side of the square input in pixels; the weights are the same for all. SAM 2 was trained at 1024.
    Raises ValueError for another size, and for an image that the windows of the trunk (8 x 8 cells of 4 pixels) do not
    fill.
    """
    if image_size < 32 or image_size % 32:
        raise ValueError(f"the image size of SAM 2.1 must be a multiple of 32, 32 or more, got {image_size}")
    common = Sam2Config(image_size=image_size, dynamic_multimask=True)  # the sizes differ in their trunks only
    if size == "tiny":
        return replace(
            common,
            embed_dim=96,
            num_heads=1,
            stages=(1, 2, 7, 2),
            global_attention_blocks=(5, 7, 9),
            window_spec=(8, 4, 14, 7),
        )
    if size == "small":
        return replace(
            common,
            embed_dim=96,
            num_heads=1,
            stages=(1, 2, 11, 2),
            global_attention_blocks=(7, 10, 13),
            window_spec=(8, 4, 14, 7),
        )
    if size == "base-plus":
        return replace(
            common,
            embed_dim=112,
            num_heads=2,
            stages=(2, 3, 16, 3),
            global_attention_blocks=(12, 16, 20),
            window_spec=(8, 4, 14, 7),
            position_background=14,
        )
    if size == "large":
        return common
    raise ValueError(f"the size of SAM 2.1 must be one of {', '.join(SAM2_1_SIZES)}, got {size!r}")


def tabletop_tiny(words: tuple[str, ...], special_tokens: int = 4) -> VirstConfig:
    """VIRST at toy scale: every part is there, the widths are small enough for a laptop CPU."""
    return VirstConfig(
        name="tabletop-tiny",
        sam2=Sam2Config(
            image_size=128,
            embed_dim=32,
            num_heads=1,
            stages=(1, 2, 3, 1),
            global_attention_blocks=(),
            window_spec=(8, 8, 8, 4),
            position_background=8,
            top_down_levels=(0, 1, 2, 3),  # ST-Fusion reads level 0, which has to know what it sees
            channels=128,
            memory_channels=64,
            memory_layers=2,
            memory_feedforward=256,
            decoder_feedforward=256,
            iou_hidden=64,
            fuser_layer_scale=0.1,
            dropout=0.0,
            multimask_prompted=False,
            multimask_tracking=False,
            pointer_distance_limit=45,  # the longest distance that training shows
        ),
        video=VideoEncoderConfig(fine_newest=True),
        language=LanguageModelConfig(
            hidden=192, layers=4, heads=6, kv_heads=2, feedforward=512,
            vocabulary=len(words) + special_tokens, rope_theta=1e4, max_positions=512,
            position_per_frame=True,
        ),
        fusion=FusionConfig(
            st_tokens=4, shared_st_embedding=False, initial_heads=6, heads=4, layers=2, feedforward=256,
            feature_level=0, tokenizer_strides=(2, 2, 1), position_in_values=True,  # 32 x 32 -> 8 x 8 tokens, too
            predicts_presence=True,
        ),
        words=words,
    )  # fmt: skip
