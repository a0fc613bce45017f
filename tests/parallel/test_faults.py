"""Two groups of two ranks under FSDP2: a rank is killed, then a rank of the other group is stopped and that group
killed. It costs the other group a step each time, and the group that comes back heals shard by shard. A stopped
rank 0 is missed by the lighthouse, and in its group by the other rank.

The collectives inside a group have half an hour, those between groups a minute: nothing here would end in time if it
waited for one of those.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.job import Job, Trainer

SCRIPT = Path(__file__).with_name("trainer.py")
SOON = 45.0
"""Seconds: more than it takes to miss a rank's signs of life (5) and the grace (2), far less than any timeout."""


def train_together(job: Job, *groups: list[Trainer]) -> None:
    ranks = [t for group in groups for t in group]
    job.until(lambda: all(t.newest["participants"] == len(groups) for t in ranks), "training together", 100)


def goes_on(job: Job, group: list[Trainer], since: float) -> None:
    job.until(lambda: all(len(t.commits_after(since)) >= 3 for t in group), "going on", SOON)


def ends_by_itself(job: Job, rank: Trainer, lost: int = 1) -> None:
    rank.exits.add(1)
    job.until(lambda: rank.process.poll() == 1, "the end of the rank that lost the other", SOON)
    assert f"rank {lost} of this group is no longer there" in rank.log, rank.log[-3000:]


def in_place(rank: Trainer) -> int:
    """Bytes that its heal received straight into its own shards."""
    line = next(line for line in rank.log.splitlines() if "of them in place" in line)
    return int(line.split(" of them in place")[0].rsplit(" ", 1)[1])


@pytest.mark.timeout(300)  # it starts eight processes
def test_a_killed_rank_and_a_stopped_rank_cost_the_other_group_a_step_and_their_own_heals(tmp_path: Path) -> None:
    chosen = tmp_path / "transport"
    chosen.write_text("http")
    args = ("--transport-file", str(chosen))
    shards = 3 * 256 * 256 * 4 // 2
    job = Job(tmp_path, trainer=SCRIPT, join_timeout_ms=60_000, heartbeat_timeout_ms=60_000)
    try:
        a, b = job.start_group("a", 2, *args), job.start_group("b", 2, *args)
        train_together(job, a, b)
        before = [len(rank.failures()) for rank in a]

        killed = b[1].kill()
        goes_on(job, a, killed)
        ends_by_itself(job, b[0])
        b = job.start_group("b", 2, *args)
        train_together(job, a, b)
        assert all(in_place(rank) >= shards for rank in b)
        assert all(len(rank.failures()) <= n + 1 for rank, n in zip(a, before, strict=True))

        chosen.write_text("pg")
        before = [len(rank.failures()) for rank in b]
        stopped = a[1].signal(signal.SIGSTOP)  # breaks no connection: a[0] waits for it in a collective of FSDP's
        goes_on(job, b, stopped)
        ends_by_itself(job, a[0])
        assert "waits for it in vain and ends now" in a[0].log
        assert "all_gather" in a[0].log or "reduce_scatter" in a[0].log, "the stack says where it waited"
        a[1].kill()  # as its supervisor does: the whole group is gone
        a = job.start_group("a", 2, *args)
        train_together(job, a, b)
        assert all(in_place(rank) >= shards for rank in a)
        assert all(len(rank.failures()) <= n + 1 for rank, n in zip(b, before, strict=True))

        ends = job.finish()
        assert len(ends) == 4
        assert len({(e["step"], e["batches"]) for e in ends}) == 1
        hashes = [rank.of("end")[0]["hash"] for rank in (*a, *b)]
        assert hashes[:2] == hashes[2:], "each rank has what the same rank of the other group has"
        assert hashes[0] != hashes[1]
    finally:
        job.close()


@pytest.mark.timeout(200)  # it starts four processes
def test_a_stopped_rank_0_ends_its_group_and_costs_the_other_a_step(tmp_path: Path) -> None:
    chosen = tmp_path / "transport"
    chosen.write_text("http")
    # The lighthouse hears of the group by its rank 0 alone: it is the one to miss it.
    job = Job(tmp_path, trainer=SCRIPT, join_timeout_ms=60_000, heartbeat_timeout_ms=5000)
    try:
        a, b = (job.start_group(name, 2, "--transport-file", str(chosen)) for name in "ab")
        train_together(job, a, b)
        before = [len(rank.failures()) for rank in a]
        stopped = b[0].signal(signal.SIGSTOP)
        goes_on(job, a, stopped)
        ends_by_itself(job, b[1], lost=0)
        assert "no sign of life for" in b[1].log
        assert "waits for it in vain and ends now" in b[1].log
        assert "all_gather" in b[1].log or "reduce_scatter" in b[1].log, "the stack says where it waited"
        assert all(len(rank.failures()) <= n + 1 for rank, n in zip(a, before, strict=True))
    finally:
        job.close()
