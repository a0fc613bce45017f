"""The process's loop and its timers, in this process and in a forked child."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import os
import random
import signal
import threading
import time

import pytest

from torchft.runtime.deadline import Deadline
from torchft.runtime.loop import Timer, _Timers, call_later, get_loop, on_loop, submit
from torchft.testing.wait import wait_until

WAIT = 60.0


def until_loop_is_idle() -> None:
    """Returns after all that was due on the loop by now has been done."""
    submit(asyncio.sleep(0)).result(WAIT)


def test_there_is_one_loop_and_it_runs_in_the_background() -> None:
    async def where() -> tuple[asyncio.AbstractEventLoop, bool]:
        return asyncio.get_running_loop(), on_loop()

    loop, there = submit(where()).result(WAIT)
    assert loop is get_loop() is get_loop()
    assert there
    assert not on_loop()


def test_first_use_by_many_threads_starts_one_loop() -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loops = list(pool.map(lambda _: get_loop(), range(32)))
    assert len(set(map(id, loops))) == 1
    assert sum(t.name == "torchft-loop" for t in threading.enumerate()) == 1


def test_submit_carries_errors_and_cancels_the_coroutine() -> None:
    async def fail() -> None:
        raise ValueError("from the loop")

    with pytest.raises(ValueError, match="from the loop"):
        submit(fail()).result(WAIT)

    started, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    future = submit(wait())
    assert started.wait(WAIT)
    future.cancel()
    assert cancelled.wait(WAIT)


def test_timer_calls_back_on_the_loop_and_not_before_it_is_due() -> None:
    done: concurrent.futures.Future[tuple[float, bool]] = concurrent.futures.Future()
    timer = call_later(0.02, lambda: done.set_result((time.monotonic(), on_loop())))
    called_at, there = done.result(WAIT)
    assert called_at >= timer.due
    assert there


def test_delay_in_the_past_is_due_now() -> None:
    done = threading.Event()
    call_later(-5, done.set)
    assert done.wait(WAIT)


def test_cancelled_timer_is_not_called() -> None:
    called: list[str] = []
    last, go_on = threading.Event(), threading.Event()

    async def hold() -> None:
        assert go_on.wait(WAIT)  # no timer is called meanwhile, however long this thread takes

    held = submit(hold())
    cancelled = [call_later(0.01, lambda: called.append("cancelled")) for _ in range(10)]
    call_later(0.02, last.set)
    for timer in cancelled:
        timer.cancel()
        timer.cancel()
    go_on.set()
    held.result(WAIT)
    assert last.wait(WAIT)
    until_loop_is_idle()
    assert called == []


def test_timers_are_called_in_order_of_their_times() -> None:
    called: list[float] = []
    done = threading.Event()
    delays = list(range(50))
    random.Random(1).shuffle(delays)
    slowest = 0.0  # on a busy machine the call itself takes a while, and the time counts from somewhere in it
    for i in delays:
        before = time.monotonic()
        due = before + 0.05 + i * 0.001
        call_later(0.05 + i * 0.001, lambda due=due: called.append(due))  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - before)
    call_later(0.2, done.set)
    assert done.wait(WAIT)
    wait_until(lambda: len(called) == 50)
    assert all(later > earlier - slowest for earlier, later in itertools.pairwise(called))


def test_earlier_timer_overtakes_a_later_one_that_was_added_first() -> None:
    soon = threading.Event()
    late = call_later(3600, lambda: None)
    call_later(0.01, soon.set)
    assert soon.wait(WAIT)
    late.cancel()


def test_timer_that_raises_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    after = threading.Event()

    def fail() -> None:
        raise RuntimeError("broken callback")

    with caplog.at_level(logging.ERROR, logger="torchft.runtime.loop"):
        call_later(0.01, fail)
        call_later(0.02, after.set)
        assert after.wait(WAIT)
    assert "broken callback" in caplog.text


def test_callback_may_add_the_next_timer() -> None:
    done = threading.Event()
    left = [5]

    def again() -> None:
        left[0] -= 1
        if left[0]:
            call_later(0.001, again)
        else:
            done.set()

    call_later(0.001, again)
    assert done.wait(WAIT)


def test_timers_of_many_threads_are_each_called_once() -> None:
    n, threads = 200, 8
    lock, counts, done = threading.Lock(), [0] * (n * threads), threading.Event()

    def called(i: int) -> None:
        with lock:
            counts[i] += 1
            if sum(counts) == len(counts):
                done.set()

    def add(t: int) -> None:
        generator = random.Random(t)
        for i in range(n):
            call_later(generator.uniform(0, 0.2), lambda i=t * n + i: called(i))  # type: ignore[misc]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(add, range(threads)))
    assert done.wait(WAIT)
    until_loop_is_idle()
    assert set(counts) == {1}


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = _Timers()
    kept: list[Timer] = [timers.add(3600, lambda: None) for _ in range(10)]
    for _ in range(20_000):
        timers.add(3600, lambda: None).cancel()
    assert len(timers._heap) <= 300
    alive = [entry[2] for entry in timers._heap if entry[2].callback is not None]
    assert sorted(map(id, alive)) == sorted(map(id, kept))


def test_loop_is_woken_once_however_many_timers_came_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = _Timers()
    fired: list[float] = []
    fire = timers._fire

    def count() -> None:
        fired.append(time.monotonic())
        fire()

    monkeypatch.setattr(timers, "_fire", count)
    last = threading.Event()
    timers.add(0.2, last.set)
    for i in reversed(range(1, 20)):  # each is the earliest when it is added
        timers.add(i * 0.01, lambda: None)
    assert last.wait(WAIT)
    until_loop_is_idle()
    assert len(fired) <= 2 * 20, "each timer wakes the loop once (twice if the clock was a tick early)"


def test_steps_of_equal_timeouts_do_not_wake_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = _Timers()
    armed: list[int] = []
    arm = timers._arm

    def count() -> None:
        armed.append(1)
        arm()

    monkeypatch.setattr(timers, "_arm", count)
    for _ in range(100):
        timers.add(60, lambda: None).cancel()
    until_loop_is_idle()
    assert len(armed) == 1


def test_forked_child_has_a_loop_of_its_own() -> None:
    until_loop_is_idle()  # the parent has one
    parents = threading.Event()
    call_later(0.1, parents.set)  # earlier than the child's: its own timers do not know of it
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            parents.clear()  # the parent may have been late
            done = threading.Event()
            call_later(0.2, done.set)
            answer = submit(asyncio.sleep(0, "from the child")).result(WAIT)
            if done.wait(WAIT) and answer == "from the child" and not parents.is_set():
                code = 0
        finally:
            os._exit(code)
    assert exit_code(pid) == 0
    assert parents.wait(WAIT)
    done = threading.Event()
    call_later(0.01, done.set)
    assert done.wait(WAIT), "the parent's loop goes on"


def exit_code(pid: int) -> int:
    """Waits for the child; kills it when it takes too long."""
    deadline = Deadline(2 * WAIT)
    never = threading.Event()
    while not deadline.expired:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        never.wait(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child did not end")
