"""How the ranks of one replica group find each other: the group's store, its ManagerServer, its name.

The idea
    Rank 0 starts the ManagerServer and publishes its address and the group's replica id in the group's TCPStore;
    the other ranks read them there. Rank 0 then talks to its server in process, the others by gRPC.

Rules
    - The keys carry torchrun's restart count: its agent's store outlives the workers, and a restarted rank must
      not find the address of a former life.
    - The other ranks hold a session to rank 0 (unless sessions are off), so that any rank's death is seen. It and
      the calls share a connection that is pinged from both ends: nobody waits for a rank 0 that is stopped or cut off.
    - A group of one rank that no launcher gave a store hosts its own, so that ``python train.py`` works.
    - torchrun names a store of this machine by a loopback address or by this machine's name. Other groups, which meet
      in it, are told the address under which they are told everything else of this machine.
"""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchft import config
from torchft.coordination import ManagerClient, ManagerServer, QuorumResult
from torchft.coordination.channel import ping_times
from torchft.coordination.group_vote import Voted
from torchft.coordination.proto import session_pb2 as pb
from torchft.coordination.rank_sessions import RANK_HEARTBEAT_TIMEOUT
from torchft.coordination.session_client import OneServer, SessionClient, SessionEvents
from torchft.coordination.types import ANY_QUORUM, Notice
from torchft.runtime.deadline import seconds
from torchft.runtime.fork import Registration, close_in_children
from torchft.runtime.life import life_address
from torchft.runtime.logs import RankLogger
from torchft.runtime.net import advertised_host, format_address, host_as_told, parse_address, parse_addresses

__all__ = ["Group", "GroupClient", "join_group"]

logger = logging.getLogger(__name__)

_LONGEST_ID = 1000


class GroupClient(Protocol):
    """What a rank asks of its group's server, whether it sits in this process or not."""

    def _quorum(
        self,
        group_rank: int,
        step: int,
        checkpoint_metadata: str,
        shrink_only: bool,
        timeout: timedelta,
        commit_failures: int,
        init_sync: bool = True,
        timed_out: bool = False,
        lineage: int = 0,
        waits: bool = False,
    ) -> QuorumResult: ...

    def vote(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> Voted: ...


@dataclass
class Group:
    """A rank's membership in its replica group."""

    replica_id: str
    rank: int
    world_size: int
    client: GroupClient
    server: ManagerServer | None
    """In rank 0's process."""
    store: TCPStore
    session: SessionClient | None = None
    """To rank 0, in the other ranks' processes."""
    hostname: str = ""
    """What others are told of this machine; empty: the address that routes to ``toward``."""
    toward: str | None = None
    """The lighthouse's ``host:port``."""
    hosted: Registration | None = None
    """What keeps the store out of forked children, where this process hosts it."""
    _listener: Callable[[Notice], None] = field(default=lambda _: None)
    _on_back: Callable[[Notice], None] = field(default=lambda _: None)
    _silence: Notice | None = None
    _next_stands: int = -1

    def stands(self, step: int) -> bool:
        """Whether ``step`` begins now with the quorum there is, without asking: see :mod:`torchft.core.standing`.

        In a group of several ranks the vote on the step before it has decided that, for all of them.
        """
        if self.world_size == 1 and self.server is not None:
            return self.server.stands(step)
        stands, self._next_stands = self._next_stands == step, -1
        return stands

    def vote(self, step: int, commit: bool, timeout: timedelta) -> bool:
        """Votes on ``step``. Returns the group's decision.

        Raises:
            TimeoutError: not all ranks voted in time.
            RuntimeError: any other failure.
        """
        voted = self.client.vote(self.rank, step, commit, timeout)
        self._next_stands = step + 1 if voted.next_stands else -1
        return voted.commit

    def listen(
        self,
        on_notice: Callable[[Notice], None],
        on_back: Callable[[Notice], None],
        on_welcome: Callable[[timedelta, timedelta], None],
    ) -> None:
        """From now on tells what comes on this rank's session, on a thread of its own.

        Args:
            on_notice: a replica is no longer there.
            on_back: what this notice said does not hold any more: rank 0 was silent, and is there again.
            on_welcome: in rank 0: the lighthouse's heartbeat and join timeouts.
        """
        self._listener, self._on_back = on_notice, on_back
        if self.server is not None:
            self.server.listen(on_notice, on_welcome)

    def drain(self) -> bool:
        """Asks for a change of the members, at which this group can go. Returns whether that was possible."""
        return self.world_size == 1 and self.server is not None and self.server.drain()

    def hear(self, notice: Notice) -> None:
        """A notice came on this rank's session."""
        self._listener(notice)

    def rank0_is_silent(self, cause: str) -> None:
        """Rank 0 is stopped or cut off, as this rank's session shows."""
        self._silence = Notice(self.replica_id, f"rank 0 of this group is no longer there: {cause}", ANY_QUORUM)
        self._listener(self._silence)

    def rank0_is_back(self) -> None:
        """It is not silent any more."""
        notice, self._silence = self._silence, None
        if notice is not None:
            self._on_back(notice)

    def leave(self, reason: str, step: int, timeout: timedelta) -> bool:
        """Tells everybody that this group goes. Returns whether they were told."""
        if self.server is not None:
            return self.server.leave(reason, step, timeout)
        return self.session is not None and self.session.leave(reason, step, seconds(timeout))

    def close(self) -> None:
        """Ends the server, or the connection to it."""
        if self.server is not None:
            self.server.shutdown()
            if self.hosted is not None:
                self.hosted.forget()
            return
        if self.session is not None:
            self.session.close()
        if isinstance(self.client, ManagerClient):
            self.client.close()


def join_group(
    *,
    rank: int | None,
    world_size: int | None,
    store_addr: str | None,
    store_port: int | None,
    lighthouse_addr: str | None,
    replica_id: str | None,
    port: int | None,
    hostname: str,
    heartbeat_interval: timedelta,
    connect_timeout: timedelta,
    quorum_retries: int,
    sessions: bool,
) -> Group:
    """Makes this process a rank of its group. Arguments as of :class:`torchft.manager.Manager`.

    Raises:
        ValueError: something that is needed is neither an argument nor in the environment.
        TimeoutError: the lighthouse, the store or rank 0 did not answer within ``connect_timeout``.
    """
    rank = config.RANK.read() if rank is None else rank
    world_size = config.WORLD_SIZE.read() if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a group of {world_size} ranks (RANK, WORLD_SIZE)")
    lighthouse_addr = lighthouse_addr or config.LIGHTHOUSE.read()
    if rank == 0 and not lighthouse_addr:
        raise ValueError(
            "no lighthouse: set TORCHFT_LIGHTHOUSE=http://host:29510 or pass lighthouse_addr. One is started by "
            "`torchft_lighthouse --min_replicas 1`."
        )
    try:
        toward = parse_address(parse_addresses(lighthouse_addr)[0]) if lighthouse_addr else None
    except ValueError as e:
        raise ValueError(f"the lighthouse's address (TORCHFT_LIGHTHOUSE, lighthouse_addr): {e}") from None
    # The default is only this machine's name, which others need not resolve: the route decides then.
    hostname = "" if hostname == socket.gethostname() else hostname
    store, address, hosted = _open_store(store_addr, store_port, rank, world_size, toward, hostname, connect_timeout)
    prefix = f"torchft/group/{config.RESTART_COUNT.read()}"

    with ExitStack() as undo:
        if hosted is not None:
            undo.callback(hosted.forget)
        if rank == 0:
            assert lighthouse_addr
            unique = f"{_checked(replica_id)}:{uuid.uuid4()}" if replica_id else str(uuid.uuid4())
            server = ManagerServer(
                replica_id=unique,
                lighthouse_addr=lighthouse_addr,
                hostname=hostname,
                bind=f"[::]:{port if port is not None else config.MANAGER_PORT.read() or 0}",
                store_addr=address,
                world_size=world_size,
                heartbeat_interval=heartbeat_interval,
                connect_timeout=connect_timeout,
                quorum_retries=quorum_retries,
                sessions=sessions,
            )
            undo.callback(server.shutdown)
            if world_size > 1:
                store.set(f"{prefix}/replica_id", unique)
                store.set(f"{prefix}/manager_address", server.address())
            undo.pop_all()
            return Group(
                unique, rank, world_size, server, server, store, hostname=hostname, toward=toward, hosted=hosted
            )

        try:
            store.wait([f"{prefix}/manager_address"], connect_timeout)
        except Exception as e:
            raise TimeoutError(
                f"rank 0 of this group did not publish its manager's address in the store at {address} within "
                f"{connect_timeout.total_seconds():g} s: did it start, and does it reach the lighthouse? ({e})"
            ) from e
        manager_address = store.get(f"{prefix}/manager_address").decode()
        unique = store.get(f"{prefix}/replica_id").decode()
        pings = ping_times(RANK_HEARTBEAT_TIMEOUT) if sessions else None
        client = ManagerClient(manager_address, connect_timeout, pings=pings)
        group = Group(unique, rank, world_size, client, None, store, hostname=hostname, toward=toward)
        undo.callback(group.close)
        if sessions:
            group.session = _session_to_rank0(group, client, manager_address)
        undo.pop_all()
        return group


def _checked(replica_id: str) -> str:
    """A name that travels, whatever is in it."""
    try:
        replica_id.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"replica_id is {replica_id!a}, which is no text: {e.reason}") from None
    if len(replica_id) > _LONGEST_ID:
        raise ValueError(f"replica_id has {len(replica_id)} characters, {_LONGEST_ID} at most are told to others")
    return replica_id


def _session_to_rank0(group: Group, client: ManagerClient, address: str) -> SessionClient:
    life = life_address(parse_address(address))

    def gone(cause: str) -> None:
        group.hear(Notice(group.replica_id, f"rank 0 of this group is no longer there: {cause}", ANY_QUORUM))

    return SessionClient(
        OneServer(client.channel),
        lambda: pb.Hello(replica_id=group.replica_id, group_rank=group.rank, life_address=life),
        SessionEvents(
            notice=group.hear,
            gone=gone,
            silent=group.rank0_is_silent,
            back=group.rank0_is_back,
            beat=lambda: 1,
        ),
        f"rank 0 of this group at {address}",
        RankLogger(logger, group.replica_id, group.rank, lambda: "-"),
    )


def _open_store(
    addr: str | None,
    port: int | None,
    rank: int,
    world_size: int,
    toward: str | None,
    hostname: str,
    timeout: timedelta,
) -> tuple[TCPStore, str, Registration | None]:
    """The group's store, its address as other groups are told it, and what keeps it out of children if it is ours."""
    addr = addr or config.MASTER_ADDR.read()
    port = config.MASTER_PORT.read() if port is None else port
    if addr is None or port is None:
        if world_size > 1:
            raise ValueError(
                "a group of several ranks needs its store: start it with torchrun, or pass store_addr and "
                "store_port (MASTER_ADDR, MASTER_PORT) of a TCPStore that you host"
            )
        host = advertised_host(toward, hostname)
        try:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        except Exception as e:
            raise TimeoutError(
                f"the group's own store was not reached at {host}, the address of this machine that others are told, "
                f"within {timeout.total_seconds():g} s. Is TORCHFT_HOST, or hostname=, an address that this machine "
                f"has? ({e})"
            ) from e
        return store, f"{host}:{store.port}", close_in_children(own=[store.port])
    try:
        store = TCPStore(addr, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except Exception as e:
        raise TimeoutError(
            f"the group's store at {addr}:{port} (rank {rank} of {world_size}) did not answer within "
            f"{timeout.total_seconds():g} s. torchrun hosts it; without torchrun host a TCPStore there, or leave "
            f"MASTER_ADDR and MASTER_PORT unset in a group of one rank. ({e})"
        ) from e
    host = host_as_told(addr, toward, hostname)
    return store, parse_address(format_address(host, port)), None
