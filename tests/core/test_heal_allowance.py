"""A heal costs the others a share of the time that was waited for it, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.core.heal_allowance import FREE, SLOWEST, allowance, hopeless, seconds_until_allowed

SECONDS = st.floats(0.0, 1e5)
POSITIVE = st.floats(1e-3, 1e5)
BOUND = st.none() | POSITIVE
RATE = st.floats(1.0, 1e10)


@pytest.mark.parametrize(
    ("waited", "timeout", "bound", "step", "allowed"),
    [
        (0.0, 60.0, None, 0.0, FREE),
        (20.0, 60.0, None, 0.1, FREE),
        (20.0, 60.0, None, 15.0, 15.0),
        (160.0, 60.0, None, 15.0, 16.0),
        (10_000.0, 60.0, None, 0.0, 60.0),
        (0.0, 60.0, None, 90.0, 60.0),
        (0.0, 1.0, None, 0.0, 1.0),
        (0.0, 60.0, 30.0, 40.0, 30.0),
        (10_000.0, 60.0, 0.5, 15.0, 0.5),
        (0.0, 60.0, 3600.0, 0.0, 60.0),
    ],
)
def test_what_is_allowed_grows_with_the_waiting_unless_a_bound_is_set(
    waited: float, timeout: float, bound: float | None, step: float, allowed: float
) -> None:
    assert allowance(waited, timeout, bound, step) == allowed


@given(needed=SECONDS, waited=SECONDS, timeout=POSITIVE, bound=BOUND, step=SECONDS, rate=RATE)
def test_the_time_that_is_told_is_when_it_is_allowed(
    needed: float, waited: float, timeout: float, bound: float | None, step: float, rate: float
) -> None:
    wait = seconds_until_allowed(needed, waited, timeout, bound, step, rate)
    if wait is None:
        assert needed > allowance(1e12, timeout, bound, step, rate), "not even after any time"
    else:
        assert needed <= allowance(waited + wait, timeout, bound, step, rate) * (1 + 1e-9)
        assert wait == 0 or needed > allowance(waited + 0.99 * wait, timeout, bound, step, rate)


@pytest.mark.parametrize(
    ("rate", "bound", "step", "allowed"),
    [
        (SLOWEST, None, 0.0, 16.0),
        (0.99 * SLOWEST, None, 0.0, FREE),
        (0.99 * SLOWEST, None, 15.0, 15.0),
        (0.99 * SLOWEST, 30.0, 0.0, 30.0),
    ],
)
def test_no_waiting_pays_for_a_way_that_is_so_slow_that_it_must_be_a_fault(
    rate: float, bound: float | None, step: float, allowed: float
) -> None:
    assert allowance(160.0, 60.0, bound, step, rate) == allowed
    never = seconds_until_allowed(40.0, 160.0, 60.0, bound, step, rate) is None
    assert never == (rate < SLOWEST or bound is not None)


@given(needed=POSITIVE, timeout=POSITIVE)
def test_without_a_bound_and_over_a_sound_way_whatever_fits_the_timeout_is_taken_for_a_tenth_of_the_time(
    needed: float, timeout: float
) -> None:
    wait = seconds_until_allowed(needed, 0.0, timeout)
    if needed > timeout:
        assert wait is None
    else:
        assert wait is not None
        assert needed <= max(FREE, (wait + needed) / 10)


@given(passed=SECONDS, rest=SECONDS, left=SECONDS, allowed=POSITIVE)
def test_what_is_nearly_there_or_not_much_too_late_is_not_given_up(
    passed: float, rest: float, left: float, allowed: float
) -> None:
    if rest <= 2 * left and (rest <= passed or passed + rest <= 2 * allowed):
        assert not hopeless(passed, rest, left, allowed)
    else:
        assert hopeless(passed, rest, left, allowed)


def test_a_slow_transfer_is_given_up_soon_and_one_that_gets_slow_late_is_not() -> None:
    assert hopeless(1.0, 15.0, 59.0, FREE), "16 s where 2 are allowed"
    assert not hopeless(1.0, 15.0, 59.0, 16.0)
    assert not hopeless(1.0, 30.0, 59.0, 16.0), "it was measured too well, by less than two"
    assert hopeless(1.0, 32.0, 59.0, 16.0)
    assert not hopeless(17.0, 16.0, 43.0, 16.0), "half is there"
    assert hopeless(58.0, 5.0, 2.0, 16.0), "the timeout comes first"
