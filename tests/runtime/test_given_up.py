"""Waits that end when nobody waits for the answer any more."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchft.runtime.given_up import Flag, GivenUp, Withdrawn


def test_who_waits_for_a_flag_gives_up_when_it_is_said() -> None:
    flag, given_up, other = Flag(), GivenUp(), GivenUp()
    with ThreadPoolExecutor(2) as pool:
        withdrawn, goes_on = (pool.submit(flag.wait, 60.0, each) for each in (given_up, other))
        given_up.say()
        with pytest.raises(Withdrawn):
            withdrawn.result(20)
        assert not goes_on.done()
        flag.set()
        assert goes_on.result(20)
    flag.clear()
    assert not flag.wait(0.01, other)
    with pytest.raises(Withdrawn):
        flag.wait(60.0, given_up)


def test_it_is_said_once_and_to_all_also_to_those_who_come_later() -> None:
    given_up = GivenUp()
    heard: list[str] = []
    given_up.then(lambda: heard.append(threading.current_thread().name))
    given_up.check()
    given_up.say()
    given_up.say()
    given_up.then(lambda: heard.append("late"))
    assert heard == [threading.current_thread().name, "late"]
    with pytest.raises(Withdrawn):
        given_up.check()
