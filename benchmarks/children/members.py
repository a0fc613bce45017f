"""Thousands of groups in one process, as far as a lighthouse can tell: real sockets, and nothing behind them.

``--standing``: each keeps a session, answers what it is asked about a change, and asks when it is told to. Otherwise
each asks by a call of its own, as clients without sessions do. What is answered is counted, not looked at.
"""

import argparse
import asyncio
import time

import grpc
import grpc.aio
from report import hello, say

from torchft.coordination.proto import session_pb2, session_pb2_grpc
from torchft.coordination.proto import torchft_pb2 as pb

CHANNELS = 64
QUORUM = "/torchft.LighthouseService/Quorum"


def member(name: str, step: int) -> pb.QuorumMember:
    return pb.QuorumMember(
        replica_id=f"{name}:00000000-0000-4000-8000-000000000000",
        address="http://127.0.0.1:29600",
        store_address="127.0.0.1:29601",
        step=step,
        world_size=1,
    )


class Asking:
    """Groups that ask by calls."""

    def __init__(self, channels: list[grpc.aio.Channel]) -> None:
        self._calls = [
            channel.unary_unary(QUORUM, request_serializer=None, response_deserializer=None) for channel in channels
        ]

    async def ask(self, i: int, name: str, step: int) -> None:
        request = pb.LighthouseQuorumRequest(requester=member(name, step)).SerializeToString()
        await self._calls[i % CHANNELS](request, timeout=120)


class Session:
    """A group that keeps a session."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._stream = session_pb2_grpc.SessionServiceStub(channel).Session()
        self._name = name
        self._answered: asyncio.Future[session_pb2.Answer] = asyncio.get_running_loop().create_future()
        self.decided = self._undecided()
        self._writing = asyncio.Lock()  # a stream takes one message at a time
        self._uses = 0
        self.step = 0

    @staticmethod
    def _undecided() -> asyncio.Future[int]:
        return asyncio.get_running_loop().create_future()

    async def begin(self) -> None:
        hello = session_pb2.Hello(replica_id=member(self._name, 0).replica_id, standing=True)
        await self._write(session_pb2.SessionUp(hello=hello))
        await self._stream.read()
        self._reader = asyncio.ensure_future(self._read())
        self._beats = asyncio.ensure_future(self._beat())

    async def ask(self, step: int) -> None:
        self._answered = asyncio.get_running_loop().create_future()
        ready = session_pb2.Ready(request_id=1, member=member(self._name, step), init_sync=True, uses=self._uses)
        await self._write(session_pb2.SessionUp(ready=ready))
        answer = await self._answered
        if answer.error:
            raise RuntimeError(answer.error)
        self._uses = answer.grant.views[0].quorum_id if answer.grant.stands else 0
        self.step = step
        self.decided = self._undecided()

    async def _write(self, message: session_pb2.SessionUp) -> None:
        async with self._writing:
            await self._stream.write(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(1.0)  # as each group does with a heartbeat timeout of 5 s
            await self._write(session_pb2.SessionUp(beat=session_pb2.Beat()))

    async def _read(self) -> None:
        while True:
            message = await self._stream.read()
            if not isinstance(message, session_pb2.SessionDown):
                return
            kind = message.WhichOneof("kind")
            if kind == "answer":
                self._answered.set_result(message.answer)
            elif kind == "prepare":
                ack = session_pb2.Ack(change=message.prepare.change, step=self.step)
                await self._write(session_pb2.SessionUp(ack=ack))
            elif kind == "decide":
                self.decided.set_result(message.decide.step)


async def by_calls(channels: list[grpc.aio.Channel], groups: int, changes: int) -> None:
    asking = Asking(channels)
    names = [f"g{i}" for i in range(groups)]
    step = 5
    await asyncio.gather(*(asking.ask(i, name, step) for i, name in enumerate(names)))
    for change in range(changes):
        joiner = asyncio.ensure_future(asking.ask(groups, f"joiner{change}", 0))
        await asyncio.sleep(0.2)
        step += 1
        began = time.monotonic()
        await asyncio.gather(joiner, *(asking.ask(i, name, step) for i, name in enumerate(names)))
        say("change", standstill=time.monotonic() - began, joining=None)
        names.append(f"joiner{change}")


async def by_sessions(channels: list[grpc.aio.Channel], groups: int, stand: float, changes: int) -> None:
    sessions = [Session(channels[i % CHANNELS], f"g{i}") for i in range(groups)]
    await asyncio.gather(*(s.begin() for s in sessions))
    await asyncio.gather(*(s.ask(5) for s in sessions))
    say("stands")
    await asyncio.sleep(stand)
    say("stood")
    for change in range(changes):
        newcomer = Session(channels[change % CHANNELS], f"joiner{change}")
        await newcomer.begin()
        joining = time.monotonic()
        joiner = asyncio.ensure_future(newcomer.ask(0))
        steps = await asyncio.gather(*(s.decided for s in sessions))
        began = time.monotonic()
        await asyncio.gather(joiner, *(s.ask(step) for s, step in zip(sessions, steps, strict=True)))
        ended = time.monotonic()
        say("change", standstill=ended - began, joining=ended - joining)
        sessions.append(newcomer)
        await asyncio.gather(*(s.ask(max(steps) + 1) for s in sessions))  # it has healed: the next quorum stands


async def run(address: str, groups: int, standing: bool, stand: float, changes: int) -> None:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    channels = [grpc.aio.insecure_channel(address.removeprefix("http://"), options=options) for _ in range(CHANNELS)]
    if standing:
        await by_sessions(channels, groups, stand, changes)
    else:
        await by_calls(channels, groups, changes)
    say("changed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--standing", action="store_true")
    parser.add_argument("--stand", type=float, default=0.0, help="seconds in which nothing happens")
    parser.add_argument("--changes", type=int, default=1, help="joiners, one after the other")
    args = parser.parse_args()
    stop = hello()
    asyncio.run(run(args.lighthouse, args.groups, args.standing, args.stand, args.changes))
    stop.wait()


if __name__ == "__main__":
    main()
