"""What the Manager does with checkpoints on disk between two steps, if it was given any.

Rules
    - Before the first step the newest one is restored, unless the program has loaded a state of its own.
    - After a step in which all went well the state is saved, if one is due (:mod:`torchft.restoring`).
    - When nobody holds the state of the job any more, the newest one is restored; without any, that is the end.
"""

from __future__ import annotations

from torchft.healing import Healing
from torchft.lost_state import StateLost
from torchft.progress import Progress
from torchft.quorum_phase import QuorumPhase
from torchft.restoring import Restoring
from torchft.runtime.logs import RankLogger

__all__ = ["Persistence"]


class Persistence:
    """One rank's. On the training thread, between two steps.

    Args:
        restoring: saves and restores; None: there are no checkpoints.
        progress: of this replica; a restored state moves it.
        begin: knows how the last step began.
        healing: knows whether a peer's state was taken in it.
        log: of the manager.
    """

    def __init__(
        self,
        restoring: Restoring | None,
        progress: Progress,
        begin: QuorumPhase,
        healing: Healing,
        log: RankLogger,
    ) -> None:
        self._restoring = restoring
        self._progress = progress
        self._begin = begin
        self._healing = healing
        self._log = log
        self._restored = False

    def restore(self) -> int | None:
        """As :meth:`torchft.manager.Manager.restore`."""
        if self._restoring is None:
            raise RuntimeError("this Manager has no checkpoints to restore: pass checkpoints=Checkpoints(directory)")
        if not self._resume(self._restoring):
            self._restoring.check()
            self._restored = True
            return None
        return self._progress.step

    def _resume(self, restoring: Restoring) -> bool:
        """Goes on from the newest checkpoint, if there is one."""
        torchft = restoring.restore()
        if torchft is None:
            return False
        self._progress.load_state_dict(torchft)
        self._restored = True  # not before: who has caught an error and tries again must not begin anew
        return True

    def settle_loss(self) -> None:
        """Nobody holds the state any more: goes on from the newest checkpoint, or not at all.

        Raises:
            StateLost: there is none.
        """
        lost: StateLost | None
        lost, self._begin.lost = self._begin.lost, None
        if lost is None:
            return
        if self._restoring is None:
            raise lost
        self._log.warning("%s", lost)
        if not self._resume(self._restoring):
            raise lost

    def between_steps(self) -> None:
        """The state is at rest: saves it if that is due, or restores it before the first step."""
        if self._restoring is None:
            return
        if not self._restored:
            if self._progress.step == 0:  # else the program has loaded a state of its own
                self.restore()
            self._restored = True
        elif self._progress.failures == 0 and not self._healing.heals:
            self._restoring.save(self._progress.step, self._begin.participation.rank, self._progress.state_dict())
        self._restoring.look_ahead(self._progress.step)

    def close(self, wait: bool) -> None:
        """A save under way may end first, if ``wait``."""
        if self._restoring is not None:
            self._restoring.checkpoints.close(None if wait else 0.0)
