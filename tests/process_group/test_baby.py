"""ProcessGroupBabyGloo keeps every promise of the suite, and those about its children."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ReduceOp

from torchft.process_group import (
    ProcessGroup,
    ProcessGroupBabyGloo,
    ProcessGroupError,
    ProcessGroupGloo,
)
from torchft.process_group.baby import gpu
from torchft.process_group.baby.memory import Block, HostBlock, Pool
from torchft.testing.process_group_life import Held
from torchft.testing.process_group_member import Member
from torchft.testing.process_group_suite import ProcessGroupSuite, each
from torchft.testing.process_state import lives, stat_of
from torchft.testing.wait import wait_until


def _parent(pid: int) -> int:
    return int(stat_of(pid)[1])


def _sockets(pid: int | str) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # the listing's own
        if target.startswith("socket:"):
            found.add(target)
    return found


class TestProcessGroupBabyGloo(ProcessGroupSuite):
    factory = "torchft.process_group:ProcessGroupBabyGloo"

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupBabyGloo(timeout=timeout)

    def held(self, groups: list[ProcessGroup]) -> Held:
        return sum(map(Held.by, self.children(groups)), super().held(groups))

    def children(self, groups: list[ProcessGroup]) -> list[int]:
        return [pg.child_pid for pg in groups]

    def test_a_healthy_child_serves_on_and_an_aborted_one_is_replaced_at_once(
        self, store: str, groups: list[ProcessGroup]
    ) -> None:
        first = self.children(groups)
        self.meet(store, groups)
        assert self.children(groups) == first
        groups[0].abort()
        wait_until(lambda: not lives(first[0]), 30, "the end of the aborted child")
        nursery = _parent(first[1])
        self.meet(store, groups)
        second = self.children(groups)
        assert set(map(_parent, second)) == {nursery}  # forked from the process that has torch in it: no import
        assert second[0] != first[0]
        assert second[1:] == first[1:]
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_a_child_that_is_killed_fails_what_is_pending_at_once(self, store: str, groups: list[ProcessGroup]) -> None:
        tensor = self.tensor(1, 2)
        pending = groups[0].allreduce([tensor])
        os.kill(self.children(groups)[0], signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(ProcessGroupError, match=r"child process \d+ .*died \(signal 9\)"):
            pending.wait()
        assert time.monotonic() - begun < 20  # the group's timeout is 30
        with pytest.raises(ProcessGroupError, match="died"):
            pending.get_future().wait()
        assert tensor.tolist() == [1.0, 2.0]  # what fails leaves its tensors as they were
        assert "died" in str(groups[0].errored())
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_the_death_of_an_idle_child_is_an_error_of_the_group(self, store: str, groups: list[ProcessGroup]) -> None:
        assert groups[0].errored() is None
        os.kill(self.children(groups)[0], signal.SIGKILL)
        wait_until(lambda: groups[0].errored() is not None, 30, "the error")
        with pytest.raises(ProcessGroupError, match="died"):
            groups[0].allreduce([self.tensor(1)])
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_a_stopped_child_ends_by_the_timeout_and_is_killed(self, store: str, groups: list[ProcessGroup]) -> None:
        groups[0].set_timeout(timedelta(seconds=0.2))
        child = self.children(groups)[0]
        try:
            os.kill(child, signal.SIGSTOP)
            with pytest.raises(ProcessGroupError, match=r"did not answer: allreduce did not end within 0\.2 s"):
                groups[0].allreduce([self.tensor(1)]).wait()
        finally:
            groups[0].set_timeout(timedelta(seconds=30))
        wait_until(lambda: not lives(child), 30, "the end of the stopped child")
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_an_abort_ends_a_stopped_child(self, store: str, groups: list[ProcessGroup]) -> None:
        child = self.children(groups)[0]
        os.kill(child, signal.SIGSTOP)
        pending = groups[0].allreduce([self.tensor(1)])
        groups[0].abort()
        with pytest.raises(ProcessGroupError, match="aborted"):
            pending.wait()
        wait_until(lambda: not lives(child), 30, "the end of the stopped child")
        self.meet(store, groups)

    def test_a_child_holds_none_of_the_trainers_sockets(self, groups: list[ProcessGroup]) -> None:
        for child in self.children(groups):
            assert _sockets(child)
            assert not _sockets(child) & _sockets("self")

    def test_a_child_of_a_killed_trainer_ends(self, store: str, members: Callable[..., list[Member]]) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        child = pair[0].ask("child")["value"]
        assert lives(child)
        pair[0].kill()
        wait_until(lambda: not lives(child), 30, "the end of the child")

    def test_it_meets_a_plain_gloo_group(self, store: str, idle_groups: list[ProcessGroup]) -> None:
        plain = ProcessGroupGloo(timeout=timedelta(seconds=30))
        pair = [idle_groups[0], plain]
        self.meet(store, pair)
        assert self.sum_of_ranks(pair) == [1.0, 1.0]
        plain.shutdown()

    def test_a_collective_that_the_child_refuses_fails_and_says_why(self, groups: list[ProcessGroup]) -> None:
        with pytest.raises(RuntimeError, match="BAND"):
            groups[0].allreduce([self.tensor(1)], ReduceOp.BAND).wait()
        assert "BAND" in str(groups[0].errored())

    def test_a_reduction_with_a_factor_of_its_own_is_refused(self, groups: list[ProcessGroup]) -> None:
        with pytest.raises(ValueError, match="cannot be given to a child"):
            groups[0].allreduce([self.tensor(1)], dist._make_nccl_premul_sum(2.0))

    def test_tensors_of_any_strides_are_taken(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[list[float]]:
            whole = torch.arange(6.0).view(2, 3)
            pg.allreduce([whole.t()[1:]]).wait()
            return whole.tolist()

        assert each(groups, act) == [[[0.0, 3.0, 6.0], [3.0, 12.0, 15.0]]] * 3

    def test_tensors_in_shared_memory_are_used_where_they_are(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: Any) -> list[object]:
            whole = torch.zeros(3, 4).share_memory_()
            part = whole[1]
            part.fill_(rank + 1)
            pg.allreduce([part]).wait()
            out = [torch.zeros(1) for _ in range(3)]
            pg.allgather([out], [whole[1, :1]]).wait()
            known = dict(pg._carrier._adopted._known)
            del whole, part
            # The thread that carried the last call may hold it for a moment longer.
            wait_until(lambda: all(reference.expired() for _, reference in known.values()), 30, "nobody holds it")
            pg.broadcast_one(torch.zeros(2).share_memory_(), 0).wait()
            return [*out, len(known), len(pg._carrier._adopted._known)]

        # The second one took the place of the first, which was gone.
        assert self.each(groups, act) == [[6.0, 6.0, 6.0, 1, 1]] * 3

    def test_a_group_that_is_dropped_takes_its_child_with_it(self, store: str) -> None:
        pair = [self.make(), self.make()]
        self.meet(store, pair)
        children = self.children(pair)
        pair.clear()
        wait_until(lambda: not any(map(lives, children)), 30, "the end of the children")

    def test_a_nursery_that_is_killed_is_replaced(self, store: str, groups: list[ProcessGroup]) -> None:
        os.kill(groups[0]._children._process.pid, signal.SIGKILL)
        wait_until(lambda: all(pg.errored() is not None for pg in groups), 30, "the end of the children")
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_collectives_of_several_threads_at_once_all_end(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> set[float]:
            tensors = [torch.full((1 + 997 * i,), float(i)) for i in range(20)]
            futures = [pg.allreduce([t]).get_future() for t in tensors]
            waiting = [threading.Thread(target=future.wait) for future in futures]
            for thread in waiting:
                thread.start()
            for thread in waiting:
                thread.join(30)
            return {float(t[-1]) / max(1, i) for i, t in enumerate(tensors)}

        assert each(groups, act) == [{0.0, 3.0}] * 3


def test_a_pool_uses_blocks_again_and_keeps_no_more_than_was_in_use() -> None:
    made: list[int] = []

    def make(number: int, size: int) -> Block:
        made.append(size)
        return HostBlock(number, size)

    pool = Pool(make)
    big, new, _ = pool.take(5 << 20)
    assert new
    pool.give_back(big)
    again, new, _ = pool.take((5 << 20) - 1000)
    assert again is big
    assert not new
    pool.give_back(again)
    other, new, gone = pool.take(4 << 20)
    assert new
    assert gone == [big.number]  # 9 MiB were never in use at the same time
    assert other.data.numel() == 4 << 20
    failed, _, _ = pool.take(1 << 20)
    pool.keep(failed)
    assert failed.data.numel() > 0  # the child may still write into it
    pool.close()
    assert failed.data.numel() == 0
    pool.give_back(other)
    assert other.data.numel() == 0
    assert made == [5 << 20, 4 << 20, 1 << 20]


def test_a_dead_childs_count_of_a_gpu_block_is_given_back_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is faked: what is shown is what torch is told, and when."""
    released: list[tuple[bytes, int]] = []
    handle = (0, b"memory", 4096, 512, b"counter", 7, b"event", True)
    shared = SimpleNamespace(
        _release_ipc_counter_cuda=lambda *counter: released.append(counter),
        _new_shared_cuda=lambda *parts: parts,
    )
    monkeypatch.setattr(gpu.torch, "UntypedStorage", shared)

    def block() -> gpu.GpuBlock:
        made = gpu.GpuBlock.__new__(gpu.GpuBlock)
        made._counter, made._ready = None, SimpleNamespace(ipc_handle=lambda: b"ready")
        made.data = SimpleNamespace(  # type: ignore[assignment]
            untyped_storage=lambda: SimpleNamespace(_share_cuda_=lambda: handle)
        )
        return made

    let_go, dead = block(), block()
    told, files = let_go.introduce()
    assert gpu._handle(json.loads(json.dumps(told["cuda"]))) == handle
    assert files == ()
    let_go.close(dead=False)
    assert released == []
    dead.introduce()
    dead.close(dead=True)
    dead.close(dead=True)
    assert released == [(b"counter", 7)]
