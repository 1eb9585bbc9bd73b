# SPDX-License-Identifier: Apache-2.0
"""The benchmark's bookkeeping on the fake network; speeds themselves are never asserted."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.evaluate.test_runner import fake_case
from tests.engine.test_session_zmq import serving
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
    assert len(done) == 5
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


def test_several_objects_and_cameras_are_set_beside_one(result):
    scale = result["scale"]
    assert {name: row["objects_tracked"] for name, row in scale.items()} == {
        "8 objects": 8.0,
        "2 cameras": 2.0,
        "4 cameras": 4.0,
    }
    for row in scale.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["over_one"] <= high
    assert "| 2 cameras |" in bench.markdown(result)


def test_memory_is_compared_with_that_after_500_frames(result):
    memory = result["memory"]
    assert memory["frames"] == 600
    assert {"settled_mib", "last_mib", "largest_change_percent"} <= set(memory)


def test_the_largest_change_counts_from_frame_500(monkeypatch):
    """One figure per 50 frames. What came before does not count; what comes later does, in both directions."""
    series = iter([10.0, 900.0, *[50.0] * 7, 200.0, 206.0, 190.0, 201.0])
    monkeypatch.setattr(bench, "resident_mib", lambda: next(series))
    playback = bench.Playback(fake_case(None, 0))
    memory = bench.resident_memory(FakeStages(), FakeReasoner(), EngineConfig(), playback, 650)
    expected = {"frames": 650, "settled_mib": 200.0, "last_mib": 201.0, "largest_change_percent": 5.0}
    assert {name: memory[name] for name in expected} == expected
    assert memory["early_ms"] > 0 < memory["late_ms"]


def test_flatness_compares_frames_500_to_1500_with_the_last_1000():
    ms = np.full(10_000, 7.0)
    ms[500:1500], ms[9000:] = 10.0, 12.0
    ms[9500] = 1012.0  # one slow frame moves the mean, not the median
    flat = bench.flatness(ms)
    assert flat == {"early_ms": 10.0, "late_ms": 13.0, "late_over_early": 1.3, "late_over_early_p50": 1.2}


def test_flatness_of_a_short_run_leaves_its_first_tenth_out():
    ms = [50.0] * 10 + [4.0] * 10 + [9.0] * 70 + [5.0] * 10
    assert bench.flatness(ms)["late_over_early"] == 1.25
    for few in ([3.0], [3.0, 3.0]):
        assert bench.flatness(few)["late_over_early"] == 1.0


def test_the_paced_run_ages_masks_while_a_reasoner_answers(tmp_path):
    """Over the real wire: at 20 Hz for two seconds with refreshes as fast as they come."""
    endpoint = f"ipc://{tmp_path}/reasoner"
    config = EngineConfig()
    config = replace(config, reasoner=replace(config.reasoner, endpoint=endpoint, period_s=0.0))
    with serving(endpoint, FakeReasoner()):
        figures = bench.paced_run(FakeStages(), config, bench.Playback(fake_case(None, 0)), 20.0, 2.0)
    assert figures["answers"] >= 2
    assert 0 < figures["frames"] <= 41
    assert 0 < figures["age_ms"]["p50"] <= figures["age_ms"]["p99"]
    assert figures["tracked_percent"] > 0


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
