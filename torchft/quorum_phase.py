"""How a step begins: quorum, process group, and the state, for those who give it and those who need it.

The idea
    Everything between ``start_quorum`` and the first collective happens here, in one call that never raises: what
    fails becomes the error of the step. The manager runs it on its background thread (asynchronous quorum) or on
    the training thread, and reads the result when it is over.

Rules
    - Nothing here decides: who is in, who heals from whom and who participates are computed in ``torchft.core``.
    - From the moment the quorum is known, the death of a member is the step's error, and ends what is waited for.
    - While the live state may be half written, this replica asks with step -1: it is nobody's source.
    - A group that heals contributes zeros when it has the state. If the state does not come, over a transport that
      leaves the process group alone, it contributes them all the same and votes no: the others lose no step by it.
    - Nor by a source that cannot give its state: it trains on, says once why, and whoever asked is told the reason.
      Not at step 0, where all have to begin alike; nor where those that heal count as participants, or share the
      process group with the transfer.
    - A group whose heal would hold the others up for too long, or is refused for long, says so when it asks
      (:mod:`torchft.heal_pause`): nobody serves it then.
    - A step that stands (:mod:`torchft.core.standing`) begins with the quorum and the process group of the one before
      it. If a notice comes before the step has used them, it begins once more, by asking, and nothing is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torchft.checkpointing import CheckpointTransport, StepNotServed, TooSlow, Unauthorized
from torchft.coordination import QuorumResult
from torchft.coordination.types import Notice
from torchft.core.participation import Participation, participation
from torchft.failure_watch import FailureWatch, ReplicaLost
from torchft.group import Group
from torchft.heal_pause import HealPause, Pausing
from torchft.lost_state import Holders, StateLost, check_not_lost
from torchft.process_group import ProcessGroup
from torchft.progress import Progress
from torchft.recovery import Recovery
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.logs import RankLogger
from torchft.runtime.retry import doubled
from torchft.state import ReplicaState
from torchft.step_error import StepError, waited_in_vain
from torchft.telemetry import RankTelemetry
from torchft.together import Together, TogetherError

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
        transport, state, recovery, together: give and take the state.
        progress: of this replica; a heal moves it.
        error: of the step under way.
        log: of the manager.
        telemetry: of this rank.
        use_async_quorum: a group that heals does not take part in that step.
        min_replica_size: a step with fewer participants is not committed.
        fixed_world_size: the most participants there may be; None: no limit.
        init_sync: at step 0 all groups take the primary's state.
        allow_restart: as of :class:`torchft.manager.Manager`.
        saved: the step of the newest checkpoint, the same on all ranks of a group; 0: there is none.
        heal_pause: as of :class:`torchft.manager.Manager`.
    """

    def __init__(
        self,
        *,
        group: Group,
        pg: ProcessGroup,
        transport: CheckpointTransport[dict[str, Any]],
        state: ReplicaState,
        recovery: Recovery,
        together: Together,
        progress: Progress,
        error: StepError,
        log: RankLogger,
        telemetry: RankTelemetry,
        use_async_quorum: bool,
        min_replica_size: int,
        fixed_world_size: int | None,
        init_sync: bool,
        allow_restart: bool | None,
        saved: Callable[[QuorumResult], int],
        heal_pause: timedelta | None,
    ) -> None:
        self._group = group
        self._pg = pg
        self._transport = transport
        self._state = state
        self._recovery = recovery
        self._together = together
        self._progress = progress
        self._error = error
        self._log = log
        self._telemetry = telemetry
        self._use_async_quorum = use_async_quorum
        self._fixed = fixed_world_size
        self._init_sync = init_sync
        self._allow_restart = allow_restart
        self._saved = saved
        self._quorum: QuorumResult | None = None  # of the step under way
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
        self.healing = False
        """This replica takes a peer's state in the step under way."""
        self.quorum_id = 0
        """Of the step under way."""
        self.loads = False
        """A state is to be written at its end: a peer's, or this rank's own because the group's others load."""
        self.unhealed: Exception | None = None
        """Why the state that this replica needs did not come, in a step that the others can do without it."""
        bound = None if heal_pause is None else seconds(heal_pause)
        self._pause = HealPause(recovery.measure, recovery.timeout, log, bound, min_replica_size)
        self._cannot_serve = ""  # why, as it was said
        self._told_not_allowed = False
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
        if self.loads and not self.healing:
            self._state.drop_pending()  # its own
        self.healing = self.loads = False
        self.unhealed = None
        self.participation = NOBODY
        self._quorum = None

    def invalidate(self) -> None:
        """The process group was aborted: the next quorum configures it anew, whatever its id."""
        self._configured = None
        self._aborted = True

    def hear(self, notice: Notice) -> None:
        """A replica is no longer there, or broke its quorum. From any thread."""
        self.watch.hear(notice)
        if not notice.lives:
            self._recovery.drop(notice.replica_id, notice.cause)

    def step_failed(self, error: Exception) -> None:
        """The step under way has an error. From any thread."""
        self._recovery.step_failed(error)

    def stop(self) -> None:
        """Ends a pause between two attempts, and what measures in one."""
        self._stop.set()
        self._pause.stop()

    def close(self) -> None:
        """Waits for the thread that measures."""
        self._pause.close()

    @property
    def waits(self) -> bool:
        """This group needs a state, and takes none in this step, as it has said or was told."""
        return isinstance(self.unhealed, Pausing)

    @property
    def only_unhealed(self) -> bool:
        """If nothing else failed here, the step under way can fail only because this group is not healed: the quorum is
        as good as before. A rank with an error of its own says so, for all of its group.
        """
        if self._group.world_size == 1:
            return self.unhealed is not None
        # What all ranks call is agreed on once in each attempt, and a break tells one attempt from the next.
        return self.healing and self._heals_aside and not self._together.shared

    def stands(self, again: Callable[[], bool]) -> bool:
        """Begins a step without asking, if it stands: there is nothing to do then, and nothing to wait for.

        Args:
            again: called when a member is lost. Returns whether the step begins once more, by :meth:`run`; if not,
                the loss is the step's error.
        """
        last, progress = self._last, self._progress
        if last is None:
            return False
        sound = self._configured == last.quorum_id and not progress.failures
        sound = sound and self._state.usable and not self._state.pending
        if self._group.world_size == 1 and not sound:
            return False
        if not self._group.stands(progress.step):
            return False
        self._pause.up_to_date()
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
        self._quorum = quorum
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
            try:
                self._together.refuse(quorum, str(e))
            except Exception as gone:  # the group's store is: nobody agrees on anything any more
                self._log.debug("the other ranks of this group are not told: %s", gone)

    def _ask(self, shrink_only: bool, deadline: Deadline) -> QuorumResult:
        usable = self._state.usable and not self._state.pending
        return self._group.client._quorum(
            group_rank=self._group.rank,
            step=self._progress.step if usable else _NO_STATE,
            checkpoint_metadata=self._transport.metadata(),
            shrink_only=shrink_only,
            timeout=timedelta(seconds=deadline.remaining()),
            commit_failures=self._progress.breaks or int(self._aborted),
            init_sync=self._init_sync,
            timed_out=self._progress.timed_out,
            lineage=self._progress.lineage,
            waits=self._pause.waits,
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
        if allow_heal:
            own = self._serve(quorum)
            self.loads = self._together.all_load(quorum)
            self._pause.step(quorum)
            if quorum.heal:
                self.healing = True
                if self._heals_aside:
                    self._try_to_heal(quorum)
                else:
                    self._heal_or_fail(quorum)
            elif quorum.waits:
                self._sit_out(quorum, self._pause.why)
            elif self.loads and own is not None:
                self._state.keep_own(own)
        elif quorum.max_replica_rank is None:
            self._sit_out(quorum, self._not_allowed())
        self.participation = part

    def _not_allowed(self) -> str:
        """Why a group that is behind commits nothing where it may not heal. It is said once."""
        why = "it is behind, and may not heal in this step: allow_heal is False"
        if not self._told_not_allowed:
            self._told_not_allowed = True
            self._log.warning(
                "this group commits nothing: %s. Call start_quorum() without it to take the others' state. This is "
                "said once",
                why,
            )
        return why

    @property
    def _heals_aside(self) -> bool:
        """A step is as good without those that heal in it: they do not count, and the process group stays whole."""
        return self._use_async_quorum and getattr(self._transport, "receives_beside_collectives", False)

    def _serve(self, quorum: QuorumResult) -> dict[str, Any] | None:
        """What cannot be given is no error of the step where that can do without those that heal.

        At step 0 it is one: a job whose groups cannot be made alike does not begin.
        """
        try:
            own = self._recovery.serve(quorum, self._progress.state_dict())
        except Exception as e:
            if self._error.current is not None or not self._heals_aside or quorum.max_step <= 0:
                raise
            self._together.refuse(quorum, str(e))
            new, self._cannot_serve = str(e) != self._cannot_serve, str(e)
            self._log.log(
                logging.ERROR if new else logging.DEBUG,
                "this group trains on, but cannot give its state to the groups that need it: %s: %s. Unless another "
                "one gives them its own, they cannot take part",
                type(e).__name__,
                e,
                exc_info=e.__cause__ if new else None,
            )
            return None
        if own is not None:
            self._cannot_serve = ""
        return own

    def _heal(self, quorum: QuorumResult, **how: Any) -> None:
        began = time.monotonic()
        received = self._recovery.heal(quorum, self._progress.step, self._error, **how)
        self._progress.load_state_dict(received)
        self._telemetry.heal(quorum, time.monotonic() - began)
        self._progress.lineage = quorum.lineage

    def _heal_or_fail(self, quorum: QuorumResult) -> None:
        """A heal that fails is the step's error. All go on to the next one at once, so the loop must not spin."""
        try:
            self._heal(quorum)
            self._pause.over()
        except (StepNotServed, Unauthorized):
            self._stop.wait(self._pause.moment())
            raise

    def _try_to_heal(self, quorum: QuorumResult) -> None:
        """A heal that fails is no error of the step: the process group is as good as before, and carries zeros."""
        began = time.monotonic()
        try:
            self._pause.check()  # not every lighthouse passes on that this group waits
            allowance, unmeasured = self._pause.allowance, not self._pause.measured
            self._heal(quorum, allowance=allowance, unmeasured=unmeasured)
            self._pause.over()
        except Exception as e:
            if isinstance(e, TooSlow):
                self._pause.hopeless(e)
            self.unhealed = e
            self._together.refuse(quorum, str(e))
            level = logging.DEBUG if isinstance(e, (Pausing, Unauthorized)) else logging.WARNING  # that is said once
            self._log.log(level, "this group is not healed in this step: %s: %s", type(e).__name__, e)
            if isinstance(e, (StepNotServed, Unauthorized)):
                self._stop.wait(self._pause.refused(e, time.monotonic() - began))

    def _sit_out(self, quorum: QuorumResult, why: str) -> None:
        """This group needs a state, and takes none in this step: it contributes zeros, and commits nothing."""
        self._recovery.know(quorum)
        self.healing, self.loads = True, False
        self.unhealed = Pausing(why)
        self._together.refuse(quorum, str(self.unhealed))

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

    def apply_healed_state(self) -> None:
        """Writes the state that was received, if one was. On the training thread."""
        if not self._state.pending or self._quorum is None:
            return  # the transfer failed: the step has its error, and the other ranks know
        if self.healing:
            self._log.info("applying pending state dict")
        try:
            self._together.load(self._quorum)
        except TogetherError as e:
            self._error.report(e)
            return
        if self.healing:
            self._log.info("Loaded state dict.")
