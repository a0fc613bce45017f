"""A replica group's ManagerServer in a process of its own, for tests that kill it. Obeys lines on its standard input.

Prints a JSON line per event: `ready`, `notice`, and `done` after each command: `ask`, `hold_gil SECONDS`, `fork`,
`leave REASON`, `raise`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from torchft.coordination import ManagerServer
from torchft.departure import leave_at_the_end


def say(event: str, **fields: Any) -> None:
    os.write(1, (json.dumps({"event": event, "time": time.monotonic(), **fields}) + "\n").encode())


class Leaver:
    def __init__(self, server: ManagerServer) -> None:
        self._server = server

    def leave(self, reason: str) -> bool:
        return self._server.leave(reason, 3)


def main() -> None:
    replica_id, lighthouse = sys.argv[1:]
    minute = timedelta(minutes=1)
    server = ManagerServer(replica_id, lighthouse, "", "[::]:0", "store:1", 1, timedelta(milliseconds=100), minute, 0)
    server.listen(lambda n: say("notice", replica=n.replica_id, cause=n.cause, quorum=n.quorum_id, step=n.step))
    leaver = Leaver(server)
    leave_at_the_end(leaver)
    say("ready", pid=os.getpid(), address=server.address())
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "ask":
            quorum = server._quorum(0, 3, "", False, minute, 0)
            say("quorum", id=quorum.quorum_id, members=quorum.replica_ids)
        elif command == "hold_gil":
            ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))
        elif command == "fork":
            child = os.fork()
            if child == 0:
                threading.Event().wait(60)
                os._exit(0)
            say("child", pid=child)
        elif command == "leave":
            server.leave(argument, 3)
        elif command == "raise":
            raise ZeroDivisionError("made on purpose")
        say("done", command=command)


if __name__ == "__main__":
    main()
