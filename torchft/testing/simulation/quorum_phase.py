"""How a step begins: quorum, process group, and the state, for those who give it and those who need it.

Mirrors ``quorum_phase.py``, ``healing.py``, the first half of ``manager.py`` (``start_quorum``), ``lost_state.py`` and
``state.py``.
Who participates is decided by ``core/participation.py``, whether a death concerns this step by ``failure_watch.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchft.coordination.types import Notice
from torchft.core.assignment import View
from torchft.core.participation import Participation, participation
from torchft.failure_watch import FailureWatch
from torchft.runtime.retry import doubled
from torchft.testing.simulation.collective import Contribution, Fabric, Mesh
from torchft.testing.simulation.group import Ask, GroupServer
from torchft.testing.simulation.invariants import TORN, Invariants
from torchft.testing.simulation.recovery import Recovery, Served
from torchft.testing.simulation.settings import Settings
from torchft.testing.simulation.world import Process, Timer

if TYPE_CHECKING:
    from torchft.testing.simulation.job import Job

__all__ = ["QuorumPhase", "TimedOut"]

_NO_STATE = -1


class TimedOut(Exception):
    """Something was waited for in vain."""


class QuorumPhase:
    """One life of one rank, from the beginning of each step to its first collective.

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
        # the replica's state (state.py, progress.py)
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
        self._aborted = False
        """The process group, and none was configured since."""
        self._touched = True
        """The step's quorum was used, or is none that stood."""
        self._again = False
        """The step stood, and then had to ask."""
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
        self._touched = self._settings.ranks > 1
        self._again = False
        if self._begins_standing():
            return
        if self.draining:
            self._drain()
            return
        self._touched = True
        pause = doubled(0.05, self._quorum_failures, 2.0) if self._quorum_failures else 0.0
        if pause:
            self._in = "pause"
            self.process.after(pause, self._ask_quorum, self._attempt)
        if self._settings.async_quorum:
            self._compute()
        if not pause:
            self._ask_quorum(self._attempt)

    def _begins_standing(self) -> bool:
        """Begins the step without asking, if it stands."""
        view = self._view
        if view is None:
            return False
        sound = self._configured == view.quorum_id and not self._failures and self.usable and self._pending is None
        if self._settings.ranks > 1:
            stands, self._stands = self._stands, False
        else:
            stands = sound and self.server.stands(self.step)
        if not stands:
            return False
        if self.draining and self.rank == 0:
            self.server.drain()
        self._enter(self._attempt, self.server.view(self.rank))
        if self._error is None:
            self._part = self._next_part
        if not sound:  # the group's other ranks have begun it: it ends for all of them by the vote
            self._report(RuntimeError("the process group was aborted after the last vote"))
        if self._settings.async_quorum:
            self._compute()
        self._phase_over()
        return True

    def _lose(self, attempt: int, notice: Notice) -> None:
        """A member of the step's quorum is lost: a step that has not used it yet begins once more, by asking."""
        if attempt != self._attempt:
            return
        if self._touched or self._in:
            self._report(RuntimeError(str(notice)))
            return
        self.world.tell(self.process.name, "begins step %s once more: %s", self.step, notice)
        self.world.point("begun once more", self.process.name)
        self._touched = self._again = True
        self._part = None
        self._begun = False
        self._ask_quorum(attempt)

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
            self.rank,
            self.step if usable else _NO_STATE,
            self.lineage,
            shrink,
            self._failures or int(self._aborted),
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
            self._answered(attempt, None, TimedOut("no quorum in time"))

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
            lambda notice: self._lose(attempt, notice),
        )

    def _configure_timeout(self, attempt: int) -> None:
        if attempt == self._attempt and self._in == "configure":
            self._end_configure(TimedOut("the process group was not built in time"))

    def _end_configure(self, error: Exception) -> None:
        self._waited()
        self._timed_out = isinstance(error, TimedOut)
        self._report(error)
        self._phase_over()

    def mesh_built(self, mesh: Mesh) -> None:
        if mesh is self._mesh and self._in == "configure":
            self._waited()
            self._configured = mesh.key[0]
            self._aborted = False
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
            self._transfer_failed(TimedOut("the transfer took too long"))

    def _transfer_failed(self, error: Exception) -> None:
        self._waited()
        self.recovery.stop()
        self._timed_out = isinstance(error, TimedOut)
        self._report(error)
        self._phase_over()

    def _apply(self) -> None:
        if self._pending is not None:
            self.state, self._pending = self._pending, None
            self.usable = True

    # ------------------------------------------------------------ what follows

    def _phase_over(self) -> None:
        """The quorum is there, and all that belongs to it, or the step has an error."""
        raise NotImplementedError

    def reduced(self, mesh: Mesh, contributions: dict[str, Contribution]) -> None:
        """A collective is complete here."""
        raise NotImplementedError

    def mesh_failed(self, mesh: Mesh, cause: str) -> None:
        """Another member closed its connections."""
        raise NotImplementedError

    def _compute(self) -> None:
        """The forward and backward pass begins."""
        raise NotImplementedError

    def _report(self, error: Exception) -> None:
        """Something failed in this step."""
        raise NotImplementedError
