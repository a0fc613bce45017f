"""The training loop's face: quorum, fault-tolerant allreduce, healing, commit.

The idea
    A step begins with a quorum, averages gradients over its participants, and ends with a vote: only when nothing
    failed does the optimizer step. Whatever fails in between is an error *of that step*: it is reported, the rest
    of the step's collectives become no-ops, the vote is no, and the next step starts afresh.

Rules
    - Quorum, reconfiguration and transfer run on one background thread, for which the training thread waits at the
      first collective (asynchronous quorum), or on the training thread (synchronous).
    - The first error of a step aborts the process group, so that groups which wait for this one learn it at once.
      The death of a member of the step's quorum is such an error, wherever this rank is in the step.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from enum import Enum
from typing import Any, NoReturn, TypeVar

import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft import config
from torchft.agreement import Agreement
from torchft.checkpointing import Checkpoints, CheckpointTransport
from torchft.collectives import check_quantizable
from torchft.commit_phase import CommitPhase
from torchft.coordination.types import Notice
from torchft.departure import Drained, forget, leave_at_the_end, listen_for_sigterm
from torchft.group import join_group
from torchft.group_loss import GroupLoss
from torchft.healing import Healing
from torchft.leaving import Leaving
from torchft.persistence import Persistence
from torchft.process_group import ProcessGroup, Reduction
from torchft.process_group.claim import Claim
from torchft.progress import Progress
from torchft.quorum_phase import NOBODY, QuorumPhase
from torchft.recovery import Recovery, default_transport
from torchft.reduction import StepFutures, contribute_nothing
from torchft.restoring import Restoring
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.logs import RankLogger
from torchft.state import ReplicaState
from torchft.step_error import StepError
from torchft.step_start import StepStart
from torchft.telemetry import telemetry_of
from torchft.timeouts import Timeouts, effective
from torchft.together import Together
from torchft.work import CompletedWork, FutureWork

__all__ = ["Manager", "WorldSizeMode"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorldSizeMode(Enum):
    """How many groups take part in a step."""

    DYNAMIC = 0
    """All there are."""
    FIXED_WITH_SPARES = 1
    """Exactly ``min_replica_size``; further groups follow as spares: they contribute zeros and stay up to date."""


class Manager:
    """Fault tolerance for one rank of one replica group.

    Args:
        pg: carries the collectives between groups; reconfigured by the manager, whose alone it is until its shutdown.
        load_state_dict, state_dict: write and read what a healing group needs: model, optimizer, and so on.
            Registered under the key ``"default"``; both may be None when others are registered.
        min_replica_size: a step with fewer participants is not committed.
        use_async_quorum: run quorum and healing beside the forward pass. A group that heals contributes zeros in
            that step; with False it heals before its forward pass and contributes. The same in all groups, as is
            ``world_size_mode``: else they divide by different numbers.
        timeout: longest wait for a collective, a vote or a transfer.
        quorum_timeout: longest wait for a quorum.
        connect_timeout: how long an address that does not answer yet is tried.
        rank, world_size: in the group; ``RANK`` and ``WORLD_SIZE`` by default.
        world_size_mode: see :class:`WorldSizeMode`.
        store_addr, store_port: of the group's TCPStore; ``MASTER_ADDR`` and ``MASTER_PORT`` by default. A group of
            one rank with neither hosts its own.
        lighthouse_addr: ``http://host:port``, or several with commas between; ``TORCHFT_LIGHTHOUSE`` by default.
        replica_id: the group's name in logs; a unique suffix is added for each life of it.
        port: of the ManagerServer; ``TORCHFT_MANAGER_PORT``, else any, by default.
        hostname: what other groups are told. The default, the machine's own name, and one that does not resolve stand
            for the address that routes to the lighthouse.
        heartbeat_interval: between signs of life.
        checkpoint_transport: moves the state; an :class:`HTTPTransport` by default, which receives into
            :meth:`live_state`, with the token ``TORCHFT_TOKEN`` if that is set.
        init_sync: at step 0 all groups take the primary's state. With False they must start from the same.
        max_retries: :meth:`should_commit` raises after more failed steps in a row; None: never.
        quorum_retries: how often a lighthouse call that broke is repeated within a quorum.
        proactive_recovery: learn of deaths at once, and abort the process group at the first error instead of
            leaving others to their timeout; ``TORCHFT_PROACTIVE_RECOVERY`` by default.
        drain: at SIGTERM finish the step under way, leave, and exit with code 0: the next :meth:`start_quorum`
            raises :class:`torchft.departure.Drained`. To be set on the main thread.
        checkpoints: where the state is saved every so many steps, by one of the groups, and restored from: before the
            first quorum, and when the last replica that held the state is gone (docs/checkpoints.md).
        allow_restart: whether the job may begin again at step 0 when the last replica that held its state is gone.
            None: only if all groups are new, with a warning; if a group that saw the job further is there,
            :meth:`should_commit` raises :class:`torchft.lost_state.StateLost`. ``TORCHFT_ALLOW_RESTART`` wins.
        timeouts: all of them at once, instead of ``timeout``, ``quorum_timeout``, ``connect_timeout`` and
            ``heartbeat_interval``; :func:`torchft.timeouts.suggest` makes them.
        heal_pause: longest that this group's heal may hold the others up, where they could go on without it. One that
            would take longer is not begun. None: 2 s, a step of theirs, or, over a way of 2 MB/s or more, a tenth of
            the time that this group has waited for it. As long as ``timeout``: whatever a transfer may
            take (docs/transfer.md).

    The environment wins over arguments for ``TORCHFT_TIMEOUT_SEC``, ``TORCHFT_QUORUM_TIMEOUT_SEC``,
    ``TORCHFT_CONNECT_TIMEOUT_SEC``, ``TORCHFT_HEAL_PAUSE_SEC``, ``TORCHFT_QUORUM_RETRIES`` and ``TORCHFT_DRAIN``.

    Raises:
        TimeoutError: lighthouse, store or rank 0 did not answer within ``connect_timeout``.
        TypeError: a timeout is no timedelta, or ``pg`` no process group of torchft that carries collectives.
        ValueError: an argument is missing or out of range, or ``pg`` belongs to another Manager.
    """

    def __init__(
        self,
        pg: ProcessGroup,
        load_state_dict: Callable[[Any], object] | None,
        state_dict: Callable[[], Any] | None,
        min_replica_size: int,
        use_async_quorum: bool = True,
        timeout: timedelta = timedelta(seconds=60),
        quorum_timeout: timedelta = timedelta(seconds=60),
        connect_timeout: timedelta = timedelta(seconds=60),
        rank: int | None = None,
        world_size: int | None = None,
        world_size_mode: WorldSizeMode = WorldSizeMode.DYNAMIC,
        store_addr: str | None = None,
        store_port: int | None = None,
        lighthouse_addr: str | None = None,
        replica_id: str | None = None,
        port: int | None = None,
        hostname: str = socket.gethostname(),
        heartbeat_interval: timedelta = timedelta(milliseconds=100),
        checkpoint_transport: CheckpointTransport[dict[str, Any]] | None = None,
        init_sync: bool = True,
        max_retries: int | None = None,
        quorum_retries: int = 0,
        *,
        proactive_recovery: bool | None = None,
        drain: bool = False,
        checkpoints: Checkpoints | None = None,
        allow_restart: bool | None = None,
        timeouts: Timeouts | None = None,
        heal_pause: timedelta | None = None,
    ) -> None:
        if min_replica_size < 1:
            raise ValueError(f"min_replica_size is {min_replica_size}: a step needs at least one participant")
        if isinstance(pg, type) or not hasattr(pg, "configure"):
            raise TypeError(f"pg is {pg!r}: it has to be a process group of torchft, for instance ProcessGroupGloo()")
        self._claim = Claim(pg)
        self._timeouts = effective(timeouts, timeout, quorum_timeout, connect_timeout, heartbeat_interval, heal_pause)
        self._timeout = self._timeouts.collective
        self._quorum_timeout = self._timeouts.quorum
        assert self._timeouts.commit is not None
        self._vote_timeout = self._timeouts.commit
        retries = config.QUORUM_RETRIES.read()
        self._proactive = config.PROACTIVE_RECOVERY.read() if proactive_recovery is None else proactive_recovery
        self._pg = pg
        self._use_async_quorum = use_async_quorum

        self._state = ReplicaState()
        if (load_state_dict is None) != (state_dict is None):
            raise ValueError("load_state_dict and state_dict belong together: pass both, or None for both")
        if load_state_dict is not None and state_dict is not None:
            self._state.register("default", load_state_dict, state_dict)

        self._progress = Progress()
        self._error = StepError(self._on_first_error)
        self._works = StepFutures(self._error)
        drain = config.DRAIN.read() if config.DRAIN.is_set() else drain

        with ExitStack() as undo:  # what has begun ends if something of the rest fails
            if drain:
                undo.callback(listen_for_sigterm())
            self._start = StepStart(beside=use_async_quorum)
            undo.callback(self._start.shutdown, timeout=5.0)
            self._group = join_group(
                rank=rank,
                world_size=world_size,
                store_addr=store_addr,
                store_port=store_port,
                lighthouse_addr=lighthouse_addr,
                replica_id=replica_id,
                port=port,
                hostname=hostname,
                heartbeat_interval=self._timeouts.heartbeat_interval,
                connect_timeout=self._timeouts.connect,
                quorum_retries=quorum_retries if retries is None else retries,
                sessions=self._proactive,
            )
            undo.callback(self._group.close)
            self._log = RankLogger(logger, self._group.replica_id, self._group.rank, lambda: self._progress.step)
            self._leaving = Leaving(self._group, self._progress, drain, self._log)
            undo.callback(self._leaving.leave, "its Manager could not be set up")
            self._telemetry = telemetry_of(self._group.replica_id, self._group.rank, lambda: self._progress.step)
            self._transport = checkpoint_transport or default_transport(
                self.live_state, self._timeout, self._group.hostname or None, self._group.toward
            )
            if checkpoint_transport is None:
                undo.callback(self._transport.shutdown)
            agreement = Agreement(
                self._group.store,
                f"torchft/group/{self._group.replica_id}/agreed",
                self._group.rank,
                self._group.world_size,
                seconds(self._timeout),
                lambda: self._error.current,
            )
            together = Together(agreement, self._state, self._start.caller, seconds(self._timeout))
            restoring: Restoring | None = None
            if checkpoints is not None:
                restoring = Restoring(
                    checkpoints,
                    agreement,
                    self._group.store,
                    self._group.replica_id,
                    self._group.rank,
                    self._group.world_size,
                    self._state,
                    max(seconds(self._timeout), seconds(self._timeouts.connect)),
                    self._log,
                )
            self._healing = Healing(
                recovery=Recovery(
                    self._transport,
                    self._state,
                    together,
                    self._group.rank,
                    self._timeout,
                    self._timeouts.connect,
                    self._log,
                ),
                together=together,
                state=self._state,
                progress=self._progress,
                error=self._error,
                log=self._log,
                telemetry=self._telemetry,
                alone=self._group.world_size == 1,
                use_async_quorum=use_async_quorum,
                min_replica_size=min_replica_size,
                heal_pause=self._timeouts.heal_pause,
            )
            self._begin = QuorumPhase(
                group=self._group,
                pg=pg,
                transport=self._transport,
                healing=self._healing,
                progress=self._progress,
                error=self._error,
                log=self._log,
                telemetry=self._telemetry,
                use_async_quorum=use_async_quorum,
                fixed_world_size=min_replica_size if world_size_mode is WorldSizeMode.FIXED_WITH_SPARES else None,
                init_sync=init_sync,
                allow_restart=allow_restart if config.ALLOW_RESTART.read() is None else config.ALLOW_RESTART.read(),
                saved=(lambda _: 0) if restoring is None else restoring.newest,
            )
            self._persistence = Persistence(restoring, self._progress, self._begin, self._healing, self._log)
            self._commit = CommitPhase(
                group=self._group,
                pg=pg,
                transport=self._transport,
                begin=self._begin,
                healing=self._healing,
                works=self._works,
                progress=self._progress,
                error=self._error,
                persistence=self._persistence,
                log=self._log,
                telemetry=self._telemetry,
                min_replica_size=min_replica_size,
                max_retries=max_retries,
                timeout=self._timeout,
                voted=self._all_voted,
            )
            self._loss: GroupLoss | None = None
            self._claim.take(self._group.replica_id)  # another thread may have been quicker
            undo.callback(self._claim.release)
            self._group.listen(self._hear, self._hear_back, self._check_timeouts)
            leave_at_the_end(self)
            undo.pop_all()

    def _hear(self, notice: Notice) -> None:
        """Somebody is no longer there. From any thread."""
        self._begin.hear(notice)
        if self._loss is not None:
            self._loss.hear(notice)

    def _hear_back(self, notice: Notice) -> None:
        """Who was no longer there is there again. From any thread."""
        self._begin.watch.back(notice)
        if self._loss is not None:
            self._loss.back(notice)

    def _all_voted(self, at: float) -> None:
        """All ranks of the group were there when this one voted, or came back since."""
        self._begin.watch.whole(at)
        if self._loss is not None:
            self._loss.whole(at)

    def _check_timeouts(self, heartbeat_timeout: timedelta, join_timeout: timedelta) -> None:
        """The lighthouse has told its own."""
        for contradiction in self._timeouts.contradictions(heartbeat_timeout, join_timeout):
            self._log.warning("timeouts that do not fit together (docs/timeouts.md): %s", contradiction)

    # ------------------------------------------------------------- the state

    def register_state_dict_fn(
        self,
        key: str,
        load: Callable[[Any], object],
        save: Callable[[], Any],
        *,
        on_training_thread: bool = False,
        alike: bool = True,
    ) -> None:
        """Registers a further piece of the state that healing groups receive.

        Args:
            key: the same on all groups, registered in the same order on all ranks.
            load: writes what ``save`` of another group returned. Called on the training thread.
            save: reads it. Called on a background thread while the forward pass may run.
            on_training_thread: ``save`` runs collectives inside the group (a full state dict of FSDP), or is not
                thread-safe. It is then called on the training thread where that waits for the quorum (at the
                step's first allreduce, or at :meth:`wait_quorum`), on all ranks of a group in the same step; and
                so is ``load``. What it returns is never received into in place.
            alike: all groups at the same step hold the same, bit by bit. With False, on all groups, a healing one takes
                its state from one source alone and does not compare it with others': for what each group has for
                itself, as an inner optimizer of local SGD, or statistics of batch norm.

        Raises:
            ValueError: the key is taken.
        """
        self._state.register(key, load, save, on_training_thread, alike)

    def set_state_dict_fns(self, load_state_dict: Callable[[Any], object], state_dict: Callable[[], Any]) -> None:
        """Sets what the constructor's ``load_state_dict`` and ``state_dict`` set: an older name."""
        self._state.replace("default", load_state_dict, state_dict)

    def state_dict(self) -> dict[str, int]:
        """``{"step", "batches_committed"}``: save it with a checkpoint of the model."""
        return self._progress.state_dict()

    def live_state(self) -> dict[str, Any]:
        """All that is registered and may be read here, as it travels: what a transport receives into in place.

        For a transport that is not the default one; it asks when a state comes, and the Manager is there by then::

            transport = HTTPTransport(token=secret, snapshot="lock", state_dict=lambda: manager.live_state())
            manager = Manager(..., checkpoint_transport=transport)

        Returns:
            ``{"user": {key: save()}, "torchft": state_dict()}``, without pieces that are saved on the training thread.

        Raises:
            RuntimeError: nothing is registered, or a function raised.
            TimeoutError: reading was not allowed within ``timeout``.
        """
        return self._state.read(self.state_dict(), seconds(self._timeout))

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues from what :meth:`state_dict` returned."""
        self._progress.load_state_dict(state_dict)

    def restore(self) -> int | None:
        """Restores the newest checkpoint, if there is one. The first :meth:`start_quorum` does by itself.

        To be called by all ranks of the group, when everything that belongs to the state is registered: before the
        data is loaded, say, if where that begins depends on the step.

        Returns:
            The step it is of; None if there is none.

        Raises:
            DamagedCheckpoint: there are some, and none can be used.
            UnsafeStateError: the state that is registered could not be saved.
            CheckpointError: nor could anything, to this directory.
            RuntimeError: this Manager has no ``checkpoints``.
        """
        return self._persistence.restore()

    def allow_state_dict_read(self) -> None:
        """Ends what :meth:`disallow_state_dict_read` began."""
        self._state.gate.open()

    def disallow_state_dict_read(self) -> None:
        """Until allowed again no healing peer's request reads the state; waits for a read under way.

        Raises:
            TimeoutError: that read took longer than ``timeout``.
        """
        self._state.gate.close(seconds(self._timeout))

    # ------------------------------------------------------------ the quorum

    def start_quorum(
        self, allow_heal: bool = True, shrink_only: bool = False, timeout: timedelta | None = None
    ) -> None:
        """Begins a step. Never raises for a quorum that fails: that is an error of the step.

        A step that has begun and was not ended by :meth:`should_commit` goes on instead, if nothing was reduced in it
        and nothing failed: a loop may call this twice, or skip a batch. If something was reduced, it is lost.

        Args:
            allow_heal: let a group that is behind take a peer's state. With False it sits the step out, which it does
                not commit, and at step 0 each group begins with its own weights. The same in all groups.
            shrink_only: take no new group in.
            timeout: for the quorum; the manager's ``quorum_timeout`` by default.

        Raises:
            Drained: the group was asked to drain, and has left.
            RuntimeError: it has left before; or a collective of an earlier step did not end even when the process
                group was aborted, and may write to gradients at any time: this process must be restarted.
        """
        self._works.check()
        if self._leaving.left is None and self._commit.goes_on():
            self._start.here()
            return
        self._start.wait()
        self._start.here()
        self._persistence.settle_loss()
        self._persistence.between_steps()
        self._begin.clear()
        draining = self._leaving.asked
        if draining and not self._leaving.waits():
            self._leave_drained()
        if self._leaving.left is not None:
            raise RuntimeError(f"this group has left the job ({self._leaving.left}): there is no further step")
        self._commit.step_begins()
        self._error.begin()
        self._works.clear()
        deadline = Deadline(timeout or self._quorum_timeout)

        def begin() -> None:
            self._begin.run(allow_heal, shrink_only, deadline)

        self._start.open(again=self._group.world_size == 1)
        if self._begin.stands(lambda: self._begin_again(begin)):
            return
        if draining:
            self._leave_drained()
        self._start.run(begin)
        if not self._use_async_quorum:
            self._healing.apply_at_once()

    def _begin_again(self, begin: Callable[[], None]) -> bool:
        """A member of the standing quorum is lost. If this step has not used it yet, it asks for another one."""

        def reset() -> None:
            self._begin.participation = NOBODY

        return self._start.again(reset, begin if self._use_async_quorum else self._without_heal(begin))

    def _without_heal(self, begin: Callable[[], None]) -> Callable[[], None]:
        """The forward pass may run on the state that a heal would replace: such a step is lost."""

        def run() -> None:
            begin()
            if self._healing.heals:
                self.report_error(RuntimeError("this group fell behind in mid-step and has healed: the step is lost"))

        return run

    def _leave_drained(self) -> NoReturn:
        self.leave("drained on SIGTERM")
        raise Drained("SIGTERM")

    def wait_quorum(self) -> None:
        """Waits until the quorum of this step is there and the process group can be used.

        Raises:
            Exception: what the quorum, the reconfiguration or the transfer failed with.
        """
        if not self._start.called:
            raise RuntimeError("no quorum to wait for: call start_quorum() first (the optimizer's zero_grad does)")
        self._start.wait()
        if self._error.current is not None and self._begin.failed:
            raise self._error.current
        if self._healing.unhealed is not None:
            raise self._healing.unhealed

    # --------------------------------------------------------- the reduction

    def allreduce(
        self,
        tensor: torch.Tensor,
        should_quantize: bool = False,
        reduce_op: Reduction = ReduceOp.AVG,
    ) -> Work:
        """Reduces ``tensor`` over the participants, in place. Never raises for a failure of communication.

        Waits for the quorum. A group that does not participate contributes zeros (to another reduction than SUM and
        AVG: what changes nothing in its result). After an error in this step it does nothing; the work then completes
        with the tensor as it is, and the step will not be committed.

        Args:
            tensor: any shape, on the process group's device.
            should_quantize: send one byte an element (:mod:`torchft.collectives`); SUM and AVG of floating point.
                All groups must say the same.
            reduce_op: AVG is SUM divided by :meth:`num_participants`; floating point only.

        Returns:
            Work whose future's value is ``tensor``.

        Raises:
            ValueError: AVG of a tensor that is not floating point, or one that cannot be quantized.
        """
        average = reduce_op == ReduceOp.AVG
        if average and not tensor.is_floating_point():
            raise ValueError(f"AVG needs a floating point tensor, not {tensor.dtype}; use ReduceOp.SUM")
        if should_quantize:
            check_quantizable([tensor], reduce_op)
        if not self._start.called:
            self.report_error(
                RuntimeError(
                    "nothing is averaged before the first start_quorum(): call zero_grad() of torchft's Optimizer "
                    "before the forward pass"
                )
            )
            return CompletedWork(tensor)
        self._start.wait(collective=True)
        if self._error.current is not None:
            return CompletedWork(tensor)
        if not self.is_participating():
            contribute_nothing(tensor, reduce_op)
        divisor = self.num_participants() if average else 1
        op = ReduceOp.SUM if average else reduce_op
        out = self._works.reduce(self._pg, tensor, op, divisor, seconds(self._timeout), should_quantize)
        return FutureWork(out)

    def wrap_future(self, fut: Future[T], default: T, timeout: timedelta | None = None) -> Future[T]:
        """A future that completes with ``default`` where ``fut`` fails or takes longer than ``timeout``.

        What went wrong becomes the step's error. The step's vote waits for the returned future.
        """
        return self._works.wrap(fut, default, timeout or self._timeout)

    # ------------------------------------------------------------ the commit

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """Ends the step: whether the optimizer may step.

        Waits for the step's collectives, applies a healed state, and votes among the group's ranks: true only if
        no rank has an error and there are at least ``min_replica_size`` participants.

        Args:
            timeout: for the vote; a tenth, and at least 5 s, more than the manager's ``timeout`` by default.

        Raises:
            StateLost: the last replica that held the state of the job is gone.
            Exception: what a load function raised. The step has ended, uncommitted; this group has no state then, and
                heals anew in the next step.
            RuntimeError: no step has begun, or it was ended before; or more than ``max_retries`` steps in a row
                failed, and the message names the last cause; or this process must be restarted, as of
                :meth:`start_quorum`: once that was said, each later call of either says it again.
        """
        if self._commit.over:
            raise RuntimeError(
                "no step to commit: call start_quorum() first (the optimizer's zero_grad does), once for each step"
            )
        self._start.wait()
        return self._commit.run(timeout or self._vote_timeout)

    # ----------------------------------------------------------- errors, facts

    def report_error(self, e: Exception) -> None:
        """Makes ``e`` the error of this step: it will not be committed. From any thread; the first one counts."""
        self._error.report(e)

    def _on_first_error(self, e: Exception) -> None:
        self._log.warning("error in this step: %s: %s", type(e).__name__, e)
        self._log.debug("where it came from", exc_info=e)
        self._telemetry.error(e)
        self._healing.step_failed(e)
        if self._proactive:
            # Others wait for what this group will not send any more: tell them now, not after their timeout.
            self._begin.invalidate()
            self._pg.abort()

    def errored(self) -> Exception | None:
        """The error of this step, or why this group is not healed in it; None while there is none."""
        return self._commit.errored()

    @property
    def use_async_quorum(self) -> bool:
        """Whether quorum and healing run beside the forward pass."""
        return self._use_async_quorum

    def current_step(self) -> int:
        """The step this group works on: as many steps are committed."""
        return self._progress.step

    def batches_committed(self) -> int:
        """Batches committed over all participants and steps."""
        return self._progress.batches_committed

    def participating_rank(self) -> int | None:
        """This group's index among the participants; None: it contributes zeros. Waits for the quorum."""
        self._start.wait()
        return None if self._healing.heals else self._begin.participation.rank

    def num_participants(self) -> int:
        """Participants of this step, 0 when its quorum failed. Waits for the quorum."""
        self._start.wait()
        return self._begin.participation.world_size

    def is_participating(self) -> bool:
        """Whether this group's gradients count in this step. Waits for the quorum."""
        return self.participating_rank() is not None

    def replica_id(self) -> str:
        """The group's unique id in this life, ``name:uuid``."""
        return self._group.replica_id

    def leave(self, reason: str) -> bool:
        """Tells all groups that this one goes, so that they go on without it at once.

        To be called between two steps; in the middle of one that step is lost for all. Between two steps nothing is
        lost but, at most, a step that others have begun meanwhile, as they may while the quorum stands: they try it
        again. ``drain=True`` and SIGTERM cost no step at all: the others agree on the step from which on this group is
        not there. Nothing is trained after it. :meth:`shutdown` leaves by itself.

        Args:
            reason: for the others' logs.

        Returns:
            Whether they were told; False where that was impossible, or this group has left before.
        """
        forget(self)
        if self._loss is not None:
            self._loss.stop()
        return self._leaving.leave(reason)

    def end_with_group(self, grace: timedelta = timedelta(seconds=10)) -> None:
        """From now on this process ends when it waits in vain for another rank of its own group.

        To be called where the ranks of a group have collectives among themselves (FSDP, tensor parallelism, inner
        data parallelism): those of NCCL never end when a member dies, and those of gloo do not when one is stopped,
        until their own timeout of many minutes. :func:`torchft.parallel.replicate` calls it.

        Args:
            grace: after the loss of a rank was seen, for the training loop to end by itself. Then the process ends
                with exit code 1 and the stacks of its threads on stderr, if it is in the middle of a step and the
                rank has not come back.
        """
        self._loss = GroupLoss(self._group.replica_id, seconds(grace), lambda: not self._commit.over, self._log)
        lost = self._begin.watch.last(self._group.replica_id)
        if lost is not None:  # while the model was made, say
            self._loss.hear(lost)

    def shutdown(self, wait: bool = True) -> None:
        """Leaves, and ends servers, transfers and threads. Idempotent.

        Args:
            wait: let a quorum under way end first, at most for its deadline.
        """
        self.leave("manager.shutdown() was called")
        self._begin.stop()
        self._healing.stop()
        if wait:
            self._start.await_end(seconds(self._quorum_timeout))
        self._group.close()
        self._persistence.close(wait)
        self._transport.shutdown(wait=wait)
        if wait:
            self._healing.close()
        self._start.shutdown(timeout=5.0 if wait else 0.0)
        if self._claim.held:  # or else it may be another Manager's by now
            self._pg.shutdown()
            self._claim.release()
