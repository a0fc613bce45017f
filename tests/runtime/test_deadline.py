"""A deadline runs from its making, however often it is asked."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from torchft.runtime.deadline import LONGEST, Deadline, seconds


@pytest.mark.parametrize(
    ("timeout", "expected"), [(timedelta(milliseconds=1500), 1.5), (2, 2.0), (0.25, 0.25), (timedelta(days=1), 86400.0)]
)
def test_timeout_may_be_a_timedelta_or_seconds(timeout: timedelta | float, expected: float) -> None:
    assert seconds(timeout) == expected
    assert Deadline(timeout).timeout == expected


def test_remaining_goes_down_and_never_below_zero() -> None:
    deadline = Deadline(3600)
    first = deadline.remaining()
    second = deadline.remaining()
    assert 3600 >= first >= second > 3500
    assert not deadline.expired
    past = Deadline(timedelta(seconds=-1))
    assert past.remaining() == 0.0
    assert past.expired


@pytest.mark.parametrize(("timeout", "less"), [(60.0, 1.0), (2.0, 1.0), (1.0, 0.5), (0.1, 0.05)])
def test_another_process_gets_less_so_that_its_answer_comes_before_the_end(timeout: float, less: float) -> None:
    deadline = Deadline(timeout)
    before = deadline.remaining()
    told = deadline.remaining_to_answer()
    assert max(0.0, deadline.remaining() - less) <= told <= max(0.0, before - less)
    assert Deadline(0).remaining_to_answer() == Deadline(-10).remaining_to_answer() == 0.0


def test_expires_when_its_time_has_passed() -> None:
    deadline = Deadline(0.02)
    never = threading.Event()
    while not deadline.expired:
        never.wait(deadline.remaining())
    assert time.monotonic() >= deadline.at
    assert deadline.remaining() == 0.0


def test_repr_says_what_was_asked_and_what_is_left() -> None:
    assert repr(Deadline(-2)) == "Deadline(-2s, 0.000s left)"


def test_what_is_longer_than_ten_years_can_be_waited_for() -> None:
    deadline = Deadline(timedelta.max)
    assert threading.Lock().acquire(timeout=deadline.remaining())
    assert timedelta(seconds=deadline.remaining()) <= LONGEST
