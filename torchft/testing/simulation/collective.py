"""The collectives between groups: who meets, whose contribution reaches whom, and who sees one fail.

The idea
    A process group is a *mesh* of connections that its members build for one quorum id. A collective is complete
    for a member when the contributions of all members have reached it, which is not the same moment for all, so a
    death in between leaves some with a result and others with an error: exactly as a real allreduce can end
    (mirrors ``process_group/gloo.py`` and ``process_group/session.py``).

Rules
    - Collectives are matched by their order in the mesh, not by the step that a member believes to be in.
    - Who aborts or dies closes its connections: the others' unfinished collectives fail as soon as they see that;
      one whose data is all under way already may still end well, by chance.
    - Through a cut, and from a stopped process, nothing comes: the others wait until their timeout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torchft.testing.simulation.network import Network
from torchft.testing.simulation.world import Process

__all__ = ["Contribution", "Fabric", "Mesh", "Peer"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a member brings to a collective."""

    replica: int
    """The number of this life of the replica."""
    step: int
    state: int
    """The state that its gradients were computed from."""
    counts: bool
    """False: zeros."""


class Peer(Protocol):
    """A member of a mesh: one rank of one group."""

    process: Process

    def mesh_built(self, mesh: Mesh) -> None:
        """All members have met."""

    def reduced(self, mesh: Mesh, contributions: dict[str, Contribution]) -> None:
        """A collective is complete here."""

    def mesh_failed(self, mesh: Mesh, cause: str) -> None:
        """Another member closed its connections."""


@dataclass(slots=True, eq=False)
class _Op:
    contributions: dict[str, Contribution] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)


class Fabric:
    """All meshes, by quorum id and group rank."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._meshes: dict[tuple[int, int], Mesh] = {}

    def mesh(self, quorum_id: int, group_rank: int, members: tuple[str, ...]) -> Mesh:
        """Where the members of a quorum meet."""
        key = quorum_id, group_rank
        mesh = self._meshes.get(key)
        if mesh is None:
            mesh = self._meshes[key] = Mesh(self.network, key, members)
        return mesh


class Mesh:
    """The process group of one quorum and one group rank."""

    def __init__(self, network: Network, key: tuple[int, int], members: tuple[str, ...]) -> None:
        self.network = network
        self.key = key
        self.members = members
        self.built = False
        self.broken = False
        self._peers: dict[str, Peer] = {}
        self._done: dict[str, int] = {}
        self._told: set[str] = set()
        self._ops: list[_Op] = []

    # ------------------------------------------------------------- building

    def join(self, replica_id: str, peer: Peer) -> None:
        """A member configures its process group for this quorum, and waits until it is built."""
        if replica_id in self._peers or self.broken:  # what an earlier attempt left in the store leads nowhere
            self.broken = True
            return
        self._peers[replica_id] = peer
        self._done[replica_id] = 0
        if len(self._peers) == len(self.members):
            self.built = True
            for rid, other in self._peers.items():
                self._later(other, self._met, rid)

    def _met(self, replica_id: str) -> None:
        peer = self._peers[replica_id]
        if self._apart(peer):
            self.network.world.to(peer.process, 0.05, self._met, replica_id)
        elif not self.broken:
            peer.mesh_built(self)

    def _apart(self, peer: Peer) -> bool:
        """Whether something on its way to or from this member is cut."""
        name, apart = peer.process.name, self.network.apart
        return any(apart(name, other.process.name) for other in self._peers.values())

    def _later(self, peer: Peer, function: object, *args: object) -> None:
        net = self.network
        net.world.to(peer.process, net.latency(peer.process.name, peer.process.name), function, *args)  # type: ignore[arg-type]

    # ----------------------------------------------------------- collectives

    def contribute(self, replica_id: str, contribution: Contribution) -> None:
        """A member begins its next collective."""
        peer = self._peers[replica_id]
        if self.broken:
            if replica_id in self._told:  # otherwise it waits for its timeout
                self._later(peer, self._fail, replica_id, "a connection was closed")
            return
        index = self._done[replica_id]
        self._done[replica_id] = index + 1
        if index == len(self._ops):
            self._ops.append(_Op())
        op = self._ops[index]
        op.contributions[replica_id] = contribution
        if len(op.contributions) == len(self.members):
            for rid, other in self._peers.items():
                self._later(other, self._complete, op, rid)

    def _complete(self, op: _Op, replica_id: str) -> None:
        if replica_id in op.over:
            return
        peer = self._peers[replica_id]
        if self._apart(peer):
            self.network.world.to(peer.process, 0.05, self._complete, op, replica_id)
            return
        op.over.add(replica_id)
        peer.reduced(self, op.contributions)

    def leave(self, replica_id: str, cause: str) -> None:
        """A member aborts, or its process is gone: its connections are closed."""
        if replica_id not in self._peers:
            self.broken = True
            return
        self.broken = True
        op = self._ops[-1] if self._ops else None
        if op is not None:
            op.over.add(replica_id)
        net = self.network
        leaver = self._peers[replica_id].process
        full = op is not None and len(op.contributions) == len(self.members)
        for rid, other in self._peers.items():
            if rid == replica_id or net.is_cut(leaver.name, other.process.name) or not leaver.host_up:
                continue
            self._told.add(rid)
            if not self.built:
                self._later(other, self._fail, rid, cause)
            elif op is not None and rid not in op.over and rid in op.contributions:
                if full and net.world.rng.random() < 0.5:
                    continue  # all it needs is under way already
                op.over.add(rid)
                self._later(other, self._fail, rid, cause)

    def _fail(self, replica_id: str, cause: str) -> None:
        self._peers[replica_id].mesh_failed(self, cause)
