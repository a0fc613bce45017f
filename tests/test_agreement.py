"""The ranks of a group do something together, or none of them does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from torchft.agreement import Agreement, NotAgreed


@pytest.fixture
def ranks() -> Callable[..., list[Agreement]]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def make(
        number: int, timeout: float = 60.0, failed: Callable[[], Exception | None] = lambda: None
    ) -> list[Agreement]:
        clients = [TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False) for _ in range(number)]
        return [Agreement(c, "life", rank, number, timeout, failed) for rank, c in enumerate(clients)]

    return make


def outcomes(calls: list[Callable[[], None]]) -> list[str]:
    def outcome(call: Callable[[], None]) -> str:
        try:
            call()
        except NotAgreed as e:
            return str(e)
        return "go"

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def test_all_go_when_all_are_ready(ranks: Callable[..., list[Agreement]]) -> None:
    group = ranks(3)
    for topic in ("7/save", "7/load"):
        assert outcomes([lambda a=a, t=topic: a.agree(t) for a in group]) == ["go"] * 3


def test_one_that_does_not_come_keeps_all_back_at_once(ranks: Callable[..., list[Agreement]]) -> None:
    a, b, c = ranks(3)
    began = time.monotonic()
    told = outcomes([lambda: a.agree("7"), lambda: b.refuse("7", "no route to the other group"), lambda: c.agree("7")])
    cause = "rank 1 of this group does not come: no route to the other group"
    assert told == [cause, "go", cause]
    assert time.monotonic() - began < 30.0
    with pytest.raises(NotAgreed, match="no route"):
        b.agree("7")  # what is decided stays decided


def test_whoever_gives_up_waiting_decides_for_all(ranks: Callable[..., list[Agreement]]) -> None:
    a, b = ranks(2, timeout=0.05)
    with pytest.raises(NotAgreed, match=r"ranks \[1\] of this group did not come within 0.05 s"):
        a.agree("7")
    with pytest.raises(NotAgreed, match=r"ranks \[1\]"):
        b.agree("7")  # it comes late, and alone


def test_the_end_of_the_step_ends_the_wait(ranks: Callable[..., list[Agreement]]) -> None:
    errors: list[Exception] = []
    asked = threading.Event()

    def failed() -> Exception | None:
        error = errors[0] if errors else None
        asked.set()
        return error

    a, _ = ranks(2, failed=failed)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.agree, "7")
        assert asked.wait(60)
        errors.append(RuntimeError("rank 1 of this group is no longer there"))
        with pytest.raises(NotAgreed, match="no longer there"):
            waiting.result(60)


def test_alone_there_is_nothing_to_agree(ranks: Callable[..., list[Agreement]]) -> None:
    [only] = ranks(1)
    only.refuse("7", "whatever")
    only.agree("7")
