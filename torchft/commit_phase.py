"""How a step ends: its collectives, the healed state, the vote.

The idea
    :mod:`torchft.quorum_phase` begins a step, this ends it. Whatever failed in between has become the step's error by
    now or becomes it here, and the ranks of the group vote: only when none has an error does the optimizer step.

Invariants
    - A step that was begun is ended by a vote, or counts as failed when the next one begins.
    - The progress moves here and nowhere else, but for what a heal or a checkpoint brings.
    - After the vote no peer reads the state any more: the optimizer may write it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torchft.checkpointing import CheckpointTransport
from torchft.group import Group
from torchft.healing import Healing
from torchft.persistence import Persistence
from torchft.process_group import ProcessGroup
from torchft.progress import Progress
from torchft.quorum_phase import QuorumPhase
from torchft.reduction import StepFutures
from torchft.runtime.logs import RankLogger
from torchft.step_error import StepError, waited_in_vain
from torchft.telemetry import RankTelemetry

__all__ = ["CommitPhase"]


class CommitPhase:
    """The ends of one rank's steps, one after the other. On the training thread.

    Args:
        group: who votes.
        pg: aborted where a collective does not end in time.
        transport: offers the state until the vote.
        begin: how the step began.
        healing: what became of the states in it.
        works: its collectives.
        progress: of this replica.
        error: of the step.
        persistence: what to do where nobody holds the state any more.
        log, telemetry: of this rank.
        min_replica_size: a step with fewer participants is not committed.
        max_retries: more failed steps in a row are an exception; None: never.
        timeout: of the collectives.
        voted: called after each vote in which all ranks took part, with when (:func:`time.monotonic`) this one voted.
    """

    def __init__(
        self,
        *,
        group: Group,
        pg: ProcessGroup,
        transport: CheckpointTransport[dict[str, Any]],
        begin: QuorumPhase,
        healing: Healing,
        works: StepFutures,
        progress: Progress,
        error: StepError,
        persistence: Persistence,
        log: RankLogger,
        telemetry: RankTelemetry,
        min_replica_size: int,
        max_retries: int | None,
        timeout: timedelta,
        voted: Callable[[float], None],
    ) -> None:
        self._group = group
        self._pg = pg
        self._transport = transport
        self._begin = begin
        self._healing = healing
        self._works = works
        self._progress = progress
        self._error = error
        self._persistence = persistence
        self._log = log
        self._telemetry = telemetry
        self._min_replica_size = min_replica_size
        self._max_retries = max_retries
        self._timeout = timeout
        self._voted = voted
        self._ending = False
        self._said: set[str] = set()
        self.over = True
        """No step is under way."""

    def step_begins(self) -> None:
        """The next step is under way from now on."""
        if not self.over:
            self._progress.failures += 1
            self._progress.breaks += 1
            if not self._ending and self.errored() is None:
                self._say_once(
                    "the step before was left without a vote, and counts as failed: should_commit() was not called "
                    "(the optimizer's step() does). This is said once"
                )
            self._works.give_up(self._abort)
        self.over = self._ending = False

    def _abort(self) -> None:
        self._begin.invalidate()
        self._pg.abort()

    def goes_on(self) -> bool:
        """Whether a step is under way of which nothing was used: another one instead would break the quorum for all."""
        return not (self.over or self._ending or self._works.begun) and self.errored() is None

    def errored(self) -> Exception | None:
        """The step's error, or why this group is not healed in it."""
        return self._error.current or self._healing.unhealed

    def run(self, timeout: timedelta) -> bool:
        """Ends the step, which has begun. Returns whether it is committed.

        Args:
            timeout: of the vote.

        Raises:
            StateLost, RuntimeError: as of :meth:`torchft.manager.Manager.should_commit`.
            Exception: what a load function raised.
        """
        self._ending = True
        reduced = self._works.begun
        self._works.wait(self._timeout, self._pg.abort, self._pg.errored)
        failure = self._apply()
        if (broken := self._pg.errored()) is not None:
            self._error.report(broken)
        self._begin.watch.exit()  # all it had to say is said: who dies or leaves from now on is no matter of this step
        if self.errored() is None and not self._healing.has_state:
            self._error.report(RuntimeError("this replica has no whole state: one that was to be loaded was not"))
        participants = self._begin.participation.world_size
        few = participants < self._min_replica_size
        mine = self.errored() is None and not few
        at = time.monotonic()
        try:
            commit = self._group.vote(self._progress.step, mine, timeout)
            self._voted(at)
        except Exception as e:
            self._error.report(e)
            commit = False
        self._transport.disallow_checkpoint()
        self.over = True
        if commit:
            self._committed(participants, reduced)
        elif self._healing.sits_out and self._error.current is None:
            self._log.debug("the step is not committed: %s", self._healing.unhealed)  # as was announced: no failure
            self._persistence.settle_loss()
        else:
            self._failed(participants, few)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # which has this frame
        return commit

    def _apply(self) -> Exception | None:
        """Writes a healed state. What a load function raised is for the caller, once the step has ended for all."""
        if self._healing.loads:
            try:
                self._healing.apply()
            except Exception as e:
                return e
        return None

    def _committed(self, participants: int, reduced: bool) -> None:
        if self._begin.groups > 1 and not reduced:
            self._say_once(
                "this step was committed, but nothing was averaged over the groups in it: each trains by itself, and "
                "their weights come apart. The forward and backward pass belong between zero_grad() and step(), "
                "through torchft's DistributedDataParallel, torchft.parallel.replicate or manager.allreduce. This is "
                "said once"
            )
        self._begin.short = 0
        self._progress.step += 1
        self._progress.lineage = self._begin.quorum_id
        self._progress.batches_committed += participants
        self._progress.failures = self._progress.breaks = 0
        self._log.debug("committed with %d participants", participants)
        self._telemetry.commit(participants, self._progress.batches_committed)

    def _say_once(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            self._log.warning(warning)

    def _failed(self, participants: int, few: bool) -> None:
        self._progress.failures += 1
        if self._error.current is not None or not self._healing.only_unhealed:
            self._progress.breaks += 1
        if not self._begin.failed:
            self._progress.timed_out = waited_in_vain(self._error.current)
        cause: object = self.errored() or "another rank of this group failed"
        if few and self.errored() is None:
            cause = f"{participants} participants, min_replica_size is {self._min_replica_size}: more are waited for"
            self._begin.short += 1
        else:
            self._begin.short = 0
        self._log.warning("the step is not committed (%d in a row): %s", self._progress.failures, cause)
        self._telemetry.step_failed(self._progress.failures, cause)
        self._persistence.settle_loss()
        if self._max_retries is not None and self._progress.failures > self._max_retries:
            raise RuntimeError(
                f"{self._progress.failures} steps in a row were not committed, max_retries is {self._max_retries}. "
                f"Last cause: {cause}"
            ) from self._error.current
