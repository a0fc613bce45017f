"""The Manager's checkpoints: all ranks of a group save and restore the same ones."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.groups import Groups, Replica
from torchft.checkpointing import CheckpointError, Checkpoints, DamagedCheckpoint, UnsafeStateError
from torchft.checkpointing.snapshot import Arena


def group_of_two(groups: Groups, name: str, folder: Path, seed: int) -> list[Replica]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def rank(rank: int) -> Replica:
        where = {"store_addr": "127.0.0.1", "store_port": store.port, "rank": rank, "world_size": 2}
        replica = groups.replica(name, seed=seed + rank, checkpoints=Checkpoints(folder, every=2, keep=9), **where)
        replica.store = store  # type: ignore[attr-defined]
        return replica

    return sorted(groups.together(lambda: rank(0), lambda: rank(1)), key=lambda r: r.manager._group.rank)


def train(groups: Groups, ranks: list[Replica], until: int) -> dict[int, list[bytes]]:
    """The weights of each rank before each step."""
    seen: dict[int, list[bytes]] = {}

    def loop(r: Replica) -> None:
        while r.manager.current_step() < until:
            assert r.manager._persistence._restoring is not None
            assert r.manager._persistence._restoring.checkpoints.wait(30), "each step's checkpoint is completed here"
            r.step()
            seen.setdefault(r.manager.current_step(), [b"", b""])[r.manager._group.rank] = r.weights()

    groups.together(*(lambda r=r: loop(r) for r in ranks))
    return seen


def test_the_ranks_of_a_group_restore_one_checkpoint_that_all_of_them_can_use(groups: Groups, tmp_path: Path) -> None:
    a = group_of_two(groups, "a", tmp_path, seed=1)
    weights = train(groups, a, until=7)
    for r in a:
        r.manager.shutdown()
    found = Checkpoints(tmp_path).candidates()
    assert [step for step, _ in found] == [6, 4, 2]
    (found[0][1] / "rank-1.data").unlink()  # rank 0 could use it

    b = group_of_two(groups, "b", tmp_path, seed=8)
    assert groups.together(*(r.manager.restore for r in b)) == [4, 4]
    assert [r.weights() for r in b] == weights[4]
    assert weights[4][0] != weights[4][1], "each rank has its own"
    assert [r.manager.state_dict() for r in b] == [{"step": 4, "batches_committed": 4}] * 2
    again = train(groups, b, until=6)
    assert again[5] == weights[5]


def test_a_step_is_saved_by_all_ranks_or_by_none(
    groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Checkpoints):
        slow = False

        @property
        def saving(self) -> bool:
            return self.slow or super().saving

    a = group_of_two(groups, "a", tmp_path, seed=1)
    slow = Slow(tmp_path, every=2, keep=9)
    assert a[1].manager._persistence._restoring is not None
    a[1].manager._persistence._restoring.checkpoints = slow
    train(groups, a, until=3)
    for r in a:
        assert r.manager._persistence._restoring is not None
        assert r.manager._persistence._restoring.checkpoints.wait(30)
    slow.slow = True  # rank 1 is still writing, rank 0 is not
    groups.together(*(lambda r=r: [r.step() for _ in range(2)] for r in a))
    slow.slow = False
    train(groups, a, until=7)
    for r in a:
        r.manager.shutdown()
    assert [step for step, _ in slow.candidates()] == [6, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000000002", "step-000000000006"], "no leftovers"
    assert "step 4 is not saved: rank 1 of this group does not come: its last save is still under way" in caplog.text


def test_no_rank_begins_anew_when_all_checkpoints_are_damaged(groups: Groups, tmp_path: Path) -> None:
    a = group_of_two(groups, "a", tmp_path, seed=1)
    train(groups, a, until=3)
    for r in a:
        r.manager.shutdown()
    (tmp_path / "step-000000000002" / "rank-0.data").write_bytes(b"")
    b = group_of_two(groups, "b", tmp_path, seed=1)

    def begin(r: Replica) -> Any:
        with pytest.raises(DamagedCheckpoint, match=r"rank-0\.data has 0 bytes"):
            r.optimizer.zero_grad()
        return r.manager.current_step()

    for _ in range(2):  # who catches it and tries again does not begin anew either
        assert groups.together(*(lambda r=r: begin(r) for r in b)) == [0, 0]
    assert (tmp_path / "step-000000000002").exists()


def test_a_step_that_comes_again_finds_no_parts_of_the_last_time(groups: Groups, tmp_path: Path) -> None:
    class Recording(Checkpoints):
        def save(self, step: int, *args: Any, **kwargs: Any) -> Any:
            writers.append((step, kwargs["writer"]))
            return super().save(step, *args, **kwargs)

    writers: list[tuple[int, str]] = []
    checkpoints = Recording(tmp_path, every=1)
    a = groups.replica("a", checkpoints=checkpoints)
    for again in range(2):
        while a.manager.current_step() < 3:
            a.step()
            assert checkpoints.wait(30)
        if not again:
            shutil.rmtree(tmp_path / "step-000000000002")
            assert a.manager.restore() == 1
    of_2 = [writer for step, writer in writers if step == 2]
    assert len(of_2) == len(set(of_2)) == 2


def test_a_checkpoint_that_is_deleted_before_it_is_read_is_left_for_the_newer_one(
    groups: Groups, tmp_path: Path
) -> None:
    class Late(Checkpoints):
        def load(self, folder: Path, *args: Any) -> Any:
            if folder == old:
                newer.rename(tmp_path / "run" / newer.name)
                shutil.rmtree(old)
            return super().load(folder, *args)

    checkpoints = Checkpoints(tmp_path / "run", every=1)
    a = groups.replica("a", checkpoints=checkpoints)
    while a.manager.current_step() < 3:
        a.step()
        assert checkpoints.wait(30)
    a.manager.shutdown()
    old, newer = (folder for _, folder in reversed(checkpoints.candidates()))
    newer = newer.rename(tmp_path / newer.name)
    b = groups.replica("b", checkpoints=Late(tmp_path / "run"))
    assert b.manager.restore() == 2


def test_a_checkpoint_that_is_deleted_under_one_rank_is_left_by_all_of_them(groups: Groups, tmp_path: Path) -> None:
    class Late(Checkpoints):
        def load(self, folder: Path, into: object = None, rank: int = 0, world_size: int = 1) -> Any:
            both.wait(30)
            if folder == old and rank == 0:
                newer.rename(tmp_path / "run" / newer.name)
                shutil.rmtree(old)
            both.wait(30)
            return super().load(folder, into, rank, world_size)

    both = threading.Barrier(2)
    a = group_of_two(groups, "a", tmp_path / "run", seed=1)
    train(groups, a, until=5)
    for r in a:
        r.manager.shutdown()
    old, newer = (folder for _, folder in reversed(Checkpoints(tmp_path / "run").candidates()))
    newer = newer.rename(tmp_path / newer.name)
    b = group_of_two(groups, "b", tmp_path / "run", seed=8)
    for r in b:
        assert r.manager._persistence._restoring is not None
        r.manager._persistence._restoring.checkpoints = Late(tmp_path / "run")
    assert groups.together(*(r.manager.restore for r in b)) == [4, 4]


def test_who_comes_late_to_its_save_sets_nothing_newer_aside(groups: Groups, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=2)
    a = groups.replica("a", checkpoints=checkpoints)
    Checkpoints(tmp_path).save(8, {"user": {}, "torchft": {"step": 8, "batches_committed": 8}}).result(30)  # type: ignore[union-attr]
    a.manager.load_state_dict({"step": 0, "batches_committed": 0})
    a.manager._persistence._restored = True  # it went back, on purpose
    a.step()
    a.step()  # from here on others may go on before it saves
    Checkpoints(tmp_path).save(6, {}, given_up=[]).result(30)  # type: ignore[union-attr]
    a.step()
    assert checkpoints.wait(30)
    assert [step for step, _ in checkpoints.candidates()] == [6, 2]
    assert [p.name for p in tmp_path.glob("abandoned-step-000000000008-*")]


def test_without_memory_for_a_snapshot_the_training_goes_on(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Arena, "reserve", no_memory)
    a = group_of_two(groups, "a", tmp_path, seed=1)
    train(groups, a, until=4)
    assert caplog.text.count("there is no memory for a copy of the state") == 2, "one line of each rank"
    assert Checkpoints(tmp_path).candidates() == []


def test_a_program_that_loaded_a_state_of_its_own_is_left_alone(groups: Groups, tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(9, {"user": {}, "torchft": {"step": 9, "batches_committed": 9}})
    a = groups.replica("a", checkpoints=Checkpoints(tmp_path, every=100))
    a.manager.load_state_dict({"step": 5, "batches_committed": 9})
    a.step()
    assert a.manager.current_step() == 6


def test_a_directory_that_can_not_be_made_is_refused_at_the_first_step(groups: Groups) -> None:
    a = groups.replica("a", checkpoints=Checkpoints("/proc/mistyped", every=100))
    with pytest.raises(CheckpointError, match="no checkpoint could be saved to /proc/mistyped: No such file"):
        a.step()


def test_of_a_mistyped_path_nothing_is_made(groups: Groups, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "mistyped" / "run", every=1)
    a = groups.replica("a", checkpoints=checkpoints)
    with pytest.raises(CheckpointError, match=r"mistyped/run: No such file.*: a folder of that path is not there"):
        a.step()
    job = checkpoints.save(1, {"user": {}})
    assert job is not None
    with pytest.raises(FileNotFoundError):
        job.result(30)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_can_not_be_saved_is_refused_at_the_first_step_and_later_no_reason_to_die(
    groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra: dict[str, Any] = {"lock": threading.Lock()}
    a = groups.replica("a", checkpoints=Checkpoints(tmp_path, every=1))
    a.manager.register_state_dict_fn("extra", lambda s: None, lambda: extra)
    with pytest.raises(UnsafeStateError, match="lock"):
        a.step()
    lock = extra.pop("lock")
    b = groups.replica("b", checkpoints=Checkpoints(tmp_path, every=1))
    b.manager.register_state_dict_fn("extra", lambda s: None, lambda: extra)
    b.step()
    extra["lock"] = lock
    b.step()
    b.step()
    assert b.manager.current_step() == 3
    assert "step 1 could not be saved" in caplog.text
    a.manager.shutdown()


def test_restoring_without_checkpoints_is_a_clear_error(groups: Groups) -> None:
    with pytest.raises(RuntimeError, match=r"checkpoints=Checkpoints\(directory\)"):
        groups.replica("a").manager.restore()
