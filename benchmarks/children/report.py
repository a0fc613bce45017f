"""What every child says on its standard output and hears on its standard input (see benchmarks/processes.py)."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable

from orphan import die_with_parent

import torchft


def say(event: str, t: float | None = None, **fields: object) -> None:
    """Writes one event, a JSON object, on a line of its own."""
    line = json.dumps({"event": event, "t": time.monotonic() if t is None else t, **fields})
    print(line + "\n", end="", flush=True)  # at once: other threads may speak as well


def hello(heard: Callable[[str], object] | None = None) -> threading.Event:
    """Names the torchft that was imported. Returns the event that the parent's word `stop` sets.

    Every other line is given to `heard`, on a thread of its own. No child outlives its run: a parent that is gone
    closes the pipe, and this process ends.
    """
    die_with_parent()
    stop = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            word = line.strip()
            if word == "stop":
                stop.set()
            elif word and heard is not None:
                heard(word)
        os._exit(3)

    threading.Thread(target=listen, name="listen", daemon=True).start()
    say("hello", torchft=torchft.__file__, pid=os.getpid())
    return stop
