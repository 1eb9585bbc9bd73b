# SPDX-License-Identifier: Apache-2.0
"""sam2's own SAM2VideoPredictor (facebookresearch/sam2 2b90b9f), driven as its notebooks do.

Not counted in a frame's time, to its advantage: `init_state` decodes, resizes and normalises the whole video before the
first frame, and holes in masks are not filled (`fill_hole_area`, which no other system does).
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sam2.build_sam import build_sam2_video_predictor
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from torch import Tensor

from virst_engine.evaluate.peers import Footage, StageClock, autocast, weights_of
from virst_engine.model.config import Sam2Config
from virst_engine.model.sam2 import Sam2
from virst_engine.timing import StageTimer
from virst_engine.types import ClickPrompt

CONFIG_FILE = "configs/sam2.1/sam2.1_hiera_t.yaml"  # what is different in another model is overridden
LEAST_FRAMES = 16  # a shorter video has another scale of the pointers' age (max_obj_ptrs_in_encoder)


def build_predictor(config: Sam2Config, device: str, *, vos_optimized: bool = False) -> Any:
    """sam2's predictor with these dimensions, from its own configuration and builder, without weights."""
    with _silent():
        predictor = build_sam2_video_predictor(
            CONFIG_FILE,
            ckpt_path=None,
            device="cpu",
            vos_optimized=vos_optimized,
            hydra_overrides_extra=[f"++model.{name}={value}" for name, value in _overrides(config).items()],
        )
    if (config.decoder_feedforward, config.iou_hidden, config.dynamic_multimask) != (2048, 256, True):
        # SAM2Base has these numbers in its code, not in its configuration.
        predictor.sam_mask_decoder = _mask_decoder(config)
    predictor.fill_hole_area = 0
    return predictor.eval().to(device)


class Sam2Predictor:
    """One video in the predictor. It reads its frames from a folder, all of them in `begin`."""

    def __init__(
        self,
        model: Sam2,
        footage: Footage,
        frames: int,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        vos_optimized: bool = False,
    ) -> None:
        """`frames`: length of the video, frame 0 included."""
        self.name = "sam2 vos_optimized" if vos_optimized else "sam2"
        self._footage, self._frames = footage, max(frames, LEAST_FRAMES)
        self._device, self._precision = device, precision
        self.bytes_per_frame_ahead = 4 * 3 * footage.size**2  # float32 pixels
        self.predictor = build_predictor(model.config, device, vos_optimized=vos_optimized)
        self.predictor.load_state_dict(weights_of(model), strict=True)
        self._clock = StageClock()
        for stage, owner, method in (
            ("image_encoder", self.predictor, "forward_image"),
            ("memory_attention", self.predictor.memory_attention, "forward"),
            ("mask_decoder", self.predictor, "_forward_sam_heads"),
            ("memory_encoder", self.predictor, "_encode_new_memory"),
        ):
            setattr(owner, method, self._clock.timed(stage, getattr(owner, method)))
        self._state: dict[str, Any] = {}
        self._masks: Iterator[Any] = iter(())
        self._number = -1

    def begin(self, prompts: Sequence[ClickPrompt]) -> Bool[np.ndarray, "o height width"]:
        self.end()
        with _silent(), autocast(self._device, self._precision):
            self._state = self.predictor.init_state(str(self._footage.as_folder(self._frames)))
            for name, prompt in enumerate(prompts):
                self.predictor.add_new_points_or_box(self._state, 0, name, box=prompt.box_px)
            self._masks = self.predictor.propagate_in_video(self._state)
            return self._next(0)

    def step(self, number: int, timer: StageTimer) -> Bool[np.ndarray, "o height width"]:
        self._clock.timer = timer
        try:
            with autocast(self._device, self._precision):
                return self._next(number)
        finally:
            self._clock.timer = None

    def logits(self) -> Float[Tensor, "o hm wm"]:
        outputs = self._state["output_dict_per_obj"].values()
        kind = "non_cond_frame_outputs" if self._number else "cond_frame_outputs"
        return torch.cat([out[kind][self._number]["pred_masks"][:, 0] for out in outputs]).float().cpu()

    def end(self) -> None:
        self._state, self._masks, self._number = {}, iter(()), -1

    def _next(self, number: int) -> Bool[np.ndarray, "o height width"]:
        self._number, _, logits = next(self._masks)
        assert self._number == number, f"sam2 is at frame {self._number}, the others at {number}"
        masks: np.ndarray = (logits[:, 0] > 0.0).cpu().numpy()
        return masks


def _overrides(config: Sam2Config) -> dict[str, Any]:
    """sam2.1_hiera_t.yaml -> this model; keys as in that file."""
    c, m = config.channels, config.memory_channels
    trunk = {
        "embed_dim": config.embed_dim,
        "num_heads": config.num_heads,
        "stages": list(config.stages),
        "global_att_blocks": list(config.global_attention_blocks),
        "window_pos_embed_bkg_spatial_size": [config.position_background] * 2,
        "window_spec": list(config.window_spec),
    }
    neck = {
        "d_model": c,
        "position_encoding.num_pos_feats": c,
        "backbone_channel_list": config.backbone_channels,
        "fpn_top_down_levels": list(config.top_down_levels),
    }
    attention = {"embedding_dim": c, "feat_sizes": [config.grid] * 2}
    memory_attention = {
        "d_model": c,
        "num_layers": config.memory_layers,
        "layer.d_model": c,
        "layer.dim_feedforward": config.memory_feedforward,
        **{f"layer.self_attention.{name}": value for name, value in attention.items()},
        **{f"layer.cross_attention.{name}": value for name, value in attention.items()},
        "layer.cross_attention.kv_in_dim": m,
    }
    memory_encoder = {
        "in_dim": c,
        "out_dim": m,
        "position_encoding.num_pos_feats": m,
        "mask_downsampler.embed_dim": c,
        "fuser.layer.dim": c,
    }
    return {
        "image_size": config.image_size,
        "num_maskmem": config.memory_frames,
        "max_obj_ptrs_in_encoder": config.max_pointers,
        "multimask_output_in_sam": config.multimask_prompted,
        "multimask_output_for_tracking": config.multimask_tracking,
        **{f"image_encoder.trunk.{name}": value for name, value in trunk.items()},
        **{f"image_encoder.neck.{name}": value for name, value in neck.items()},
        **{f"memory_attention.{name}": value for name, value in memory_attention.items()},
        **{f"memory_encoder.{name}": value for name, value in memory_encoder.items()},
    }


def _mask_decoder(config: Sam2Config) -> MaskDecoder:
    c = config.channels
    return MaskDecoder(
        transformer_dim=c,
        transformer=TwoWayTransformer(depth=2, embedding_dim=c, num_heads=8, mlp_dim=config.decoder_feedforward),
        num_multimask_outputs=3,
        iou_head_hidden_dim=config.iou_hidden,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
        dynamic_multimask_via_stability=config.dynamic_multimask,
        dynamic_multimask_stability_delta=config.stability_delta,
        dynamic_multimask_stability_thresh=config.stability_threshold,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without sam2's progress bars and messages. What writes to them later goes on doing so unseen."""
    sink = open(os.devnull, "w")  # noqa: SIM115  # tqdm holds it as long as the video is played
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
