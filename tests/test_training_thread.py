"""Calls that only the training thread may make."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from torchft.training_thread import TrainingThread


def test_a_call_is_made_by_the_training_thread_while_it_waits() -> None:
    training = TrainingThread()
    training.begin()
    quorum: Future[None] = Future()

    def background() -> tuple[int, str]:
        where = training.call(threading.get_ident, 30.0)
        with pytest.raises(ValueError, match="cannot gather") as e:
            training.call(lambda: fail("cannot gather"), 30.0)
        quorum.set_result(None)
        return where, str(e.value)

    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(background)
        training.wait(quorum, collective=False)
        assert told.result(30.0) == (threading.get_ident(), "cannot gather")


def fail(text: str) -> None:
    raise ValueError(text)


def test_another_thread_that_waits_makes_no_calls_unless_it_runs_a_collective() -> None:
    training = TrainingThread()
    training.begin()
    quorum: Future[None] = Future()
    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(training.wait, quorum, False)
        with pytest.raises(TimeoutError, match="did not come within"):
            training.call(lambda: None, 0.05)
        pool.submit(training.wait, quorum, True)  # as autograd's thread, in the middle of the backward pass
        assert training.call(threading.get_ident, 30.0) != threading.get_ident()
        quorum.set_result(None)
        watching.result(30.0)


def test_a_timeout_of_the_call_itself_is_passed_on() -> None:
    training = TrainingThread()
    training.begin()
    quorum: Future[None] = Future()

    def late() -> None:
        raise TimeoutError("a rank of the group did not answer")

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(training.call, late, 30.0)
        asked.add_done_callback(lambda _: quorum.set_result(None))
        training.wait(quorum, collective=False)
        with pytest.raises(TimeoutError, match="a rank of the group did not answer"):
            asked.result(30.0)
