# SPDX-License-Identifier: Apache-2.0
"""The names of SAM 2.1's weights in `sam2` (SAM2Base, facebookresearch/sam2 2b90b9f) and in `transformers`
(Sam2VideoModel, 5.23), in both directions. The numbers are the same in both; only names and two layouts differ:
- the four point embeddings are one table in transformers;
- the matrix of the prompts' positional encoding is stored twice there.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Of the image's places, and of points.
POSITION_MATRICES = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
POINT_TABLE = "prompt_encoder.point_embed.weight"

# sam2 -> transformers. All of them are tried, in this order, each on what the ones before made of the name.
_RENAMED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
        (r"^obj_ptr_proj\.", "object_pointer_proj."),
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
        (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
        (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
        (r"\.gamma$", ".scale"),
        # In sam2 the mask's path is a list of convolution, norm, activation, and so on; activations have no weights.
        *((rf"\.mask_downsampler\.encoder\.{3 * i}\.", f".mask_downsampler.layers.{i}.conv.") for i in range(4)),
        *(
            (rf"\.mask_downsampler\.encoder\.{3 * i + 1}\.", f".mask_downsampler.layers.{i}.layer_norm.")
            for i in range(4)
        ),
        (r"\.mask_downsampler\.encoder\.12\.", ".mask_downsampler.final_conv."),
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"\.norm(\d?)\.", r".layer_norm\1."),
        (r"\.out_proj\.", ".o_proj."),
        # Perceptrons of two layers, then those of three.
        (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
        (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
        (r"(_head|_mlps\.\d|pointer_proj)\.layers\.0\.", r"\1.proj_in."),
        (r"(_head|_mlps\.\d|pointer_proj)\.layers\.1\.", r"\1.layers.0."),
        (r"(_head|_mlps\.\d|pointer_proj)\.layers\.2\.", r"\1.proj_out."),
    )
)
_POINT_ROW = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d)\.weight$")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of a Sam2VideoModel from all of SAM2Base; no tensor is copied but the point embeddings."""
    points = sorted(name for name in state if _POINT_ROW.match(name))
    renamed = {_renamed(name): value for name, value in state.items() if name not in points}
    renamed[POINT_TABLE] = torch.cat([state[name] for name in points])
    renamed[POSITION_MATRICES[0]] = renamed[POSITION_MATRICES[1]]
    return renamed


def from_transformers(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights `names` of SAM2Base out of a Sam2VideoModel's, as views. Raises KeyError where one is not there."""
    found = {}
    for name in names:
        if row := _POINT_ROW.match(name):
            at = int(row[1])
            found[name] = state[POINT_TABLE][at : at + 1]
        else:
            found[name] = state[_renamed(name)]
    return found


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
