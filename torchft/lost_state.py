"""The state of the job is lost: what then (docs/checkpoints.md).

Rules, for a quorum that is behind what the job was
    - Where checkpoints are kept, and one is newer than what the members hold, it is restored.
    - Otherwise members that hold something go on from there.

Rules, where no member holds more than its first weights
    - Nobody there has a usable state at all: nothing can be trained, whatever is allowed.
    - A *survivor* is there, one that saw the job further: going on from step 0 would throw away what it knows of.
      It is an error, unless ``allow_restart`` is true.
    - All are new: whoever starts all groups anew starts the job anew. It is told, as a warning, how far the former
      one was; with ``allow_restart=False`` it is an error as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchft.coordination import QuorumResult
from torchft.runtime.logs import RankLogger

__all__ = ["Holders", "StateLost", "check_not_lost"]


class StateLost(RuntimeError):
    """The last replica that held the state is gone. The message says which step is lost, who held it, what to do."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        """How far the job was."""


class Holders:
    """Who held the newest state when this replica last knew.

    Args:
        why: the cause of a replica's death, where it is known.
    """

    def __init__(self, why: Callable[[str], str | None]) -> None:
        self._why = why
        self._replicas: Sequence[str] = ()

    def remember(self, quorum: QuorumResult) -> None:
        """A quorum has begun."""
        if quorum.max_step > 0:
            healing = set(quorum.recovering_replica_ranks)
            self._replicas = [r for i, r in enumerate(quorum.replica_ids) if i not in healing]

    def __str__(self) -> str:
        if not self._replicas:
            return "who held it is not known here"
        told = [f"{replica} ({self._why(replica) or 'it is not in this quorum'})" for replica in self._replicas[:8]]
        return f"it was held by {', '.join(told)}{' …' if len(self._replicas) > 8 else ''}"


def check_not_lost(
    quorum: QuorumResult,
    allow_restart: bool | None,
    holders: Holders,
    saved: Callable[[QuorumResult], int],
    log: RankLogger,
) -> None:
    """Lets a quorum go on that may.

    Args:
        quorum: this rank's view.
        allow_restart: as of :class:`torchft.manager.Manager`.
        holders: who held what may be lost.
        saved: the step of the newest checkpoint, the same on all ranks of a group; 0: there is none.
        log: for the warning.

    Raises:
        StateLost: the job would begin again at step 0, or further back than its newest checkpoint.
        RuntimeError: no member has a usable state, and nothing that was trained is lost.
    """
    members = ", ".join(quorum.replica_ids[:8])
    if quorum.max_step < 0 and not quorum.lost_step:
        raise RuntimeError(
            f"no member of quorum {quorum.quorum_id} holds a usable state: each lost its own in a heal that did not "
            "finish, or its ranks are at different steps. They ask again, and heal when a group with a state comes. "
            f"Members: {members}"
        )
    if not quorum.lost_step:
        return
    if quorum.max_step > 0:
        if (newest := saved(quorum)) > quorum.max_step:
            raise StateLost(
                f"the job was at step {quorum.lost_step}, and nobody holds that state any more: {holders}. The members "
                f"of quorum {quorum.quorum_id} are at step {quorum.max_step}, behind the checkpoint of step {newest}",
                quorum.lost_step,
            )
        return
    strict = quorum.lost_by_survivor if allow_restart is None else not allow_restart
    if quorum.max_step < 0 or strict:
        what = "hold half a state" if quorum.max_step < 0 else "hold nothing but their first weights"
        restart = "" if quorum.max_step < 0 else " To begin again at step 0 set TORCHFT_ALLOW_RESTART=1."
        raise StateLost(
            f"the job was at step {quorum.lost_step}, and nobody holds that state any more: {holders}. The members of "
            f"quorum {quorum.quorum_id} {what}: {members}. Nothing is trained, so that the job does not silently begin "
            f"again at step 0. Start all groups from the newest checkpoint: Manager(checkpoints=…) saves and restores "
            f"them by itself (docs/checkpoints.md).{restart}",
            quorum.lost_step,
        )
    log.warning(
        "the job begins again at step 0: it was at step %d, and nobody holds that state any more", quorum.lost_step
    )
