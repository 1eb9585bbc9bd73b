# SPDX-License-Identifier: Apache-2.0
"""What the tests of exports share: one export of the shipped model per precision, and TensorRT-RTX."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from virst_engine.backends.tensorrt_api import TensorRt, load_tensorrt
from virst_engine.config import EngineParameters, MemoryParameters, ModelParameters
from virst_engine.errors import BackendError


@pytest.fixture(scope="session")
def rtx() -> TensorRt:
    """The real TensorRT-RTX, which compiles without a GPU."""
    try:
        return load_tensorrt("tensorrt_rtx")
    except BackendError as error:
        pytest.skip(f"no TensorRT-RTX to build with: {error}")


@pytest.fixture(scope="session")
def _exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"no {package} in this Python; ./scripts/setup installs it")
    from virst_engine.export.onnx import export_model

    done: dict[str, Path] = {}

    def export(precision: str) -> Path:
        if precision not in done:
            folder = tmp_path_factory.mktemp(precision)
            engine = EngineParameters(precision=precision)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about its own exporter
                export_model(ModelParameters(), engine, MemoryParameters(), folder)
            done[precision] = folder
        return done[precision]

    return export


@pytest.fixture
def exported(_exports: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """`exported(precision)`: a folder of one's own with the stages of tabletop-tiny. The first takes half a minute."""
    return lambda precision: Path(shutil.copytree(_exports(precision), tmp_path / precision))
