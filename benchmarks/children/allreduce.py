"""One of two members that all-reduce as fast as they can, without a Manager: what does a collective cost?

Says `result` with the seconds of each collective by size, of the first `configure` and of each later one. Rank 0 says
`store` first: where the other finds it.
"""

import argparse
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from report import hello, say

from torchft import process_group


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--group", required=True, help="a class of torchft.process_group")
    parser.add_argument("--store", default="")
    parser.add_argument("--kilobytes", type=int, nargs="+", required=True)
    parser.add_argument("--times", type=int, nargs="+", required=True)
    parser.add_argument("--shared", action="store_true", help="the tensors are in shared memory")
    parser.add_argument("--configurations", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()
    store = args.store
    if args.rank == 0:
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        store = f"localhost:{server.port}"
        say("store", address=store)
    pg = getattr(process_group, args.group)(timeout=timedelta(seconds=60))

    def configure(number: int) -> float:
        start = time.perf_counter()
        pg.configure(f"{store}/{number}", f"member{args.rank}", args.rank, 2)
        seconds = time.perf_counter() - start
        pg.allreduce([torch.ones(1)], options).wait()  # both have met: neither leaves while the other connects
        return seconds

    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM
    first = configure(0)
    collectives: dict[int, list[float]] = {}
    for kilobytes, times in zip(args.kilobytes, args.times, strict=True):
        tensor = torch.ones(kilobytes * 256)
        if args.shared:
            tensor.share_memory_()
        collectives[kilobytes] = []
        for _ in range(times):
            tensor.fill_(1.0)
            start = time.perf_counter()
            pg.allreduce([tensor], options).wait()
            collectives[kilobytes].append(time.perf_counter() - start)
            if tensor[0].item() != 2.0 or tensor[-1].item() != 2.0:
                raise RuntimeError(f"the sum is wrong: {tensor[0].item()}")
    later = [configure(n) for n in range(1, 1 + args.configurations)]
    say("result", collectives=collectives, first=first, later=later)
    stop.wait()
    if hasattr(pg, "shutdown"):
        pg.shutdown()


if __name__ == "__main__":
    main()
