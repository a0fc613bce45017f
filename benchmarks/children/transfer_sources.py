"""A source behind a link of so many bytes a second, or a receiver that takes the state from one of two, and from both.

The receiver takes it from the first source, from both, and from both once more, telling when half of it is there:
whoever started this kills the second source then.
"""

import argparse
import threading
import time
from datetime import timedelta

import torch
from report import hello, say

from torchft.checkpointing import HTTPTransport
from torchft.testing.faults import Link

TIMEOUT = timedelta(seconds=60)
STEP = 7


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second of this source's link")
    parser.add_argument("--sources", nargs="*", default=[], help="addresses, for the receiver")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()
    state = {f"t{i}": torch.full((args.mib << 20 >> 4,), float(not args.sources), dtype=torch.uint8) for i in range(16)}
    if not args.sources:
        source = HTTPTransport(TIMEOUT, snapshot="lock", hostname="127.0.0.1")
        source.send_checkpoint([1], STEP, state, TIMEOUT)
        with Link(source.metadata().rpartition("http://")[2]) as link:
            link.throttle(args.rate)
            say("source", address=link.address)
            stop.wait()
        return
    receiver = HTTPTransport(TIMEOUT, hostname="127.0.0.1", state_dict=lambda: state)
    metadata = [(rank, f"torchft-http/1 http://{address}") for rank, address in enumerate(args.sources)]
    for way, sources in (("one", metadata[:1]), ("two", metadata), ("killed", metadata)):
        for tensor in state.values():
            tensor.zero_()
        receiver.last_receive = None
        began = time.perf_counter()
        if way == "killed":
            threading.Thread(target=tell_half, args=(receiver,), daemon=True).start()
        receiver.recv_from_many(sources, STEP, TIMEOUT)
        took = time.perf_counter() - began
        if not all(int(t.min()) == 1 for t in state.values()):
            raise RuntimeError(f"{way}: not what was sent")
        progress = receiver.last_receive
        say("moved", way=way, seconds=took, again=progress.received / progress.total - 1, sources=progress.sources)
    say("over")
    stop.wait()


def tell_half(receiver: HTTPTransport) -> None:
    while (
        receiver.last_receive is None
        or receiver.last_receive.done < receiver.last_receive.total / 2
        or (not receiver.last_receive.total)
    ):
        time.sleep(0.002)
    say("half")


if __name__ == "__main__":
    main()
