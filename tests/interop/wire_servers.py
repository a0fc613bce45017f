"""Lighthouses and manager servers in one process, for `wire_clients.py` of either implementation to talk to.

One lighthouse, which wants two replicas, is asked directly. Another, which wants three, serves the managers of three
groups of two ranks, `x`, `y` and `z`. (With fewer, who is in the first quorum would be a race.) A third one is there
for `single`, a group of one rank that only votes.
"""

import logging
from datetime import timedelta

from report import hello, say

from torchft.coordination import LighthouseServer, ManagerServer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = hello()
    asked = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=1000, heartbeat_timeout_ms=5000)
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=3)
    another = LighthouseServer(bind="[::]:0", min_replicas=1)

    def manager(replica_id: str, world_size: int, lighthouse: LighthouseServer = lighthouse) -> ManagerServer:
        return ManagerServer(
            replica_id=replica_id,
            lighthouse_addr=lighthouse.address(),
            hostname="localhost",
            bind="[::]:0",
            store_addr=f"store-of-{replica_id}:1",
            world_size=world_size,
            heartbeat_interval=timedelta(milliseconds=100),
            connect_timeout=timedelta(seconds=30),
            quorum_retries=0,
        )

    managers = {name: manager(name, 2) for name in ("x", "y", "z")}
    managers["single"] = manager("single", 1, another)
    say("address", lighthouse=asked.address(), managers={name: m.address() for name, m in managers.items()})
    stop.wait()
    for server in (*managers.values(), another, lighthouse, asked):
        server.shutdown()
    say("end")


if __name__ == "__main__":
    main()
