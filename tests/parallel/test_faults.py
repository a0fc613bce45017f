"""Two groups of two ranks under FSDP2: a rank is stopped, a rank is killed, a whole group is killed. It costs the
other group a step each time, and the group that comes back heals shard by shard.

The collectives inside a group have half an hour, those between groups a minute: nothing here would end in time if it
waited for one of those.
"""

from __future__ import annotations

import signal
from pathlib import Path

from tests.faults.job import Job, Trainer

SCRIPT = Path(__file__).with_name("trainer.py")
SOON = 25.0
"""Seconds: more than it takes to miss a rank's signs of life (5) and the grace (2), far less than any timeout."""


def train_together(job: Job, *groups: list[Trainer]) -> None:
    ranks = [t for group in groups for t in group]
    job.until(lambda: all(t.newest["participants"] == len(groups) for t in ranks), "training together")


def goes_on(job: Job, group: list[Trainer], since: float) -> None:
    job.until(lambda: all(len(t.commits_after(since)) >= 3 for t in group), "going on", SOON)


def ends_by_itself(job: Job, rank: Trainer) -> None:
    rank.exits.add(1)
    job.until(lambda: rank.process.poll() == 1, "the end of the rank that lost the other", SOON)
    assert "rank 1 of this group is no longer there" in rank.log, rank.log[-3000:]


def in_place(rank: Trainer) -> int:
    """Bytes that its heal received straight into its own shards."""
    line = next(line for line in rank.log.splitlines() if "of them in place" in line)
    return int(line.split(" of them in place")[0].rsplit(" ", 1)[1])


def test_a_stopped_rank_a_killed_rank_and_a_killed_group_cost_the_others_a_step_and_heal(tmp_path: Path) -> None:
    chosen = tmp_path / "transport"
    chosen.write_text("http")
    args = ("--transport-file", str(chosen))
    job = Job(tmp_path, trainer=SCRIPT, join_timeout_ms=60_000, heartbeat_timeout_ms=60_000)
    try:
        a, b = job.start_group("a", 2, *args), job.start_group("b", 2, *args)
        train_together(job, a, b)

        stopped = b[1].signal(signal.SIGSTOP)  # breaks no connection: b[0] waits for it in a collective of FSDP's
        goes_on(job, a, stopped)
        ends_by_itself(job, b[0])
        assert "waits for it in vain and ends now" in b[0].log
        assert "all_gather" in b[0].log or "reduce_scatter" in b[0].log, "the stack says where it waited"
        b[1].kill()  # as its supervisor does

        b = job.start_group("b", 2, *args)
        train_together(job, a, b)
        shards = 3 * 256 * 256 * 4 // 2
        assert all(in_place(rank) >= shards for rank in b)

        chosen.write_text("pg")
        killed = b[1].kill()
        goes_on(job, a, killed)
        ends_by_itself(job, b[0])
        b = job.start_group("b", 2, *args)
        train_together(job, a, b)
        assert all(in_place(rank) >= shards for rank in b)

        failures = [len(rank.failures()) for rank in a]
        for rank in a:
            killed = rank.kill()
        goes_on(job, b, killed)
        a = job.start_group("a", 2, *args)
        train_together(job, a, b)

        ends = job.finish()
        assert len(ends) == 4
        assert len({(e["step"], e["batches"]) for e in ends}) == 1
        hashes = [rank.of("end")[0]["hash"] for rank in (*a, *b)]
        assert hashes[:2] == hashes[2:], "each rank has what the same rank of the other group has"
        assert hashes[0] != hashes[1]
        assert max(failures) <= 2, "two faults of b cost a two steps"
        assert all(len(rank.failures()) <= 1 for rank in b)
    finally:
        job.close()
