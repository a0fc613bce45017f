"""What the cases share that move a state between two processes and do nothing else."""

from __future__ import annotations

import statistics

from benchmarks.cases.base import Run
from benchmarks.processes import CHILDREN, Child, Cluster

__all__ = ["Ends"]


class Ends:
    """A source and a receiver that have moved the state by every way they know, and have ended.

    Args:
        run: what for.
        script: of both, in the children's folder.
        mib: of the state.
        count: its tensors.
        rounds: times that each way is taken.
    """

    def __init__(self, run: Run, script: str, mib: int, count: int, rounds: int) -> None:
        if run.quick:
            mib, count, rounds = min(mib, 64), min(count, 40), 2
        args = ("--mib", mib, "--count", count, "--rounds", rounds)
        with Cluster() as cluster:
            source = cluster.spawn(run.impl, CHILDREN / script, "--rank", 0, *args, name="source")
            source.hello()
            port = source.wait("store", 30)["port"]
            receiver = cluster.spawn(run.impl, CHILDREN / script, "--rank", 1, "--port", port, *args, name="receiver")
            receiver.hello()
            self.total = float(receiver.wait("over", 280)["total"])
            source.wait("over", 30)
            for child in (source, receiver):
                child.tell("stop")
            for child in (source, receiver):
                if child.end(60) != 0:
                    raise child.error("failed at its end")
        self._source, self._receiver = source, receiver

    def seconds(self, warm: int = 0) -> dict[str, float]:
        """By way, the median of the rounds after the first ``warm``."""
        took: dict[str, list[float]] = {}
        for e in self._receiver.all("moved"):
            took.setdefault(e["way"], []).append(e["seconds"])
        return {way: statistics.median(seconds[warm:]) for way, seconds in took.items()}

    def speed(self, warm: int = 0) -> dict[str, float]:
        """By way, in GB/s: see :meth:`seconds`."""
        return {way: self.total / seconds / 1e9 for way, seconds in self.seconds(warm).items()}

    def beyond(self, way: str, of_source: bool = False) -> float:
        """Bytes that the memory of the receiver, or of the source, peaked at beyond what it held before."""
        child: Child = self._source if of_source else self._receiver
        return float(max(e["beyond"] for e in child.all("memory") if e["way"] == way))
