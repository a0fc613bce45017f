"""SIGTERM is listened to by Managers that drain, and by nobody else."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from torchft.departure import listen_for_sigterm
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo


@pytest.fixture(autouse=True)
def handler() -> Iterator[object]:
    """What SIGTERM does before the test, and after it."""
    former = signal.getsignal(signal.SIGTERM)
    yield former
    signal.signal(signal.SIGTERM, former)


def fail_to_make_a_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(ValueError, match="no lighthouse"):
        Manager(ProcessGroupGloo(), None, None, 1, rank=0, world_size=1, drain=True)


def test_a_manager_that_cannot_be_set_up_leaves_sigterm_as_it_was(
    handler: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_make_a_manager(monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_it_does_not_take_sigterm_from_another_manager_that_drains(
    handler: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = listen_for_sigterm()
    ours = signal.getsignal(signal.SIGTERM)
    assert ours is not handler
    fail_to_make_a_manager(monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is ours
    undo()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_handler_that_was_set_meanwhile_stays() -> None:
    undo = listen_for_sigterm()

    def theirs(*_: object) -> None: ...

    signal.signal(signal.SIGTERM, theirs)
    undo()
    assert signal.getsignal(signal.SIGTERM) is theirs
