"""State functions that run collectives inside a group of two ranks: on the training thread, by all ranks or by none."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from tests.groups import TIMEOUT, Groups, Replica
from torchft.process_group import ProcessGroupGloo
from torchft.runtime.deadline import Deadline

SOON = timedelta(seconds=2)
"""Longest wait for a collective inside a group where one is to wait in vain."""


class Rank(Replica):
    """One rank of a group that is sharded inside: it holds half of a vector, and only together they have it whole."""

    def __init__(
        self, groups: Groups, store: TCPStore, name: str, rank: int, on_training_thread: bool, **kwargs: Any
    ) -> None:
        self.shard = torch.full((4,), float(10 * (ord(name[0]) - ord("a")) + rank))
        self.saves: list[tuple[bool, int]] = []
        self.inside = ProcessGroupGloo(timeout=TIMEOUT)
        self.inside.configure(f"127.0.0.1:{store.port}/inside", name, rank, 2)
        options = {"store_addr": "127.0.0.1", "store_port": store.port, "rank": rank, "world_size": 2}
        super().__init__(groups.lighthouse.address(), name, **{**options, **kwargs})
        self.rank = rank
        self.training = threading.get_ident()
        groups._replicas.append(self)
        self.manager.register_state_dict_fn("whole", self.take_whole, self.whole, on_training_thread=on_training_thread)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        out = [torch.zeros_like(tensor) for _ in range(2)]
        self.inside.allgather([out], [tensor]).wait()
        return torch.cat(out)

    def whole(self) -> dict[str, torch.Tensor]:
        self.saves.append((threading.get_ident() == self.training, self.manager.current_step()))
        return {"shard": self.gather(self.shard)}

    def take_whole(self, state: dict[str, torch.Tensor]) -> None:
        whole = state["shard"].clone()
        self.inside.broadcast_one(whole, 0).wait()  # a load that runs collectives as well
        self.shard.copy_(whole[4 * self.rank : 4 * self.rank + 4])

    def step(self, value: float = 1.0) -> None:
        self.training = threading.get_ident()
        self.optimizer.zero_grad()
        self.gather(self.shard)  # the forward pass has collectives of its own
        self.compute(value)
        self.gather(self.shard)
        if self.manager.should_commit():
            self.inner.step()
            self.shard.add_(1.0)


STORES: list[TCPStore] = []
"""As long as the process: what a test leaves behind may still be connecting to them."""


class Pairs:
    """Groups of two ranks as threads."""

    def __init__(self, groups: Groups, **kwargs: Any) -> None:
        self.groups = groups
        self.kwargs = kwargs

    def group(self, name: str) -> list[Rank]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        STORES.append(store)
        kwargs: dict[str, Any] = {"on_training_thread": True, **self.kwargs}
        make = [lambda r=r: Rank(self.groups, store, name, r, **kwargs) for r in range(2)]
        return sorted(self.groups.together(*make), key=lambda r: r.rank)

    def train(self, ranks: list[Rank], until: int) -> None:
        """Until they are at that step, all of them, or some steps later: nobody waits for a group that is on its way
        to the others, so they train on until it takes part.
        """
        groups = len({r.manager.replica_id() for r in ranks})
        goal: list[int] = []
        lock = threading.Lock()
        limit = Deadline(60)

        def loop(r: Rank) -> None:
            while not goal or r.manager.current_step() < goal[0]:
                assert not limit.expired, r.manager.errored()
                r.step()
                with lock:
                    if not goal and r.manager.is_participating() and r.manager.num_participants() == groups:
                        goal.append(max(until, r.manager.current_step() + 1))

        self.groups.together(*(lambda r=r: loop(r) for r in ranks))

    def close(self) -> None:
        for r in self.groups._replicas:
            assert isinstance(r, Rank)
            r.inside.shutdown()


@pytest.mark.parametrize("use_async_quorum", [True, False], ids=["async", "sync"])
def test_collective_state_is_read_by_all_ranks_of_the_sources_on_their_training_threads(
    pair: Groups, use_async_quorum: bool
) -> None:
    pairs = Pairs(pair, use_async_quorum=use_async_quorum)
    try:
        a, b = pairs.group("a"), pairs.group("b")
        pairs.train(a + b, until=3)
        c = pairs.group("c")
        # With two sources the two ranks of c heal from one each: the ranks of a group do not all serve.
        pairs.train(a + b + c, until=6)
        for rank in a + b + c:
            assert torch.equal(rank.shard, a[rank.rank].shard)
            assert all(on_training_thread for on_training_thread, _ in rank.saves)
        for group in (a, b, c):
            assert group[0].saves == group[1].saves, "in the same steps"
        assert max(step for _, step in a[0].saves) >= 3, "a source of c"
        assert max(step for _, step in b[0].saves) >= 3, "a source of c"
        assert not torch.equal(a[0].shard, a[1].shard)
    finally:
        pairs.close()


def test_without_it_the_collective_of_a_rank_that_serves_waits_for_one_that_does_not(pair: Groups) -> None:
    pairs = Pairs(pair, on_training_thread=False, init_sync=False)
    try:
        a, b = pairs.group("a"), pairs.group("b")
        pairs.train(a + b, until=2)
        c = pairs.group("c")
        for rank in a + b + c:
            rank.inside.set_timeout(SOON)
            rank.manager._transport.takes_many_sources = False  # else all ranks of the sources save
        with pytest.raises(Exception):  # noqa: B017, PT011 - a collective inside a group times out, wherever
            pairs.train(a + b + c, until=4)
    finally:
        pairs.close()


def test_a_rank_that_failed_before_keeps_the_others_out_of_the_collective(groups: Groups) -> None:
    pairs = Pairs(groups, timeout=timedelta(seconds=3))
    try:
        a = pairs.group("a")
        pairs.train(a, until=2)
        broken = a[1].manager._begin._pg.configure
        attempts = []

        def fail_once(*args: Any, **kwargs: Any) -> None:
            attempts.append(1)
            if len(attempts) == 1:
                raise RuntimeError("no route to the other group")
            broken(*args, **kwargs)

        a[1].manager._begin._pg.configure = fail_once  # type: ignore[method-assign]
        b = pairs.group("b")
        pairs.train(a + b, until=5)
        assert attempts
        assert all(torch.equal(x.shard, y.shard) for x, y in zip(a, b, strict=True))
        assert a[0].saves == a[1].saves
    finally:
        pairs.close()
