"""One rank's training loop: forward pass, allreduce, vote, commit, again and again.

Mirrors ``manager.py`` and ``step_error.py``. The model is a hash: a commit makes the next one from it, the step, the
participants and the divisor, so two replicas that differ in anything that counts hold different states ever after.
"""

from __future__ import annotations

from torchft.coordination.types import Notice
from torchft.testing.simulation.collective import Contribution, Mesh
from torchft.testing.simulation.invariants import Commit
from torchft.testing.simulation.quorum_phase import QuorumPhase, TimedOut
from torchft.testing.simulation.trace import show_id

__all__ = ["Trainer"]


class Trainer(QuorumPhase):
    """One life of one rank: see :class:`QuorumPhase`."""

    # ------------------------------------------------------- the step's work

    def _compute(self) -> None:
        seconds = self._settings.step_time * self.slowness * (0.7 + 0.6 * self._chance.random())
        self.process.after(seconds, self._forward_done, self._attempt)

    def _phase_over(self) -> None:
        self._begun = True
        if self._settings.async_quorum or self._again:
            if self._again and self._healing and not self._settings.async_quorum:
                self._report(RuntimeError("this group fell behind in mid-step and has healed: the step is lost"))
            if self._computed:
                self._reduce()
            return
        if self._healing:
            self._apply()
            self._healing = False
        self._compute()

    def _forward_done(self, attempt: int) -> None:
        if attempt != self._attempt:
            return
        self._computed = True
        if self._begun:
            self._reduce()

    def _reduce(self) -> None:
        self._touched = True
        if self._error is not None or self._mesh is None or self._part is None:
            self._end_step()
            return
        counts = self._part.rank is not None and not self._healing
        self._wait("collective", self._settings.collective_timeout, self._collective_timeout)
        self._mesh.contribute(self.replica_id, Contribution(self.number, self.step, self.state, counts))

    def _collective_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "collective":
            self._waited()
            self._report(TimedOut("the collective took too long"))
            self._end_step()

    def mesh_failed(self, mesh: Mesh, cause: str) -> None:
        if mesh is not self._mesh:
            return
        if self._in == "configure":
            self._end_configure(RuntimeError(cause))
        elif self._in == "collective":
            self._waited()
            self._report(RuntimeError(cause))
            self._end_step()

    def reduced(self, mesh: Mesh, contributions: dict[str, Contribution]) -> None:
        if mesh is not self._mesh or self._in != "collective":
            return
        self._waited()
        self._contributions = contributions
        self._end_step()

    # ------------------------------------------------------------ the vote

    def _end_step(self) -> None:
        """``should_commit``."""
        if self._healing:
            self._apply()
        self._watch.exit()
        enough = self._part is not None and self._part.world_size >= self._settings.min_replica_size
        attempt = self._attempt
        self._in = "vote"
        self._call(
            self.server.cast,
            self.rank,
            self.step,
            self._error is None and enough,
            lambda commit, cause, stands: self._reach(self._decided, attempt, commit, cause, stands),
        )
        if attempt == self._attempt and self._in == "vote":  # it is not decided yet
            self._wait("vote", self._settings.collective_timeout * 1.2, self._vote_timeout)

    def _vote_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "vote":
            self._report(TimedOut("the vote did not end in time"))
            self._call(self.server.uncast, self.rank, self.step, "its deadline passed")
            self._decided(attempt, False, "", False)

    def _decided(self, attempt: int, commit: bool, cause: str, stands: bool) -> None:
        if attempt != self._attempt or self._in != "vote":
            return
        self._waited()
        self.recovery.serving = None
        if commit:
            self._stands = stands
            self._commit()
        else:
            self._failures += 1
            if self._view is not None:
                self._invariants.failed(self._view.quorum_id, self.step, self.rank, self.replica_id)
            if self._part is not None:
                self._timed_out = isinstance(self._error, TimedOut)
            self.world.point("failed step", self.process.name)
            self.world.tell(self.process.name, "does not commit step %s: %s", self.step, self._error or cause)
        self.begin()

    def _commit(self) -> None:
        view, part = self._view, self._part
        assert view is not None
        assert part is not None
        counting = [c for c in self._contributions.values() if c.counts]
        participants = tuple(sorted(c.replica for c in counting))
        ancestor = self.state
        self.state = hash((ancestor, self.step, participants, part.world_size))
        self.world.tell(
            self.process.name,
            "commits step %s in quorum %s: %s/%s",
            self.step,
            show_id(view.quorum_id) if self.world.trace else "",
            participants,
            part.world_size,
        )
        self._invariants.committed(
            Commit(
                self.replica_id,
                self.rank,
                view.quorum_id,
                view.replica_ids,
                self.step,
                participants,
                part.world_size,
                ancestor,
                self.state,
            ),
            (c.state for c in counting),
        )
        self.world.point("commit", self.process.name)
        self.step += 1
        self.lineage = view.quorum_id
        self.commits += 1
        self.last_commit = self.world.now
        self._failures = 0

    # ---------------------------------------------------- errors and notices

    def hear(self, notice: Notice) -> None:
        """A replica is no longer there, or broke its quorum."""
        self._watch.hear(notice)
        if not notice.lives and self._in == "transfer" and notice.replica_id == self.recovery.source:
            self._transfer_failed(RuntimeError(str(notice)))

    def _report(self, error: Exception) -> None:
        """The first error of a step aborts the process group."""
        if self._error is not None:
            return
        self._error = error
        self.world.tell(self.process.name, "error in step %s: %s", self.step, error)
        self._configured = None
        self._aborted = self._aborted or self._mesh is not None
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            mesh.leave(self.replica_id, f"{self.replica_id} aborted")
        if self._in == "configure":
            self._waited()
            self._phase_over()
        elif self._in == "collective":
            self._waited()
            self._end_step()

    def ended(self) -> None:
        """Its process is gone."""
        if self._mesh is not None:
            self._mesh.leave(self.replica_id, f"{self.replica_id} died")
