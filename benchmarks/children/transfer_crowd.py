"""A source of one state, or a crowd of receivers that ask for it before it is offered.

The source offers it when it is told `offer`, and says when. The crowd is `--crowd` threads with a transport each; it
says `asking` when all of them do, why one failed, and in the end when each had the state, by the clock of the machine.
"""

import argparse
import threading
import time
from datetime import timedelta

import torch
from report import hello, say

from torchft.checkpointing import HTTPTransport

TIMEOUT = timedelta(seconds=60)
STEP = 7


def serve(nbytes: int) -> None:
    told = threading.Event()
    stop = hello(lambda _: told.set())
    source: HTTPTransport = HTTPTransport(TIMEOUT, 0)
    state = {f"t{i}": torch.full((nbytes // 16 // 4,), float(STEP)) for i in range(16)}
    say("source", metadata=source.metadata())
    told.wait()
    say("offered")
    source.send_checkpoint([1], STEP, state, TIMEOUT)
    stop.wait()
    source.disallow_checkpoint()
    source.shutdown()


def ask(count: int, metadata: str) -> None:
    stop = hello()
    transports = [HTTPTransport(TIMEOUT, 0) for _ in range(count)]
    ready = threading.Barrier(count + 1)
    done: list[float | None] = [None] * count

    def receive(i: int) -> None:
        ready.wait()
        try:
            got = transports[i].recv_checkpoint(0, metadata, STEP, TIMEOUT)
        except Exception as e:  # the peer's are of any class
            say("failed", why=f"{type(e).__name__}: {e}"[:200])
            return
        if any(float(t[0]) != STEP or float(t[-1]) != STEP for t in got.values()):
            say("failed", why="not what was sent")
            return
        done[i] = time.monotonic()

    threads = [threading.Thread(target=receive, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    say("asking")
    for thread in threads:
        thread.join()
    say("over", done=[at for at in done if at is not None])
    stop.wait()
    for transport in transports:
        transport.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=0, help="of the source's state")
    parser.add_argument("--crowd", type=int, default=0, help="receivers; 0: the source")
    parser.add_argument("--metadata", default="", help="of the source, for the crowd")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.crowd:
        ask(args.crowd, args.metadata)
    else:
        serve(args.bytes)


if __name__ == "__main__":
    main()
