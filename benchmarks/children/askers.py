"""Groups without torch that do nothing but ask for quorums: what a lighthouse does, and not what training does.

Told `ask`, all ask at once for a quorum that takes the place of the last one, and say when each has it.
"""

import argparse
import queue
import threading
import time
from datetime import timedelta

from report import hello, say

from torchft.coordination import ManagerServer

MINUTE = timedelta(seconds=60)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lighthouse")
    parser.add_argument("groups", type=int)
    args = parser.parse_args()
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = hello(orders.put)
    servers = [
        ManagerServer(f"asker{i}", args.lighthouse, "", "[::]:0", "store:1", 1, timedelta(seconds=1), MINUTE, 0)
        for i in range(args.groups)
    ]

    answers: list[tuple[float, int]] = []

    def ask(server: ManagerServer) -> None:
        quorum = server._quorum(0, 1, "", False, MINUTE, 1)
        answers.append((time.monotonic(), quorum.quorum_id))

    say("ready")
    while not stop.is_set():
        try:
            orders.get(timeout=0.1)
        except queue.Empty:
            continue
        threads = [threading.Thread(target=ask, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for t, quorum_id in answers:
            say("quorum", t=t, id=quorum_id)
        answers.clear()
        say("asked")
    for server in servers:
        server.shutdown()


if __name__ == "__main__":
    main()
