"""One end of state transfers over HTTP, and of the same bytes over bare TCP.

The state is `--count` tensors of `--mib` MiB in all. It is moved in every way that the implementation has: where
`HTTPTransport` takes a `state_dict`, into the receiver's own tensors, by the way that it takes between two processes
of one machine (a state of many tensors: in turns with one of few), by TCP, and by the Unix socket that is used where
no process may read another's memory; then into fresh memory, without and with `num_chunks`. What is in place takes
turns with `recv_into` of 1 MiB from one and from two TCP streams into those same tensors, checked by nobody: what the
kernel gives; and from two whose congestion control does not pace (`reno`), where the default one may. Each other way
has its rounds after that: gigabytes that are given back keep the system busy for a while. The receiver tells the
seconds of each, from when the source may begin until everything is there, and both what their memory peaked at beyond
what they held before.
"""

import inspect
import os
import socket
import threading
import time

from ends import MIB, TIMEOUT, End, State, check, in_turn, mark, peak, peak_anew, run
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


def transports(end: End) -> dict[str, HTTPTransport]:
    """By the name of the way. In place the receiver's state is the destination."""
    out = {"fresh": HTTPTransport(TIMEOUT, 0), "chunks": HTTPTransport(TIMEOUT, 8)}
    options = inspect.signature(HTTPTransport.__init__).parameters

    def place(way: str, **more: bool) -> None:
        into = None if end.sends else lambda: moved_by(way, end)
        out[way] = HTTPTransport(TIMEOUT, snapshot="lock", state_dict=into, **more)

    if "state_dict" in options:
        place("place")
        if end.few:
            place("place, few")
    if "local" in options:
        place("place, tcp", local=False)
        os.environ["TORCHFT_CROSS_MEMORY"] = "0"  # read when a source is made
        place("place, socket")
        del os.environ["TORCHFT_CROSS_MEMORY"]
    return out


def moved_by(way: str, end: End) -> State:
    """The state that goes this way."""
    return end.few if way == "place, few" else end.state


def phases(ways: dict[str, HTTPTransport]) -> list[tuple[list[str], list[str]]]:
    """The ways that alternate, with a transport and without. The transports end with their phase, and free memory."""
    place = [way for way in ways if way.startswith("place")]
    return [(place, list(RAW)), *(([way], []) for way in ways if way not in place)]


def serve(end: End) -> None:
    store = end.store
    ways = transports(end)
    listener = socket.create_server(("127.0.0.1", 0))
    store.set("port", str(listener.getsockname()[1]))
    sockets = [listener.accept()[0] for _ in range(4)]
    for sock in sockets[2:]:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    step = 0
    for moved, raw in phases(ways):
        beyond = dict.fromkeys(moved, 0)
        for n in range(end.rounds):
            for way in in_turn(moved, n):
                step += 1
                state = moved_by(way, end)
                mark(state, float(step))
                before = peak_anew()
                store.set(f"metadata{step}", ways[way].metadata())
                store.wait([f"go{step}"], TIMEOUT)
                ways[way].send_checkpoint([1], step, state, TIMEOUT)
                store.wait([f"done{step}"], TIMEOUT)
                ways[way].disallow_checkpoint()
                beyond[way] = max(beyond[way], peak() - before)
            for way in raw:
                store.wait([f"{way}.{n}"], TIMEOUT)
                at_once(send_all, sockets[RAW[way]], end.state)
        finish(ways, beyond, end)


def receive(end: End) -> None:
    store = end.store
    ways = transports(end)
    store.wait(["port"], TIMEOUT)
    sockets = [socket.create_connection(("127.0.0.1", int(store.get("port")))) for _ in range(4)]
    step = 0
    for moved, raw in phases(ways):
        beyond = dict.fromkeys(moved, 0)
        for n in range(end.rounds):
            for way in in_turn(moved, n):
                step += 1
                store.wait([f"metadata{step}"], TIMEOUT)
                metadata = store.get(f"metadata{step}").decode()
                before = peak_anew()
                began = time.perf_counter()
                store.set(f"go{step}", "")
                got = ways[way].recv_checkpoint(0, metadata, step, TIMEOUT)
                took = time.perf_counter() - began
                beyond[way] = max(beyond[way], peak() - before)
                store.set(f"done{step}", "")
                check(got, step, f"step {step}")
                del got
                say("moved", way=way, seconds=took)
            for way in raw:
                began = time.perf_counter()
                store.set(f"{way}.{n}", "")
                at_once(receive_all, sockets[RAW[way]], end.state)
                say("moved", way=way, seconds=time.perf_counter() - began)
        finish(ways, beyond, end)


def finish(ways: dict[str, HTTPTransport], beyond: dict[str, int], end: End) -> None:
    """The end of a phase. The first is the only one with few tensors."""
    end.few.clear()
    for way, nbytes in beyond.items():
        say("memory", way=way, beyond=nbytes)
        ways[way].shutdown()


if __name__ == "__main__":
    run(__doc__, lambda end: serve(end) if end.sends else receive(end))
