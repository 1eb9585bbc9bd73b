# SPDX-License-Identifier: Apache-2.0
"""What a refresh of VIRST at full size costs, part by part: random weights go the way of real ones, files included.

On a GPU, with 18 GB of disk:   pytest tests/engine/slow/test_virst_7b_full_size.py -m gpu -s
The same harness runs in small everywhere, so that it works when there is a GPU.
"""

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from tests.engine.model.small_virst_7b import SMALL_7B, byte_vocabulary
from virst_engine.config import EngineParameters, ModelParameters
from virst_engine.model.virst_7b_config import Virst7bConfig, with_preset
from virst_engine.model.virst_checkpoint import BASE_PARTS, expected_state
from virst_engine.model.weights_folder import read_manifest, weights_bytes, working_bytes, write_folder
from virst_engine.slow.frame_window import FrameWindow
from virst_engine.slow.virst_7b_reasoner import WINDOWS
from virst_engine.types import ReasonerAnswer, ReasonerRequest
from virst_engine.weights import load_reasoner, load_stages

SPACING_S, PERIOD_S, RATE_HZ = 0.3, 1.0, 10


def write_random_folder(folder: Path, config: Virst7bConfig, device: str, dtype: torch.dtype) -> Path:
    """A weights folder as the converter writes one, with a tokenizer of single bytes and words that no text has."""
    words = byte_vocabulary()
    words |= {f"unused {number}": number for number in range(len(words), config.language.vocabulary - 4)}
    tokenizer = Tokenizer(BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    file = folder.with_name("tokenizer.json")
    tokenizer.save(str(file))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(0)
        for name, wanted in expected_state(config).items():
            if wanted.ndim <= 1:
                value = torch.full(wanted.shape, 1.0 if name.endswith("weight") else 0.1)
            else:
                value = torch.randn(wanted.shape, device=device) / wanted[0].numel() ** 0.5
            yield name, value.to(dtype if name.startswith(BASE_PARTS) else torch.float32).cpu()

    write_folder(folder, config, tensors(), {"published": "random"}, [file])
    return folder


def measure(folder: Path, device: str, clip_frames: int, refreshes: int, weight_bits: int = 16) -> dict[str, Any]:
    """Milliseconds and GiB of a reasoner and a segmenter on one device; refreshes are those after the first window."""
    manifest = read_manifest(folder)
    config, weights = manifest.config, weights_bytes(manifest, weight_bits=weight_bits)
    parameters = ModelParameters(name="virst-7b", weights=str(folder), device=device, threads=0)
    on_gpu = device.startswith("cuda")

    def gib() -> float:
        return torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0

    begin_s = time.perf_counter()
    reasoner = load_reasoner(parameters, weight_bits=weight_bits)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "clip_frames": clip_frames,
        "weight_bits": weight_bits,
        "load_s": time.perf_counter() - begin_s,
        "weights_gib": weights / 2**30,
        "after_loading_gib": gib(),
    }
    window = FrameWindow(clip_frames, SPACING_S, on_grid=True)
    rng = np.random.default_rng(0)
    side, grid = config.vision.image_size, config.sam2.grid
    answers: list[ReasonerAnswer] = []
    step = 0

    def ask(sentence: str = "the red cup", *, wants_words: bool = False) -> ReasonerAnswer:
        return reasoner.answer(ReasonerRequest(step, 0, "goal", sentence, window.clip(), wants_words))

    frames_before_first = round((clip_frames + 1) * SPACING_S * RATE_HZ)
    for step in range(frames_before_first + round(refreshes * PERIOD_S * RATE_HZ) + 1):
        frame = rng.integers(0, 256, (side, side, 3), np.uint8)
        fusion = rng.standard_normal((config.sam2.channels, grid, grid), np.float32)
        window.push(step, round(step * 1e9 / RATE_HZ), frame, fusion)
        since = step - frames_before_first
        if since >= 0 and since % round(PERIOD_S * RATE_HZ) == 0:
            answers.append(ask())
    first, *others = answers
    report["first_window_ms"] = first.timings_ms
    report["refresh_ms"] = {
        part: statistics.median(answer.timings_ms[part] for answer in others) for part in others[0].timings_ms
    }
    report["second_goal_ms"] = ask("the plate behind it").timings_ms
    words = ask("What is on the table?", wants_words=True)
    report["question_ms"] = words.timings_ms
    report["peak_gib"] = gib()
    report["estimate_gib"] = (weights + working_bytes(config, WINDOWS, weight_bits)) / 2**30
    stages = load_stages(parameters, EngineParameters(precision="bf16" if on_gpu else "fp32"))
    pixels = torch.zeros(1, 3, config.sam2.image_size, config.sam2.image_size, device=device)
    for _ in range(3):
        begin_s = time.perf_counter()
        features = stages.image_encoder(pixels)
        if on_gpu:
            torch.cuda.synchronize(device)
        report["image_encoder_ms"] = (time.perf_counter() - begin_s) * 1e3
    report["with_segmenter_gib"] = gib()
    assert features.fusion.shape == (1, config.sam2.channels, grid, grid)
    assert words.words
    for answer in answers:
        embeddings = np.stack([prompt.embeddings for prompt in answer.prompts])
        assert embeddings.shape == (clip_frames, config.fusion.st_tokens, config.sam2.channels)
        assert np.isfinite(embeddings).all()
    return report


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", ["released", "paper"])
def test_full_size_runs_on_a_gpu_and_says_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    if shutil.disk_usage(tmp_path).free < 18e9:
        pytest.skip("no 18 GB of disk for random weights")
    config = with_preset(Virst7bConfig(), preset)
    folder = write_random_folder(tmp_path / "weights", config, "cuda:0", torch.bfloat16)
    reports = []
    for weight_bits in (16, 8, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        reports.append(measure(folder, "cuda:0", clip_frames=32, refreshes=8, weight_bits=weight_bits))
        with capsys.disabled():
            print(json.dumps({"preset": preset} | reports[-1], indent=1))
    shutil.rmtree(folder)
    for report in reports:
        assert report["peak_gib"] < 1.1 * report["estimate_gib"]  # what a memory budget is compared with


@pytest.mark.parametrize("weight_bits", [16, 8])  # four bits need wider layers
def test_the_harness_runs_in_small(tmp_path: Path, weight_bits: int) -> None:
    config = with_preset(replace(SMALL_7B, seg_frames=16), "paper")
    folder = write_random_folder(tmp_path / "weights", config, "cpu", torch.float32)
    if weight_bits != 16:
        pytest.importorskip("bitsandbytes")
    report = measure(folder, "cpu", clip_frames=16, refreshes=4, weight_bits=weight_bits)
    assert report["refresh_ms"].keys() == {"video_encoder", "fusion_maps", "language_model", "total"}
    assert report["question_ms"].keys() == {"video_encoder", "language_model", "total"}
    assert json.loads(json.dumps(report)) == report
    assert 0 < report["weights_gib"] < report["estimate_gib"]
