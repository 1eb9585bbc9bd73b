# SPDX-License-Identifier: Apache-2.0
"""Where figures come from: the versions, the device and the command that a report names."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

PACKAGES = (
    "virst_ros",
    "torch",
    "onnxruntime",
    "tensorrt",
    "transformers",
    "sam2",
    "mujoco",
    "numpy",
    "opencv-python-headless",
)


def command_line() -> str:
    """The command of this process as one would type it."""
    program = Path(sys.argv[0]).name or "python"
    return shlex.join([program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Version of Python and of every package that moves the figures; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_description(device: str = "cpu") -> str:
    """The processor (and GPU, for a cuda device) in words, with the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{_cpu_name()}, {cores} cores"
    if device.startswith("cuda"):
        import torch

        words = f"{torch.cuda.get_device_name(device)}; {words}"
    return words


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Folders and files of the package that move no figure of an evaluation: they make, tell or time something else.
NOT_EVALUATED = (
    "cli.py", "export/", "train/", "data/", "evaluate/bench", "evaluate/compare", "evaluate/pictures",
    "evaluate/provenance", "evaluate/workers", "evaluate/answers", "evaluate/peers", "evaluate/sam2_peer",
    "evaluate/transformers_peer", "sim/live", "video/command", "video/results", "video/segment",
)  # fmt: skip


@functools.cache
def code_version() -> str:
    """The start of a SHA-256 over the source that figures of evaluations depend on."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(NOT_EVALUATED):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
