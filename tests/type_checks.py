# SPDX-License-Identifier: Apache-2.0
"""The checker that tests/conftest.py applies to every function and dataclass of virst_engine."""

import typing
from collections.abc import Callable, Iterator
from typing import Any

from beartype import BeartypeConf, beartype

# PEP 484: where a float is expected, an int will do.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _classes_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes_in(part)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, raising when an argument or its result does not fit its annotation.

    beartype refuses protocols that are not runtime-checkable. The engine itself never asks isinstance of a protocol,
    so they become runtime-checkable here and not there.
    """
    for hint in getattr(function, "__annotations__", {}).values():
        for cls in _classes_in(hint):
            if getattr(cls, "_is_protocol", False):
                typing.runtime_checkable(cls)
    return _check(function)
