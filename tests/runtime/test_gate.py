"""The gate: nobody reads while the writer writes."""

from __future__ import annotations

import threading

import pytest

from torchft.runtime.gate import Gate

WAIT = 60.0


def test_readers_read_together_while_it_is_open() -> None:
    gate = Gate()
    with gate.reading(0), gate.reading(0):
        pass
    gate.close(0)


def test_closed_gate_lets_nobody_in_until_it_opens() -> None:
    gate = Gate()
    gate.close(0)
    with pytest.raises(TimeoutError, match="being written"), gate.reading(0.01):
        pytest.fail("the gate was closed")
    entered = threading.Event()

    def read() -> None:
        with gate.reading(WAIT):
            entered.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert not entered.is_set()
    gate.open()
    assert entered.wait(WAIT)
    reader.join(WAIT)
    gate.close(0)


def test_closing_waits_for_those_that_read() -> None:
    gate = Gate()
    closed = threading.Event()

    def close() -> None:
        gate.close(WAIT)
        closed.set()

    with gate.reading(0):
        writer = threading.Thread(target=close)
        writer.start()
        assert not closed.wait(0.02)
    assert closed.wait(WAIT)
    writer.join(WAIT)


def test_closing_gives_up_on_a_reader_and_stays_closed() -> None:
    gate = Gate()
    with gate.reading(0):
        with pytest.raises(TimeoutError, match="still being read"):
            gate.close(0.01)
        with pytest.raises(TimeoutError, match="being written"), gate.reading(0):
            pytest.fail("the gate was closed")


def test_reader_that_fails_leaves() -> None:
    gate = Gate()
    with pytest.raises(ValueError, match="broken"), gate.reading(0):
        raise ValueError("broken")
    gate.close(0)
    gate.open()
    with gate.reading(0):
        pass
