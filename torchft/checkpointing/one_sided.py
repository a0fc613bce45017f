"""Whether this PyTorch has one-sided tensor transports (``torch.distributed._transport``), which read a peer's memory.

A state that its receiver reads out of the source's registered memory would cost the source nothing but that
registration. torch has an experimental interface for it from 2.15 on, private and still changing. This module finds it,
and says what is missing where it is not there. No transport of this package is built on it yet: write one of your own
(docs/transfer.md, *A transport of your own*), with what :func:`one_sided_transports` names.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from torchft.checkpointing.transport import CheckpointError

__all__ = ["OneSidedUnavailable", "one_sided_transports"]

_MODULE = "torch.distributed._transport"
_SINCE = "2.15"


class OneSidedUnavailable(CheckpointError):
    """There are no one-sided transports here. The message says what to install."""


def one_sided_transports() -> tuple[str, ...]:
    """The names of torch's one-sided transports that could be tried here; which work, each says when it is made.

    Raises:
        OneSidedUnavailable: this PyTorch has none, or not as they are known here.
    """
    try:
        module: ModuleType = importlib.import_module(_MODULE)
    except ModuleNotFoundError as e:
        if e.name is None or not _MODULE.startswith(e.name):
            raise OneSidedUnavailable(
                f"{_MODULE} needs the module {e.name}, which is not installed: install its package"
            ) from e
        raise OneSidedUnavailable(
            f"PyTorch {torch.__version__} has no one-sided transports ({_MODULE}): they come with torch {_SINCE}, "
            f"pip install 'torch>={_SINCE}'. Until then HTTPTransport and PGTransport move the state"
        ) from e
    available = getattr(module, "available_transports", None)
    if not callable(available) or not callable(getattr(module, "new_transport", None)):
        raise OneSidedUnavailable(
            f"{_MODULE} of PyTorch {torch.__version__} is not the interface that torchft knows, which is private to "
            "PyTorch and may have changed: use HTTPTransport or PGTransport, or a newer torchft"
        )
    return tuple(str(name) for name in available())
