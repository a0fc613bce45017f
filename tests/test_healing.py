"""Healing beside the others' steps: from all groups that have the state, slowly, or not at all; never by half."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from tests.checkpointing.loopback import address_of
from tests.groups import Groups, Replica, running
from torchft.checkpointing import HTTPTransport, StepNotServed
from torchft.runtime.deadline import Deadline
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until

MB = 1 << 20
LONG = timedelta(seconds=60)
"""A heal may take as long as any transfer."""


class Big(Replica):
    """A replica with a large piece of state, which each committed step changes, behind a link of its own."""

    def __init__(self, stack: ExitStack, groups: Groups, name: str, megabytes: int, **kwargs: Any) -> None:
        self.big = torch.zeros(megabytes * MB // 4)
        timeout = kwargs.setdefault("timeout", timedelta(seconds=20))
        self.transport: HTTPTransport[Any] = HTTPTransport(
            timeout, snapshot="lock", hostname="127.0.0.1", state_dict=self.all_state
        )
        super().__init__(groups.lighthouse.address(), name, checkpoint_transport=self.transport, **kwargs)
        self.manager.register_state_dict_fn("big", self.load_big, lambda: {"big": self.big})
        groups._replicas.append(self)
        self.link = stack.enter_context(Link(address_of(self.transport)))
        self.transport.metadata = lambda: f"torchft-http/1 http://{self.link.address}"  # type: ignore[method-assign]
        self.committed: list[float] = []
        self.groups = groups

    def load_big(self, state: dict[str, torch.Tensor]) -> None:
        self.big.copy_(state["big"])

    def all_state(self) -> Any:
        return self.manager.live_state()

    def train(self) -> None:
        """Until the groups end together."""
        limit = Deadline(150)
        while not self.groups.at_the_end(self.manager.current_step()):
            assert not limit.expired, self.manager.errored()
            self.optimizer.zero_grad()
            self.compute(1.0)
            time.sleep(0.01)  # the host waits for its accelerator
            if self.manager.should_commit():
                self.inner.step()
                self.big.add_(1.0)
                self.committed.append(time.monotonic())

    def longest_gap(self, since: float, until: float) -> float:
        times = [t for t in self.committed if since <= t <= until]
        return max(b - a for a, b in zip([since, *times], [*times, until], strict=True))


@contextmanager
def jobs(heartbeat_timeout_ms: int = 5000, join_timeout_ms: int = 100) -> Iterator[tuple[ExitStack, Groups]]:
    limits = {"heartbeat_timeout_ms": heartbeat_timeout_ms, "join_timeout_ms": join_timeout_ms}
    with running(**limits) as groups, ExitStack() as stack:
        yield stack, groups


until = partial(wait_until, timeout=120.0)


def finish(replicas: list[Big], running: list[Any]) -> None:
    """All, which train together, stop at one step, with the same state."""
    replicas[0].groups.finishing.set()
    for future in running:
        future.result(100)
    assert len({r.manager.current_step() for r in replicas}) == 1
    assert len({r.weights() for r in replicas}) == 1
    assert all(torch.equal(r.big, replicas[0].big) for r in replicas)


def test_a_receiver_that_is_slow_does_not_lengthen_the_others_steps_and_heals_when_it_can(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchft.heal_pause._SELDOM", 1.0)
    with caplog.at_level("INFO"), jobs(join_timeout_ms=3000) as (stack, groups):
        timeout = timedelta(seconds=60)
        a, b = (Big(stack, groups, name, 32, timeout=timeout) for name in ("a", "b"))
        trains = [groups.start(a.train), groups.start(b.train)]
        until(lambda: a.committed and b.committed)
        for r in (a, b):
            r.link.throttle(1e6)  # 17 s from both at the same time, which the timeout would allow
        offers = [offers_of(r) for r in (a, b)]
        began = time.monotonic()
        c = Big(stack, groups, "c", 32, timeout=timeout)
        trains.append(groups.start(c.train))
        until(lambda: "the way to the groups that have the state is too slow" in caplog.text)
        tried, before = ([len(o) for o in offers], c.transport.last_receive), len(a.committed)
        until(lambda: len(a.committed) > before + 100)
        longest = a.longest_gap(began, time.monotonic())
        assert not c.committed
        assert tried == ([len(o) for o in offers], c.transport.last_receive), "nobody offers, nobody receives"
        assert sum(tried[0]) == 2, "one try, in one step"
        assert longest < 10, "which is less than the transfer would take"
        assert caplog.text.count("the way to the groups that have the state is too slow") == 1
        assert c.manager._progress.failures == 1, "to wait is no failure"
        a.link.restore()
        b.link.restore()
        until(lambda: c.committed)
        assert sum(len(o) for o in offers) > 2
        finish([a, b, c], trains)


def test_a_slow_receiver_is_waited_for_where_the_others_are_too_few_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"), jobs() as (stack, groups):
        a = Big(stack, groups, "a", 4, min_replica_size=2)
        a.manager.load_state_dict({"step": 5, "batches_committed": 5})
        a.link.throttle(8e6)  # half a second
        b = Big(stack, groups, "b", 4, min_replica_size=2, heal_pause=timedelta(milliseconds=10))
        trains = [groups.start(r.train) for r in (a, b)]
        until(lambda: b.committed)
        assert "TooSlow" not in caplog.text
        assert "is too slow" not in caplog.text
        finish([a, b], trains)


def offers_of(replica: Big) -> list[int]:
    """The steps whose state it offers from now on."""
    offers: list[int] = []
    real = replica.transport.send_checkpoint

    def offer(dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        offers.append(step)
        real(dst_ranks, step, state_dict, timeout)

    replica.transport.send_checkpoint = offer  # type: ignore[method-assign]
    return offers


def test_source_lost_in_the_middle_of_a_heal_the_receiver_goes_on_with_the_others() -> None:
    with jobs() as (stack, groups):
        a, b = (Big(stack, groups, name, 96) for name in ("a", "b"))
        trains = [groups.start(a.train), groups.start(b.train)]
        until(lambda: len(a.committed) >= 2 and len(b.committed) >= 2)
        a.link.throttle(60e6)
        b.link.throttle(60e6)
        c = Big(stack, groups, "c", 96, heal_pause=LONG)
        trains.append(groups.start(c.train))
        until(lambda: c.transport.last_receive is not None and c.transport.last_receive.done >= 16 * MB)
        for link in (a.link,):
            link.refuse()
            link.cut()
        until(lambda: c.committed)
        progress = c.transport.last_receive
        assert progress is not None
        assert progress.received < 1.3 * progress.total, "it did not begin again"
        assert progress.sources == 2
        finish([a, b, c], trains)


def test_all_sources_lost_in_the_middle_no_half_state_is_used_or_given_away() -> None:
    with jobs() as (stack, groups):
        a = Big(stack, groups, "a", 96)
        trains = [groups.start(a.train)]
        until(lambda: len(a.committed) >= 2)
        a.link.throttle(60e6)
        b = Big(stack, groups, "b", 96, heal_pause=LONG)
        trains.append(groups.start(b.train))
        until(lambda: b.transport.last_receive is not None and b.transport.last_receive.done >= 16 * MB)
        a.link.refuse()
        a.link.cut()
        until(lambda: b.manager.errored() is not None)
        assert not b.manager._state.usable
        assert not b.committed
        before = len(a.committed)
        until(lambda: len(a.committed) >= before + 10)  # the receiver's process goes on, and the source is not held up
        # Somebody else joins meanwhile: it is not b that is asked for the state.
        c = Big(stack, groups, "c", 96, heal_pause=LONG)
        trains.append(groups.start(c.train))
        offered: list[object] = []
        real = b.transport.send_checkpoint
        b.transport.send_checkpoint = lambda *args, **kw: (offered.append(args or kw), real(*args, **kw))[1]  # type: ignore[method-assign]
        until(lambda: c.manager.errored() is not None)
        assert not offered
        a.link.restore()
        until(lambda: b.committed and c.committed)
        finish([a, b, c], trains)


def test_sources_that_cannot_give_their_state_train_on_and_the_joiner_is_told_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchft.heal_pause._SOON", 0.05)
    monkeypatch.setattr("torchft.heal_pause._ASKED_AGAIN", 0.05)
    broken, goal = threading.Event(), list[int]()

    def sampler() -> int:
        if broken.is_set():
            raise OSError("the sampler's file is gone")
        return 1

    def train(r: Replica) -> list[bool]:
        limit, committed = Deadline(150), []
        while not goal or r.manager.current_step() < goal[0]:
            assert not limit.expired, r.manager.errored()
            r.optimizer.zero_grad()
            r.compute(1.0)
            committed.append(r.manager.should_commit())
            if committed[-1]:
                r.inner.step()
        return committed

    with caplog.at_level("INFO"), running(heartbeat_timeout_ms=60_000, join_timeout_ms=60_000) as groups:
        a, b = (groups.replica(name) for name in ("a", "b"))
        for r in (a, b):
            r.manager.register_state_dict_fn("sampler", lambda state: None, sampler)
        together = groups.train_together((a.manager, a.step), (b.manager, b.step))
        broken.set()
        c = groups.replica("c", seed=1)
        c.manager.register_state_dict_fn("sampler", lambda state: None, sampler)
        before = c.weights()
        loops = [groups.start(lambda r=r: train(r)) for r in (a, b, c)]
        until(lambda: "no group gives its state to this one" in caplog.text)
        at = a.manager.current_step()
        assert at > together, "they train on"
        until(lambda: a.manager.current_step() > at + 20)
        assert c.manager.current_step() == c.manager.batches_committed() == 0
        assert c.weights() == before
        until(lambda: c.manager._state.usable)  # between two tries: nothing was written
        broken.clear()
        until(lambda: c.manager.current_step() > at + 20)  # it has healed
        goal.append(max(r.manager.current_step() for r in (a, b, c)) + 5)
        committed = [loop.result(60) for loop in loops]
        assert {r.manager.current_step() for r in (a, b, c)} == {goal[0]}
        assert a.weights() == b.weights() == c.weights() != before
        assert a.manager.batches_committed() == b.manager.batches_committed() == c.manager.batches_committed()
    assert all(committed[0]), "no step is lost for the joiner"
    assert all(committed[1])
    lines = [r.getMessage() for r in caplog.records]
    said = [line for line in lines if "this group trains on, but cannot give its state" in line]
    assert len(said) == 2, "once at each source"
    why = "the state dict function 'sampler' raised OSError: the sampler's file is gone"
    assert all(why in line and "test_healing.py, line" in line for line in said)
    told = [line for line in lines if line.startswith("[c:") and "is not healed in this step" in line]
    assert told
    assert f"could not be offered: {why}" in told[0]


def test_where_one_rank_cannot_give_its_state_no_rank_of_the_joiner_heals_and_the_others_train_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchft.heal_pause._REFUSALS", 1)
    monkeypatch.setattr("torchft.heal_pause._SOON", 0.05)
    monkeypatch.setattr("torchft.heal_pause._ASKED_AGAIN", 0.05)
    broken, goal, stores = threading.Event(), list[int](), list[TCPStore]()
    broken.set()

    def sampler(name: str, rank: int) -> int:
        if (name, rank) == ("a", 1) and broken.is_set():
            raise OSError("the sampler's file is gone")
        return rank

    def group(name: str) -> list[Replica]:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        options = {"store_addr": "127.0.0.1", "store_port": stores[-1].port, "world_size": 2, "seed": ord(name)}
        ranks = groups.together(*(lambda r=r: groups.replica(name, rank=r, **options) for r in range(2)))
        for rank, r in enumerate(ranks):
            r.manager.register_state_dict_fn("sampler", lambda state: None, lambda rank=rank: sampler(name, rank))
        return ranks

    def train(r: Replica) -> None:
        """Notes of each step whether it was committed, and why not."""
        limit = Deadline(150)
        while not goal or r.manager.current_step() < goal[0]:
            assert not limit.expired, r.manager.errored()
            r.optimizer.zero_grad()
            r.compute(1.0)
            committed = r.manager.should_commit()
            steps[r].append((committed, r.manager.errored()))
            if committed:
                r.inner.step()

    def committed(r: Replica) -> list[bool]:
        return [yes for yes, _ in steps[r]]

    with running(heartbeat_timeout_ms=60_000, join_timeout_ms=60_000) as groups:
        a = group("a")
        groups.together(*(r.step for r in a))
        b = group("b")
        steps: dict[Replica, list[tuple[bool, Exception | None]]] = {r: [] for r in (*a, *b)}
        loops = [groups.start(lambda r=r: train(r)) for r in steps]
        until(lambda: "no group gives its state to this one" in caplog.text)
        before = len(steps[a[0]])
        until(lambda: len(steps[a[0]]) > before + 5)
        assert not any(committed(b[0]) + committed(b[1]))
        broken.clear()
        until(lambda: any(committed(b[0])))
        goal.append(a[0].manager.current_step() + 2)
        for loop in loops:
            loop.result(60)
        assert {r.manager.current_step() for r in steps} == {goal[0]}
        assert len({r.manager.batches_committed() for r in steps}) == 1
        assert len({r.weights() for r in steps}) == 1
    assert all(committed(a[0]) + committed(a[1])), "the others lose no step"
    assert committed(b[0]) == committed(b[1])
    refusals = [str(why) for _, why in steps[b[1]] if isinstance(why, StepNotServed)]
    assert refusals
    assert all("'sampler' raised OSError: the sampler's file is gone" in why for why in refusals)
