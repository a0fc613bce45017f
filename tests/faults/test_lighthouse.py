"""The only lighthouse is killed in mid-training: nobody's step fails for it, and a job that needs it waits for it."""

from __future__ import annotations

from pathlib import Path

from tests.faults.job import Job, Trainer
from tests.lighthouse import LighthouseProcess
from torchft.core.election import first_id
from torchft.testing.wait import wait_until

PATIENCE = "6"
"""Seconds for which the groups wait for a quorum."""


def together(*trainers: Trainer) -> bool:
    return all(t.newest["participants"] == len(trainers) for t in trainers)


def test_the_lighthouse_is_killed_a_group_joins_when_it_is_back_and_one_that_dies_without_it_is_waited_out(
    tmp_path: Path,
) -> None:
    options = ("--state_file", str(tmp_path / "state"), "--join_timeout_ms", "1000")
    lights = [LighthouseProcess(*options)]
    job = Job(tmp_path, addresses=lights[0].address)
    try:
        a, b = (job.start(name, TORCHFT_QUORUM_TIMEOUT_SEC=PATIENCE) for name in "ab")
        job.until(lambda: together(a, b), "training together")
        wait_until(lambda: 2 in dict(lights[0].quorums()).values(), timeout=60, what="that it logs their quorum")

        killed = lights[0].kill()
        job.until(lambda: min(len(t.commits_after(killed)) for t in (a, b)) >= 20, "that both train on without it")
        c = job.start("c")
        lights.append(LighthouseProcess(*options, former=lights[0]))
        job.until(lambda: together(a, b, c), "that c joins by the one that was started again")
        wait_until(lambda: 3 in dict(lights[1].quorums()).values(), timeout=60, what="that it logs their quorum")
        former, now = (light.quorums() for light in lights)
        assert min(i for i, _ in now) > first_id(2) > max(i for i, _ in former), "no id is used twice"
        assert [a.failures(), b.failures()] == [[], []], "nobody's step fails because a lighthouse dies"

        killed = lights[1].kill()
        job.until(lambda: min(len(t.commits_after(killed)) for t in (a, b, c)) >= 5, "that all train on")
        c.kill()

        def waited(trainer: Trainer) -> list[str]:
            return [error for error in trainer.failures() if "quorum at the lighthouse" in error]

        job.until(lambda: waited(a) and waited(b), "the error of those that wait for the lighthouse")
        for trainer in (a, b):
            error = waited(trainer)[0]
            assert lights[0].address in error, "it says who was asked"
            assert "did not end within" in error, "and for how long"
            assert "torchft_lighthouse --min_replicas" in error, "and what to do"
            after = [e["participants"] for e in trainer.of("step") if e["committed"] and e["time"] > c.newest["time"]]
            assert set(after) <= {3}, "nobody goes on without the word that c is dead"

        lights.append(LighthouseProcess(*options, former=lights[0]))
        job.until(lambda: together(a, b), "that both go on without c")
        wait_until(lambda: lights[2].said("of the last quorum is gone: its process has ended"), timeout=60)
        wait_until(lambda: lights[2].quorums(), timeout=60, what="that it logs their quorum")
        assert min(i for i, _ in lights[2].quorums()) > first_id(3)
        ends = job.finish()
        assert len({e["hash"] for e in ends}) == 1
        assert len({(e["step"], e["batches"]) for e in ends}) == 1
    finally:
        job.close()
        for light in lights:
            light.end()
