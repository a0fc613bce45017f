"""When another rank of this group is gone: the end of a process that waits for it in vain.

The idea
    The ranks of a group wait for each other inside their own collectives (FSDP's, tensor parallelism's), which
    torchft does not see and which have timeouts of many minutes. A group that has lost a rank cannot go on; its
    supervisor restarts it as a whole, but only once somebody ends. Gloo's collectives break when a member dies, so
    the training loop ends by its own exception. One that was stopped or cut off breaks nothing, and NCCL's
    collectives wait in any case. Then this ends the process.

Rules
    - Only a process in the middle of a step ends, ``grace`` after it was told: between two steps, and after the
      last one, it waits for nobody. It is looked at again then.
    - A vote in which all ranks took part shows that the group is whole again, and calls the end off, if the loss was
      heard of before this rank voted: who dies after its vote is lost all the same.
    - So does the return of who was lost, where that is seen before a vote.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from torchft.coordination.types import ANY_QUORUM, Notice
from torchft.runtime.logs import RankLogger
from torchft.runtime.loop import Timer, call_later

__all__ = ["EXIT_CODE", "GroupLoss", "end_process"]

EXIT_CODE = 1
_AGAIN = 1.0


def end_process(cause: str) -> None:
    """Ends this process now, with :data:`EXIT_CODE` and the stacks of all threads on stderr.

    Its threads wait in C++ code for somebody who is not there: no exception reaches them.
    """
    try:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        for handler in logging.root.handlers:
            handler.flush()
    except Exception:
        logging.getLogger(__name__).exception("the stacks could not be written: %s", cause)
    os._exit(EXIT_CODE)


class GroupLoss:
    """From any thread.

    Args:
        replica_id: of the group.
        grace: seconds from hearing of the loss to the end.
        in_step: whether the training thread is in the middle of a step.
        end: ends the process, given the cause.
        log: of the manager.
    """

    def __init__(
        self,
        replica_id: str,
        grace: float,
        in_step: Callable[[], bool],
        log: RankLogger,
        end: Callable[[str], None] = end_process,
    ) -> None:
        self._replica_id = replica_id
        self._grace = grace
        self._in_step = in_step
        self._end = end
        self._log = log
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._notice: Notice | None = None
        self._heard = 0.0

    def hear(self, notice: Notice) -> None:
        """Somebody is no longer there: what the group says of its own ranks matters here."""
        if notice.replica_id != self._replica_id or notice.quorum_id < ANY_QUORUM or notice.lives:
            return
        with self._lock:
            if self._timer is not None:
                return
            self._notice, self._heard = notice, time.monotonic()
            self._timer = call_later(self._grace, self._due)
        if notice.step and not self._in_step():  # at the end of a job the ranks go one after the other
            self._log.info("%s", notice.cause)
            return
        self._log.error(
            "%s. This group cannot go on without it. If this process still waits for it in %g s, it ends with exit "
            "code %d; its supervisor (torchrun --max-restarts) then restarts the group",
            notice.cause,
            self._grace,
            EXIT_CODE,
        )

    def whole(self, since: float) -> None:
        """All ranks of the group were there at ``since`` (:func:`time.monotonic`) or later."""
        if self._call_off(lambda: self._heard <= since):
            self._log.info("the group is whole again")

    def back(self, notice: Notice) -> None:
        """Who was lost by this notice is there again."""
        if self._call_off(lambda: self._notice is notice):
            self._log.info("who was lost is there again: this process does not end")

    def stop(self) -> None:
        """This process ends by itself."""
        self._call_off(lambda: True)

    def _call_off(self, applies: Callable[[], bool]) -> bool:
        with self._lock:
            if self._timer is None or not applies():
                return False
            self._timer.cancel()
            self._timer = self._notice = None
        return True

    def _due(self) -> None:
        with self._lock:
            if self._timer is None or self._notice is None:
                return
            if not self._in_step():
                self._timer = call_later(_AGAIN, self._due)
                return
            cause = self._notice.cause
        self._log.critical("%s; this process waits for it in vain and ends now", cause)
        self._end(cause)
