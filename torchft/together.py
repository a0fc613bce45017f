"""State functions that run collectives inside the group: all of its ranks call them in the same step, or none does.

The idea
    A function that gathers a sharded model (a full state dict) needs every rank of the group. But ranks serve and
    heal on their own: another rank may have no receiver, or may have failed before it came so far. So which ranks
    call is decided from the quorum, alike on all of them; and before a call they agree (:mod:`torchft.agreement`) that
    all come. One that will not come says so, and nobody is left in a collective that never ends.

Rules
    - ``save`` is called by all ranks of every group that is up to date while somebody heals, whoever serves.
    - ``load`` is called by all ranks of a group that heals. At step 0 each rank of a group may have another source,
      or be the source itself (the primary is spread over the group ranks): then those that heal nothing load what
      they saved.
"""

from __future__ import annotations

from typing import Any

from torchft.agreement import Agreement, NotAgreed
from torchft.coordination import QuorumResult
from torchft.state import ReplicaState
from torchft.training_thread import Caller

__all__ = ["Together", "TogetherError"]


class TogetherError(RuntimeError):
    """Another rank of the group does not come to a call that all must make. The message says which, and why."""


class Together:
    """One rank's part in the collective state functions of its group.

    Args:
        agreement: of the ranks of the group.
        state: whose functions are called.
        caller: makes calls on the training thread.
        timeout: seconds, for the training thread to come.
    """

    def __init__(self, agreement: Agreement, state: ReplicaState, caller: Caller, timeout: float) -> None:
        self._agreement = agreement
        self._state = state
        self._caller = caller
        self._timeout = timeout

    def all_save(self, quorum: QuorumResult) -> bool:
        """Whether this rank saves in this step although it may serve nobody."""
        up_to_date = quorum.max_replica_rank is not None
        return self.shared and up_to_date and bool(quorum.recovering_replica_ranks)

    def all_load(self, quorum: QuorumResult) -> bool:
        """Whether this rank loads at the end of this step although it may heal nothing."""
        return quorum.heal or (quorum.max_step == 0 and self.all_save(quorum))

    def save(self, quorum: QuorumResult, torchft: dict[str, int]) -> dict[str, Any]:
        """The whole state.

        Raises:
            TogetherError: another rank does not save.
            Exception: what a save function raised.
        """
        self._agree(quorum, "save")
        return self._state.read(torchft, self._timeout, self._caller)

    def load(self, quorum: QuorumResult) -> None:
        """Writes the state that waits. On the training thread.

        Raises:
            TogetherError: another rank has nothing to load.
            Exception: what a load function raised.
        """
        self._agree(quorum, "load")
        self._state.apply()

    def refuse(self, quorum: QuorumResult, cause: str) -> None:
        """This rank makes no further such call in this step. What is decided already stays decided."""
        if self.shared:
            for what in ("save", "load"):
                self._agreement.refuse(_topic(quorum, what), cause)

    @property
    def shared(self) -> bool:
        """There are functions that all ranks of the group must call."""
        return not self._agreement.alone and self._state.on_training_thread

    def _agree(self, quorum: QuorumResult, what: str) -> None:
        if not self.shared:
            return
        try:
            self._agreement.agree(_topic(quorum, what))
        except NotAgreed as e:
            raise TogetherError(
                f"a state dict function that all ranks of the group must call is not called: {e}"
            ) from None


def _topic(quorum: QuorumResult, what: str) -> str:
    """The same on all ranks of the group, and another one in each attempt at a step."""
    return f"{quorum.quorum_id}.{quorum.max_step}.{quorum.commit_failures}/{what}"
