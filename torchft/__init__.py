"""Fault tolerance for PyTorch training, per step.

The public names are imported when first used, so that a process that needs no torch (the lighthouse, the command
line) does not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchft.data import DistributedSampler
    from torchft.ddp import DistributedDataParallel
    from torchft.manager import Manager
    from torchft.optim import OptimizerWrapper as Optimizer
    from torchft.process_group import (
        ProcessGroupBabyGloo,
        ProcessGroupBabyNCCL,
        ProcessGroupBabyXCCL,
        ProcessGroupGloo,
        ProcessGroupNCCL,
        ProcessGroupXCCL,
    )

__all__ = [
    "DistributedDataParallel",
    "DistributedSampler",
    "Manager",
    "Optimizer",
    "ProcessGroupBabyGloo",
    "ProcessGroupBabyNCCL",
    "ProcessGroupBabyXCCL",
    "ProcessGroupGloo",
    "ProcessGroupNCCL",
    "ProcessGroupXCCL",
]
__version__ = "0.3.0"

_WHERE = {
    "DistributedDataParallel": ("torchft.ddp", "DistributedDataParallel"),
    "DistributedSampler": ("torchft.data", "DistributedSampler"),
    "Manager": ("torchft.manager", "Manager"),
    "Optimizer": ("torchft.optim", "OptimizerWrapper"),
    "ProcessGroupBabyGloo": ("torchft.process_group", "ProcessGroupBabyGloo"),
    "ProcessGroupBabyNCCL": ("torchft.process_group", "ProcessGroupBabyNCCL"),
    "ProcessGroupBabyXCCL": ("torchft.process_group", "ProcessGroupBabyXCCL"),
    "ProcessGroupGloo": ("torchft.process_group", "ProcessGroupGloo"),
    "ProcessGroupNCCL": ("torchft.process_group", "ProcessGroupNCCL"),
    "ProcessGroupXCCL": ("torchft.process_group", "ProcessGroupXCCL"),
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'torchft' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value: object = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
