"""How a step begins: quorum, process group, and then the healing (:mod:`torchft.healing`).

The idea
    Everything between ``start_quorum`` and the first collective happens here, in one call that never raises: what
    fails becomes the error of the step. The manager runs it on its background thread (asynchronous quorum) or on
    the training thread, and reads the result when it is over.

Rules
    - Nothing here decides: who is in and who participates are computed in ``torchft.core``.
    - From the moment the quorum is known, the death of a member is the step's error, and ends what is waited for.
    - While the live state may be half written, this replica asks with step -1: it is nobody's source.
    - A step that stands (:mod:`torchft.core.standing`) begins with the quorum and the process group of the one before
      it. If a notice comes before the step has used them, it begins once more, by asking, and nothing is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torchft.checkpointing import CheckpointTransport
from torchft.coordination import QuorumResult
from torchft.coordination.types import Notice
from torchft.core.participation import Participation, participation
from torchft.failure_watch import FailureWatch, ReplicaLost
from torchft.group import Group
from torchft.healing import Healing
from torchft.lost_state import Holders, StateLost, check_not_lost
from torchft.process_group import ProcessGroup
from torchft.progress import Progress
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import RankLogger
from torchft.runtime.retry import doubled
from torchft.step_error import StepError, waited_in_vain
from torchft.telemetry import RankTelemetry

__all__ = ["NOBODY", "QuorumPhase"]

NOBODY = Participation(None, 0)
"""Takes part while there is no quorum."""
_NO_STATE = -1
_MAX_PAUSE = 2.0


class QuorumPhase:
    """The beginnings of one rank's steps, one after the other.

    Args:
        group: who asks.
        pg: reconfigured when the members change.
        transport: whose metadata the others are told.
        healing: gives and takes the state.
        progress: of this replica.
        error: of the step under way.
        log: of the manager.
        telemetry: of this rank.
        use_async_quorum: a group that heals does not take part in that step.
        fixed_world_size: the most participants there may be; None: no limit.
        init_sync: at step 0 all groups take the primary's state.
        allow_restart: as of :class:`torchft.manager.Manager`.
        saved: the step of the newest checkpoint, the same on all ranks of a group; 0: there is none.
    """

    def __init__(
        self,
        *,
        group: Group,
        pg: ProcessGroup,
        transport: CheckpointTransport[dict[str, Any]],
        healing: Healing,
        progress: Progress,
        error: StepError,
        log: RankLogger,
        telemetry: RankTelemetry,
        use_async_quorum: bool,
        fixed_world_size: int | None,
        init_sync: bool,
        allow_restart: bool | None,
        saved: Callable[[QuorumResult], int],
    ) -> None:
        self._group = group
        self._pg = pg
        self._transport = transport
        self._healing = healing
        self._progress = progress
        self._error = error
        self._log = log
        self._telemetry = telemetry
        self._use_async_quorum = use_async_quorum
        self._fixed = fixed_world_size
        self._init_sync = init_sync
        self._allow_restart = allow_restart
        self._saved = saved
        self._configured: int | None = None  # the quorum that the process group stands for
        self._aborted = False  # the process group, and none was configured since
        self._last: QuorumResult | None = None
        self._failures = 0
        self._stop = threading.Event()
        self.watch = FailureWatch()
        """Hears who is no longer there."""
        self.participation = NOBODY
        """In the step under way; nobody while its quorum is not there, or failed."""
        self._holders = Holders(self.watch.cause)
        self.quorum_id = 0
        """Of the step under way."""
        self.short = 0
        """Steps in a row that had a quorum, but too few participants."""
        self.lost: StateLost | None = None
        """Nobody holds the state of the job any more."""

    @property
    def failed(self) -> bool:
        """There is no quorum to work with."""
        return self.participation is NOBODY

    @property
    def groups(self) -> int:
        """How many there are in the step under way, those that do not count among them."""
        return 0 if self.failed or self._last is None else self._last.replica_world_size

    def clear(self) -> None:
        """The next step begins."""
        self.watch.exit()
        self._healing.clear()
        self.participation = NOBODY

    def invalidate(self) -> None:
        """The process group was aborted: the next quorum configures it anew, whatever its id."""
        self._configured = None
        self._aborted = True

    def hear(self, notice: Notice) -> None:
        """A replica is no longer there, or broke its quorum. From any thread."""
        self.watch.hear(notice)
        if not notice.lives:
            self._healing.drop(notice.replica_id, notice.cause)

    def stop(self) -> None:
        """Ends a pause between two attempts."""
        self._stop.set()

    def stands(self, again: Callable[[], bool]) -> bool:
        """Begins a step without asking, if it stands: there is nothing to do then, and nothing to wait for.

        Args:
            again: called when a member is lost. Returns whether the step begins once more, by :meth:`run`; if not,
                the loss is the step's error.
        """
        last, progress = self._last, self._progress
        if last is None:
            return False
        sound = self._configured == last.quorum_id and not progress.failures and self._healing.has_state
        if self._group.world_size == 1 and not sound:
            return False
        if not self._group.stands(progress.step):
            return False
        self._healing.up_to_date()
        self.quorum_id = last.quorum_id
        self.participation = participation(
            replica_rank=last.replica_rank,
            replica_world_size=last.replica_world_size,
            max_replica_rank=last.replica_rank,
            max_world_size=last.replica_world_size,
            only_up_to_date=True,
            fixed_world_size=self._fixed,
        )
        self._enter(last, progress.step, again)
        if not sound:  # the group's other ranks have begun it: it ends for all of them by the vote
            self._error.report(RuntimeError("the process group was aborted after the last vote"))
        return True

    def run(self, allow_heal: bool, shrink_only: bool, deadline: Deadline) -> None:
        """Begins a step. Whatever fails becomes its error."""
        if vain := self._failures or max(0, self.short - 1):  # what fails at once must not make the loop spin
            self._stop.wait(min(doubled(0.05, vain, _MAX_PAUSE), deadline.remaining() / 2))
        try:
            quorum = self._ask(shrink_only, deadline)
        except Exception as e:
            self._failures += 1
            self._error.report(e)
            return
        self._failures = 0
        self._progress.timed_out = False
        try:
            check_not_lost(quorum, self._allow_restart, self._holders, self._saved, self._log)
            self._holders.remember(quorum)
            self._prepare(quorum, allow_heal)
        except Exception as e:
            if isinstance(e, StateLost):
                self.lost = e
            if e is not self._error.current:
                self._progress.timed_out = waited_in_vain(e)
            self._error.report(e)
            self._healing.refuse(quorum, str(e))

    def _ask(self, shrink_only: bool, deadline: Deadline) -> QuorumResult:
        return self._group.client._quorum(
            group_rank=self._group.rank,
            step=self._progress.step if self._healing.has_state else _NO_STATE,
            checkpoint_metadata=self._transport.metadata(),
            shrink_only=shrink_only,
            timeout=timedelta(seconds=deadline.remaining()),
            commit_failures=self._progress.breaks or int(self._aborted),
            init_sync=self._init_sync,
            timed_out=self._progress.timed_out,
            lineage=self._progress.lineage,
            waits=self._healing.pauses,
        )

    def _prepare(self, quorum: QuorumResult, allow_heal: bool) -> None:
        self.quorum_id = quorum.quorum_id
        part = participation(
            replica_rank=quorum.replica_rank,
            replica_world_size=quorum.replica_world_size,
            max_replica_rank=quorum.max_replica_rank,
            max_world_size=quorum.max_world_size,
            only_up_to_date=self._use_async_quorum or not allow_heal,
            fixed_world_size=self._fixed,
        )
        self._last = quorum
        self._enter(quorum, quorum.max_step, lambda: False)
        if self._error.current is not None:
            raise self._error.current  # this group has left the step, the others will not meet it
        if quorum.quorum_id != self._configured:
            self._configure(quorum)
        self._healing.exchange(quorum, allow_heal)
        self.participation = part

    def _enter(self, quorum: QuorumResult, step: int, again: Callable[[], bool]) -> None:
        """From now on the loss of a member is the step's error, unless the step can begin once more."""
        report = self._error.reporter()

        def lose(notice: Notice) -> None:
            if not again():
                report(ReplicaLost(str(notice)))

        self.watch.enter(quorum.replica_ids or (self._group.replica_id,), quorum.quorum_id, step, lose)

    def _configure(self, quorum: QuorumResult) -> None:
        address = f"{quorum.store_address}/torchft/{quorum.quorum_id}/{self._group.rank}"
        self._log.info("reconfiguring for quorum_id=%d store_prefixed_addr=%r", quorum.quorum_id, address)
        self._configured = None
        self._pg.configure(
            address,
            self._group.replica_id,
            quorum.replica_rank,
            quorum.replica_world_size,
            quorum_id=quorum.quorum_id,
            group_rank=self._group.rank,
            group_world_size=self._group.world_size,
        )
        self._configured = quorum.quorum_id
        self._telemetry.quorum(quorum)
        self._aborted = False
