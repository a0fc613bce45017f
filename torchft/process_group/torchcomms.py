"""Collectives over torchcomms, PyTorch's experimental communication library: looked for, and not carried yet.

What there is
    torchcomms is distributed for accelerators, from PyTorch's own index, and its communicators are to be reconfigured
    in place one day: what a group here does by building anew. Nothing of it can be run where this package is tested,
    and a group that was never run would be a promise about failures that nobody has seen. So this class only looks what
    is there, and says what to use instead. What would carry the collectives belongs into ``_open``, as in
    :mod:`torchft.process_group.nccl`, and has to pass :mod:`torchft.testing.process_group_suite`.

    The same holds for the groups that torch is to reconfigure itself, from 2.14 on: that belongs here as well.
"""

from __future__ import annotations

import importlib.util
from datetime import timedelta

from torchft.process_group.backend import BackendProcessGroup
from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError

__all__ = ["ProcessGroupTorchComms"]

_INSTALL = (
    "pip install torch torchcomms --index-url https://download.pytorch.org/whl/cu128, or your accelerator's index"
)
_INSTEAD = "ProcessGroupNCCL, ProcessGroupXCCL and ProcessGroupGloo need no further package"


class ProcessGroupTorchComms(BackendProcessGroup):
    """Says what is missing for torchcomms: it cannot be made yet.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: always. The message says whether torchcomms is not installed, and how it is; or that it is
            there and not carried by this version.
    """

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        if importlib.util.find_spec("torchcomms") is None:
            raise ProcessGroupError(
                f"{type(self).__name__} needs the package torchcomms, which is not installed ({_INSTALL}), and a later "
                f"version of torchft: this one does not carry collectives over it. {_INSTEAD}"
            )
        raise ProcessGroupError(
            f"torchcomms is installed, but this version of torchft does not carry collectives over it. {_INSTEAD}"
        )

    def getBackendName(self) -> str:
        return "torchft-torchcomms"
