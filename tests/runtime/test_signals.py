from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from torchft.runtime.signals import EndSignals

DEADLINE = 30.0

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals are for the main thread"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_wait_ends_it(number: signal.Signals) -> None:
    with EndSignals() as signals:
        assert not signals.wait(0)
        os.kill(os.getpid(), number)
        assert signals.wait(DEADLINE)
        assert signals.wait(DEADLINE)  # it has come: that does not change


def test_a_signal_that_another_thread_receives_ends_the_wait() -> None:
    # A lock in its place goes on waiting: only the thread that a signal is given to is taken out of its system call.
    with EndSignals() as signals:
        other = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
        other.start()
        assert signals.wait(DEADLINE)
        other.join()


def test_another_signal_that_python_handles_is_none() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with EndSignals([signal.SIGHUP]) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not signals.wait(0.05)
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.wait(DEADLINE)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_afterwards_all_is_as_before() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with EndSignals() as signals:
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (signals._read.fileno(), signals._write.fileno()) == (-1, -1), "they are closed"


def test_another_thread_is_refused_and_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    def pair() -> tuple[socket.socket, socket.socket]:
        made.extend(both := real())
        return both

    real = socket.socketpair
    monkeypatch.setattr(socket, "socketpair", pair)
    refused: list[BaseException] = []

    def enter() -> None:
        try:
            with EndSignals():
                pass
        except ValueError as e:
            refused.append(e)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(refused) == 1
    assert [s.fileno() for s in made] == [-1, -1], "they are closed"
