# SPDX-License-Identifier: Apache-2.0
"""Real-valued rotary encodings against sam2's complex ones and against angles worked out by hand."""

import math

import torch
from sam2.modeling.position_encoding import apply_rotary_enc, compute_axial_cis

from virst_engine.model.rope import axial_angles, axis_angles, rotate


def test_tables_and_rotation_are_those_of_sam2() -> None:
    dim, width, height, repeats = 16, 5, 3, 2
    angles = axial_angles(dim, width, height)
    cis = compute_axial_cis(dim=dim, end_x=width, end_y=height)
    assert torch.allclose(torch.polar(torch.ones_like(angles), angles), cis, atol=1e-6)

    q = torch.randn(2, 1, width * height, dim)
    k = torch.randn(2, 1, repeats * width * height, dim)
    expected_q, expected_k = apply_rotary_enc(q, k, cis, repeat_freqs_k=True)
    keys = angles.repeat(repeats, 1)
    assert torch.allclose(rotate(q, angles.cos(), angles.sin()), expected_q, atol=1e-6)
    assert torch.allclose(rotate(k, keys.cos(), keys.sin()), expected_k, atol=1e-6)


def test_x_turns_the_first_half_of_the_pairs_and_y_the_second() -> None:
    angles = axial_angles(8, 3, 2)  # tokens (y, x): (0,0) (0,1) (0,2) (1,0) (1,1) (1,2)
    slow = 10000.0 ** (-4 / 8)
    assert torch.allclose(angles[2], torch.tensor([2.0, 2.0 * slow, 0.0, 0.0]))
    assert torch.allclose(angles[4], torch.tensor([1.0, slow, 1.0, slow]))


def test_angles_of_one_axis_by_hand() -> None:
    # Ten channels make five pairs with the frequencies 10000^-(i/5), i = 0..4.
    angles = axis_angles(torch.tensor([0.0, 1.0, 3.0]), 10)
    frequencies = [1.0, 10000**-0.2, 10000**-0.4, 10000**-0.6, 10000**-0.8]
    assert angles.shape == (3, 5)
    assert torch.equal(angles[0], torch.zeros(5))
    assert torch.allclose(angles[1], torch.tensor(frequencies))
    assert torch.allclose(angles[2], 3 * torch.tensor(frequencies))


def test_neighbouring_channels_turn_together_and_the_rest_stays() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0, 7.0, -7.0]])
    quarter, half = math.pi / 2, math.pi
    angles = torch.tensor([[quarter, half]])
    expected = torch.tensor([[0.0, 1.0, 0.0, -2.0, 7.0, -7.0]])
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()), expected, atol=1e-6)


def test_a_product_of_rotated_vectors_depends_on_their_distance_only() -> None:
    q, k = torch.randn(1, 10), torch.randn(1, 10)

    def product(query_at: float, key_at: float) -> float:
        a, b = axis_angles(torch.tensor([query_at]), 10), axis_angles(torch.tensor([key_at]), 10)
        return float((rotate(q, a.cos(), a.sin()) * rotate(k, b.cos(), b.sin())).sum())

    assert math.isclose(product(2.0, 5.0), product(9.0, 12.0), abs_tol=1e-4)
    assert not math.isclose(product(2.0, 5.0), product(2.0, 6.0), abs_tol=1e-3)
