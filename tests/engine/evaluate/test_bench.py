# SPDX-License-Identifier: Apache-2.0
"""The benchmark's bookkeeping on the fake network; speeds themselves are never asserted."""

import json

import pytest

from tests.engine.evaluate.test_runner import fake_case
from tests.fakes import FakeReasoner, FakeStages
from virst_engine.config import EngineConfig
from virst_engine.evaluate import bench

SETTINGS = bench.BenchSettings(frames=12, memory_frames=600)


@pytest.fixture(scope="module")
def result():
    done = []
    figures = bench.run_bench(
        SETTINGS, FakeStages(), FakeReasoner(), fake_case(None, 0), on_step=done.append, with_process=False
    )
    assert len(done) == 4
    return figures


def test_every_stage_is_timed_for_every_number_of_objects(result):
    for count in ("1", "4", "8"):
        row = result["engine"][count]
        assert {"preprocess", "image_encoder", "memory_attention", "mask_decoder", "memory_encoder"} <= set(
            row["stage_ms"]
        )
        assert row["objects_tracked"] == int(count)
        assert row["frames"] == 12
        assert row["frame_ms"]["p50"] <= row["frame_ms"]["p95"]


def test_memory_is_compared_with_that_after_500_frames(result):
    memory = result["memory"]
    assert memory["frames"] == 600
    assert memory["settled_mib"] > 0
    assert memory["largest_change_percent"] >= 0


def test_result_is_json_and_a_page(result):
    assert json.loads(json.dumps(result))["engine"] == result["engine"]
    page = bench.markdown(result)
    assert "| image_encoder |" in page
    assert "600 frames" in page


def test_playback_goes_forwards_and_backwards():
    playback = bench.Playback(fake_case(None, 0))
    video = [playback.frame(number, number).image_rgb_u8[0, 0, 0] for number in range(20)]
    assert video == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1]


def test_too_little_cannot_be_measured():
    with pytest.raises(ValueError, match="memory_frames"):
        bench.BenchSettings(memory_frames=100)


def test_the_engine_is_asked_about_once_per_goal():
    reasoner = FakeReasoner()
    bench.engine_speed(FakeStages(), reasoner, EngineConfig(), bench.Playback(fake_case(None, 0)), 4, 60)
    assert len(reasoner.requests) == 4
