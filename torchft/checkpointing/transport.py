"""What every way of moving a live state from one replica group to another promises.

The idea
    A source *offers* the state of one step; a receiver of the same group rank asks for exactly that step and gets a
    tree equal to what was offered, verified, or an error. Nothing in between: a half-received state is never
    returned.

Rules
    - ``send_checkpoint`` takes the state as it is at the call. When it returns, the caller may go on computing; it may
      write the parameters only after ``disallow_checkpoint`` has returned.
    - ``metadata`` is what the receiver is told about the source; a transport refuses metadata it does not understand.
    - Every wait ends: with what was asked for, with :class:`CheckpointError`, or with a ``TimeoutError``.
    - ``abort`` ends what runs at that moment, and nothing that begins after it.
    - No pickle. ``allow_pickle=True`` on both sides is the explicit way out for objects that the format refuses.
    - A transport that was given ``state_dict`` writes into those tensors as bytes arrive, before all of them are
      verified. If such a receive fails the tensors hold neither the old nor the new state, and the replica must
      not use them: ``receives_in_place`` says so to the Manager.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Generic, TypeVar

__all__ = [
    "COPY_BELOW",
    "CheckpointError",
    "CheckpointTimeout",
    "CheckpointTransport",
    "IntegrityError",
    "ManifestError",
    "SourceLost",
    "StepNotServed",
    "TooSlow",
    "TransferAborted",
    "Unauthorized",
    "UnsafeStateError",
]

COPY_BELOW = 64 << 10
"""Storages of fewer bytes are copied at the source, and never received in place, whatever else is. The forward pass
runs beside a transfer and may write buffers (BatchNorm's statistics), which are that small: bytes that change between
being sent and being hashed would count as corrupted. Parameters are written only after ``disallow_checkpoint``."""

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A state could not be moved. The message says what happened, with whom, and what to do."""


class UnsafeStateError(CheckpointError):
    """The state holds something that cannot be sent without pickle. The message names its path."""


class ManifestError(CheckpointError):
    """What the other side describes is not a checkpoint of a format this side can read safely."""


class IntegrityError(CheckpointError):
    """Bytes arrived that are not the bytes that were announced."""


class SourceLost(CheckpointError):
    """The source went away, or cannot be reached."""


class StepNotServed(CheckpointError):
    """The source lives, but offers another step than the one that was asked for."""


class Unauthorized(CheckpointError):
    """The source gives its state to nobody who presents what this receiver does: it asks for another token."""


class TransferAborted(CheckpointError):
    """``abort`` was called while it ran. The message gives the reason."""


class CheckpointTimeout(CheckpointError, TimeoutError):
    """The time allowed was over first."""


class TooSlow(CheckpointTimeout):
    """It comes, but so slowly that it cannot be there in the time allowed. Nothing is wrong with the source's state.

    Args:
        nbytes: of the state; 0: not known.
    """

    def __init__(self, message: str, nbytes: int = 0) -> None:
        super().__init__(message)
        self.nbytes = nbytes


class CheckpointTransport(ABC, Generic[T]):
    """Moves a state of type ``T`` between replica groups. See the rules at the top of this module."""

    receives_in_place: bool = False
    """Whether ``recv_checkpoint`` writes into live tensors before everything is verified."""

    @property
    def has_written(self) -> bool:
        """Whether the newest receive may have written live tensors. If it failed and has not, they are as they were."""
        return self.receives_in_place

    takes_many_sources: bool = False
    """Whether ``recv_from_many`` makes use of more than the first source. Then all groups at the newest step offer
    their state where one heals, else only the one that the quorum assigns."""
    receives_beside_collectives: bool = False
    """Whether a receive leaves the process group alone, so that collectives may run meanwhile."""
    needs_metadata: bool = True
    """Whether a receiver must be told what the source's ``metadata`` returns. If not, it gets its own's, and the source
    is not asked: a connection less before the first byte."""

    measures: bool = False
    """Whether ``measure`` says how fast sources are, and ``recv_from_many`` takes two more keywords, with which it
    gives up with :class:`TooSlow` what would hold others up for too long. Only transports with this attribute get them.

    - ``allowance: timedelta``: how long the transfer may take, at most ``timeout``. It is given up where it would take
      more than twice as long, unless the larger part has come (:func:`torchft.core.heal_allowance.hopeless`).
    - ``unmeasured: bool``: nothing is known about the way to the sources, so a transfer that would take longer than the
      allowance is given up within a fraction of a second."""

    compares: bool = False
    """Whether ``recv_from_many`` holds that all sources have the same, and takes ``alike=False`` where they have not:
    then all is to come from one of them, the first that can give it."""

    @abstractmethod
    def metadata(self) -> str:
        """What a receiver needs to know to reach this source; handed to its ``recv_checkpoint``."""

    @abstractmethod
    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta) -> None:
        """Offers or sends the state of ``step``.

        Args:
            dst_ranks: replica ranks, in the current quorum, of those who will receive from here. Empty where
                ``takes_many_sources`` and others may come, if their own source is not enough.
            step: the step the state belongs to.
            state_dict: the state, as it is now.
            timeout: longest that this call may take.

        Raises:
            UnsafeStateError: the state holds something that the format refuses.
            TimeoutError: ``timeout`` passed.
            CheckpointError: it could not be sent.
        """

    def disallow_checkpoint(self) -> None:
        """Returns when nobody reads the caller's tensors any more: they may be written again."""

    @abstractmethod
    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        """Receives the state of ``step``, verified.

        Args:
            src_rank: replica rank of the source in the current quorum.
            metadata: what the source's ``metadata()`` returned.
            step: the step that must be received; another one is refused.
            timeout: longest that this call may take.

        Raises:
            StepNotServed: the source offers another step.
            Unauthorized: it asks for another token.
            SourceLost: the source died or cannot be reached.
            IntegrityError, ManifestError: what arrived is not what was announced, or not safe.
            TransferAborted: ``abort`` was called meanwhile.
            TimeoutError: ``timeout`` passed.
        """

    def recv_from_many(self, sources: Sequence[tuple[int, str]], step: int, timeout: timedelta) -> T:
        """Receives the state of ``step``, verified, from one or more of several sources that have it.

        By default from the first one, with ``recv_checkpoint``.

        Args:
            sources: replica rank and ``metadata()`` of each, the assigned one first. It may grow while this runs:
                further sources are appended as they answer.
            step, timeout: as of ``recv_checkpoint``, whose errors this raises.
        """
        rank, metadata = sources[0]
        return self.recv_checkpoint(rank, metadata, step, timeout)

    def measure(self, sources: Sequence[tuple[int, str]], timeout: timedelta) -> float:
        """How fast a state would come from these sources: bytes a second, without a state's being offered.

        From any thread, beside everything else; where ``measures`` says so.

        Args:
            sources: as of ``recv_from_many``.
            timeout: longest that this call may take; it takes a second or two.

        Raises:
            CheckpointError: none of them can be measured.
        """
        raise CheckpointError(f"{type(self).__name__} does not measure")

    def abort(self, reason: str = "the caller gave it up") -> None:
        """Ends what this transport is doing at this moment, so that nobody waits for a member that died or hangs.

        From any thread; idempotent; returns at once. A ``recv_checkpoint`` that runs raises :class:`TransferAborted`
        soon; readers of what is offered are dropped, so that ``disallow_checkpoint`` does not wait for them. What
        begins afterwards is not affected. A transport that does not define it waits for its timeouts instead.

        Args:
            reason: for the message of what is ended.
        """

    def expect_no_offer(self, reason: str) -> None:
        """The step has failed: sources that have not offered it by now will not, and a ``recv_checkpoint`` that waits
        for them raises soon. A transfer that has begun goes on as long as something comes: that is as good as before.

        From any thread; idempotent; returns at once. Without it, such a wait lasts until its timeout.

        Args:
            reason: for the message, as what follows "when".
        """

    def decline(self, step: int, reason: str, dst_ranks: Sequence[int] = ()) -> None:
        """The state of ``step`` could not be given: whoever asks this source for it is told why, and does not wait.

        Until the next ``send_checkpoint``. From any thread; returns soon and does not raise. Without it, they wait for
        their timeout.

        Args:
            step: whose state.
            reason: for their message.
            dst_ranks: the replica ranks that wait for it, as ``send_checkpoint`` was given them, or would have been.
        """

    def shutdown(self, wait: bool = True) -> None:
        """Stops serving and receiving, and frees what is held. Idempotent.

        A ``recv_checkpoint`` that runs raises :class:`TransferAborted` soon, so that nothing is written into the
        caller's tensors any more. With ``wait``, threads have ended when this returns.
        """
