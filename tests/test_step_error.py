from __future__ import annotations

from torchft.step_error import StepError


def test_only_the_first_error_of_a_step_counts() -> None:
    seen: list[Exception] = []
    error = StepError(seen.append)
    error.begin()
    first, second = RuntimeError("first"), RuntimeError("second")
    error.report(first)
    error.report(second)
    assert error.current is first
    assert seen == [first]


def test_what_fails_after_the_next_step_began_is_dropped() -> None:
    seen: list[Exception] = []
    error = StepError(seen.append)
    error.begin()
    late = error.reporter()
    error.begin()
    late(RuntimeError("late"))
    assert error.current is None
    assert seen == []
    error.reporter()(RuntimeError("now"))
    assert str(error.current) == "now"
