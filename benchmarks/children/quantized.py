"""One of two members that all-reduce 64 MB in float32 and quantized: how many bytes does each send?

Ours alone: it asks the kernel by a helper of this package. Says `result` with bytes and seconds of both.
"""

import argparse
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from report import hello, say

from torchft.collectives import allreduce_quantized
from torchft.process_group import ProcessGroupGloo
from torchft.testing.traffic import bytes_sent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--store", default="")
    parser.add_argument("--megabytes", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()
    store = args.store
    if args.rank == 0:
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        store = f"localhost:{server.port}"
        say("store", address=store)
    pg = ProcessGroupGloo(timeout=timedelta(seconds=60))
    pg.configure(f"{store}/quantized", f"member{args.rank}", args.rank, 2)
    exact = torch.randn(args.megabytes << 18)
    rounded = exact.clone()

    def measured(how: str) -> tuple[int, float]:
        pg.barrier().wait()
        before, start = bytes_sent(), time.perf_counter()
        if how == "exact":
            pg.allreduce([exact], dist.ReduceOp.SUM).wait()
        else:
            allreduce_quantized([rounded], dist.ReduceOp.SUM, pg).wait()
        seconds = time.perf_counter() - start
        pg.barrier().wait()  # the last bytes have been acknowledged
        return bytes_sent() - before, seconds

    results = {how: measured(how) for how in ("exact", "quantized")}
    error = ((exact - rounded).norm() / exact.norm()).item()
    say("result", error=error, **results)
    stop.wait()
    pg.shutdown()


if __name__ == "__main__":
    main()
