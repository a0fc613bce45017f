"""Examples that need no torchrun, as forked programs: what they import is imported once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forked import ForkedProgram
from torchft.launch.processes import Child, Children

__all__ = ["Forks"]


class _Fork(Child):
    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = ForkedProgram(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env}
            )

    def kill(self, timeout: float = 30.0) -> None:
        self._process.kill()
        self._process.wait(timeout)


class Forks(Children):
    """Children of which the Python scripts are forked programs; the others are started."""

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        if argv[0] != sys.executable:
            return super().start(name, argv, env, log)
        child = _Fork(name, argv, env, log)
        self._children.append(child)
        return child
