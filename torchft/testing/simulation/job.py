"""A whole job in the simulated world: lighthouses, groups, the network between them, and a supervisor.

The supervisor does what torchrun or Kubernetes does: it starts a group again that has ended because nobody in the
job holds a usable state any more, or because one of its ranks died.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torchft.core import assignment
from torchft.core.election import Candidate, LeaseOptions
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.core.standing_member import StandingMember
from torchft.testing.simulation.clock import Clock
from torchft.testing.simulation.collective import Fabric
from torchft.testing.simulation.group import GroupServer
from torchft.testing.simulation.invariants import Invariants
from torchft.testing.simulation.lighthouse import Lighthouse
from torchft.testing.simulation.network import Network
from torchft.testing.simulation.seat import Alone, Seat, Shared, SharedRegister
from torchft.testing.simulation.settings import Settings
from torchft.testing.simulation.trace import Trace
from torchft.testing.simulation.trainer import Trainer
from torchft.testing.simulation.world import Process, World

__all__ = ["Group", "Job", "Parts"]

_RESTART = 0.4
"""Seconds that a supervisor takes to start a group again."""


@dataclass(frozen=True)
class Parts:
    """What the simulated shells drive: the real code, unless a test puts something else in its place."""

    lighthouse: Callable[..., StandingLighthouse] = StandingLighthouse
    member: Callable[[], StandingMember] = StandingMember
    candidate: Callable[[str, LeaseOptions], Candidate] = Candidate
    assign: Callable[..., Any] = assignment.assign
    trainer: type[Trainer] = Trainer


@dataclass(eq=False)
class Group:
    """All lives of one replica group."""

    name: str
    processes: list[Process]
    lives: int = 0
    server: GroupServer | None = None
    trainers: list[Trainer] = field(default_factory=list)
    wanted: bool = True
    """The supervisor starts it again."""

    @property
    def alive(self) -> bool:
        return self.processes[0].alive


class Job:
    """A job, ready to :meth:`start`.

    Args:
        settings: sizes and times.
        seed: of chance.
        trace: what a person can read afterwards.
        parts: the code under test.
    """

    def __init__(self, settings: Settings, seed: int, trace: Trace | None = None, parts: Parts | None = None) -> None:
        self.settings = settings
        self.parts = parts or Parts()
        self.world = World(seed, trace)
        self.invariants = Invariants(self.world)
        self.network = Network(self.world, 0.9 * settings.heartbeat_timeout)
        self.fabric = Fabric(self.network)
        self._numbers = itertools.count(1)
        self._clocks = random.Random(f"{seed} clocks")
        self.lighthouses: dict[str, Lighthouse] = {}
        register = SharedRegister(self.network, LeaseOptions(settings.seat_lease))
        for i in range(settings.lighthouses):
            self._lighthouse(f"L{i}", register)
        self.groups: dict[str, Group] = {}
        self._trainers: dict[tuple[str, int], Trainer] = {}
        for i in range(settings.replicas):
            self.group(f"g{i}")

    def _process(self, name: str) -> Process:
        drift = self.settings.drift
        clock = Clock(1.0 + self._clocks.uniform(-drift, drift), self._clocks.uniform(0.0, 1000.0))
        return Process(self.world, name, clock)

    def _lighthouse(self, name: str, register: SharedRegister) -> None:
        process = self._process(name)

        def seat(owner: Lighthouse) -> Seat:
            if self.settings.lighthouses == 1:
                return Alone(owner)
            return Shared(process, register, owner, self.process, self.parts.candidate)

        self.lighthouses[name] = Lighthouse(
            process, self.network, self.settings, self.invariants, self.parts.lighthouse, seat
        )

    def group(self, name: str) -> Group:
        """The group of this name, which need not have been started yet."""
        if name not in self.groups:
            names = [name, *(f"{name}/{rank}" for rank in range(1, self.settings.ranks))]
            self.groups[name] = Group(name, [self._process(n) for n in names])
        return self.groups[name]

    def process(self, name: str) -> Process:
        """The process of a lighthouse or of a group's rank."""
        if name in self.lighthouses:
            return self.lighthouses[name].process
        group, _, rank = name.partition("/")
        return self.group(group).processes[int(rank or 0)]

    def start(self) -> None:
        """Starts the lighthouses, and the groups one after the other."""
        for lighthouse in self.lighthouses.values():
            lighthouse.start()
        for i, group in enumerate(list(self.groups.values())):
            self.world.at(0.05 * i * self.world.rng.random(), self.start_group, group)
        self.world.at(0.5, self._watch_waits)

    # ---------------------------------------------------------------- groups

    def start_group(self, group: Group) -> None:
        """Its processes are started, with the state of step 0. Nothing happens if it runs."""
        if group.alive:
            return
        group.lives += 1
        group.wanted = True
        number = next(self._numbers)
        for process in group.processes:
            process.begin_life()
        self.network.back(group.processes[0])
        replica_id = f"{group.name}:{group.lives}"
        self.world.tell(group.name, "starts as %s", replica_id)
        server = GroupServer(
            group.processes[0],
            replica_id,
            self.network,
            list(self.lighthouses.values()),
            self.settings,
            self.invariants,
            self.parts.assign,
            self.parts.member(),
        )
        group.server = server
        group.trainers = [
            self.parts.trainer(self, process, server, rank, number) for rank, process in enumerate(group.processes)
        ]
        server.trainers = group.trainers
        for trainer in group.trainers:
            self._trainers[replica_id, trainer.rank] = trainer
            trainer.begin()

    def trainer(self, replica_id: str, rank: int) -> Trainer | None:
        """A rank of a life of a group, dead or alive."""
        return self._trainers.get((replica_id, rank))

    def kill(self, group: Group, host: bool = False) -> None:
        """SIGKILL of all its processes; with ``host`` their machine is gone."""
        if not group.alive:
            return
        self.world.tell(group.name, "its machine is gone" if host else "is killed")
        self._end(group, host)

    def _end(self, group: Group, host: bool = False) -> None:
        for process in group.processes:
            process.end_life(host)
        for trainer in group.trainers:
            trainer.ended()
        self.network.died(group.processes[0])

    def kill_rank(self, group: Group, rank: int) -> None:
        """One of a group's other processes dies; the supervisor starts the whole group again."""
        process = group.processes[rank]
        if not group.alive or not process.alive:
            return
        self.world.tell(process.name, "is killed")
        process.end_life()
        group.trainers[rank].ended()
        assert group.server is not None
        self.world.to(group.processes[0], 0.001, group.server.rank_died, rank, "its process has ended")
        self.world.at(self.world.now + _RESTART, self._restart, group, group.lives)

    def exited(self, server: GroupServer) -> None:
        """A group has left in good order: its processes end."""
        group = self._group_of(server)
        if group.alive and group.server is server:
            self.world.tell(group.name, "has left, and ends")
            self.world.seen["left"] += 1
            group.wanted = False
            self._end(group)

    def state_lost(self, server: GroupServer) -> None:
        """Nobody holds the state of the job any more: the training loop ends with an error, and begins anew."""
        group = self._group_of(server)
        if group.alive and group.server is server:
            self.world.tell(group.name, "gives up: the state of the job is lost")
            self.world.seen["state lost"] += 1
            self._end(group)
            self.world.at(self.world.now + _RESTART, self._restart, group, group.lives)

    def _restart(self, group: Group, life: int) -> None:
        if group.lives == life and group.wanted:
            if group.alive:
                self._end(group)
            self.start_group(group)

    def _group_of(self, server: GroupServer) -> Group:
        return self.groups[server.replica_id.partition(":")[0]]

    # ---------------------------------------------------------- what is checked

    def _watch_waits(self) -> None:
        """Invariant 7, as time passes."""
        self.world.at(self.world.now + 0.5, self._watch_waits)
        for group in self.groups.values():
            for trainer in group.trainers:
                waits, process = trainer.waits, trainer.process
                if waits is None or not process.alive or process.paused or process.resumed_at == self.world.now:
                    continue
                over = process.time - waits[1]
                if over > 0.05:
                    self.invariants.waited(trainer.replica_id, waits[0], over)

    def make_whole(self) -> None:
        """What faults left dead is started: lighthouses and groups; of those that had left as many as it takes."""
        for lighthouse in self.lighthouses.values():
            if not lighthouse.process.alive:
                lighthouse.start()
        needed = max(self.settings.min_replicas, self.settings.min_replica_size)
        for group in sorted(self.groups.values(), key=lambda group: not group.wanted):
            if not group.alive and (group.wanted or sum(g.alive for g in self.groups.values()) < needed):
                self.start_group(group)

    def trainers(self) -> list[Trainer]:
        """All lives of all ranks."""
        return list(self._trainers.values())

    def behind(self, since: float) -> list[str]:
        """Live groups that have not committed since a true time (invariant 6)."""
        return [
            group.name
            for group in self.groups.values()
            if group.alive and any(trainer.last_commit <= since for trainer in group.trainers)
        ]
