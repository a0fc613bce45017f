"""Training goes on while the lighthouse that leads is killed and stopped, and groups join after each of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd import Etcd, needs_etcd, running_etcd, standby
from tests.faults.job import Job, Trainer
from torchft.testing.wait import wait_until

LEASE_MS = 3000
OPTIONS = ("--heartbeat_timeout_ms", "3000", "--join_timeout_ms", "1000")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    with running_etcd(tmp_path) as etcd:
        yield etcd


def together(*trainers: Trainer) -> bool:
    return all(t.newest["participants"] == len(trainers) for t in trainers)


@needs_etcd
def test_no_step_fails_when_the_leader_is_killed_or_stopped_and_groups_join_afterwards(
    etcd: Etcd, tmp_path: Path
) -> None:
    lights = [standby(etcd.url("job"), LEASE_MS, *OPTIONS)]
    job: Job | None = None
    try:
        wait_until(lambda: lights[0].epochs() == [1], what="that the first one leads")
        lights.append(standby(etcd.url("job"), LEASE_MS, *OPTIONS))
        job = Job(tmp_path, addresses=",".join(light.address for light in lights))
        a, b = job.start("a"), job.start("b")
        job.until(lambda: together(a, b), "training together")

        lights[0].process.kill()
        c = job.start("c")
        wait_until(lambda: lights[1].epochs() == [2], what="that the second one leads")
        job.until(lambda: together(a, b, c), "that c joins by the second one")

        # The first one is back, at its address, and stands by.
        former = lights[0]
        former.process.wait()
        lights[0] = standby(etcd.url("job"), LEASE_MS, *OPTIONS, former=former)
        former.end()
        wait_until(lambda: lights[0].said("standby: "), what="that it stands by")
        at = lights[1].stop()
        wait_until(lambda: lights[0].epochs() == [3], what="that it leads")
        job.until(lambda: min(len(t.commits_after(at)) for t in (a, b, c)) >= 20, "that all go on")
        lights[1].process.send_signal(signal.SIGCONT)
        wait_until(lambda: lights[1].said("no longer leads (epoch 2)"), what="that it steps down when it wakes")
        c.kill()
        job.until(lambda: together(a, b), "that a and b go on without c")

        ends = job.finish()
        assert len({e["hash"] for e in ends}) == 1
        dead = c.newest["time"]
        for trainer in (a, b):
            failed = [e for e in trainer.of("step") if e["error"] and e["time"] < dead]
            assert not failed, "nobody's step fails because a lighthouse dies"
    finally:
        if job is not None:
            job.close()
        for light in lights:
            light.end()
