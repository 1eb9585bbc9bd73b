# SPDX-License-Identifier: Apache-2.0
"""Measure what should travel to the reasoner: frames alone, or frames with the features that the segmenter has anyway.

    python examples/measure_reasoner_payload.py                 # tabletop-tiny and full size, with a process of its own
    python examples/measure_reasoner_payload.py --threads 2     # CPU threads of the image encoder that re-encodes

Prints the Markdown table of docs/frames-or-features.md. A second process runs the real server with a reasoner that
computes nothing, so the round trip is the price of the border: encoding, ipc, checking, decoding, a small answer back.
"""

import argparse
import contextlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from virst_engine.config import ModelParameters, ReasonerParameters
from virst_engine.errors import WeightsError
from virst_engine.slow import wire
from virst_engine.slow.frame_window import FrameWindow
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_server import serve
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

NO_FEATURES = (1, 1, 1)
CASES = {  # name: frames of the clip, shape of a frame, shape of its features
    "nothing (the border itself)": (1, (1, 1, 3), NO_FEATURES),
    "tabletop-tiny, frames + features": (8, (128, 128, 3), (128, 32, 32)),
    "tabletop-tiny, frames only": (8, (128, 128, 3), NO_FEATURES),
    "full size, frames (448 px) + features": (32, (448, 448, 3), (256, 64, 64)),
    "full size, frames only (1024 px)": (32, (1024, 1024, 3), NO_FEATURES),
}


class IdleReasoner:
    """Answers at once with prompts of the full size."""

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        clip = request.clip
        prompts = tuple(
            Prompt(int(step), int(stamp_ns), np.zeros((10, 256), np.float32))
            for step, stamp_ns in zip(clip.steps, clip.stamps_ns, strict=True)
        )
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts)


def random_request(frames: int, frame_shape: tuple[int, ...], features_shape: tuple[int, ...]) -> ReasonerRequest:
    generator = np.random.default_rng(0)
    clip = Clip(
        steps=np.arange(frames),
        stamps_ns=np.arange(frames) * 300_000_000,
        frames_rgb_u8=generator.integers(0, 256, (frames, *frame_shape), np.uint8),
        fusion=generator.standard_normal((frames, *features_shape), np.float32).astype(np.float16),
    )
    return ReasonerRequest(0, 0, "goal", "the box left of the blue can", clip)


def median_ms(action: Callable[[], object], repeats: int) -> float:
    spent_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        spent_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(spent_ms)


def round_trips(client: ZmqReasonerClient, request: ReasonerRequest, repeats: int) -> tuple[float, float]:
    """Median milliseconds of `submit` alone, and from `submit` to the answer."""
    submit_ms, total_ms = [], []
    for request_id in range(repeats + 1):
        start = time.perf_counter()
        client.submit(ReasonerRequest(request_id, 0, request.goal_id, request.sentence, request.clip))
        submitted = time.perf_counter()
        while not client.poll():
            if time.perf_counter() - start > 30:
                raise TimeoutError(client.status())
            time.sleep(0.0002)
        submit_ms.append((submitted - start) * 1e3)
        total_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(submit_ms[1:]), statistics.median(total_ms[1:])  # the first one starts ZeroMQ's threads


def encoder_ms(weights: str, threads: int) -> float | None:
    """Milliseconds that the image encoder of tabletop-tiny takes per frame here; None without weights."""
    from virst_engine.weights import load_stages

    try:
        stages = load_stages(ModelParameters(weights=weights, threads=threads))
    except WeightsError as error:
        print(f"the image encoder was not measured: {error}", file=sys.stderr)
        return None
    pixels = torch.zeros(1, 3, stages.sizes.image_size, stages.sizes.image_size)
    stages.image_encoder(pixels)
    return median_ms(lambda: stages.image_encoder(pixels), 20)


def repeated_frames(rate_hz: float, period_s: float, clip_frames: int = 8, *, on_grid: bool = False) -> float:
    """Share of a clip's frames that the clip one period earlier held too, with the default spacing."""
    window = FrameWindow(clip_frames, ReasonerParameters().clip_spacing_s, on_grid=on_grid)
    clips: list[set[int]] = []
    for step in range(round(60 * rate_hz)):
        window.push(step, round(step * 1e9 / rate_hz), np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1, 1), np.float16))
        clips.append(set(window.clip().steps.tolist()))
    later, begin = round(period_s * rate_hz), round(15 * rate_hz)  # from there on windows are full
    pairs = zip(clips[begin:], clips[begin + later :], strict=False)
    return statistics.mean(len(before & clip) for before, clip in pairs) / clip_frames


def measure(weights: str, threads: int) -> None:
    print(f"{platform.machine()}, {torch.get_num_threads()} cores, Python {platform.python_version()}\n")
    print("| what travels | MB | encode ms | decode ms | submit ms (the fast path waits) | round trip ms |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        endpoint = f"ipc://{folder}/reasoner"
        process = subprocess.Popen([sys.executable, __file__, "--serve", endpoint])
        stack.callback(process.wait)
        stack.callback(process.terminate)
        client = stack.enter_context(contextlib.closing(ZmqReasonerClient(endpoint)))
        while client.status():
            time.sleep(0.05)
        for name, (frames, frame_shape, features_shape) in CASES.items():
            request = random_request(frames, frame_shape, features_shape)
            parts = [bytes(part) for part in wire.encode(request)]
            megabytes = sum(map(len, parts)) / 1e6
            repeats = 5 if megabytes > 10 else 50
            encode_ms, decode_ms = (
                median_ms(lambda request=request: wire.encode(request), repeats),
                median_ms(lambda parts=parts: wire.decode(parts), repeats),
            )
            submit_ms, total_ms = round_trips(client, request, repeats)
            print(
                f"| {name} | {megabytes:.2f} | {encode_ms:.3f} | {decode_ms:.3f} | {submit_ms:.3f} | {total_ms:.1f} |"
            )
    per_frame_ms = encoder_ms(weights, threads)
    if per_frame_ms is not None:
        print(
            f"\nRe-encoding 8 frames of tabletop-tiny in the reasoner: {8 * per_frame_ms:.0f} ms "
            f"({per_frame_ms:.1f} ms per frame, {torch.get_num_threads()} threads)."
        )
    print("\nFrames of a clip that the previous clip held too (camera at 20 Hz):", end=" ")
    print(", ".join(f"{repeated_frames(20, period_s):.0%} after {period_s} s" for period_s in (0.3, 0.5, 0.9, 1.0)))
    print("The same on a grid, after 1.0 s:", end=" ")
    print(", ".join(f"{repeated_frames(20, 1.0, count, on_grid=True):.0%} of {count}" for count in (8, 16, 32)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="", help="safetensors file of tabletop-tiny; the shipped one by default")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the image encoder; 0 = torch's choice")
    parser.add_argument("--serve", metavar="ENDPOINT", help="be the second process")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(IdleReasoner, arguments.serve)
    else:
        measure(arguments.weights, arguments.threads)
