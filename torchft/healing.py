"""How a state is given and taken in a step: what becomes of it, on either side, for the step and for the others in it.

The idea
    :mod:`torchft.quorum_phase` knows the quorum, :mod:`torchft.recovery` moves a state. Between them, this says what
    the step comes to: whether a heal that fails, or a state that cannot be given, is an error of the step, or
    only of those that need the state, or is not even tried now (:mod:`torchft.heal_pause`). What was taken waits until
    the training thread applies it.

Rules
    - Nothing here decides who heals, and from whom: that is computed in ``torchft.core``.
    - A group that heals contributes zeros when it has the state. If the state does not come, over a transport that
      leaves the process group alone, it contributes them all the same and votes no: the others lose no step by it.
    - Nor by a source that cannot give its state: it trains on, says once why, and whoever asked is told the reason.
      Not at step 0, where all have to begin alike; nor where those that heal count as participants, or share the
      process group with the transfer.
    - A group whose heal would hold the others up for too long, or is refused for long, says so when it asks: nobody
      serves it then.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from typing import Any

from torchft.checkpointing import StepNotServed, TooSlow, Unauthorized
from torchft.coordination import QuorumResult
from torchft.heal_pause import HealPause, Pausing
from torchft.progress import Progress
from torchft.recovery import Recovery
from torchft.runtime.deadline import seconds
from torchft.runtime.logs import RankLogger
from torchft.state import ReplicaState, StateError
from torchft.step_error import StepError
from torchft.telemetry import RankTelemetry
from torchft.together import Together, TogetherError

__all__ = ["Healing"]


class Healing:
    """One rank's, in one step after the other.

    Args:
        recovery, together: give and take the state.
        state: where it is.
        progress: of this replica; a heal moves it.
        error: of the step under way.
        log: of the manager.
        telemetry: of this rank.
        alone: this rank is all of its group.
        use_async_quorum: a group that heals does not take part in that step.
        min_replica_size: a step with fewer participants is not committed.
        heal_pause: as of :class:`torchft.manager.Manager`.
    """

    def __init__(
        self,
        *,
        recovery: Recovery,
        together: Together,
        state: ReplicaState,
        progress: Progress,
        error: StepError,
        log: RankLogger,
        telemetry: RankTelemetry,
        alone: bool,
        use_async_quorum: bool,
        min_replica_size: int,
        heal_pause: timedelta | None,
    ) -> None:
        self._recovery = recovery
        self._together = together
        self._state = state
        self._progress = progress
        self._error = error
        self._log = log
        self._telemetry = telemetry
        self._alone = alone
        self._use_async_quorum = use_async_quorum
        bound = None if heal_pause is None else seconds(heal_pause)
        self._pause = HealPause(recovery.measure, recovery.timeout, log, bound, min_replica_size)
        self._stop = threading.Event()
        self._quorum: QuorumResult | None = None  # of the step under way
        self._cannot_serve = ""  # why, as it was said
        self._told_not_allowed = False
        self._heal_took = 0.0
        self.heals = False
        """This replica takes a peer's state in the step under way."""
        self.loads = False
        """A state is to be written at its end: a peer's, or this rank's own because the group's others load."""
        self.unhealed: Exception | None = None
        """Why the state that this replica needs did not come, in a step that the others can do without it."""

    # ------------------------------------------------------ between two steps

    @property
    def has_state(self) -> bool:
        """The state of this replica is one: it is not half written, and none waits to be."""
        return self._state.usable and not self._state.pending

    @property
    def pauses(self) -> bool:
        """No state is taken now, for all that this rank knows: the others are told when it asks for a quorum."""
        return self._pause.waits

    def clear(self) -> None:
        """The next step begins. What was said of the last one is over."""
        if self.loads and not self.heals:
            self._state.drop_pending()  # its own
        self.heals = self.loads = False
        self.unhealed = None
        self._quorum = None

    def up_to_date(self) -> None:
        """It stands: this group needs no state in it."""
        self._pause.up_to_date()

    def stop(self) -> None:
        """Ends a pause between two attempts, and what measures in one."""
        self._stop.set()
        self._pause.stop()

    def close(self) -> None:
        """Waits for the thread that measures."""
        self._pause.close()

    # ------------------------------------------------------- as the step begins

    def exchange(self, quorum: QuorumResult, allow_heal: bool) -> None:
        """Gives the state to those that need it, and takes it if this replica does.

        Args:
            quorum: this rank's view, for which the process group is configured.
            allow_heal: as of :meth:`torchft.manager.Manager.start_quorum`.

        Raises:
            Exception: the step fails.
        """
        self._quorum = quorum
        if allow_heal:
            own = self._serve(quorum)
            self.loads = self._together.all_load(quorum)
            self._pause.step(quorum)
            if quorum.heal:
                self.heals = True
                if self._beside:
                    self._try_to_heal(quorum)
                else:
                    self._heal_or_fail(quorum)
            elif quorum.waits:
                self._sit_out(quorum, self._pause.why)
            elif self.loads and own is not None:
                self._state.keep_own(own)
        elif quorum.max_replica_rank is None:
            self._sit_out(quorum, self._not_allowed())

    def refuse(self, quorum: QuorumResult, cause: str) -> None:
        """The step failed as it began: this rank gives and takes nothing more in it. Never raises."""
        try:
            self._together.refuse(quorum, cause)
        except Exception as gone:  # the group's store is: nobody agrees on anything any more
            self._log.debug("the other ranks of this group are not told: %s", gone)

    def drop(self, replica_id: str, cause: str) -> None:
        """A replica is no longer there: a transfer to it, or from it alone, ends now. From any thread."""
        self._recovery.drop(replica_id, cause)

    def step_failed(self, error: Exception) -> None:
        """The step under way has an error. From any thread."""
        self._recovery.step_failed(error)

    @property
    def _beside(self) -> bool:
        """A step is as good without those that heal in it: they do not count, and the process group stays whole."""
        return self._use_async_quorum and getattr(self._recovery.transport, "receives_beside_collectives", False)

    def _serve(self, quorum: QuorumResult) -> dict[str, Any] | None:
        """What cannot be given is no error of the step where that can do without those that heal.

        At step 0 it is one: a job whose groups cannot be made alike does not begin.
        """
        try:
            own = self._recovery.serve(quorum, self._progress.state_dict())
        except Exception as e:
            if self._error.current is not None or not self._beside or quorum.max_step <= 0:
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
        self._heal_took = time.monotonic() - began
        self._telemetry.heal(quorum, self._heal_took)
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
            elif isinstance(e, StateError):
                self._pause.misfits(e, time.monotonic() - began)

    def _sit_out(self, quorum: QuorumResult, why: str) -> None:
        """This group needs a state, and takes none in this step: it contributes zeros, and commits nothing."""
        self._recovery.know(quorum)
        self.heals, self.loads = True, False
        self.unhealed = Pausing(why)
        self._together.refuse(quorum, str(self.unhealed))

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

    # ------------------------------------------------------------- as it ends

    @property
    def sits_out(self) -> bool:
        """This group needs a state, and takes none in this step, as it has said or was told."""
        return isinstance(self.unhealed, Pausing)

    @property
    def only_unhealed(self) -> bool:
        """If nothing else failed here, the step under way can fail only because this group is not healed: the quorum is
        as good as before. A rank with an error of its own says so, for all of its group.
        """
        if self._alone:
            return self.unhealed is not None
        # What all ranks call is agreed on once in each attempt, and a break tells one attempt from the next.
        return self.heals and self._beside and not self._together.shared

    def apply(self) -> None:
        """Writes the state that was received, if one was. On the training thread.

        Raises:
            Exception: what a load function raised: the step is not committed by this group, which has no state now.
        """
        if not self._state.pending or self._quorum is None:
            return  # the transfer failed: the step has its error, and the other ranks know
        if self.heals:
            self._log.info("applying pending state dict")
        try:
            self._together.load(self._quorum)
        except TogetherError as e:
            self._error.report(e)
            return
        except Exception as e:
            if self.heals and self._beside:
                self.unhealed = e  # which costs nobody else the step
            else:
                self._error.report(e)
            self._pause.misfits(e, self._heal_took)
            raise
        self._pause.fits()
        if self.heals:
            self._log.info("Loaded state dict.")

    def apply_at_once(self) -> None:
        """The same where the quorum is waited for: as the step goes on with that state, this group takes part in it."""
        if self.loads:
            self.apply()
            self.heals = self.loads = False
