"""Checkpoints and the Manager: when the state is saved, and when it is restored.

The idea
    Between two steps, on the training thread, the state is at rest: there a group saves, and there it restores. Every
    group restores the newest checkpoint before its first quorum, so that all groups meet at one step when all of
    them begin anew; who joins a running job is behind then, as always, and heals. And a group restores when it
    learns that nobody holds the state any more.

Rules
    - The group with participating rank 0 in the step just committed saves: one writer per state, another one when the
      first is gone. Its ranks agree before they take the snapshot, so all of them save a step or none.
    - The ranks of a group restore the same checkpoint: rank 0 proposes the newest, each rank checks what it would
      read, and only if all of them can use it is it used; else the one before is proposed.
    - A restored state is written like a healed one: whole, by the registered functions. Until then the replica has
      none.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchft.agreement import Agreement, NotAgreed
from torchft.checkpointing import CheckpointError, Checkpoints, CheckpointTimeout, DamagedCheckpoint, UnsafeStateError
from torchft.checkpointing.persistent import NoMemoryForSnapshot
from torchft.coordination import QuorumResult
from torchft.runtime.logs import RankLogger
from torchft.state import ReplicaState
from torchft.training_thread import directly

__all__ = ["Restoring"]

_OK, _VANISHED = "ok", "vanished"


class Restoring:
    """One rank's use of the checkpoints of its group. On the training thread.

    Args:
        checkpoints: where they are.
        agreement: of the ranks of the group.
        store: of the group.
        replica_id, rank, world_size: of this rank.
        state: what is saved and restored.
        timeout: seconds, longest wait for the group's other ranks.
        log: of the manager.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        agreement: Agreement,
        store: TCPStore,
        replica_id: str,
        rank: int,
        world_size: int,
        state: ReplicaState,
        timeout: float,
        log: RankLogger,
    ) -> None:
        self.checkpoints = checkpoints
        self._agreement = agreement
        self._store = store
        self._prefix = f"torchft/group/{replica_id}/restore"
        self._replica_id = replica_id
        self._rank = rank
        self._world_size = world_size
        self._state = state
        self._timeout = timeout
        self._log = log
        self._rounds = 0
        self._saved = -1
        self._given_up: tuple[int, list[Path]] = -1, []

    def look_ahead(self, step: int) -> None:
        """A step begins: what is there of later ones, if its own is to be saved, is of a history that was given up.

        Afterwards nobody could say: others may go on, and save, between the commit of a step and this group's save.

        Args:
            step: as many are committed.
        """
        if self._rank == 0 and self.checkpoints.due(step + 1):
            try:
                found = self.checkpoints.candidates()
            except CheckpointError:
                found = []  # the save says so
            self._given_up = step + 1, [folder for later, folder in found if later > step + 1]

    def save(self, step: int, participating_rank: int | None, torchft: dict[str, int]) -> None:
        """Saves the state of the step if it is due and this group is the one that saves.

        Args:
            step: as many are committed.
            participating_rank: of the group, in the last of them.
            torchft: the manager's own part of the state.

        Raises:
            CheckpointError: more than ``max_failures`` saves in a row failed.
        """
        if participating_rank != 0 or step == self._saved or not self.checkpoints.due(step) or not self._state.usable:
            return
        self._saved = step
        if not self._agree(step):
            return
        state = self._state.read(torchft, self._timeout, directly)
        writer = f"{self._replica_id}/{self._rounds}"  # a step that comes again must not find parts of the last time
        try:
            self.checkpoints.save(
                step,
                state,
                rank=self._rank,
                world_size=self._world_size,
                writer=writer,
                given_up=self._given_up[1] if self._given_up[0] == step else [],
            )
        except (UnsafeStateError, CheckpointTimeout, NoMemoryForSnapshot) as e:
            self.checkpoints.report(step, e)  # the state has changed its kind since the first step: no reason to die

    def _agree(self, step: int) -> bool:
        """Whether all ranks of the group have finished the last save: else their parts would not fit together."""
        topic = f"checkpoint/{self._rounds}.{step}"  # a step may come again after one was restored
        if self.checkpoints.saving:
            self._agreement.refuse(topic, "its last save is still under way")
            self.checkpoints.leave_out(step)
            return False
        try:
            self._agreement.agree(topic)
        except NotAgreed as e:
            self._log.warning("step %d is not saved: %s", step, e)
            return False
        return True

    def restore(self) -> dict[str, int] | None:
        """Restores the newest checkpoint that all ranks of the group can use.

        Returns:
            The manager's own part of it; None if there is no checkpoint.

        Raises:
            DamagedCheckpoint: there are some, and none can be used.
            CheckpointError: it cannot be read.
            TimeoutError: another rank of the group did not come.
        """
        while True:
            name = self._choose()
            if name is None:
                return None
            folder = self.checkpoints.directory / name
            live = self._state.read({}, self._timeout, directly)
            self._saved = -1
            self._state.begin_receiving(in_place=True)
            loaded, failure = None, None
            try:
                loaded = self.checkpoints.load(folder, live, self._rank, self._world_size)
            except DamagedCheckpoint as e:
                failure = e
            if self._all_loaded(folder, failure) and loaded is not None:
                break
        torchft = self._state.received(loaded.state)
        self._state.apply()
        self._log.info("restored step %d from %s", loaded.step, loaded.path)
        return torchft

    def _all_loaded(self, folder: Path, failure: DamagedCheckpoint | None) -> bool:
        """Whether all ranks could read it. False: its writer has replaced it by a newer one since it was checked.

        Raises:
            DamagedCheckpoint: it is there, and is not whole any more.
            TimeoutError: another rank did not come.
        """
        said = _OK if failure is None else str(failure) if folder.exists() else _VANISHED
        if self._world_size > 1:
            here = f"{self._prefix}/{self._rounds}/loaded"
            self._store.set(f"{here}/{self._rank}", said)
            answers = [self._wait(f"{here}/{rank}", rank) for rank in range(self._world_size)]
        else:
            answers = [said]
        if failure is not None and said != _VANISHED:
            raise failure
        for rank, answer in enumerate(answers):
            if answer not in (_OK, _VANISHED):
                raise DamagedCheckpoint(f"rank {rank} of this group could not read {folder}: {answer}")
        return _VANISHED not in answers

    def newest(self, quorum: QuorumResult) -> int:
        """The step of the newest checkpoint, as rank 0 sees it in this quorum; 0: there is none. On any thread."""
        key = f"{self._prefix}/newest/{quorum.quorum_id}.{quorum.max_step}"
        if self._rank == 0:
            found = self.checkpoints.candidates()
            self._store.set(key, str(found[0][0] if found else 0))
        return int(self._wait(key, 0))

    def check(self) -> None:
        """Raises now what saving would fail with: as of :meth:`torchft.checkpointing.Checkpoints.check`."""
        self.checkpoints.check(self._state.read({}, self._timeout, directly))

    def _choose(self) -> str | None:
        """The name of the newest checkpoint that all ranks can use."""
        self._rounds += 1
        refused: dict[str, str] = {}
        while True:
            here = f"{self._prefix}/{self._rounds}/{len(refused)}"
            if self._rank == 0:
                names = [folder.name for _, folder in self.checkpoints.candidates() if folder.name not in refused]
                self._store.set(f"{here}/proposed", names[0] if names else "")
            name = self._wait(f"{here}/proposed", 0)
            if not name:
                break
            folder = self.checkpoints.directory / name
            try:
                self.checkpoints.verify(folder, self._rank, self._world_size)
                found = _OK
            except DamagedCheckpoint as e:
                found = str(e)
                if folder.exists():  # else its writer has replaced it by a newer one meanwhile
                    self._log.warning("%s is passed over for the one before: %s", folder, e)
            self._store.set(f"{here}/{self._rank}", found)
            answers = [self._wait(f"{here}/{rank}", rank) for rank in range(self._world_size)]
            why = next((answer for answer in answers if answer != _OK), None)
            if why is None:
                return name
            refused[name] = why
        if refused:
            raise DamagedCheckpoint(
                f"none of the {len(refused)} checkpoints in {self.checkpoints.directory} can be used; move them away "
                f"to begin without them. {'; '.join(refused.values())}"
            )
        return None

    def _wait(self, key: str, rank: int) -> str:
        try:
            self._store.wait([key], timedelta(seconds=self._timeout))
        except Exception as e:
            raise TimeoutError(
                f"rank {rank} of this group took no part in restoring a checkpoint for {self._timeout:g} s ({e})"
            ) from e
        value: bytes = self._store.get(key)
        return value.decode()
