"""Training that communicates rarely: replicas walk alone for a window and then agree.

:class:`LocalSGD` averages parameters; :class:`DiLoCo` gives the averaged way to an outer optimizer, for the whole
model at once or fragment by fragment (Streaming DiLoCo).
"""

from __future__ import annotations

from torchft.local_sgd.diloco import DiLoCo
from torchft.local_sgd.local_sgd import LocalSGD

__all__ = ["DiLoCo", "LocalSGD"]
