"""Giving this replica's state to those that heal, and taking it from a healthy one.

Both run on the manager's background thread, with the process group of the new quorum in place, and log the story
of a heal line by line (README, *what the log says*).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from torchft import config
from torchft.checkpointing import CheckpointError, CheckpointTransport, HTTPTransport
from torchft.coordination import ManagerClient, QuorumResult
from torchft.core.assignment import Source
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.logs import RankLogger, speaking
from torchft.runtime.loop import call_later
from torchft.state import ReplicaState
from torchft.step_error import StepError
from torchft.together import Together

__all__ = ["Recovery", "default_transport"]

_PATIENCE = 0.5
"""Seconds after which another source that has answered is as good as the assigned one."""
_MEASURING = timedelta(seconds=3)


def default_transport(
    live_state: Callable[[], Any], timeout: timedelta, hostname: str | None = None, toward: str | None = None
) -> CheckpointTransport[dict[str, Any]]:
    """HTTP from the live state of the source straight into the live state here.

    Nothing is copied for a snapshot, but for what a slow receiver has not read when the parameters are about to be
    written: the source's next commit waits for the receiver in any case, whose gradients (zeros) its allreduce needs.

    Args:
        live_state: the state as it is now.
        timeout: for one transfer.
        hostname, toward: as of :class:`HTTPTransport`.
    """
    return HTTPTransport(
        timeout,
        snapshot="lock",
        state_dict=live_state,
        token=config.TOKEN.read(),
        hostname=hostname,
        toward=toward,
    )


class _Heal:
    """The sources of the heal under way, and who of them is no longer there."""

    def __init__(self, quorum: QuorumResult, sources: Sequence[Source], connect_timeout: timedelta) -> None:
        self.ids = {s.replica_rank: quorum.name(s.replica_rank) for s in sources}
        self.clients = {s.replica_rank: ManagerClient(s.manager_address, connect_timeout, wait=False) for s in sources}
        self.changed = threading.Condition()
        self.known: list[tuple[int, str]] = []
        """Replica rank and metadata of those that have answered, the assigned one first if it was in time."""
        self.failures: dict[int, Exception] = {}
        self.lost: dict[str, str] = {}
        self.over = False

    def lose(self, replica_id: str, cause: str) -> bool:
        """A source is no longer there. Whether none is left."""
        with self.changed:
            self.lost[replica_id] = cause
            for rank, name in self.ids.items():
                if name == replica_id:
                    self.clients[rank].close()
            self.changed.notify_all()
            return set(self.ids.values()) <= self.lost.keys()

    def ask(self, rank: int, group_rank: int, timeout: timedelta) -> None:
        """Asks a source for its metadata. On a thread of its own."""
        try:
            metadata = self.clients[rank]._checkpoint_metadata(group_rank, timeout)
        except Exception as e:
            with self.changed:
                self.failures[rank] = e
                self.changed.notify_all()
            return
        with self.changed:
            if not self.over and self.ids[rank] not in self.lost:
                self.known.append((rank, metadata))
                self.changed.notify_all()

    def first(self, assigned: int, patience: float, limit: float) -> tuple[int, str]:
        """Waits for the assigned source's metadata, or after ``patience`` seconds for anybody's.

        Raises:
            Exception: why there is none.
        """
        deadline, patient = Deadline(limit), Deadline(patience)
        with self.changed:
            while True:
                for i, (rank, _) in enumerate(self.known):
                    if rank == assigned:
                        self.known.insert(0, self.known.pop(i))
                answered = bool(self.known) and self.known[0][0] == assigned
                gone = assigned in self.failures or self.ids[assigned] in self.lost
                if answered or (self.known and (gone or patient.expired)):
                    return self.known[0]
                if len(self.failures) == len(self.ids) or deadline.expired:
                    raise self.failures.get(assigned) or TimeoutError(
                        f"no source told within {limit:g}s how to get its state"
                    )
                self.changed.wait(0.02)

    def close(self) -> None:
        with self.changed:
            self.over = True
        for client in self.clients.values():
            client.close()


class Recovery:
    """One rank's side of live checkpoint recovery.

    Args:
        transport: moves the state.
        state: where what is taken goes.
        together: reads what is given.
        group_rank: of this process: it deals with the same rank of other groups.
        timeout: for one transfer.
        connect_timeout: to reach the source's manager.
        log: of the manager.
    """

    def __init__(
        self,
        transport: CheckpointTransport[dict[str, Any]],
        state: ReplicaState,
        together: Together,
        group_rank: int,
        timeout: timedelta,
        connect_timeout: timedelta,
        log: RankLogger,
    ) -> None:
        self.transport = transport
        self._state = state
        self._together = together
        self._group_rank = group_rank
        self._timeout = timeout
        self.timeout = seconds(timeout)
        """Seconds, for one transfer."""
        self._connect_timeout = connect_timeout
        self._log = log
        self._receivers: tuple[str, ...] = ()
        self._heal: _Heal | None = None
        self._sources: list[Source] = []

    def drop(self, replica_id: str, cause: str) -> None:
        """A replica is no longer there: a transfer to it, or from it alone, ends now. From any thread.

        Where there are other sources the transfer goes on with them.
        """
        heal = self._heal
        if heal is not None and replica_id in heal.ids.values():
            if heal.lose(replica_id, cause):
                self._abandon(heal, cause)
        elif replica_id in self._receivers:
            self._receivers = tuple(r for r in self._receivers if r != replica_id)
            if not self._receivers:
                self.transport.abort(f"the receiver {replica_id} is no longer there: {cause}")

    def step_failed(self, error: Exception) -> None:
        """The step under way has an error. The other members leave it as well, and who has not offered its state by
        now does so in the next one at the earliest, for which they wait for this replica. From any thread.
        """
        heal = self._heal
        if heal is not None:
            self._until_over(heal, lambda: self.transport.expect_no_offer(f"the step failed: {error}"))

    def _abandon(self, heal: _Heal, cause: str) -> None:
        self._until_over(
            heal, lambda: self.transport.abort(f"the sources {sorted(heal.lost)} are no longer there: {cause}")
        )

    def _until_over(self, heal: _Heal, act: Callable[[], None]) -> None:
        """Again and again until the heal has ended: it may be between two waits right now."""
        if self._heal is heal:
            act()
            call_later(0.05, lambda: self._until_over(heal, act))

    def _receivers_of(self, quorum: QuorumResult) -> list[int]:
        """The replica ranks that this one offers its state to."""
        source = quorum.max_replica_rank is not None and not quorum.heal
        many = getattr(self.transport, "takes_many_sources", False)
        return quorum.recovering_replica_ranks if many and source else quorum.recover_dst_replica_ranks

    def serve(self, quorum: QuorumResult, torchft: dict[str, int]) -> dict[str, Any] | None:
        """Gives the state to the members that recover from this one, if there are any.

        Args:
            quorum: this rank's view.
            torchft: the manager's own part of the state.

        Returns:
            The state, if it was read: for others, or because all ranks of this group had to.

        Raises:
            Exception: the state could not be read or sent.
        """
        self._receivers = tuple(quorum.name(r) for r in self._receivers_of(quorum))
        if not self._receivers and not self._together.all_save(quorum):
            return None
        try:
            state = self._together.save(quorum, torchft)
            if not self._receivers:
                return state
            self._log.info("peers need recovery from us %s", quorum.recover_dst_replica_ranks)
            with speaking(self._log):
                self.transport.send_checkpoint(
                    dst_ranks=quorum.recover_dst_replica_ranks,
                    step=quorum.max_step,
                    state_dict=state,
                    timeout=self._timeout,
                )
        except Exception as e:
            self.transport.decline(
                quorum.max_step, str(e) or type(e).__name__, dst_ranks=quorum.recover_dst_replica_ranks
            )
            raise
        return state

    def know(self, quorum: QuorumResult) -> None:
        """Who has the state that this replica needs, as of this quorum."""
        source, address = quorum.recover_src_replica_rank, quorum.recover_src_manager_address
        many = getattr(self.transport, "takes_many_sources", False)
        sources = quorum.recover_sources if many else quorum.recover_sources[:1]
        self._sources = list(sources) or ([] if source is None else [Source(source, address)])

    def measure(self) -> float:
        """Bytes a second that would come from those who have the state, a second's measurement. From any thread.

        Raises:
            Exception: it cannot be said.
        """
        if not getattr(self.transport, "measures", False):
            raise CheckpointError("this transport does not measure")
        sources = self._sources
        if not sources:
            raise CheckpointError("nobody is known to have the state")
        with ThreadPoolExecutor(len(sources), thread_name_prefix="torchft-ask-source") as pool:
            known = list(pool.map(self._whereabouts, sources))
        return self.transport.measure(known, _MEASURING)

    def _whereabouts(self, source: Source) -> tuple[int, str]:
        client = ManagerClient(source.manager_address, self._connect_timeout, wait=False)
        try:
            return source.replica_rank, client._checkpoint_metadata(self._group_rank, _MEASURING)
        except Exception as e:
            self._log.debug("replica rank %d does not tell how to reach its state: %s", source.replica_rank, e)
            return source.replica_rank, ""
        finally:
            client.close()

    def heal(
        self,
        quorum: QuorumResult,
        step: int,
        error: StepError,
        *,
        allowance: float | None = None,
        unmeasured: bool = False,
    ) -> dict[str, int]:
        """Takes the state from the members that the quorum names. It waits in ``state`` to be applied.

        Args:
            quorum: this rank's view, with a source. A transport that takes many is told of all.
            step: where this replica is, for the log.
            error: of the step under way: with one, nothing is begun.
            allowance: seconds that it may hold the others up, where the transport measures; None: its timeout.
            unmeasured: nothing is known about the way to them: what would take longer is given up at once.

        Returns:
            The manager's own part of the state.

        Raises:
            Exception: the state could not be had, or is not one that fits.
        """
        source, address = quorum.recover_src_replica_rank, quorum.recover_src_manager_address
        assert source is not None
        self._log.info(
            "healing is required step=%d, max_step=%d, recover_src_replica_rank=%d", step, quorum.max_step, source
        )
        self._log.info(
            "healing required, fetching checkpoint metadata from recover_src_manager_address=%r max_step=%d",
            address,
            quorum.max_step,
        )
        self.know(quorum)
        heal = _Heal(quorum, self._sources, self._connect_timeout)
        self._heal = heal
        try:
            options: dict[str, Any] = {}
            if allowance is not None and getattr(self.transport, "measures", False):
                options = {"allowance": timedelta(seconds=allowance), "unmeasured": unmeasured}
            if not self._state.alike and getattr(self.transport, "compares", False):
                options["alike"] = False
            return self._receive(heal, source, quorum.max_step, error, options)
        finally:
            self._heal = None
            heal.close()

    def _receive(
        self, heal: _Heal, assigned: int, step: int, error: StepError, options: dict[str, Any]
    ) -> dict[str, int]:
        # Who learns of the source's death sets the error first and then looks for a source: one of us sees it.
        if error.current is not None:
            raise error.current
        if getattr(self.transport, "needs_metadata", True):
            source, metadata = self._ask(heal, assigned)
        else:
            source, metadata = assigned, self.transport.metadata()
        self._log.info(
            "fetching checkpoint from recover_src_replica_rank=%d with checkpoint_metadata=%r", source, metadata
        )
        before = self._state.usable
        self._state.begin_receiving(in_place=getattr(self.transport, "receives_in_place", False))
        try:
            with speaking(self._log):
                if getattr(self.transport, "takes_many_sources", False):
                    received = self.transport.recv_from_many(heal.known, step=step, timeout=self._timeout, **options)
                else:
                    received = self.transport.recv_checkpoint(
                        src_rank=source, metadata=metadata, step=step, timeout=self._timeout
                    )
        except BaseException:
            if before and not getattr(self.transport, "has_written", True):
                self._state.untouched()
            raise
        return self._state.received(received, step)

    def _ask(self, heal: _Heal, assigned: int) -> tuple[int, str]:
        """A source that tells how to reach its state, if possible the assigned one, and what it tells."""
        # A source that died since the quorum must not cost the whole timeout: the others wait for this replica.
        limit = min(self._connect_timeout, self._timeout)
        for rank in heal.ids:
            threading.Thread(
                target=heal.ask, args=(rank, self._group_rank, limit), name="torchft-ask-source", daemon=True
            ).start()
        return heal.first(assigned, _PATIENCE, seconds(limit))
