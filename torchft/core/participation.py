"""Who of a quorum takes part in a step: contributes its gradients and is counted in the divisor.

Rules
    - Asynchronous quorum, or healing not allowed: the participants are the groups already at ``max_step``; a group
      that heals computes its forward pass on old weights, so it contributes zeros.
    - Synchronous quorum: all of the quorum; who was behind has healed before its forward pass.
    - Fixed with spares: only the first ``min_replica_size`` of those; the rest follow as spares.

Every member computes the same world size from the same quorum, whether it takes part or not: it is the divisor of
the averages, and replicas with different divisors would come apart.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Participation", "participation"]


@dataclass(frozen=True, slots=True)
class Participation:
    """This group's part in a step."""

    rank: int | None
    """Among the participants; None: it contributes zeros."""
    world_size: int
    """Number of participants."""


def participation(
    *,
    replica_rank: int,
    replica_world_size: int,
    max_replica_rank: int | None,
    max_world_size: int,
    only_up_to_date: bool,
    fixed_world_size: int | None,
) -> Participation:
    """This group's part, from its view of the quorum.

    Args:
        replica_rank, replica_world_size: its index in the quorum, and the quorum's size.
        max_replica_rank, max_world_size: the same among those at ``max_step``; rank None when it is not.
        only_up_to_date: the first rule of the module's docstring applies, not the second.
        fixed_world_size: the most participants there may be; None: no limit.
    """
    rank: int | None
    if only_up_to_date:
        rank, size = max_replica_rank, max_world_size
    else:
        rank, size = replica_rank, replica_world_size
    if fixed_world_size is not None:
        size = min(size, fixed_world_size)
        if rank is not None and rank >= size:
            rank = None
    return Participation(rank, size)
