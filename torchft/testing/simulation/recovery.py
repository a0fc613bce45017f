"""Giving the state to groups that heal, and taking it from one that has it.

Mirrors ``recovery.py`` and the transports of ``checkpointing/``: a source serves one step until that ends; a
transfer takes time, stalls while the source is stopped or cut off, and is verified, so what arrives is whole and of the
step that was asked for, or does not arrive.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchft.core.assignment import View
from torchft.testing.simulation.world import Process

if TYPE_CHECKING:
    from torchft.testing.simulation.job import Job

__all__ = ["Recovery", "Served"]

Served = tuple[int, int]
"""A step and the state with which it begins."""

_AGAIN = 0.05


class Recovery:
    """One rank's side of live checkpoint recovery.

    Args:
        job: where it finds the source.
        process: its own.
        rank: in the group: it deals with the same rank of other groups.
        chance: of how long a transfer takes.
    """

    def __init__(self, job: Job, process: Process, rank: int, chance: random.Random) -> None:
        self.serving: Served | None = None
        """What healing peers may take."""
        self.source = ""
        """Whom it takes the state from just now."""
        self._job = job
        self._process = process
        self._rank = rank
        self._chance = chance
        self._number = 0

    def take(self, view: View, done: Callable[[Served | Exception], None]) -> None:
        """Takes the state from the member that the quorum names, and says what came of it, unless stopped before."""
        assert view.recover_src_replica_rank is not None
        self.source = view.replica_ids[view.recover_src_replica_rank]
        self._number += 1
        self._ask(self._number, view.max_step, done)

    def stop(self) -> None:
        """Gives up what is being taken."""
        self.source = ""
        self._number += 1

    def _ask(self, number: int, step: int, done: Callable[[Served | Exception], None]) -> None:
        """Until the source gives its state: it may still be busy with its own quorum."""
        if number != self._number:
            return
        source = self._job.trainer(self.source, self._rank)
        assert source is not None
        away = self._away(source.process)
        if not source.process.alive and source.process.host_up and not away:
            self._end(done, RuntimeError("the source refuses"))
            return
        serving = source.recovery.serving
        if away or not source.process.alive or serving is None:
            self._process.after(_AGAIN, self._ask, number, step, done)
        elif serving[0] != step:
            self._end(done, RuntimeError(f"the source serves step {serving[0]}"))
        else:
            seconds = self._job.settings.transfer_time * (0.5 + self._chance.random())
            life = source.process.life
            self._process.after(seconds, self._arrive, number, source.recovery, source.process, life, serving, done)

    def _away(self, source: Process) -> bool:
        return source.paused or self._job.network.apart(self._process.name, source.name)

    def _arrive(
        self,
        number: int,
        source: Recovery,
        process: Process,
        life: int,
        serving: Served,
        done: Callable[[Served | Exception], None],
    ) -> None:
        if number != self._number:
            return
        if self._away(process):
            self._process.after(_AGAIN, self._arrive, number, source, process, life, serving, done)  # it stalls
        elif process.life != life or source.serving is not serving:
            self._end(done, RuntimeError("the source is gone, or has gone on"))
        else:
            self._end(done, serving)

    def _end(self, done: Callable[[Served | Exception], None], got: Served | Exception) -> None:
        self.stop()
        done(got)
