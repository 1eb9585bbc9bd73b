# SPDX-License-Identifier: Apache-2.0
"""One interface to the three TensorRTs: 10 (from 10.3, JetPack 6), 11, and TensorRT-RTX.

They share a Python API; this file holds what differs:
- the name of the module: `tensorrt`, or `tensorrt_rtx`;
- TensorRT compiles on the GPU that will run the engine; TensorRT-RTX compiles without one, for compute capabilities
  that are named (`IBuilderConfig.set_compute_capability`), and finishes when the engine is loaded;
- `INetworkDefinition.add_attention`, which can require a fused kernel, is there from 10.14 on.
In all three a network is strongly typed: precision is what the ONNX file says. TensorRT 11 knows nothing else.
"""

import importlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from virst_engine.errors import BackendError

log = logging.getLogger(__name__)

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
OLDEST = (10, 3)
DTYPES = {  # NumPy's names, as in the manifest -> trt.DataType
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
INSTALL = {
    TENSORRT: "install TensorRT 10.3 or later (a Jetson's comes with JetPack), or use engine.backend: torch",
    TENSORRT_RTX: "pip install tensorrt-rtx-cu13 (x86-64, Python 3.10 to 3.13), or use engine.backend: torch",
}


@dataclass(frozen=True)
class Platform:
    """What an engine is compiled for, or found running on."""

    flavour: str  # tensorrt or tensorrt_rtx
    version: str  # of TensorRT, all digits: engines do not move between versions
    gpu: str  # the name that the driver gives it; empty: compiled without one, for `targets`
    targets: tuple[str, ...]  # compute capabilities: SM86, SM89


class TensorRt:
    """A TensorRT module and its version. `log` goes to Python's logging; errors are kept for messages."""

    def __init__(self, module: Any) -> None:
        """Raises BackendError for a version that is too old."""
        self.module = module
        self.flavour = str(module.__name__)
        self.version = str(module.__version__)
        found = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])
        if self.flavour == TENSORRT and found < OLDEST:
            raise BackendError(f"TensorRT {self.version} is too old; {INSTALL[TENSORRT]}")
        self.errors: list[str] = []
        self.logger = _logger(module, self.errors)

    @property
    def is_rtx(self) -> bool:
        return self.flavour == TENSORRT_RTX

    @property
    def title(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"

    def platform(self, gpu: str, target: str) -> Platform:
        """This TensorRT on a GPU of that name and compute capability."""
        return Platform(self.flavour, self.version, gpu, (target,))

    def dtype(self, name: str) -> Any:
        return getattr(self.module.DataType, DTYPES[name])

    def dtype_name(self, dtype: Any) -> str:
        names = [name for name, trt_name in DTYPES.items() if getattr(self.module.DataType, trt_name) == dtype]
        return names[0] if names else str(dtype)

    def builder(self) -> Any:
        self.errors.clear()
        return self.module.Builder(self.logger)

    def network(self, builder: Any) -> Any:
        # TensorRT 11 has nothing else, and says that this flag will go.
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def parse(self, network: Any, onnx_file: Path) -> list[str]:
        """Read an ONNX file into the network; the parser's errors, none when it succeeded."""
        parser = self.module.OnnxParser(network, self.logger)
        if parser.parse_from_file(str(onnx_file)):
            return []
        return [str(parser.get_error(i)) for i in range(parser.num_errors)] or self.errors or ["no reason given"]

    def config(self, builder: Any, targets: tuple[str, ...], workspace_mib: int) -> Any:
        """`targets`: compute capabilities to compile for, TensorRT-RTX alone; `workspace_mib` 0: no limit."""
        config = builder.create_builder_config()
        if workspace_mib:
            config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, workspace_mib << 20)
        if self.is_rtx:
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                config.set_compute_capability(getattr(self.module.ComputeCapability, target), i)
        return config

    def known_targets(self) -> list[str]:
        """The compute capabilities that TensorRT-RTX compiles for, as SM75, SM86, ..."""
        names = [name for name in dir(self.module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
        return sorted(names, key=lambda name: int(name[2:]))

    def load(self, plan: bytes) -> Any:
        """An engine from its bytes. Raises BackendError when TensorRT refuses it."""
        self.errors.clear()
        engine = self.module.Runtime(self.logger).deserialize_cuda_engine(plan)
        if engine is None:
            again = f"virst build DIR{' --rtx' if self.is_rtx else ''}"
            raise BackendError(f"{self.title} cannot load the engine ({self.last_error()}); build it again: {again}")
        return engine

    def last_error(self) -> str:
        return self.errors[-1] if self.errors else "no reason given"


def load_tensorrt(flavour: str) -> TensorRt:
    """TensorRT, or TensorRT-RTX. Raises BackendError when it is not installed or cannot be loaded."""
    try:
        module = importlib.import_module(flavour)
    except (ImportError, OSError, RuntimeError) as error:  # a wheel without its libraries raises any of these
        raise BackendError(f"{flavour} cannot be imported ({error}); {INSTALL[flavour]}") from error
    return TensorRt(module)


def gpu_here(device: torch.device) -> tuple[str, str]:
    """Name and compute capability (SM86) of a CUDA device. Raises BackendError when torch finds none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        why = f"device is {device}" if device.type != "cuda" else "torch finds none"
        raise BackendError(
            f"TensorRT engines need an NVIDIA GPU, and {why}; set model.device to cuda:0 on a machine that has one, "
            "or use engine.backend: torch"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"SM{major}{minor}"


def _logger(module: Any, errors: list[str]) -> Any:
    """TensorRT wants an instance of its own class."""
    severity = module.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                errors.append(message.strip())
            # A failure is raised with its message; what TensorRT calls an error may be a probe that went nowhere.
            log.log(min(level, logging.INFO), "TensorRT: %s", message.strip())

    return Logger()
