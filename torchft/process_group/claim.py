"""Whose a process group is: one Manager's at a time.

The idea
    A Manager configures its group for the members of its own quorum, which ends what anybody else does on it. Two
    Managers with one group would so fail each other's steps for as long as they run, and neither could say why. So a
    Manager claims its group, and who comes second is refused by name.

Rules
    - What is claimed is the group that carries the collectives: wrappers around it are seen through.
    - A claim holds until it is released, or its holder is gone.
"""

from __future__ import annotations

import threading
import weakref

from torchft.process_group.base import ProcessGroup
from torchft.process_group.managed import ManagedProcessGroup
from torchft.process_group.wrapper import ProcessGroupWrapper

__all__ = ["Claim"]


class Claim:
    """What a Manager has on its process group. From any thread.

    Args:
        pg: the group, or a wrapper around it.

    Raises:
        TypeError: it hands its collectives to a Manager, and so cannot carry them for one.
        ValueError: somebody else holds it. The message says who, and what to do.
    """

    def __init__(self, pg: ProcessGroup) -> None:
        self._carrier = _carrier(pg)  # kept, so that nothing else can have its id
        self._what = "pg is" if self._carrier is pg else f"the {type(self._carrier).__name__} that pg wraps is"
        self._by = ""
        if isinstance(self._carrier, ManagedProcessGroup):
            raise TypeError(
                f"{self._what} a ManagedProcessGroup, which hands its collectives to a Manager: a Manager needs a "
                f"group that carries them, for instance ProcessGroupGloo()"
            )
        with _lock:
            self._refuse_if_held()

    @property
    def held(self) -> bool:
        """Whether it was taken, and not released since."""
        with _lock:
            return _held.get(id(self._carrier)) is self

    def take(self, by: str) -> None:
        """From now on the group is nobody else's.

        Args:
            by: who holds it, for the message to others.

        Raises:
            ValueError: somebody else has taken it.
        """
        with _lock:
            self._refuse_if_held()
            self._by = by
            _held[id(self._carrier)] = self

    def release(self) -> None:
        """The group may be claimed again. Idempotent."""
        with _lock:
            if _held.get(id(self._carrier)) is self:
                del _held[id(self._carrier)]

    def _refuse_if_held(self) -> None:
        other = _held.get(id(self._carrier))
        if other is not None and other is not self:
            raise ValueError(
                f"{self._what} another Manager's already, that of {other._by}, which was not shut down: two Managers "
                f"with one process group end each other's collectives. Give each of them a group of its own "
                f"({type(self._carrier).__name__}), or call shutdown() on the other one first"
            )


_lock = threading.Lock()
_held: weakref.WeakValueDictionary[int, Claim] = weakref.WeakValueDictionary()
"""By the id of what is claimed."""


def _carrier(pg: ProcessGroup) -> ProcessGroup:
    while isinstance(pg, ProcessGroupWrapper) and pg._pg is not None:
        pg = pg._pg
    return pg
