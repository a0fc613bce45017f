"""State functions that run collectives inside the group: all of its ranks call them in the same step, or none does.

The idea
    A function that gathers a sharded model (a full state dict) needs every rank of the group. But ranks serve and
    heal on their own: another rank may have no receiver, or may have failed before it came so far. So which ranks
    call is decided from the quorum, alike on all of them; and before a call they agree in the group's store that
    all come. One that will not come says so, and nobody is left in a collective that never ends.

Rules
    - ``save`` is called by all ranks of every group that is up to date while somebody heals, whoever serves.
    - ``load`` is called by all ranks of a group that heals. At step 0 each rank of a group may have another source,
      or be the source itself (the primary is spread over the group ranks): then those that heal nothing load what
      they saved.
    - The first decision counts, for all ranks: *go*, once all have come, or the cause of whoever gives up first.
    - A rank that dies after it promised to come leaves the others to the timeout of their own collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchft.coordination import QuorumResult
from torchft.runtime.deadline import Deadline
from torchft.state import ReplicaState
from torchft.training_thread import Caller

__all__ = ["Together", "TogetherError"]

_GO = "go"
_LONGEST_CAUSE = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class TogetherError(RuntimeError):
    """Another rank of the group does not come to a call that all must make. The message says which, and why."""


class Together:
    """One rank's part in the collective state functions of its group.

    Args:
        store: of the group.
        prefix: in the store, of this life of the group.
        rank, world_size: in the group.
        state: whose functions are called.
        caller: makes calls on the training thread.
        timeout: seconds, for the other ranks to say whether they come, and for the training thread to come.
        failed: what has ended the step meanwhile, if something has.
    """

    def __init__(
        self,
        store: TCPStore,
        prefix: str,
        rank: int,
        world_size: int,
        state: ReplicaState,
        caller: Caller,
        timeout: float,
        failed: Callable[[], Exception | None],
    ) -> None:
        self._store = store
        self._prefix = f"{prefix}/together"
        self._rank = rank
        self._world_size = world_size
        self._state = state
        self._caller = caller
        self._timeout = timeout
        self._failed = failed

    def all_save(self, quorum: QuorumResult) -> bool:
        """Whether this rank saves in this step although it may serve nobody."""
        up_to_date = quorum.max_replica_rank is not None
        return self._shared() and up_to_date and bool(quorum.recovering_replica_ranks)

    def all_load(self, quorum: QuorumResult) -> bool:
        """Whether this rank loads at the end of this step although it may heal nothing."""
        return quorum.heal or (quorum.max_step == 0 and self.all_save(quorum))

    def save(self, quorum: QuorumResult, torchft: dict[str, int]) -> dict[str, Any]:
        """The whole state.

        Raises:
            TogetherError: another rank does not save.
            Exception: what a save function raised.
        """
        if self._shared():
            self._agree(_topic(quorum, "save"))
        return self._state.read(torchft, self._timeout, self._caller)

    def load(self, quorum: QuorumResult) -> None:
        """Writes the state that waits. On the training thread.

        Raises:
            TogetherError: another rank has nothing to load.
            Exception: what a load function raised.
        """
        if self._shared():
            self._agree(_topic(quorum, "load"))
        self._state.apply()

    def refuse(self, quorum: QuorumResult, cause: str) -> None:
        """This rank makes no further such call in this step. What is decided already stays decided."""
        if self._shared():
            for what in ("save", "load"):
                decision = f"rank {self._rank} of this group does not come: {cause}"
                self._decide(_topic(quorum, what), decision[:_LONGEST_CAUSE])

    def _shared(self) -> bool:
        return self._world_size > 1 and self._state.on_training_thread

    def _decide(self, topic: str, decision: str) -> str:
        """What is decided: by this, unless it was before."""
        decided: bytes = self._store.compare_set(f"{self._prefix}/{topic}", "", decision)
        return decided.decode(errors="replace")

    def _agree(self, topic: str) -> None:
        """Returns when all ranks come.

        Raises:
            TogetherError: they do not.
        """
        here = f"{self._prefix}/{topic}"
        self._store.set(f"{here}/{self._rank}", "")
        missing = set(range(self._world_size)) - {self._rank}
        deadline, error, pause = Deadline(self._timeout), self._failed(), _FIRST_PAUSE
        cause = None
        while cause is None:
            missing = {rank for rank in missing if not self._store.check([f"{here}/{rank}"])}
            failed = self._failed()
            if not missing or self._store.check([here]):
                cause = _GO
            elif failed is not None and failed is not error:
                cause = f"rank {self._rank} of this group does not wait for the others any more: {failed}"
            elif deadline.expired:
                cause = f"ranks {sorted(missing)} of this group did not come within {self._timeout:g} s"
            else:
                time.sleep(min(pause, deadline.remaining()))
                pause = min(2 * pause, _LONGEST_PAUSE)
        decided = self._decide(topic, cause[:_LONGEST_CAUSE])
        if decided != _GO:
            raise TogetherError(f"a state dict function that all ranks of the group must call is not called: {decided}")


def _topic(quorum: QuorumResult, what: str) -> str:
    """The same on all ranks of the group, and another one in each attempt at a step."""
    return f"{quorum.quorum_id}.{quorum.max_step}.{quorum.commit_failures}/{what}"
