"""One end of state transfers over HTTP, and of the same bytes over bare TCP.

The state is `--count` tensors of `--mib` MiB in all. Each round moves it in every way that the implementation has:
where `HTTPTransport` takes a `state_dict`, into the receiver's own tensors, and, when those rounds are over, into fresh
memory (without and with `num_chunks`): to give so much memory back keeps the system busy for a while. Beside the first,
`recv_into` of 1 MiB from one and from two TCP streams into those same tensors, checked by nobody: what the kernel
gives; and from two whose congestion control does not pace (`reno`), where the default one may. The receiver tells the
seconds of each, from when the source may begin until everything is there, and both what their memory peaked at beyond
what they held before.
"""

import inspect
import socket
import threading
import time
from collections.abc import Iterator

from ends import MIB, TIMEOUT, End, State, check, peak, peak_anew, run
from report import say

from torchft.checkpointing import HTTPTransport

RAW = {"raw1": slice(0, 1), "raw2": slice(0, 2), "raw2 unpaced": slice(2, 4)}
"""The ways without a transport, and which of the sockets each takes."""


def views_of(state: State, streams: int) -> list[list[memoryview]]:
    """The state's memory, dealt to so many streams."""
    out: list[list[memoryview]] = [[] for _ in range(streams)]
    for i, tensor in enumerate(state.values()):
        out[i % streams].append(memoryview(tensor.numpy()).cast("B"))
    return out


def send_all(sock: socket.socket, views: list[memoryview]) -> None:
    for view in views:
        sock.sendall(view)


def receive_all(sock: socket.socket, views: list[memoryview]) -> None:
    for view in views:
        at = 0
        while at < len(view):
            got = sock.recv_into(view[at : at + MIB], 0, socket.MSG_WAITALL)
            if not got:
                raise RuntimeError("the other end is gone")
            at += got


def at_once(move: object, sockets: list[socket.socket], state: State) -> None:
    parts = views_of(state, len(sockets))
    threads = [threading.Thread(target=move, args=pair) for pair in zip(sockets, parts, strict=True)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def transports(state: State | None) -> dict[str, HTTPTransport]:
    """By the name of the way: of a source if there is no state to receive into."""
    out = {"fresh": HTTPTransport(TIMEOUT, 0), "chunks": HTTPTransport(TIMEOUT, 8)}
    if "state_dict" in inspect.signature(HTTPTransport.__init__).parameters:
        out["place"] = HTTPTransport(TIMEOUT, snapshot="lock", state_dict=None if state is None else lambda: state)
    return out


def turns(ways: dict[str, HTTPTransport], rounds: int) -> Iterator[tuple[int, list[str], list[str]]]:
    """The ways of each turn: with a transport, and without."""
    into_place = [way for way in ways if way == "place"]
    for n in range(rounds):
        yield n, into_place, list(RAW)
    for n in range(rounds, 2 * rounds):
        yield n, [way for way in ways if way not in into_place], []


def serve(end: End) -> None:
    store, state = end.store, end.state
    ways = transports(None)
    listener = socket.create_server(("127.0.0.1", 0))
    store.set("port", str(listener.getsockname()[1]))
    sockets = [listener.accept()[0] for _ in range(4)]
    for sock in sockets[2:]:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    step = 0
    beyond: dict[str, int] = {}
    for n, moved, raw in turns(ways, end.rounds):
        for way in moved:
            transport = ways[way]
            step += 1
            end.mark(float(step))
            before = peak_anew()
            store.set(f"metadata{step}", transport.metadata())
            store.wait([f"go{step}"], TIMEOUT)
            transport.send_checkpoint([1], step, state, TIMEOUT)
            store.wait([f"done{step}"], TIMEOUT)
            transport.disallow_checkpoint()
            beyond[way] = max(beyond.get(way, 0), peak() - before)
        for way in raw:
            store.wait([f"{way}.{n}"], TIMEOUT)
            at_once(send_all, sockets[RAW[way]], state)
    finish(ways, beyond)


def receive(end: End) -> None:
    store, state = end.store, end.state
    ways = transports(state)
    store.wait(["port"], TIMEOUT)
    sockets = [socket.create_connection(("127.0.0.1", int(store.get("port")))) for _ in range(4)]
    step = 0
    beyond: dict[str, int] = {}
    for n, moved, raw in turns(ways, end.rounds):
        for way in moved:
            transport = ways[way]
            step += 1
            store.wait([f"metadata{step}"], TIMEOUT)
            metadata = store.get(f"metadata{step}").decode()
            before = peak_anew()
            began = time.perf_counter()
            store.set(f"go{step}", "")
            got = transport.recv_checkpoint(0, metadata, step, TIMEOUT)
            took = time.perf_counter() - began
            beyond[way] = max(beyond.get(way, 0), peak() - before)
            store.set(f"done{step}", "")
            check(got, step, f"step {step}")
            del got
            say("moved", way=way, seconds=took)
        for way in raw:
            began = time.perf_counter()
            store.set(f"{way}.{n}", "")
            at_once(receive_all, sockets[RAW[way]], state)
            say("moved", way=way, seconds=time.perf_counter() - began)
    finish(ways, beyond)


def finish(ways: dict[str, HTTPTransport], beyond: dict[str, int]) -> None:
    for way, nbytes in beyond.items():
        say("memory", way=way, beyond=nbytes)
    for transport in ways.values():
        transport.shutdown()


if __name__ == "__main__":
    run(__doc__, lambda end: serve(end) if end.sends else receive(end))
