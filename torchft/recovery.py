"""Giving this replica's state to those that heal, and taking it from a healthy one.

Both run on the manager's background thread, with the process group of the new quorum in place, and log the story
of a heal line by line (README, *what the log says*).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torchft.checkpointing import CheckpointTransport
from torchft.coordination import ManagerClient, QuorumResult
from torchft.runtime.logs import RankLogger, speaking
from torchft.runtime.loop import call_later
from torchft.state import ReplicaState
from torchft.step_error import StepError
from torchft.together import Together

__all__ = ["Recovery"]


@dataclass(frozen=True, eq=False)
class _Source:
    """Whom the heal under way takes the state from."""

    replica_id: str
    client: ManagerClient


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
        self._connect_timeout = connect_timeout
        self._log = log
        self._receivers: tuple[str, ...] = ()
        self._source: _Source | None = None

    def drop(self, replica_id: str, cause: str) -> None:
        """A replica is no longer there: a transfer to or from it ends now. From any thread."""
        source = self._source
        if source is not None and replica_id == source.replica_id:
            self._abandon(source, cause)
        elif replica_id in self._receivers:
            self.transport.abort(f"the receiver {replica_id} is no longer there: {cause}")

    def _abandon(self, source: _Source, cause: str) -> None:
        """Again and again until the heal has ended: it may be between two waits right now."""
        if self._source is source:
            source.client.close()
            self.transport.abort(f"the source {source.replica_id} is no longer there: {cause}")
            call_later(0.05, lambda: self._abandon(source, cause))

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
        self._receivers = tuple(quorum.replica_ids[r] for r in quorum.recover_dst_replica_ranks)
        if not self._receivers and not self._together.all_save(quorum):
            return None
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
        return state

    def heal(self, quorum: QuorumResult, step: int, error: StepError) -> dict[str, int]:
        """Takes the state from the member that the quorum names. It waits in ``state`` to be applied.

        Args:
            quorum: this rank's view, with a source.
            step: where this replica is, for the log.
            error: of the step under way: with one, nothing is begun.

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
        client = ManagerClient(address, self._connect_timeout, wait=False)
        self._source = _Source(quorum.replica_ids[source], client)
        try:
            return self._receive(client, source, quorum.max_step, error)
        finally:
            self._source = None
            client.close()

    def _receive(self, client: ManagerClient, source: int, step: int, error: StepError) -> dict[str, int]:
        # Who learns of the source's death sets the error first and then looks for a source: one of us sees it.
        if error.current is not None:
            raise error.current
        # A source that died since the quorum must not cost the whole timeout: the others wait for this replica.
        metadata = client._checkpoint_metadata(self._group_rank, min(self._connect_timeout, self._timeout))
        self._log.info(
            "fetching checkpoint from recover_src_replica_rank=%d with checkpoint_metadata=%r", source, metadata
        )
        self._state.begin_receiving(in_place=getattr(self.transport, "receives_in_place", False))
        with speaking(self._log):
            received = self.transport.recv_checkpoint(
                src_rank=source, metadata=metadata, step=step, timeout=self._timeout
            )
        torchft = self._state.received(received)
        if torchft.get("step") != step:
            raise RuntimeError(f"the source sent its state of step {torchft.get('step')}, the quorum is at {step}")
        return torchft
