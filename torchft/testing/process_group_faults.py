"""What every process group promises when members die or stand still. They are processes of their own here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ClassVar

import pytest

from torchft.process_group import ProcessGroup
from torchft.testing.process_group_fixtures import GroupSuite
from torchft.testing.process_group_member import Member

__all__ = ["FaultsSuite"]


class FaultsSuite(GroupSuite):
    """Members that die, stop, or leave."""

    factory: ClassVar[str] = ""
    """``module:Class`` of the group, for members in processes of their own."""

    @pytest.fixture
    def members(self) -> Iterator[Callable[..., list[Member]]]:
        """Makes members in processes of their own."""
        with ExitStack() as stack:
            yield lambda n, **options: [stack.enter_context(Member(self.factory, **options)) for _ in range(n)]

    def meet_members(self, store: str, members: list[Member]) -> None:
        address = self.address(store)
        for rank, member in enumerate(members):
            member.tell("configure", store_addr=address, rank=rank, world_size=len(members))
        for member in members:
            assert member.answer()["error"] is None

    def test_when_a_member_dies_the_survivors_collective_fails_at_once(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        pair[0].tell("allreduce")
        pair[1].kill()
        answer = pair[0].answer()
        assert answer["error"] is not None
        assert answer["seconds"] < 20  # the group's timeout is 30
        assert pair[0].ask("errored")["value"] is not None

    def test_a_member_that_is_killed_while_its_data_workers_live_on_is_seen_at_once(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        workers = pair[1].ask("fork_data_workers")["value"]
        for member in pair:
            member.tell("allreduce")
        assert [member.answer()["value"] for member in pair] == [2.0, 2.0]  # forking cost it nothing
        assert len(workers) == 2
        try:
            pair[0].tell("allreduce")
            begun = time.monotonic()
            pair[1].kill()
            assert pair[0].answer()["error"] is not None
            assert time.monotonic() - begun < 20  # the group's timeout is 30
            for worker in workers:
                os.kill(worker, 0)  # it lives
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)

    def test_a_member_that_stops_while_it_meets_the_others_does_not_hold_up_an_abort(
        self, store: str, members: Callable[..., list[Member]], groups: list[ProcessGroup]
    ) -> None:
        stopped, other = members(2)
        address = self.address(store)
        stopped.tell("configure_and_stop", store_addr=address, rank=1, world_size=2)
        stopped.wait_until_stopped()
        aborting = self.abort_once_it_waits(store, groups[0])
        begun = time.monotonic()

        def meet_and_reduce() -> None:
            groups[0].configure(address, "r", 0, 2)  # where our side makes the connection, the other need not answer
            groups[0].allreduce([self.tensor(1)]).wait()

        with pytest.raises(RuntimeError):
            meet_and_reduce()
        assert time.monotonic() - begun < 20  # the group's timeout is 30
        assert "aborted" in str(groups[0].errored())
        aborting.join()
        address = self.address(store)
        other.tell("configure", store_addr=address, rank=1, world_size=2)
        groups[0].configure(address, "r", 0, 2)
        assert other.answer()["error"] is None

    def test_a_survivor_that_aborts_lets_go_of_the_third(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        trio = members(3)
        self.meet_members(store, trio)
        for survivor in trio[:2]:
            survivor.tell("allreduce_and_abort_on_error")
        trio[2].kill()
        for survivor in trio[:2]:
            answer = survivor.answer()
            assert answer["error"] is not None
            assert answer["seconds"] < 20
        self.meet_members(store, trio[:2])
        for survivor in trio[:2]:
            survivor.tell("allreduce")
        assert [survivor.answer()["value"] for survivor in trio[:2]] == [2.0, 2.0]

    def test_abort_ends_a_collective_that_waits_for_a_stopped_member(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        pair[1].stop()
        answer = pair[0].ask("allreduce_aborted_after", seconds=0.2)
        assert answer["error"] is not None
        assert answer["seconds"] < 20
        assert "aborted" in pair[0].ask("errored")["value"]

    def test_a_survivor_that_aborts_lets_go_of_one_that_waits_for_it(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        trio = members(3)
        self.meet_members(store, trio)
        trio[1].tell("recv", source=0)
        trio[0].tell("recv_and_abort_on_error", source=2)
        trio[2].kill()
        for survivor in trio[:2]:
            answer = survivor.answer()
            assert answer["error"] is not None
            assert answer["seconds"] < 20  # the group's timeout is 30

    def test_a_process_that_exits_does_not_wait_for_a_stopped_member(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = [*members(1, timeout=300.0, program=True), *members(1, timeout=300.0)]
        self.meet_members(store, pair)
        pair[1].stop()
        pair[0].tell("issue_and_exit")
        code = pair[0].wait(deadline=60)
        assert code == 7, f"exit code {code}"
