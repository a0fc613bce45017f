"""Kept exceptions hold nothing that they passed."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest

from torchft.runtime.tracebacks import anew, without_frames


class Large:
    """Something that is to be freed."""


def test_what_an_exception_passed_is_freed_without_the_cycle_collector() -> None:
    alive: list[weakref.ref[Large]] = []

    def fails() -> None:
        large = Large()
        alive.append(weakref.ref(large))
        try:
            raise KeyError("inner")
        except KeyError as e:
            raise ValueError("outer") from e

    def keeps() -> ValueError:
        kept: list[ValueError] = []
        try:
            fails()
        except ValueError as e:
            kept.append(without_frames(e))
        return kept[0]

    enabled = gc.isenabled()
    gc.disable()
    try:
        error = keeps()
        assert isinstance(error.__cause__, KeyError)
        assert alive[0]() is None
    finally:
        if enabled:
            gc.enable()


def test_exceptions_that_lead_to_each_other_end() -> None:
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert without_frames(a) is a


@pytest.mark.parametrize("contexts", [False, True])
def test_what_the_caller_handles_meanwhile_keeps_its_own_unless_it_is_nobodys(contexts: bool) -> None:
    outer, kept = KeyError("the caller's"), ValueError("kept")
    with contextlib.suppress(KeyError):
        raise outer
    with contextlib.suppress(ValueError):
        raise kept
    kept.__context__ = outer
    assert without_frames(kept, contexts) is kept
    assert kept.__traceback__ is None
    assert (outer.__traceback__ is None) == contexts


class Odd(Exception):
    """One that cannot be made from its arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


def test_one_that_is_kept_may_be_raised_anew() -> None:
    cause = OSError(5, "disk")
    kept = RuntimeError("kept")
    kept.__cause__ = cause
    for _ in range(2):
        with pytest.raises(RuntimeError, match="kept") as e:
            raise anew(kept)
        assert e.value.__cause__ is cause
    assert kept.__traceback__ is None
    odd = Odd(1, 2)
    assert anew(odd) is odd
