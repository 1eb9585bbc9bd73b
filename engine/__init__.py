# SPDX-License-Identifier: Apache-2.0
"""Streaming, language-guided video segmentation. These names may be imported; everything else may move."""

from typing import TYPE_CHECKING, Any

from virst_engine.config import EngineConfig
from virst_engine.types import Frame, FrameResult, Goal, ObjectResult, ObjectState

if TYPE_CHECKING:
    from virst_engine.session import Session

__all__ = ["EngineConfig", "Frame", "FrameResult", "Goal", "ObjectResult", "ObjectState", "Session"]


def __getattr__(name: str) -> Any:
    # Session brings the networks along, which takes seconds; most importers only want the types.
    if name == "Session":
        from virst_engine.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
