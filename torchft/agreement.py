"""All ranks of a group do something, or none does: agreed in the group's store, without a collective.

The idea
    Each rank says that it is ready; who finds all ready decides *go*. Who cannot, or gives up waiting, decides the
    opposite, with the cause. The store takes the first decision only, so all ranks hear the same one, whatever comes
    late, twice, or from a rank that died right after.

Rules
    - A topic is decided once. It names the attempt, so that what was decided in an earlier one is not taken for it.
    - A rank that dies after *go* leaves the others to the timeout of what they do together.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchft.runtime.deadline import Deadline

__all__ = ["Agreement", "NotAgreed"]

_GO = "go"
_LONGEST_CAUSE = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class NotAgreed(RuntimeError):
    """Not all ranks of the group are ready. The message says which one is not, and why."""


class Agreement:
    """One rank's part in what its group decides.

    Args:
        store: of the group.
        prefix: of the keys; the same on all ranks, and another one in each life of the group.
        rank, world_size: in the group.
        timeout: seconds, for the other ranks to be ready.
        failed: what has ended the step under way, if something has.
    """

    def __init__(
        self,
        store: TCPStore,
        prefix: str,
        rank: int,
        world_size: int,
        timeout: float,
        failed: Callable[[], Exception | None],
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._failed = failed

    @property
    def alone(self) -> bool:
        """There is nobody to agree with."""
        return self._world_size == 1

    def agree(self, topic: str) -> None:
        """This rank is ready. Returns when all are.

        Raises:
            NotAgreed: they are not.
        """
        if self.alone:
            return
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
        decided = self._decide(topic, cause)
        if decided != _GO:
            raise NotAgreed(decided)

    def refuse(self, topic: str, cause: str) -> None:
        """This rank is not ready. What is decided already stays decided."""
        if not self.alone:
            self._decide(topic, f"rank {self._rank} of this group does not come: {cause}")

    def _decide(self, topic: str, decision: str) -> str:
        """What is decided: by this, unless it was before."""
        decided: bytes = self._store.compare_set(f"{self._prefix}/{topic}", "", decision[:_LONGEST_CAUSE])
        return decided.decode(errors="replace")
