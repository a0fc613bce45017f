"""A group's ManagerServer over real sockets, with a real lighthouse."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import grpc
import pytest

from tests.coordination.test_group_vote import RANKS, let_the_lease_run_out
from torchft.coordination import LighthouseClient, LighthouseServer, ManagerClient, ManagerServer, QuorumResult
from torchft.coordination.channel import open_channel
from torchft.coordination.group_vote import Ballot, Voted
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.coordination.quorum_round import Ask
from torchft.core.assignment import Source
from torchft.runtime.deadline import Deadline
from torchft.testing.ports import ReservedPort
from torchft.testing.wait import wait_until

Start = Callable[..., ManagerServer]
WAIT = timedelta(minutes=1)
SOON = timedelta(milliseconds=300)


@pytest.fixture
def lighthouse(request: pytest.FixtureRequest) -> Iterator[LighthouseServer]:
    server = LighthouseServer("127.0.0.1:0", getattr(request, "param", 1), join_timeout_ms=100)
    yield server
    server.shutdown()


@pytest.fixture
def start(lighthouse: LighthouseServer) -> Iterator[Callable[..., ManagerServer]]:
    servers: list[ManagerServer] = []

    def make(
        replica_id: str,
        world_size: int = 1,
        lighthouse_addr: str | None = None,
        quorum_retries: int = 0,
        sessions: bool = True,
    ) -> ManagerServer:
        server = ManagerServer(
            replica_id,
            lighthouse_addr or lighthouse.address(),
            "127.0.0.1",
            "127.0.0.1:0",
            f"store-{replica_id}:1",
            world_size,
            timedelta(milliseconds=50),
            WAIT,
            quorum_retries,
            sessions=sessions,
        )
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()


def ask(
    pool: ThreadPoolExecutor,
    client: ManagerClient | ManagerServer,
    rank: int = 0,
    step: int = 0,
    timeout: timedelta = WAIT,
    commit_failures: int = 0,
    init_sync: bool = True,
) -> Future[QuorumResult]:
    return pool.submit(
        lambda: client._quorum(rank, step, f"metadata-{rank}", False, timeout, commit_failures, init_sync)
    )


def test_a_group_of_one_gets_a_quorum_and_commits_without_a_socket_of_its_own(
    start: Start, lighthouse: LighthouseServer
) -> None:
    server = start("a")
    result = server._quorum(0, 7, "", False, WAIT, 0)
    assert (result.quorum_id, result.replica_rank, result.replica_world_size, result.max_step) == (1, 0, 1, 7)
    assert result.replica_ids == ["a"]
    assert result.store_address == "store-a:1"
    assert not result.heal
    assert server.should_commit(0, 7, True, WAIT)
    assert not server.should_commit(0, 8, False, WAIT)


@pytest.mark.parametrize("lighthouse", [2], indirect=True)
def test_all_ranks_of_all_groups_get_their_own_view_of_one_quorum(start: Start, pool: ThreadPoolExecutor) -> None:
    a, b = start("a", world_size=2), start("b", world_size=2)
    clients = {(s, r): ManagerClient(s.address(), WAIT) for s in (a, b) for r in (0, 1)}
    futures = {(s, r): ask(pool, c, r, step=3 if s is a else 5) for (s, r), c in clients.items()}
    views = {key: f.result(60) for key, f in futures.items()}
    assert {v.quorum_id for v in views.values()} == {views[a, 0].quorum_id}
    for rank in (0, 1):
        assert views[a, rank].heal
        assert views[a, rank].recover_src_replica_rank == 1
        assert views[a, rank].recover_src_manager_address == b.address()
        assert views[b, rank].recover_dst_replica_ranks == [0]
        assert views[a, rank].recover_sources == [Source(1, b.address())]
        assert views[b, rank].recover_sources == []
        assert [v.recovering_replica_ranks for v in (views[a, rank], views[b, rank])] == [[0], [0]]
        assert views[a, rank].store_address == views[b, rank].store_address == "store-b:1"
    assert clients[a, 0]._checkpoint_metadata(1, WAIT) == "metadata-1"


@pytest.mark.parametrize("lighthouse", [2], indirect=True)
def test_of_two_groups_at_one_step_with_different_histories_the_older_heals(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    a, b = start("a", world_size=2), start("b", world_size=2)
    others = [ManagerClient(server.address(), WAIT) for server in (a, b)]
    futures = [
        pool.submit(partial(rank._quorum, r, 8, "", False, WAIT, 0, lineage=lineage))
        for server, other, lineage in ((a, others[0], 4), (b, others[1], 5))
        for r, rank in enumerate((server, other))
    ]
    views = [f.result(60) for f in futures]
    assert [(v.heal, v.lineage, v.max_step, v.max_world_size) for v in views] == [
        (True, 5, 8, 1),
        (True, 5, 8, 1),
        (False, 5, 8, 1),
        (False, 5, 8, 1),
    ]
    assert views[0].recover_src_manager_address == b.address()


@pytest.mark.parametrize("lighthouse", [2], indirect=True)
def test_a_group_whose_ranks_are_at_different_steps_heals_all_of_them(start: Start, pool: ThreadPoolExecutor) -> None:
    a, b = start("a", world_size=2), start("b", world_size=2)
    ahead = [ask(pool, b, 0, step=4), ask(pool, ManagerClient(b.address(), WAIT), 1, step=4)]
    one = ask(pool, ManagerClient(a.address(), WAIT), 1, step=4)
    zero = ask(pool, a, 0, step=5)
    views = [f.result(60) for f in (zero, one, *ahead)]
    assert [(v.heal, v.max_step) for v in views] == [(True, 4), (True, 4), (False, 4), (False, 4)]


@pytest.mark.parametrize("lighthouse", [1], indirect=True)
def test_a_group_with_another_number_of_ranks_is_refused_and_not_waited_for(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    a, b = start("a", world_size=2), start("b")
    rank1 = ManagerClient(a.address(), WAIT)

    def step(number: int) -> list[list[str]]:
        return [f.result(60).replica_ids for f in (ask(pool, a, 0, step=number), ask(pool, rank1, 1, step=number))]

    assert step(1) == [["a"], ["a"]]
    refused = r"group b has 1 rank\(s\), and a, which is there already, has 2.*LIGHTHOUSE name that of its job\?$"
    with pytest.raises(RuntimeError, match=refused):
        b._quorum(0, 0, "", False, WAIT, 0)
    assert step(2) == [["a"], ["a"]]  # b lives, has asked, and holds nobody up
    rank1.close()
    assert a.leave("done", 3, WAIT)
    assert b._quorum(0, 0, "", False, WAIT, 0).replica_ids == ["b"]


@pytest.mark.parametrize("lighthouse", [2], indirect=True)
def test_only_who_does_not_fit_is_asked_whether_it_is_the_right_lighthouse(
    start: Start, pool: ThreadPoolExecutor, lighthouse: LighthouseServer
) -> None:
    a, b = start("a"), start("b")
    asked = ask(pool, a)
    wait_until(lambda: "a" in lighthouse._service._answers)
    client = LighthouseClient(lighthouse.address(), WAIT)
    client.report_failure("a", "somebody said so")
    client.close()
    with pytest.raises(RuntimeError, match=r"a was declared dead: somebody said so$"):
        asked.result(60)
    b.shutdown()
    with pytest.raises(RuntimeError, match=r"the connection was closed$"):
        b._lighthouse.quorum(pb.QuorumMember(replica_id="b"), True, Deadline(60))


def test_a_failed_lighthouse_call_reaches_every_waiting_rank_with_address_and_cause(
    start: Start, pool: ThreadPoolExecutor, lighthouse: LighthouseServer
) -> None:
    start("b")._quorum(0, 0, "", False, WAIT, 0)
    server = start("a", world_size=3)
    ranks = server, *(ManagerClient(server.address(), WAIT) for _ in (1, 2))
    for future in [ask(pool, rank, r) for r, rank in enumerate(ranks)]:
        with pytest.raises(RuntimeError, match=rf"the lighthouse at {lighthouse.address()}: .*a has 3 rank"):
            future.result(60)


def test_a_quorum_after_a_failed_one_works_when_the_lighthouse_is_back(
    start: Start, lighthouse: LighthouseServer
) -> None:
    server = start("a")
    assert server._quorum(0, 0, "", False, WAIT, 0).quorum_id == 1
    port = lighthouse.port
    lighthouse.shutdown()
    with pytest.raises((TimeoutError, RuntimeError), match=f"127.0.0.1:{port}"):
        server._quorum(0, 1, "", False, SOON, 1)
    again = LighthouseServer(f"127.0.0.1:{port}", 1)
    try:
        assert server._quorum(0, 1, "", False, WAIT, 1).replica_world_size == 1
    finally:
        again.shutdown()


def test_a_lighthouse_that_restarts_during_a_quorum_is_asked_again(start: Start, pool: ThreadPoolExecutor) -> None:
    first = LighthouseServer("127.0.0.1:0", 2)
    server = start("a", lighthouse_addr=first.address(), quorum_retries=5)
    waiting = ask(pool, server)
    wait_until(first._service._core.membership.waiting)
    first.shutdown()
    second = LighthouseServer(f"127.0.0.1:{first.port}", 1)
    try:
        assert waiting.result(60).replica_ids == ["a"]
    finally:
        second.shutdown()


def test_a_missing_rank_is_named_when_the_quorum_times_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
        start("a", world_size=2)._quorum(0, 0, "", False, SOON, 0)
    # The server has to say so before the client's own deadline: a tenth of the time is for that, and here all of it.
    assert Ask(1, pb.ManagerQuorumRequest(), Deadline(3)).remaining() <= 2.7
    monkeypatch.setattr(Ask, "remaining", lambda asked: 0.1)
    with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
        ManagerClient(start("b", world_size=2).address(), WAIT)._quorum(1, 0, "", False, WAIT, 0)


def test_after_a_round_that_one_rank_missed_the_next_one_works(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start("a", world_size=2)
    client = ManagerClient(server.address(), WAIT)
    with pytest.raises(TimeoutError):
        server._quorum(0, 0, "", False, SOON, 0)
    late = ask(pool, client, 1)
    with pytest.raises(RuntimeError, match="rank 0 left the quorum"):
        late.result(60)
    both = [ask(pool, client, 1), ask(pool, server, 0)]
    assert {f.result(60).quorum_id for f in both} == {1}


def test_the_vote_is_yes_only_if_every_rank_votes_yes(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start("a", world_size=2)
    client = ManagerClient(server.address(), WAIT)
    for mine, theirs in [(True, True), (True, False), (False, True), (False, False)]:
        other = pool.submit(lambda vote=theirs: client.should_commit(1, 5, vote, WAIT))
        assert server.should_commit(0, 5, mine, WAIT) is (mine and theirs)
        assert other.result(60) is (mine and theirs)


def test_why_a_group_commits_nothing_is_said_once_until_it_commits_again(
    start: Start, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    server = start("a", world_size=2)
    client = ManagerClient(server.address(), WAIT)
    for theirs in (False, False, False, True, False, False):
        other = pool.submit(lambda vote=theirs: client.should_commit(1, 5, vote, WAIT))
        server.should_commit(0, 5, True, WAIT)
        other.result(60)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [line.partition("not committed: ")[2] for line in said] == 2 * ["rank 1 voted no"]


def _vote_and_wait(address: str, ready: object) -> None:
    client = ManagerClient(address, WAIT)
    client.should_commit(1, 5, True, timedelta(minutes=4))


def test_a_rank_killed_in_the_vote_fails_it_at_once_for_the_others(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start("a", world_size=3)
    context = multiprocessing.get_context("spawn")
    voter = context.Process(target=_vote_and_wait, args=(server.address(), None))
    voter.start()
    try:
        wait_until(lambda: 1 in server._group_vote._ballots, timeout=60)
        mine = pool.submit(lambda: server.should_commit(0, 5, True, timedelta(minutes=4)))
        assert voter.pid is not None
        os.kill(voter.pid, signal.SIGKILL)
        assert mine.result(60) is False
        late = ManagerClient(server.address(), WAIT)
        assert late.should_commit(2, 5, True, WAIT) is False
    finally:
        voter.kill()
        voter.join(60)


def test_a_rank_that_dies_just_as_another_votes_leaves_no_vote_waiting(start: Start) -> None:
    server = start("a", world_size=2)
    cast = server._group_vote.cast

    def late(rank: int, step: int, commit: bool) -> Ballot:
        server._rank_ended(1, "rank 1 of this group is no longer there")
        return cast(rank, step, commit)

    server._group_vote.cast = late  # type: ignore[method-assign]
    ballot = server.cast(0, 5, True)
    with pytest.raises(RuntimeError, match="no commit in this group: rank 1 of this group is no longer there"):
        ballot.result(0)


def test_a_vote_that_misses_a_rank_ends_at_its_deadline(start: Start) -> None:
    server = start("a", world_size=2)
    with pytest.raises(TimeoutError, match="has not voted"):
        server.should_commit(0, 5, True, SOON)
    with pytest.raises(TimeoutError, match="should_commit"):
        ManagerClient(start("b", world_size=2).address(), WAIT).should_commit(1, 5, True, SOON)


def test_a_vote_that_waits_for_the_lease_says_so_at_its_deadline(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start("a", world_size=RANKS)
    assert server._lighthouse._session is not None
    assert server._lighthouse._session.wait(Deadline(WAIT))
    let_the_lease_run_out(server._lighthouse.standing)
    others = [server.cast(rank, 0, True) for rank in (1, 2)]
    with pytest.raises(TimeoutError, match=r"vote on step 0 did not end within 0.3 s: all ranks have voted yes, and "):
        server.should_commit(0, 0, True, SOON)
    assert [ballot.result(20).commit for ballot in others] == [False, False], "rank 0 has given it up"


def test_a_rank_that_asks_while_another_waits_for_its_vote_ends_that_vote_at_once(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start("a", world_size=2)
    client = ManagerClient(server.address(), WAIT)
    voted = pool.submit(lambda: server.should_commit(0, 5, True, WAIT))
    wait_until(lambda: 0 in server._group_vote._ballots)
    asked = [ask(pool, client, 1, commit_failures=1)]  # it left its step without a vote
    assert voted.result(20) is False
    asked.append(ask(pool, server, 0, commit_failures=1))
    assert {f.result(20).quorum_id for f in asked} == {1}


def test_a_rank_that_votes_while_another_waits_for_its_question_learns_that_it_is_left(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start("a", world_size=2)
    client = ManagerClient(server.address(), WAIT)
    asked = [ask(pool, client, 1, commit_failures=1)]
    wait_until(lambda: server._quorum_round._gather.waiting)
    assert server.should_commit(0, 5, True, WAIT) is False
    asked.append(ask(pool, server, 0, commit_failures=1))
    assert {f.result(20).quorum_id for f in asked} == {1}
    votes = [pool.submit(lambda: server.should_commit(0, 5, True, WAIT))]
    votes.append(pool.submit(lambda: client.should_commit(1, 5, True, WAIT)))
    assert [v.result(20) for v in votes] == [True, True]


def test_a_rank_that_gives_up_in_the_same_moment_keeps_no_answer_from_the_others(start: Start) -> None:
    server = start("a", world_size=3)
    given_up, *others = (server.cast(rank, 5, True) for rank in (1, 0))
    given_up.done = lambda: False  # type: ignore[method-assign]  # as it looked before it was
    given_up.cancel()
    others.append(server.cast(2, 5, True))
    assert [ballot.result(20).commit for ballot in others] == [True, True]


@pytest.mark.parametrize("told", ["before it gives up", "right after it"])
def test_a_rank_whose_deadline_passes_as_the_vote_ends_does_as_was_decided(start: Start, told: str) -> None:
    server = start("a", world_size=2)

    class Late(Future[Voted]):
        asked = 0

        def result(self, timeout: float | None = None) -> Voted:
            self.asked += 1
            if self.asked > 1:
                return Voted(True)
            if told == "before it gives up":
                self.set_result(Voted(True))
            raise TimeoutError

    server.cast = lambda *_: Late()  # type: ignore[method-assign]
    assert server.vote(0, 5, True, SOON).commit


def test_metadata_of_a_rank_that_never_asked_is_a_clear_error(start: Start) -> None:
    client = ManagerClient(start("a").address(), WAIT)
    with pytest.raises(RuntimeError, match="rank 3 of a serves no checkpoint"):
        client._checkpoint_metadata(3, WAIT)


@pytest.mark.parametrize("rank", [-1, 2, 10**9])
def test_a_rank_that_is_not_in_the_group_is_refused(start: Start, rank: int) -> None:
    client = ManagerClient(start("a", world_size=2).address(), WAIT)
    with pytest.raises(RuntimeError, match=f"rank {rank} is not in a group of 2"):
        client._quorum(rank, 0, "", False, WAIT, 0)
    with pytest.raises(RuntimeError, match=f"rank {rank} is not in a group of 2"):
        client.should_commit(rank, 0, True, WAIT)


def test_shutdown_fails_those_that_wait(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start("a", world_size=2)
    mine = ask(pool, server, 0)
    wait_until(lambda: server._quorum_round._gather.waiting)
    server.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        mine.result(60)


def test_heartbeats_begin_with_the_first_quorum_and_end_with_shutdown(
    start: Start, lighthouse: LighthouseServer
) -> None:
    server = start("a")
    core = lighthouse._service._core.membership
    assert core.healthy() == ()
    server._quorum(0, 0, "", False, WAIT, 0)
    before = core._roster.last_sign["a"]
    wait_until(lambda: core._roster.last_sign["a"] > before)
    server.shutdown()
    assert not any(t.name == "torchft-heartbeat" and t.is_alive() for t in threading.enumerate())


def _serve_until_killed(lighthouse: str, address: object) -> None:
    server = ManagerServer("k", lighthouse, "127.0.0.1", "127.0.0.1:0", "s:1", 1, WAIT, WAIT, 0)
    address.put(server.address())  # type: ignore[attr-defined]
    threading.Event().wait(300)


def test_kill_ends_the_process(lighthouse: LighthouseServer) -> None:
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=_serve_until_killed, args=(lighthouse.address(), address))
    process.start()
    try:
        with open_channel(address.get(timeout=60)) as channel, pytest.raises(grpc.RpcError):
            pb_grpc.ManagerServiceStub(channel).Kill(pb.KillRequest(msg="test"), timeout=60, wait_for_ready=True)
        process.join(60)
        assert process.exitcode == 1
    finally:
        process.kill()
        process.join(60)


def test_no_lighthouse_at_start_is_a_clear_error(start: Start) -> None:
    with ReservedPort() as nobody, pytest.raises(TimeoutError, match=f"127.0.0.1:{nobody.port}"):
        ManagerServer("a", f"http://127.0.0.1:{nobody.port}", "127.0.0.1", "127.0.0.1:0", "s:1", 1, WAIT, SOON, 0)


def test_a_server_that_just_died_is_an_error_at_once_for_who_does_not_wait() -> None:
    with ReservedPort() as nobody:
        client = ManagerClient(f"http://127.0.0.1:{nobody.port}", timedelta(minutes=4), wait=False)
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{nobody.port} is not reachable"):
            client._checkpoint_metadata(0, timedelta(minutes=4))


def abandoned(server: ManagerServer, pool: ThreadPoolExecutor, waits: Callable[[], object]) -> None:
    """Both ranks of a group ask, and one of them dies while the answer is waited for."""
    asked = [pool.submit(lambda rank=rank: server._quorum(rank, 1, "", False, WAIT, 0)) for rank in (0, 1)]
    wait_until(waits)
    server._break("rank 1 of this group is no longer there")
    for future in asked:
        with pytest.raises(RuntimeError, match="no quorum for this group: rank 1 of this group is no longer there"):
            future.result(20)
    server._caller.submit(lambda: None).result(20)  # the next question is asked at once


@pytest.mark.parametrize("lighthouse", [2], indirect=True)
@pytest.mark.parametrize("sessions", [True, False])
def test_a_question_that_nobody_waits_for_is_withdrawn_at_the_lighthouse(
    start: Start, pool: ThreadPoolExecutor, lighthouse: LighthouseServer, sessions: bool
) -> None:
    asking = lighthouse._service._answers
    abandoned(start("a", world_size=2, sessions=sessions), pool, lambda: "a" in asking)
    wait_until(lambda: "a" not in asking, timeout=20)
    assert lighthouse._service._core.membership.waiting() == ()


def test_a_question_that_nobody_waits_for_waits_for_no_lighthouse(
    start: Start, pool: ThreadPoolExecutor, lighthouse: LighthouseServer
) -> None:
    server = start("a", world_size=2)
    link = server._lighthouse
    assert link._session is not None
    assert link._session.wait(Deadline(WAIT))
    lighthouse.shutdown()
    wait_until(lambda: link._session is not None and not link._session.stands)
    abandoned(server, pool, lambda: link._asked)
