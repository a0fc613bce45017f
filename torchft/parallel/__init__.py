"""Models that are spread over the ranks of a replica group: FSDP, tensor parallelism, or both, inside; replicas across.

:func:`replicate` averages the gradients of such a model over the groups; :class:`LiveState` is what a healing group
receives of it; :func:`init_process_group` makes the group's own process group. ``docs/parallelism.md`` says which
parallelism goes how.
"""

from __future__ import annotations

from torchft.parallel.inner_group import init_process_group
from torchft.parallel.live_state import LiveState
from torchft.parallel.replicate import Replicated, replicate

__all__ = ["LiveState", "Replicated", "init_process_group", "replicate"]
