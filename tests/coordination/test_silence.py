"""When a server that does not answer counts as silent: the clock's side of it."""

from __future__ import annotations

from torchft.coordination.silence import Silence

T = 5.0


def stands(at: float = 0.0) -> Silence:
    silence = Silence()
    assert not silence.stands(at, T)
    return silence


def test_a_stopped_server_is_silent_a_heartbeat_timeout_after_its_last_sign() -> None:
    silence = stands()
    silence.sign(100.0)
    assert silence.remaining(103.0) is None, "the session stands: pings watch it"
    silence.failed(103.5)  # a ping was not answered
    assert silence.remaining(103.5) == 1.5
    silence.failed(104.9)
    assert silence.begins(104.9) is None
    assert silence.remaining(105.0) == 0.0
    assert silence.begins(105.1) == 105.1 - 100.0


def test_it_is_said_once_until_the_session_stands_again() -> None:
    silence = stands()
    silence.failed(10.0)
    assert silence.begins(11.0) == 11.0
    silence.failed(30.0)
    assert silence.remaining(30.0) is None
    assert silence.begins(30.0) is None
    assert silence.stands(31.0, T), "it was silent until now"
    assert not silence.stands(32.0, T)
    silence.failed(40.0)
    assert silence.begins(41.0) == 9.0


def test_a_server_that_is_found_again_in_time_was_never_silent() -> None:
    silence = stands()
    silence.failed(10.0)
    assert not silence.stands(10.2, T)
    assert silence.remaining(100.0) is None
    assert silence.begins(100.0) is None


def test_a_server_that_answers_is_not_silent_whatever_it_says() -> None:
    silence = stands()
    silence.failed(10.0)
    for at in range(11, 30):
        silence.sign(float(at))  # a refusal
        silence.failed(float(at))
        assert silence.begins(float(at)) is None
    assert silence.begins(29.0 + T) == T


def test_a_member_that_was_stopped_itself_looks_for_the_server_again_first() -> None:
    silence = stands()
    silence.failed(1000.0)  # the last sign is older than any timeout, because nobody was there to hear one
    assert silence.begins(1000.0) is None
    assert silence.remaining(1000.0) == 1.0


def test_a_server_with_which_no_session_stood_is_not_missed() -> None:
    silence = Silence()
    silence.failed(10.0)
    assert silence.remaining(1000.0) is None
    assert silence.begins(1000.0) is None
