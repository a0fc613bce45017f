"""One rank's training loop: quorum, heal, forward pass, allreduce, commit, again and again.

Mirrors ``manager.py``, ``quorum_phase.py``, ``lost_state.py`` and ``step_error.py``. The model is a hash: a commit
makes the next one from it, the step, the participants and the divisor, so two replicas that differ in anything that
counts hold different states ever after. Who participates is decided by ``core/participation.py``, whether a death
concerns this step by ``failure_watch.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchft.coordination.types import Notice
from torchft.core.assignment import View
from torchft.core.participation import Participation, participation
from torchft.failure_watch import FailureWatch
from torchft.testing.simulation.collective import Contribution, Fabric, Mesh
from torchft.testing.simulation.group import Ask, GroupServer
from torchft.testing.simulation.invariants import TORN, Commit, Invariants
from torchft.testing.simulation.recovery import Recovery, Served
from torchft.testing.simulation.settings import Settings
from torchft.testing.simulation.trace import show_id
from torchft.testing.simulation.world import Process, Timer

if TYPE_CHECKING:
    from torchft.testing.simulation.job import Job

__all__ = ["Trainer"]

_NO_STATE = -1


class _TimedOut(Exception):
    """Something was waited for in vain."""


class Trainer:
    """One life of one rank.

    Args:
        job: where it finds the others.
        process: its own.
        server: of its group.
        rank: in the group.
        number: of this life of the replica, unlike any other's.
    """

    def __init__(self, job: Job, process: Process, server: GroupServer, rank: int, number: int) -> None:
        self.process = process
        self.world = process.world
        self.server = server
        self.rank = rank
        self.number = number
        self.replica_id = server.replica_id
        self.slowness = 1.0
        self.draining = False
        self.shrink_once = False
        self._job = job
        self._settings: Settings = job.settings
        self._fabric: Fabric = job.fabric
        self._invariants: Invariants = job.invariants
        self._chance = random.Random(f"{self.world.seed} {process.name} {process.life}")
        self.recovery = Recovery(job, process, rank, self._chance)
        # the replica's state (state.py, quorum_phase.Progress)
        self.step = 0
        self.state = hash((number if job.settings.init_sync else 0, rank))
        self.lineage = 0
        self.usable = True
        self.commits = 0
        self.last_commit = -1.0
        self._pending: int | None = None
        self._failures = 0
        self._timed_out = False
        # the step under way
        self.waits: tuple[str, float] | None = None
        """For what it waits, and until when by its own clock."""
        self._attempt = 0
        self._quorum_failures = 0
        self._error: Exception | None = None
        self._view: View | None = None
        self._part: Participation | None = None
        self._watch = FailureWatch()
        self._healing = False
        self._ask: Ask | None = None
        self._begun = self._computed = False
        self._configured: int | None = None
        self._mesh: Mesh | None = None
        self._timer: Timer | None = None
        self._in: str = ""
        self._stands = False
        """The vote's answer: the next step stands."""

    # ------------------------------------------------------ the step's begin

    def begin(self) -> None:
        """``start_quorum``."""
        self._watch.exit()
        self._healing = False
        self._part = None
        self._attempt += 1
        self._error = None
        self._begun = self._computed = False
        if self._stands or (self._settings.ranks == 1 and not self.shrink_once and self.server.stands(self.step)):
            self._begin_standing()
            return
        if self.draining:
            self._drain()
            return
        pause = min(0.05 * 2.0**self._quorum_failures, 2.0) if self._quorum_failures else 0.0
        if pause:
            self._in = "pause"
            self.process.after(pause, self._ask_quorum, self._attempt)
        if self._settings.async_quorum:
            self._compute()
        if not pause:
            self._ask_quorum(self._attempt)

    def _begin_standing(self) -> None:
        """A step that nobody was asked for."""
        self._stands = False
        if self.draining and self.rank == 0:
            self.server.drain()
        self._enter(self._attempt, self.server.view(self.rank))
        if self._settings.async_quorum:
            self._compute()
        if self._error is None and self._view is not None and self._view.quorum_id == self._configured:
            self._part = self._next_part
        self._phase_over()

    def _compute(self) -> None:
        seconds = self._settings.step_time * self.slowness * (0.7 + 0.6 * self._chance.random())
        self.process.after(seconds, self._forward_done, self._attempt)

    def _drain(self) -> None:
        self._in = "leaving"
        self.server.leave("drained", self.step, lambda: self._job.exited(self.server))

    def _wait(self, what: str, seconds: float, passed: Callable[[int], None]) -> None:
        """From now on waits for something, at most so long by its own clock."""
        self._in = what
        self.waits = what, self.process.time + seconds
        self._timer = self.process.after(seconds, passed, self._attempt)

    def _waited(self) -> None:
        self._in = ""
        self.waits = None
        timer, self._timer = self._timer, None
        if timer is not None:
            timer[4] = None

    def _ask_quorum(self, attempt: int) -> None:
        if attempt != self._attempt:
            return
        usable = self.usable and self._pending is None
        shrink, self.shrink_once = self.shrink_once, False
        ask = Ask(
            self,
            self.rank,
            self.step if usable else _NO_STATE,
            self.lineage,
            shrink,
            self._failures,
            self._timed_out,
            lambda view, error: self._reach(self._answered, attempt, view, error),
        )
        self._ask = ask
        self._wait("quorum", self._settings.quorum_timeout, self._quorum_timeout)
        self._call(self.server.come, ask)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Calls the group's server, which for ranks other than 0 is in another process."""
        if self.rank == 0:
            function(*args)
        elif self.server.process.alive:
            self.world.to(self.server.process, 0.0005, function, *args)

    def _reach(self, function: Callable[..., object], *args: object) -> None:
        """The server's answer comes back."""
        if self.rank == 0:
            function(*args)
        else:
            self.world.to(self.process, 0.0005, function, *args)

    def _quorum_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "quorum":
            assert self._ask is not None
            self._call(self.server.give_up, self._ask)
            self._answered(attempt, None, _TimedOut("no quorum in time"))

    def _answered(self, attempt: int, view: View | None, error: Exception | None) -> None:
        if attempt != self._attempt or self._in != "quorum":
            return
        self._waited()
        if view is None:
            self._quorum_failures += 1
            assert error is not None
            self._report(error)
            self._phase_over()
            return
        self._quorum_failures = 0
        self._timed_out = False
        self._enter(attempt, view)
        if view.lost_step and (view.max_step < 0 or view.lost_by_survivor):
            self._job.state_lost(self.server)
            return
        if view.max_step < 0:
            self._report(RuntimeError("no member of the quorum holds a usable state"))
        if self._error is not None:
            self._phase_over()
        elif view.quorum_id != self._configured:
            self._configured = None
            if self._mesh is not None:
                self._mesh.leave(self.replica_id, f"{self.replica_id} reconfigured")
            self._mesh = self._fabric.mesh(view.quorum_id, self.rank, view.replica_ids)
            self._wait("configure", self._settings.connect_timeout, self._configure_timeout)
            self._mesh.join(self.replica_id, self)
        else:
            self._heal()

    def _enter(self, attempt: int, view: View) -> None:
        """The step's quorum is known."""
        self._view = view
        self._next_part = participation(
            replica_rank=view.replica_rank,
            replica_world_size=view.replica_world_size,
            max_replica_rank=view.max_replica_rank,
            max_world_size=view.max_world_size,
            only_up_to_date=self._settings.async_quorum,
            fixed_world_size=self._settings.min_replica_size if self._settings.fixed_with_spares else None,
        )
        self._watch.enter(
            view.replica_ids,
            view.quorum_id,
            max(view.max_step, self.step),
            lambda notice: self._report_in(attempt, RuntimeError(str(notice))),
        )

    def _configure_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "configure":
            self._end_configure(_TimedOut("the process group was not built in time"))

    def _end_configure(self, error: Exception) -> None:
        self._waited()
        self._timed_out = isinstance(error, _TimedOut)
        self._report(error)
        self._phase_over()

    def mesh_built(self, mesh: Mesh) -> None:
        if mesh is self._mesh and self._in == "configure":
            self._waited()
            self._configured = mesh.key[0]
            self._heal()

    # -------------------------------------------------------------- healing

    def _heal(self) -> None:
        view = self._view
        assert view is not None
        if view.recover_dst_replica_ranks:
            self.recovery.serving = self.step, self.state
        if not view.heal:
            self._part = self._next_part
            self._phase_over()
            return
        self.world.tell(self.process.name, "heals, the quorum is at step %s", view.max_step)
        self._healing = True
        self._pending = None
        self.usable = False
        self.state = TORN  # the transfer writes into the live state
        self._wait("transfer", self._settings.collective_timeout, self._transfer_timeout)
        self.recovery.take(view, self._taken)

    def _taken(self, got: Served | Exception) -> None:
        if self._in != "transfer":
            return
        if isinstance(got, Exception):
            self._transfer_failed(got)
            return
        self._waited()
        assert self._view is not None
        self.step, self._pending = got
        self.lineage = self._view.lineage
        self._part = self._next_part
        self.world.point("heal", self.process.name)
        self._invariants.healed(self.replica_id, self.rank, self.step, self._pending, self.server.asked_step >= 0)
        self._phase_over()

    def _transfer_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "transfer":
            self._transfer_failed(_TimedOut("the transfer took too long"))

    def _transfer_failed(self, error: Exception) -> None:
        self._waited()
        self.recovery.stop()
        self._timed_out = isinstance(error, _TimedOut)
        self._report(error)
        self._phase_over()

    def _apply(self) -> None:
        if self._pending is not None:
            self.state, self._pending = self._pending, None
            self.usable = True

    # ------------------------------------------------------- the step's work

    def _phase_over(self) -> None:
        self._begun = True
        if not self._settings.async_quorum:
            if self._healing:
                self._apply()
                self._healing = False
            self._compute()
        elif self._computed:
            self._reduce()

    def _forward_done(self, attempt: int) -> None:
        if attempt != self._attempt:
            return
        self._computed = True
        if self._begun:
            self._reduce()

    def _reduce(self) -> None:
        if self._error is not None or self._mesh is None or self._part is None:
            self._end_step()
            return
        counts = self._part.rank is not None and not self._healing
        self._wait("collective", self._settings.collective_timeout, self._collective_timeout)
        self._mesh.contribute(self.replica_id, Contribution(self.number, self.step, self.state, counts))

    def _collective_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "collective":
            self._waited()
            self._report(_TimedOut("the collective took too long"))
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
        self._wait("vote", self._settings.collective_timeout * 1.2, self._vote_timeout)
        self._call(
            self.server.cast,
            self.rank,
            self.step,
            self._error is None and enough,
            lambda commit, cause, stands: self._reach(self._decided, attempt, commit, cause, stands),
        )

    def _vote_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "vote":
            self._report(_TimedOut("the vote did not end in time"))
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
                self._timed_out = isinstance(self._error, _TimedOut)
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

    def _report_in(self, attempt: int, error: Exception) -> None:
        if attempt == self._attempt:
            self._report(error)

    def _report(self, error: Exception) -> None:
        """The first error of a step aborts the process group."""
        if self._error is not None:
            return
        self._error = error
        self.world.tell(self.process.name, "error in step %s: %s", self.step, error)
        self._configured = None
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
