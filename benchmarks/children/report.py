"""What every child says on its standard output and hears on its standard input (see benchmarks/processes.py)."""

import json
import os
import sys
import threading
import time

import torchft


def say(event: str, t: float | None = None, **fields: object) -> None:
    """Writes one event, a JSON object, on a line of its own."""
    print(json.dumps({"event": event, "t": time.monotonic() if t is None else t, **fields}), flush=True)


def hello() -> threading.Event:
    """Names the torchft that was imported. Returns the event that the parent's word `stop` sets.

    A parent that is gone closes the pipe, and this process then ends: no child outlives its run.
    """
    stop = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "stop":
                stop.set()
        os._exit(3)

    threading.Thread(target=listen, name="listen", daemon=True).start()
    say("hello", torchft=torchft.__file__, pid=os.getpid())
    return stop
