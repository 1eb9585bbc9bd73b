# SPDX-License-Identifier: Apache-2.0
"""Short clips: who attends to whom, what padding does, how cells become tokens."""

import pytest
import torch
from torch import Tensor

from tests.engine.model.small_models import SMALL, liven
from virst_engine.model.video_encoder import VideoEncoder


@pytest.fixture(scope="module")
def encoder() -> VideoEncoder:
    model = VideoEncoder(SMALL.video)
    liven(model)
    return model


@torch.no_grad()
def cells_of(encoder: VideoEncoder, frames: Tensor) -> Tensor:
    return encoder.cells(frames)


def video(frames: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, frames, 3, 64, 64)


def test_frames_see_their_own_short_clip_and_what_changed_since_the_frame_before_it(encoder: VideoEncoder) -> None:
    frames = video(8)  # short clips: 0..3 and 4..7
    before = cells_of(encoder, frames)
    for changed, reaches in ((1, range(4)), (6, range(4, 8)), (3, range(8))):
        other = frames.clone()
        other[:, changed] += 1.0
        moved = (cells_of(encoder, other) - before).abs().amax(dim=(0, 2, 3)) > 1e-4
        assert [t for t in range(8) if moved[t]] == list(reaches)


def test_the_stem_sees_a_frame_beside_its_change(encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = encoder.stem.forward
    monkeypatch.setattr(encoder.stem, "forward", lambda frames: seen.append(frames) or real(frames))
    frames = video(3)
    cells_of(encoder, frames)
    assert torch.equal(seen[0][:, :3], frames[0])
    assert not seen[0][0, 3:].any()
    assert torch.equal(seen[0][1:, 3:], frames[0, 1:] - frames[0, :-1])


def test_a_short_clip_that_is_not_full_repeats_what_its_last_frame_shows(encoder: VideoEncoder) -> None:
    frames = video(6)
    frames[:, 5] = frames[:, 4]  # nothing changes towards the end, as nothing does in repeated frames
    padded = torch.cat((frames, frames[:, -1:], frames[:, -1:]), dim=1)
    assert cells_of(encoder, frames).shape[1] == 6
    assert torch.allclose(cells_of(encoder, frames), cells_of(encoder, padded)[:, :6], atol=1e-5)


def test_rows_of_a_batch_do_not_mix(encoder: VideoEncoder) -> None:
    frames = video(5, batch=2)
    together = cells_of(encoder, frames)
    assert torch.allclose(together[1:], cells_of(encoder, frames[1:]), atol=1e-5)


def test_cells_know_their_place_and_their_time(encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = torch.ones(4, SMALL.video.channels, 4, 4)
    monkeypatch.setattr(encoder.stem, "forward", lambda frames: blank)  # the stem sees the same everywhere
    cells = cells_of(encoder, video(4))[0]
    assert not torch.allclose(cells[:, 0], cells[:, 1], atol=1e-3)
    assert not torch.allclose(cells[0], cells[1], atol=1e-3)


def test_evaluation_is_deterministic_and_does_not_learn(encoder: VideoEncoder) -> None:
    frames = video(4)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert torch.equal(cells_of(encoder, frames), cells_of(encoder, frames))
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in state.items())


def test_a_token_holds_its_whole_block_of_cells(encoder: VideoEncoder) -> None:
    grid, pool = SMALL.video.grid, SMALL.video.pool
    assert (grid, pool, SMALL.video.tokens_per_frame) == (4, 2, 4)
    cells = torch.randn(1, 2, grid * grid, SMALL.video.channels)
    tokens = encoder.merge(cells)
    assert tokens.shape == (1, 2, 4, 4 * SMALL.video.channels)
    block = [2, 3, 6, 7]  # rows 0 and 1, columns 2 and 3
    assert torch.equal(tokens[0, 1, 1], cells[0, 1, block].T.flatten())
    frames = video(2)
    with torch.no_grad():
        assert torch.equal(encoder(frames), encoder.merge(encoder.cells(frames)))
