"""All ranks of a group write one checkpoint: rank 0 learns what became of the others' parts."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from torchft.checkpointing import CheckpointError, Checkpoints, group_save
from torchft.checkpointing.shard import Shard

LONG = 60.0


def test_rank_0_learns_that_another_rank_could_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    real = Shard.write

    def write(shard: Any, folder: Path, stop: Any) -> None:
        if shard.rank == 1:
            raise OSError(28, "No space left on device")
        real(shard, folder, stop)

    monkeypatch.setattr(Shard, "write", write)
    began = time.monotonic()
    jobs = [
        c.save(5, {"own": torch.full((2,), float(r))}, rank=r, world_size=2, writer="group a")
        for r, c in enumerate((first, second))
    ]
    assert jobs[0] is not None
    with pytest.raises(CheckpointError, match=r"rank 1 could not write its part: OSError: .*No space left"):
        jobs[0].result(LONG)
    assert time.monotonic() - began < LONG / 2
    assert list(tmp_path.iterdir()) == []


def test_a_note_of_a_full_disk_is_empty_and_is_a_note_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: object) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    group_save._say_failed(tmp_path, 1, ValueError("why"))
    assert [p.name for p in tmp_path.iterdir()] == ["rank-1.failed"]


def test_rank_0_does_not_wait_for_ever_for_the_others(tmp_path: Path) -> None:
    alone = Checkpoints(tmp_path, timeout=timedelta(seconds=0.1))
    job = alone.save(5, {"own": torch.zeros(2)}, rank=0, world_size=2, writer="a")
    assert job is not None
    with pytest.raises(TimeoutError, match="rank 1 has not written its part"):
        job.result(LONG)
    assert list(tmp_path.iterdir()) == []
