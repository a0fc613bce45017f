"""A lighthouse that is started again before a new job: what it says of the former one, and how that is forgotten."""

from __future__ import annotations

import logging
import queue
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from torchft.coordination import LighthouseClient, LighthouseServer, ManagerServer
from torchft.coordination.channel import open_channel
from torchft.coordination.proto import session_pb2, session_pb2_grpc
from torchft.coordination.record import StateFile
from torchft.core.election import LastQuorum, first_id
from torchft.runtime.deadline import Deadline
from torchft.runtime.life import life_address
from torchft.testing.wait import wait_until

MINUTE = timedelta(minutes=1)
LAST = first_id(1) + 5
"""Of the former job."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lighthouse.json"


@contextmanager
def started_again(path: Path, lives: dict[str, str], forget: int | None) -> Iterator[LighthouseServer]:
    """A lighthouse whose record has a last quorum of these members, each with its life address or an empty text."""
    file = StateFile(path)
    file.advance()
    file.remember(LastQuorum(LAST, tuple(lives.items())))
    file.close()
    server = LighthouseServer("127.0.0.1:0", 1, heartbeat_timeout_ms=1000, state_file=path, forget=forget)
    yield server
    server.shutdown()


@contextmanager
def newcomer(lighthouse: LighthouseServer, timeout: timedelta = MINUTE) -> Iterator[Future[Any]]:
    """A new group that asks for a quorum: its answer."""
    group = ManagerServer(
        "new", lighthouse.address(), "", "127.0.0.1:0", "store:1", 1, timedelta(milliseconds=100), MINUTE, 0
    )
    session = group._lighthouse._session
    assert session is not None
    with ThreadPoolExecutor(1) as asking:
        try:
            session.wait(Deadline(60))  # a question by a call of its own is answered, but not told why it waits
            yield asking.submit(group._quorum, 0, 1, "", False, timeout, 0)
        finally:
            group.shutdown()


def test_who_is_forgotten_is_not_waited_for_and_one_that_lives_all_the_same_is_told_so(path: Path) -> None:
    with started_again(path, {"a": "", "b": ""}, forget=LAST) as lighthouse, newcomer(lighthouse) as answer:
        quorum = answer.result(timeout=60)
        assert (quorum.quorum_id, quorum.replica_ids) == (first_id(2) + 1, ["new"])

        channel = open_channel(lighthouse.address())
        said: queue.SimpleQueue[session_pb2.SessionUp | None] = queue.SimpleQueue()
        announced = session_pb2.Announcement(quorum_id=LAST, replica_rank=0, size=2, step=500, stands=True)
        said.put(
            session_pb2.SessionUp(
                hello=session_pb2.Hello(replica_id="a", active=True, standing=True, announced=announced, epoch=1)
            )
        )
        try:
            heard = session_pb2_grpc.SessionServiceStub(channel).Session(iter(said.get, None), timeout=60)
            welcome = next(heard).welcome
            assert (welcome.quorum_id, welcome.epoch) == (0, 2), "it keeps no lease any more"
            over = next(heard).over
            assert (over.quorum_id, over.cause) == (LAST, "a newer one was formed meanwhile")
        finally:
            said.put(None)
            channel.close()


def test_who_lives_is_waited_for_although_it_was_to_be_forgotten(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lives = {"dead": "", "alive": life_address()}
    with started_again(path, lives, forget=LAST) as lighthouse, newcomer(lighthouse) as answer:
        wait_until(lambda: "replica alive of the last quorum is not forgotten" in caplog.text, timeout=60)
        wait_until(lambda: "alive not known to be dead" in lighthouse.status(), timeout=60)
        assert not answer.done()
        client = LighthouseClient(lighthouse.address(), MINUTE)
        client.report_failure("alive", "its user has ended it")
        client.close()
        assert answer.result(timeout=60).replica_ids == ["new"]


def test_lighthouse_and_group_say_who_is_waited_for_how_long_and_what_to_do(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    why = f"all of the last quorum are silent, and a, b not known to be dead.*again with --forget {LAST}"
    with (
        started_again(path, {"a": "", "b": ""}, forget=LAST - 1) as lighthouse,
        newcomer(lighthouse, timedelta(seconds=6)) as answer,
    ):
        assert f"the last quorum before this start was {LAST}: a, b" in caplog.text
        assert "nobody takes their place until" in caplog.text
        assert f"quorum {LAST - 1} is not the last one, that was {LAST}: nothing is forgotten" in caplog.text
        wait_until(lambda: re.search(rf"INFO .*no quorum yet: {why}", caplog.text), 60, "what the lighthouse says")
        told = rf"the lighthouse {lighthouse.address()} has no quorum yet: {why}"
        wait_until(lambda: re.search(told, caplog.text), 60, "what the group says")
        with pytest.raises(TimeoutError, match=rf"no answer within .* s: {why}") as caught:
            answer.result(timeout=60)
        assert "Is it running" not in str(caught.value), "it has answered"


def test_without_a_record_there_is_nothing_to_forget() -> None:
    with pytest.raises(ValueError, match="needs a record"):
        LighthouseServer("127.0.0.1:0", 1, forget=LAST)
