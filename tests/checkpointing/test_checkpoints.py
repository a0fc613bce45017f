"""Checkpoints on disk: whole or not there, checked before use, and never in the way of a step."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from torchft.checkpointing import CheckpointError, Checkpoints, DamagedCheckpoint, UnsafeStateError, load_latest, save
from torchft.checkpointing.dcp import CheckpointReader
from torchft.checkpointing.description import describe
from torchft.checkpointing.group_save import write_part
from torchft.checkpointing.shard import Shard as Part
from torchft.checkpointing.snapshot import host_run

LONG = 60.0


def state_of(step: int, elements: int = 5000) -> dict[str, Any]:
    """A state that says of each of its bytes which step it is of."""
    weight = torch.full((elements,), float(step))
    return {
        "user": {
            "default": {
                "model": OrderedDict({"0.weight": weight, "0.bias": torch.arange(12.0).reshape(3, 4).t() + step}),
                "optim": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1}]},
                "tied": weight,
                "nothing": torch.empty(0, 3),
                "other": (float("inf"), None, b"\x00\xff", torch.bfloat16, "text"),
            }
        },
        "torchft": {"step": step, "batches_committed": 2 * step},
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def saved(directory: Path, *steps: int, keep: int = 10, elements: int = 5000) -> None:
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        job = checkpoints.save(step, state_of(step, elements))
        assert job is not None
        job.result(LONG)
    assert checkpoints.close()


def write_again(directory: Path, step: int, keep: int) -> None:
    """Saves on this thread."""
    manifest, sources = describe(state_of(step))
    write_part(
        directory, Part(step, 0, manifest, host_run(sources), {}), 1, "x", keep, timeout=LONG, stop=threading.Event()
    )


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nothing yet") is None
    folder = save(tmp_path / "new", 7, state_of(7)).result(LONG)
    assert folder.name == "step-000000000007"
    loaded = load_latest(tmp_path / "new")
    assert loaded is not None
    assert (loaded.step, loaded.path) == (7, folder)
    assert equal(loaded.state, state_of(7))
    user = loaded.state["user"]["default"]  # type: ignore[index]
    assert user["tied"].data_ptr() == user["model"]["0.weight"].data_ptr(), "memory that was shared is shared again"
    assert user["model"]["0.bias"].stride() == (1, 4)


def test_tensors_are_read_into_where_they_fit(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    live = state_of(0)
    weight = live["user"]["default"]["model"]["0.weight"]
    loaded = load_latest(tmp_path, into=live)
    assert loaded is not None
    assert loaded.state["user"]["default"]["model"]["0.weight"].data_ptr() == weight.data_ptr()  # type: ignore[index]
    assert torch.equal(weight, torch.full((5000,), 3.0))


def test_a_snapshot_does_not_see_what_happens_after_it(tmp_path: Path) -> None:
    state = state_of(4)
    job = save(tmp_path, 4, state)
    state["user"]["default"]["model"]["0.weight"].fill_(-1.0)
    job.result(LONG)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert equal(loaded.state, state_of(4))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank-0.data", "rank-0.manifest", "rank-0.json", "COMPLETE.json"])
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2)
    harm(tmp_path / "step-000000000002" / name)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert equal(loaded.state, state_of(1))
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(tmp_path / "step-000000000002" / name) in warning
    assert "passed over" in warning


def test_when_all_are_damaged_it_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    truncate(tmp_path / "step-000000000001" / "rank-0.data")
    (tmp_path / "step-000000000002" / "COMPLETE.json").write_text('{"body": "{}", "xxh3_128": "x"}')
    with pytest.raises(DamagedCheckpoint, match="none of the 2 checkpoints") as e:
        load_latest(tmp_path)
    assert "step-000000000001/rank-0.data" in str(e.value)


def test_the_newest_few_are_kept_and_what_a_dead_writer_left_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / ".writing-000000000009-dead"
    left.mkdir(parents=True)
    (left / "rank-0.data").write_bytes(bytes(1000))
    fresh = tmp_path / ".writing-000000000010-alive"
    fresh.mkdir()
    for path in (left / "rank-0.data", left):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [fresh.name, "step-000000000003", "step-000000000004"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_step_that_is_saved_anew_is_never_missing(tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2, keep=keep)
    folder, rename = tmp_path / "step-000000000002", Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == folder:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_again(tmp_path, 2, keep)
    monkeypatch.undo()
    assert not folder.exists()
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    assert equal(loaded.state, state_of(2))
    saved(tmp_path, 3, keep=keep)
    assert [step for step, _ in Checkpoints(tmp_path).candidates()] == [3, 2][:keep]
    saved(tmp_path, 2, keep=keep)
    assert [step for step, _ in Checkpoints(tmp_path).candidates()] == [2]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_one_that_is_deleted_before_it_is_read_is_left_for_the_newer_one(tmp_path: Path) -> None:
    class Late(Checkpoints):
        def load(self, folder: Path, *args: Any) -> Any:
            if folder.name.endswith("1"):
                saved(tmp_path, 2, keep=1)
            return super().load(folder, *args)

    saved(tmp_path, 1)
    loaded = Late(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.step == 2


@pytest.mark.parametrize("step", [-1, 10**18])
def test_a_step_that_would_not_be_found_again_is_refused(tmp_path: Path, step: int) -> None:
    with pytest.raises(ValueError, match="never be found"):
        save(tmp_path, step, state_of(1))
    assert not list(tmp_path.iterdir())


def test_what_is_ahead_of_a_job_that_went_back_is_not_loaded_again(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    saved(tmp_path, 20)  # from another branch, after the job began again at 10
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 20
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if n.startswith("step-")] == ["step-000000000010", "step-000000000020"]
    assert [n for n in names if n.startswith("abandoned-step-000000000030")]


def test_several_ranks_need_the_name_of_their_save_and_one_rank_has_its_own_each_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="writer= is missing"):
        save(tmp_path, 5, state_of(5), rank=1, world_size=2)
    one, other = (save(tmp_path, 5, state_of(5)) for _ in range(2))  # two programs, say
    for job in (one, other):
        job.result(LONG)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert equal(loaded.state, state_of(5))


def test_the_directory_stays_where_it_was_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("here")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    job = checkpoints.save(5, state_of(5))
    assert job is not None
    assert job.result(LONG).parent == tmp_path / "here"


def test_a_slow_disk_costs_a_checkpoint_and_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, real = threading.Event(), os.fsync

    def slow(file: int) -> None:
        assert disk.wait(LONG)
        real(file)

    monkeypatch.setattr(os, "fsync", slow)
    checkpoints = Checkpoints(tmp_path, every=5)
    assert [s for s in range(12) if checkpoints.due(s)] == [5, 10]
    first = checkpoints.save(5, state_of(5))
    assert first is not None
    began = time.monotonic()
    assert checkpoints.save(10, state_of(10)) is None, "one at a time"
    assert time.monotonic() - began < LONG / 2
    assert "step 10 is not saved" in caplog.text
    assert not checkpoints.wait(0.05)
    disk.set()
    first.result(LONG)
    assert checkpoints.wait()
    last = checkpoints.save(15, state_of(15))
    assert last is not None
    assert checkpoints.close()
    assert [step for step, _ in checkpoints.candidates()] == [15, 5]


def test_closing_gives_up_a_save_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (disk.wait(LONG), real(file))[1])
    checkpoints = Checkpoints(tmp_path)
    job = checkpoints.save(5, state_of(5), world_size=2, writer="a")  # and the other rank's part never comes
    assert job is not None
    assert not checkpoints.close(0.05)
    disk.set()
    with pytest.raises(CheckpointError, match="given up"):
        job.result(LONG)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_save_that_fails_says_where_why_and_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", max_failures=1)
    counted = REGISTRY.get_sample_value("torchft_saves_failed_total")
    assert counted is not None
    for _ in range(2):
        job = checkpoints.save(5, state_of(5))
        assert job is not None
        with pytest.raises(NotADirectoryError):
            job.result(LONG)
        assert checkpoints.wait()
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == checkpoints.failures == 2
    assert REGISTRY.get_sample_value("torchft_saves_failed_total") == counted + 2
    assert f"step 5 could not be saved to {tmp_path / 'file' / 'checkpoints'}" in errors[1]
    assert "Not a directory" in errors[1]
    assert "choose another directory" in errors[1]
    with pytest.raises(CheckpointError, match="max_failures is 1"):
        checkpoints.save(10, state_of(10))


def test_what_cannot_be_saved_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnsafeStateError, match=r"state\['x'\]"):
        save(tmp_path, 1, {"x": threading.Lock()})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


# ------------------------------------------------------------------ several ranks


def shard_of(rank: int, ranks: int, step: int) -> dict[str, Any]:
    """What one rank of a sharded group holds: half of a matrix of 8 x 3, a replica, and something of its own."""
    mesh = DeviceMesh("cpu", torch.arange(ranks), _init_backend=False, _rank=rank)
    whole = torch.arange(24.0).reshape(8, 3) + step
    rows = 8 // ranks
    local = whole[rows * rank : rows * (rank + 1)].clone()
    return {
        "matrix": DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=(3, 1)),
        "replica": DTensor.from_local(torch.full((3,), float(step)), mesh, [Replicate()], run_check=False),
        "own": torch.full((2,), float(rank)),
        "step": step,
    }


def save_sharded(directory: Path, ranks: int, step: int) -> None:
    parts = [Checkpoints(directory) for _ in range(ranks)]
    jobs = [
        part.save(step, shard_of(rank, ranks, step), rank=rank, world_size=ranks, writer="group a")
        for rank, part in enumerate(parts)
    ]
    for job in jobs:
        assert job is not None
        job.result(LONG)
    assert all(part.close() for part in parts)


def test_each_rank_gets_its_own_part_back(tmp_path: Path) -> None:
    save_sharded(tmp_path, 2, step=5)
    for rank in range(2):
        loaded = load_latest(tmp_path, shard_of(rank, 2, 0), rank=rank, world_size=2)
        assert loaded is not None
        state: Any = loaded.state
        assert torch.equal(state["matrix"].to_local(), shard_of(rank, 2, 5)["matrix"].to_local())
        assert torch.equal(state["own"], torch.full((2,), float(rank)))
        assert state["step"] == 5


@pytest.mark.parametrize(("rank", "now"), [(0, 1), (3, 4)])
def test_a_group_of_another_size_puts_the_shards_together_anew(tmp_path: Path, rank: int, now: int) -> None:
    save_sharded(tmp_path, 2, step=5)
    live = shard_of(rank, now, 0)
    missing = live.pop("replica")  # as an optimizer's state before the first step
    loaded = load_latest(tmp_path, live, rank=rank, world_size=now)
    assert loaded is not None
    state: Any = loaded.state
    assert torch.equal(state["matrix"].to_local(), shard_of(rank, now, 5)["matrix"].to_local())
    assert state["matrix"].device_mesh == live["matrix"].device_mesh
    assert torch.equal(state["replica"].to_local(), torch.full((3,), 5.0))
    assert state["replica"].placements == missing.placements
    assert torch.equal(state["own"], torch.full((2,), float(rank % 2)))
    with pytest.raises(CheckpointError, match="mesh"):
        load_latest(tmp_path, rank=rank, world_size=now)
    flip(tmp_path / "step-000000000005" / "rank-1.data")
    with pytest.raises(DamagedCheckpoint):
        load_latest(tmp_path, shard_of(rank, now, 0), rank=rank, world_size=now)


@pytest.mark.parametrize("alike", [True, False], ids=["replicas", "stages"])
def test_on_meshes_of_other_ranks_one_name_is_one_tensor_or_none(tmp_path: Path, alike: bool) -> None:
    def part(rank: int) -> dict[str, DTensor]:
        mesh = DeviceMesh("cpu", torch.tensor([rank]), _init_backend=False, _rank=rank)
        local = torch.full((4,), 1.0 if alike else 1.0 + rank)
        return {"w": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}

    for job in [save(tmp_path, 5, part(rank), rank=rank, world_size=2, writer="a") for rank in range(2)]:
        job.result(LONG)
    if alike:
        loaded = load_latest(tmp_path, part(2), rank=2, world_size=3)
        assert loaded is not None
        assert torch.equal(loaded.state["w"].to_local(), torch.ones(4))  # type: ignore[index]
    else:
        with pytest.raises(CheckpointError, match="another one on that of others"):
            load_latest(tmp_path, part(2), rank=2, world_size=3)


def test_a_group_of_another_size_takes_no_tensor_for_another_and_no_part_for_a_sum(tmp_path: Path) -> None:
    keys: list[Any] = ["a.b", 1, "1", "w", "w@1"]
    state = {"a": {"b": torch.zeros(2)}} | {key: torch.full((2,), 1.0 + i) for i, key in enumerate(keys)}
    states = state, {"w": torch.ones(2)}
    for job in [save(tmp_path, 5, states[rank], rank=rank, world_size=2, writer="a") for rank in range(2)]:
        job.result(LONG)
    for rank in (0, 2):
        loaded = load_latest(tmp_path, rank=rank, world_size=3)
        assert loaded is not None
        assert equal(loaded.state, state)
    mesh = DeviceMesh("cpu", torch.arange(1), _init_backend=False, _rank=0)
    part = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    save(tmp_path, 6, {"sum": part, "w": torch.ones(2)}).result(LONG)
    with pytest.raises(CheckpointError, match=r"state\['sum'\] is a DTensor of partial sums"):
        load_latest(tmp_path, {"sum": part}, rank=0, world_size=2)


def test_a_missing_shard_is_damage_for_all_ranks(tmp_path: Path) -> None:
    save_sharded(tmp_path, 2, step=5)
    save_sharded(tmp_path, 2, step=6)
    (tmp_path / "step-000000000006" / "rank-1.data").unlink()
    for rank in range(2):
        loaded = load_latest(tmp_path, shard_of(rank, 2, 0), rank=rank, world_size=2)
        assert loaded is not None
        assert loaded.step == 5


def test_any_program_can_load_a_checkpoint_with_torchs_own_dcp(tmp_path: Path) -> None:
    saved(tmp_path / "one", 3)
    model = {"0.weight": torch.zeros(5000), "0.bias": torch.zeros(4, 3)}
    folder = tmp_path / "one" / "step-000000000003"
    dcp_load({"user": {"default": {"model": model}}}, storage_reader=CheckpointReader(folder), no_dist=True)
    assert equal(OrderedDict(model), state_of(3)["user"]["default"]["model"])
    save_sharded(tmp_path / "two", 2, step=5)
    plain = {"matrix": torch.zeros(8, 3), "own": torch.zeros(2), "own@1": torch.zeros(2)}
    folder = tmp_path / "two" / "step-000000000005"
    dcp_load(plain, storage_reader=CheckpointReader(folder), no_dist=True)
    assert torch.equal(plain["matrix"], torch.arange(24.0).reshape(8, 3) + 5)
    assert (plain["own"][0], plain["own@1"][0]) == (0.0, 1.0)
    flip(folder / "rank-1.data")
    with pytest.raises(CheckpointException, match=r"rank-1\.data does not have the hash"):
        dcp_load(plain, storage_reader=CheckpointReader(folder), no_dist=True)
