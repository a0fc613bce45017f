"""Telling torch about a process group that it did not make itself.

torch keeps two lists: names for C++ (functional collectives name their group) and tables for Python
(``torch.distributed`` functions translate ranks by them). A group of ours is entered in both, with its own rank
numbers, and taken out again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import _register_process_group, _resolve_process_group, _unregister_process_group
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import GroupName

if TYPE_CHECKING:
    from torchft.process_group.base import ProcessGroup

__all__ = ["register", "unregister"]


class _OwnRanks(Mapping[int, int]):
    """Global rank to group rank of a group whose members change: every rank is its own number."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __getitem__(self, rank: int) -> int:
        if not 0 <= rank < self._group.size():
            raise KeyError(rank)
        return rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._group.size()))

    def __len__(self) -> int:
        return self._group.size()


class _NoRanksOfOthers(_OwnRanks):
    """Of a group whose members are in no relation to the ranks of the default group: this process has its rank."""

    def __getitem__(self, rank: int) -> int:
        return self._group.rank()


def register(group: ProcessGroup, name: str, related: bool = True) -> None:
    """Enters ``group`` under ``name``.

    Args:
        group, name: see there.
        related: its members are those of the default group, by their numbers there. False: they are elsewhere.

    Raises:
        ValueError: another group has the name.
    """
    try:
        _resolve_process_group(GroupName(name))
    except RuntimeError:
        pass  # free, as it has to be
    else:
        raise ValueError(f"torch knows a process group {name!r} already")
    _register_process_group(GroupName(name), group)
    world: Any = c10d._world
    world.pg_map[group] = (group.getBackendName(), None)
    world.pg_names[group] = name
    world.pg_group_ranks[group] = _OwnRanks(group) if related else _NoRanksOfOthers(group)
    world.pg_backend_config[group] = ""
    tag = f"ptd:{name}"
    world.pg_to_tag[group] = tag
    world.tags_to_pg.setdefault(tag, []).append(group)


def unregister(group: ProcessGroup, name: str) -> None:
    """Takes ``group`` out again; entries that are gone already are no error (``destroy_process_group``)."""
    world = c10d._world
    for table in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config):
        table.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    if tag is not None:
        world.tags_to_pg[tag] = [g for g in world.tags_to_pg.get(tag, []) if g is not group]
    try:
        _unregister_process_group(GroupName(name))
    except RuntimeError:
        pass  # destroy_process_group() forgets all names at once
