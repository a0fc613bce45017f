"""Telling DTensors from tensors without importing what makes them.

``torch.distributed.tensor`` imports a symbolic algebra system and takes a third of the time that a trainer needs to
start. As long as nobody has imported it there is no DTensor in the process, so nothing has to be compared with one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["dtensor_class", "is_dtensor"]


def dtensor_class() -> type[DTensor] | None:
    """``DTensor``; None: nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether ``value`` is a DTensor, or of a class derived from it."""
    kind = dtensor_class()
    return kind is not None and isinstance(value, kind)
