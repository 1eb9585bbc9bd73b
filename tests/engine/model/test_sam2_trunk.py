# SPDX-License-Identifier: Apache-2.0
"""Hiera with late padding against sam2's own."""

import copy

import pytest
import torch
from sam2.modeling.backbones.hieradet import Hiera

from tests.engine.model.small_models import liven
from virst_engine.model.sam2_trunk import LatePaddingBlock, pad_late


@pytest.mark.parametrize("apart", [False, True], ids=["one projection", "three projections"])
@pytest.mark.parametrize(("size", "heads"), [(128, 2), (192, 2), (224, 2), (192, 1)], ids=str)
def test_late_padding_changes_no_number(size: int, heads: int, apart: bool) -> None:
    """Windows of 14 and 7 cells, as in sam2.1 tiny, on grids that they do not fill; heads, pooling, global blocks."""
    reference = liven(
        Hiera(
            embed_dim=16,
            num_heads=heads,
            stages=(1, 2, 3, 2),
            global_att_blocks=(4,),
            window_pos_embed_bkg_spatial_size=(4, 4),
            window_spec=(8, 4, 14, 7),
        )
    )
    ours = pad_late(copy.deepcopy(reference))
    for block in ours.blocks:
        block.attn.projects_apart = apart
    assert ours.state_dict().keys() == reference.state_dict().keys()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for level, wanted in zip(ours(pixels), reference(pixels), strict=True):
            assert torch.allclose(level, wanted, atol=1e-5)


def test_padding_is_not_projected() -> None:
    trunk = pad_late(Hiera(embed_dim=16, num_heads=1, stages=(1, 2, 3, 2), global_att_blocks=()))
    cells: list[int] = []
    for block in trunk.blocks:
        assert isinstance(block, LatePaddingBlock)
        block.attn.proj.register_forward_hook(lambda layer, x, y: cells.append(y.numel() // y.shape[-1]))
    with torch.no_grad():
        trunk(torch.randn(1, 3, 128, 128))
    grids = [32, 16, 16, 8, 8, 8, 4, 4]
    assert cells == [grid * grid for grid in grids]
