"""Lighthouse and manager servers under random, huge and malformed messages: a clear error, and they live on."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from tests.checkpointing.hostile_manifest import TEXTS, mutated_bytes, random_for
from torchft.coordination import LighthouseClient, LighthouseServer, ManagerClient, ManagerServer
from torchft.coordination.proto import session_pb2
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.types import quorum_from_wire
from torchft.runtime import loop

LIMIT = 0.2
WAIT = timedelta(seconds=10)
CALLS = 2500
STREAMS = 250
INTEGERS = (0, 1, -1, 2, 7, 255, 1 << 20, (1 << 31) - 1, -(1 << 31), 1 << 40, (1 << 63) - 1, -(1 << 63))
LONG_TEXTS = (*(t for t in TEXTS if t.isprintable()), "x" * 70_000, "[" * 60_000, '{"a":' * 5000, "y" * (1 << 20))
LIGHTHOUSE = (
    ("/torchft.LighthouseService/Quorum", pb.LighthouseQuorumRequest),
    ("/torchft.LighthouseService/Heartbeat", pb.LighthouseHeartbeatRequest),
    ("/torchft.SessionService/ReportFailure", session_pb2.Report),
)
MANAGER = (
    ("/torchft.ManagerService/Quorum", pb.ManagerQuorumRequest),
    ("/torchft.ManagerService/ShouldCommit", pb.ShouldCommitRequest),
    ("/torchft.ManagerService/CheckpointMetadata", pb.CheckpointMetadataRequest),
    ("/torchft.SessionService/ReportFailure", session_pb2.Report),
)


def fill(message: Message, draw: random.Random, depth: int = 0) -> Message:
    """Gives some of its fields values, most of them out of range."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.3:
            continue
        if field.message_type is not None:
            if depth < 3:
                target = getattr(message, field.name)
                for _ in range(draw.randrange(3) if field.is_repeated else 1):
                    fill(target.add() if field.is_repeated else target, draw, depth + 1)
                if not field.is_repeated:
                    target.SetInParent()
            continue
        if field.cpp_type == field.CPPTYPE_STRING:
            value: Any = draw.choice(LONG_TEXTS) if draw.random() < 0.7 else f"group{draw.randrange(9)}"
        elif field.cpp_type == field.CPPTYPE_BOOL:
            value = draw.random() < 0.5
        else:
            value = draw.choice(INTEGERS)
            if field.cpp_type == field.CPPTYPE_UINT64:
                value %= 1 << 64
            elif field.cpp_type == field.CPPTYPE_INT32:
                value %= 1 << 31
        if field.is_repeated:
            getattr(message, field.name).extend([value] * draw.randrange(3))
        else:
            setattr(message, field.name, value)
    return message


def request(kind: Callable[[], Message], draw: random.Random) -> bytes:
    """A message of that kind, its bytes damaged now and then."""
    data = fill(kind(), draw).SerializeToString()
    return mutated_bytes(data, draw)[: 3 << 20] if draw.random() < 0.2 else data


def on_loop(work: Coroutine[Any, Any, list[str]]) -> list[str]:
    return loop.submit(work).result(timeout=100)


@pytest.fixture
def lighthouse() -> Iterator[LighthouseServer]:
    server = LighthouseServer("127.0.0.1:0", 1, join_timeout_ms=50, heartbeat_timeout_ms=5000)
    yield server
    server.shutdown()


async def _calls(address: str, methods: tuple[tuple[str, Any], ...], name: str) -> list[str]:
    """What was answered to whom, where it is not one of the answers that a server means."""
    bad: list[str] = []
    async with grpc.aio.insecure_channel(address.removeprefix("http://")) as channel:

        async def one(number: int) -> None:
            draw = random_for(name, number)
            method, kind = draw.choice(methods)
            data = request(kind, draw)
            try:
                await channel.unary_unary(method)(data, timeout=LIMIT)
            except grpc.aio.AioRpcError as e:
                parse = "Error parsing message" in (e.details() or "")  # grpc, of bytes that are no such message
                if e.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL) and not parse:
                    bad.append(f"{name} {number}: {method}: {e.code()}: {(e.details() or '')[:300]}")

        for start in range(0, CALLS, 100):
            await asyncio.gather(*(one(n) for n in range(start, start + 100)))
    return bad


async def _streams(address: str, name: str) -> list[str]:
    """Sessions that begin with a hello or not, say anything, and end at any point."""
    bad: list[str] = []
    async with grpc.aio.insecure_channel(address.removeprefix("http://")) as channel:

        async def one(number: int) -> None:
            draw = random_for(name, number)
            call = channel.stream_stream("/torchft.SessionService/Session")(timeout=2)
            try:
                if draw.random() < 0.8:
                    hello = session_pb2.Hello(replica_id=f"group{draw.randrange(9)}", group_rank=draw.choice(INTEGERS))
                    addresses = ("", "127.0.0.1:1", "127.0.0.1:99999", "a:-1", "é" * 300 + ":1", ":", "x" * 300 + ":80")
                    hello.life_address = draw.choice(addresses)
                    await call.write(session_pb2.SessionUp(hello=hello).SerializeToString())
                for _ in range(draw.randrange(8)):
                    await call.write(request(session_pb2.SessionUp, draw))
                if draw.random() < 0.5:
                    await call.done_writing()
                    await call.read()
                call.cancel()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                pass
            except asyncio.CancelledError:
                if not call.done():
                    raise
            if call.done() and await call.code() == grpc.StatusCode.UNKNOWN:
                details = await call.details()
                if "Error parsing message" not in details:
                    bad.append(f"{name} {number}: {details}")

        for start in range(0, STREAMS, 50):
            await asyncio.gather(*(one(n) for n in range(start, start + 50)))
    return bad


def _assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    wrong = [r for r in caplog.records if r.exc_info and not r.name.startswith("grpc.")]  # it tells of every bad call
    assert not wrong, f"{wrong[0].name}: {wrong[0].getMessage()[:500]}: {wrong[0].exc_info}"


def test_lighthouse(lighthouse: LighthouseServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert on_loop(_calls(lighthouse.address(), LIGHTHOUSE, "lighthouse")) == []
        assert on_loop(_streams(lighthouse.address(), "session")) == []
        client = LighthouseClient(lighthouse.address(), WAIT)
        quorum = client.quorum(replica_id="good", timeout=WAIT)
        assert "good" in [m.replica_id for m in quorum.participants]
    _assert_quiet(caplog)


def test_manager_server(lighthouse: LighthouseServer, caplog: pytest.LogCaptureFixture) -> None:
    server = ManagerServer(
        "good", lighthouse.address(), "127.0.0.1", "127.0.0.1:0", "store:1", 2, timedelta(milliseconds=50), WAIT, 0
    )
    try:
        with caplog.at_level(logging.ERROR):
            assert on_loop(_calls(server.address(), MANAGER, "manager")) == []
            assert on_loop(_streams(server.address(), "ranks")) == []
            client = ManagerClient(server.address(), WAIT)
            with pytest.raises((RuntimeError, TimeoutError)):  # of the other rank nothing is heard
                client._quorum(0, 1, "m", False, timedelta(seconds=1), 0)
    finally:
        server.shutdown()
    _assert_quiet(caplog)


def test_member_data_of_any_depth_is_its_own_business() -> None:
    for text in ("[" * 60_000, '{"a":' * 10_000, "nan", "[1", "\ud7ff", "9" * 5000):
        quorum = quorum_from_wire(pb.Quorum(quorum_id=1, participants=[pb.QuorumMember(replica_id="a", data=text)]))
        assert quorum.participants[0].replica_id == "a"
