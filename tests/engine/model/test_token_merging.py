# SPDX-License-Identifier: Apache-2.0
"""Token merging against its definition, with lists of which tokens became one."""

import pytest
import torch
from torch import Tensor

from virst_engine.model.token_merging import merge_tokens


def plain(tokens: Tensor, wanted: int, heads: int) -> list[tuple[Tensor, list[int]]]:
    """Merged tokens and the numbers of those that each stands for."""
    found = [(token, [number]) for number, token in enumerate(tokens)]
    while len(found) > wanted:
        count = min(len(found) - wanted, len(found) // 2)
        sources, targets = found[0::2], found[1::2]
        pairs = []
        for number, (source, _) in enumerate(sources):
            a = source.reshape(heads, -1).mean(0)
            scores = []
            for target, _ in targets:
                b = target.reshape(heads, -1).mean(0)
                scores.append(float(a @ b / (a.norm() * b.norm())))
            best = max(range(len(targets)), key=lambda place: scores[place])
            pairs.append((scores[best], number, best))
        pairs.sort(key=lambda pair: -pair[0])
        groups = [[target] for target in targets]
        for _, number, best in pairs[:count]:
            groups[best].append(sources[number])
        staying = [sources[number] for _, number, _ in pairs[count:]]
        merged = []
        for group in groups:
            everyone = sum(len(numbers) for _, numbers in group)
            mean = sum(token * len(numbers) for token, numbers in group) / everyone
            merged.append((mean, [number for _, numbers in group for number in numbers]))
        found = staying + merged
    return found


@pytest.mark.parametrize(("count", "wanted"), [(16, 12), (16, 8), (36, 5), (13, 3), (7, 7), (2, 1)])
def test_the_most_similar_pairs_become_one_token_until_enough_are_left(count: int, wanted: int) -> None:
    tokens = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(count))
    merged = merge_tokens(tokens, wanted, heads=2)
    assert merged.shape == (2, wanted, 8)
    for row in range(2):
        expected = plain(tokens[row], wanted, heads=2)
        assert torch.allclose(merged[row], torch.stack([token for token, _ in expected]), atol=1e-5)


def test_a_token_is_the_mean_of_everything_that_it_stands_for() -> None:
    """Two kinds of tokens: all of a kind end in one, whatever the rounds, and weigh by their number."""
    cat, dog = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, 1, 0])
    noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(3)) * 0.01
    tokens = torch.stack([cat] * 10 + [dog] * 6) + noise
    merged = merge_tokens(tokens[None], 2, heads=1)[0]
    assert torch.allclose(merged[merged[:, 0].argmax()], tokens[:10].mean(0), atol=1e-5)
    assert torch.allclose(merged[merged[:, 2].argmax()], tokens[10:].mean(0), atol=1e-5)


def test_similarity_is_that_of_the_mean_over_heads() -> None:
    """Channels that cancel out between the heads do not count."""
    a = torch.tensor([1.0, 5.0, 1.0, -5.0])  # mean over two heads of two channels: (1, 0)
    b = torch.tensor([-1.0, 5.0, -1.0, -5.0])  # (-1, 0): the opposite, though all four channels look much alike
    c = torch.tensor([1.0, 0.0, 1.0, 0.0])
    merged = merge_tokens(torch.stack([a, b, a, c])[None], 3, heads=2)[0]
    assert any(torch.allclose(token, (a + c) / 2) for token in merged)
    assert any(torch.allclose(token, b) for token in merged)


def test_bfloat16_tokens_are_counted_exactly() -> None:
    tokens = torch.ones(1, 1024, 4, dtype=torch.bfloat16)
    tokens[:, -1] += 1.0
    merged = merge_tokens(tokens, 1, heads=1)
    assert merged.dtype == torch.bfloat16
    assert torch.allclose(merged.float(), torch.full((1, 1, 4), 1 + 1 / 1024), atol=4e-3)


@pytest.mark.parametrize("wanted", [0, 9])
def test_more_tokens_than_there_are_cannot_be_had(wanted: int) -> None:
    with pytest.raises(ValueError, match=f"8 tokens cannot be merged into {wanted}"):
        merge_tokens(torch.randn(1, 8, 4), wanted, heads=1)
