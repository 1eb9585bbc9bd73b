# SPDX-License-Identifier: Apache-2.0
"""Streaming, language-guided video segmentation. These names may be imported; everything else may move."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virst_engine.config import EngineConfig
    from virst_engine.fast.postprocess import instance_map
    from virst_engine.session import Session
    from virst_engine.types import (
        ClickPrompt,
        Frame,
        FrameResult,
        Goal,
        KnownObject,
        MaskPrompt,
        ObjectResult,
        ObjectState,
    )

__all__ = [
    "ClickPrompt",
    "EngineConfig",
    "Frame",
    "FrameResult",
    "Goal",
    "KnownObject",
    "MaskPrompt",
    "ObjectResult",
    "ObjectState",
    "Session",
    "instance_map",
]

_HOMES = {"EngineConfig": "config", "Session": "session", "instance_map": "fast.postprocess"}  # of the others: types


def __getattr__(name: str) -> Any:
    # Imported when asked for: all but the configuration bring torch along, which takes seconds.
    if name in __all__:
        return getattr(importlib.import_module(f"virst_engine.{_HOMES.get(name, 'types')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
