"""A transfer's thread may be lost inside a wait, and only there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import Work

from torchft.checkpointing.pg_lane import Lane, Lost
from torchft.process_group.lost_works import Ending

PLENTY = 60.0
LIMIT = timedelta(seconds=PLENTY)


class Stuck(Work):
    """A work that its backend has forgotten, until the test lets its wait end."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Event()
        self.end = threading.Event()

    def wait_here(self, timeout: timedelta) -> bool:
        self.waiting.set()
        assert self.end.wait(PLENTY)
        return True


class Scene:
    """A lane with a job, and the thread that runs it."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.ending = Ending()
        self.lane = Lane(self.ending)
        self.work = Stuck()
        self.ended = threading.Event()

    def start(self, job: Callable[[], None]) -> None:
        def whole() -> None:
            try:
                job()
            finally:
                self.ended.set()

        self.running = self.pool.submit(self.lane.run, whole, "lane")


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ThreadPoolExecutor(2) as pool:
        made = Scene(pool)
        try:
            yield made
        finally:
            made.work.end.set()


def test_the_job_is_waited_for_and_its_error_is_the_callers(scene: Scene) -> None:
    scene.work.end.set()
    done: list[int] = []

    def job() -> None:
        for n in range(3):
            scene.lane.wait(scene.work, LIMIT)
            done.append(n)
        raise KeyError("of the job")

    scene.start(job)
    with pytest.raises(KeyError, match="of the job"):
        scene.running.result(PLENTY)
    assert done == [0, 1, 2]
    assert not scene.ending._listeners


def test_works_that_are_given_up_end_the_call_and_the_thread_does_nothing_more(scene: Scene) -> None:
    wrote: list[str] = []

    def job() -> None:
        scene.lane.wait(scene.work, LIMIT)
        wrote.append("into memory that is the caller's again")

    scene.start(job)
    assert scene.work.waiting.wait(PLENTY)
    scene.ending.give_up("the group was aborted")
    with pytest.raises(Lost, match="the group was aborted"):
        scene.running.result(PLENTY)
    assert not scene.ended.is_set()
    scene.work.end.set()
    assert scene.ended.wait(PLENTY)
    assert not wrote


def test_the_call_does_not_end_while_the_job_is_at_work(scene: Scene) -> None:
    at_work, go_on = threading.Event(), threading.Event()
    wrote: list[str] = []

    def job() -> None:
        at_work.set()
        assert go_on.wait(PLENTY)
        wrote.append("before the call returned")
        scene.lane.wait(scene.work, LIMIT)
        wrote.append("after it")

    scene.start(job)
    assert at_work.wait(PLENTY)
    scene.ending.give_up("the group was aborted")
    assert not scene.running.done()
    go_on.set()
    with pytest.raises(Lost):
        scene.running.result(PLENTY)
    assert wrote == ["before the call returned"]
    scene.work.end.set()
    assert scene.ended.wait(PLENTY)
    assert wrote == ["before the call returned"]


def test_a_group_that_has_given_up_already_lets_the_job_get_to_its_first_wait_at_most(scene: Scene) -> None:
    scene.ending.give_up("it was over before")
    steps: list[str] = []

    def job() -> None:
        steps.append("begun")
        scene.lane.wait(scene.work, LIMIT)
        steps.append("waited")

    scene.start(job)
    with pytest.raises(Lost, match="it was over before"):
        scene.running.result(PLENTY)
    scene.work.end.set()
    assert steps in ([], ["begun"])
