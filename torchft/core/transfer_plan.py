"""Which chunk of a state comes from which source, and what to do when one is bad, slow, or gone.

The idea
    A state is chunks of known lengths. *Workers* (one connection each, several to a source) ask for work whenever they
    have none and get a run of chunks that follow one another, long while much is left, short towards the end. The first
    is one chunk: how fast a worker is nobody knows yet, and others may still come. What a worker holds is nobody else's
    until it is verified, found bad, or given back.

Rules
    - A chunk that is found bad is not asked of the same source again while another one can give it. A source whose
      chunks were bad ``MAX_BAD`` times is *distrusted*: the shell takes its workers away if there is another.
    - A worker that ends, for whatever reason, gives back what it holds.
    - When nothing is left to give, an idle worker may *take over* what a much slower one holds: the shell ends the slow
      one first, and gives out its chunks when it has ended, so that no two ever write the same memory. What has come of
      a chunk is lost then, and counts: the bytes that are left are weighed against all bytes that it holds.
    - Chunks that were kept from an earlier attempt are done until a source's table says otherwise (``revoke``).

Invariants (tests/core/test_transfer_plan_model.py)
    - Each chunk is exactly one of: missing, held by one worker, done.
    - As long as one worker of a source that is honest for each chunk asks again and again, the plan ends.
    - Time is an argument, seconds on any clock that only goes forward.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["MAX_BAD", "MAX_RUN", "SHORT", "SLOW_RUN", "Hopeless", "TakeOver", "TransferPlan", "Work"]

SLOW_RUN = 8
"""Chunks in one request, at most: 64 MiB of 8 MiB each, of which a request's own cost is nothing over a network."""
MAX_RUN = 32
"""The same of a worker that has been so fast that they come within ``SHORT``: on one machine a request's cost shows."""
SHORT = 0.1
"""Seconds."""
MAX_BAD = 2
"""Chunks of a source that may be bad before it is distrusted."""
MAX_TRIES = 3
"""How often one chunk may be bad, over all sources."""
_GRACE = 0.25
"""Seconds that a worker is left alone beyond what could be gained by taking over from it."""
_UNKNOWN = 1.0
"""Seconds after which a worker may be taken over from to which nothing has come, as to nobody else."""
_SURE = 0.5
"""Seconds after which bytes tell how fast a worker is, before its first chunk is whole."""


class Hopeless(Exception):
    """A chunk was bad so often that asking again makes no sense."""

    def __init__(self, index: int) -> None:
        super().__init__(f"chunk {index} was bad {MAX_TRIES} times")
        self.index = index


@dataclass(frozen=True, slots=True)
class Work:
    """Chunks ``first`` to ``stop`` (not included) are the worker's now."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class TakeOver:
    """End this worker: it is so slow that what it holds is sooner had from the one that asks."""

    victim: int


@dataclass(slots=True)
class _Worker:
    source: int
    held: list[int] = field(default_factory=list)
    """In the order in which they arrive."""
    since: float = 0.0
    """When it was given its work, or its last chunk arrived."""
    heard: float = 0.0
    """When bytes came last; not before ``since``."""
    received: int = 0
    """Bytes, those of chunks that are not whole included."""
    arrived: int = 0
    """Bytes of whole chunks."""
    busy: float = 0.0
    """Seconds in which these came."""
    ending: bool = False

    @property
    def rate(self) -> float | None:
        """Bytes a second; None: it is too early to say."""
        busy = self.busy + (self.heard - self.since if self.held else 0.0)
        return self.received / max(busy, 1e-9) if self.arrived or busy >= _SURE else None

    def needs(self, nbytes: int, now: float) -> float:
        """Seconds until all that it holds, ``nbytes``, will have come, as far as can be said."""
        came, rate = self.received - self.arrived, self.rate
        left, waited, silent = nbytes - came, now - self.since, now - self.heard
        as_before = left / rate if rate else 0.0
        # What has stopped, or has become slower with this chunk, may take as long again as it has already.
        as_now = waited * min(1.0, left / came) if came else waited
        return max(as_before + silent, as_now)


class TransferPlan:
    """The work of one fetch.

    Args:
        lengths: bytes of each chunk.
        done: chunks that are there already.
    """

    def __init__(self, lengths: Sequence[int], done: Iterable[int] = ()) -> None:
        self.count = count = len(lengths)
        self._lengths = lengths
        self._largest = max(lengths, default=1)
        self._done = set(done)
        self._free: list[tuple[int, int]] = []
        self._workers: dict[int, _Worker] = {}
        self._barred: dict[int, set[int]] = {}
        self._tries: dict[int, int] = {}
        self._bad: dict[int, int] = {}
        missing = 0
        for index in range(count):
            if index in self._done:
                if missing < index:
                    self._free.append((missing, index))
                missing = index + 1
        if missing < count:
            self._free.append((missing, count))

    # ---------------------------------------------------------------- facts

    @property
    def finished(self) -> bool:
        return len(self._done) == self.count

    @property
    def done(self) -> frozenset[int]:
        """Chunks that are there."""
        return frozenset(self._done)

    @property
    def remaining(self) -> int:
        """Chunks that are not there."""
        return self.count - len(self._done)

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._workers)

    def bad_from(self, source: int) -> int:
        """How many of its chunks were bad."""
        return self._bad.get(source, 0)

    def distrusted(self, source: int) -> bool:
        return self.bad_from(source) >= MAX_BAD

    # -------------------------------------------------------------- workers

    def add(self, worker: int, source: int) -> None:
        """A worker that takes chunks from ``source`` is there."""
        if worker in self._workers:
            raise ValueError(f"worker {worker} is there already")
        self._workers[worker] = _Worker(source)

    def remove(self, worker: int) -> None:
        """It is gone: what it holds is missing again. Unknown workers are no matter."""
        gone = self._workers.pop(worker, None)
        for index in () if gone is None else gone.held:
            self._give_back(index)

    def ask(self, worker: int, now: float) -> Work | TakeOver | None:
        """What a worker that holds nothing is to do; None: nothing now, ask again when something has changed.

        Raises:
            ValueError: it holds work.
        """
        asking = self._workers[worker]
        if asking.held:
            raise ValueError(f"worker {worker} holds work")
        if asking.ending:
            return None
        work = self._take(asking)
        if work is not None:
            asking.held = list(range(work.first, work.stop))
            asking.since = asking.heard = now
            return work
        return self._slowest(asking, now)

    def heard(self, worker: int, received: int, now: float) -> None:
        """So many bytes have come to it since it was added."""
        one = self._workers[worker]
        if received > one.received:
            one.received, one.heard = received, now

    def arrived(self, worker: int, now: float) -> None:
        """All bytes of the first chunk that it holds have come; whether they are right follows."""
        one = self._workers[worker]
        one.arrived += self._lengths[one.held[0]]
        one.received = max(one.received, one.arrived)
        one.busy += now - one.since
        one.since = one.heard = now

    def verified(self, worker: int, index: int) -> None:
        """A chunk that it holds is done."""
        self._workers[worker].held.remove(index)
        self._done.add(index)

    def bad(self, worker: int, index: int) -> None:
        """A chunk that it holds has not the bytes that were announced: it is missing again.

        Raises:
            Hopeless: once too often.
        """
        one = self._workers[worker]
        one.held.remove(index)
        self._give_back(index)
        self._bad[one.source] = self._bad.get(one.source, 0) + 1
        self._barred.setdefault(index, set()).add(one.source)
        self._tries[index] = self._tries.get(index, 0) + 1
        if self._tries[index] >= MAX_TRIES:
            raise Hopeless(index)

    def revoke(self, indices: Iterable[int]) -> None:
        """Chunks that were done are not: another state's, or a source's that is not believed any more."""
        for index in indices:
            if index in self._done:
                self._done.remove(index)
                self._give_back(index)

    # -------------------------------------------------------------- inside

    def _may_take(self, source: int, index: int) -> bool:
        """Whether the source may be asked for it: it was not bad from there, or no other worker could give it."""
        barred = self._barred.get(index)
        if not barred or source not in barred:
            return True
        return all(w.source in barred for w in self._workers.values() if not w.ending)

    def _take(self, asking: _Worker) -> Work | None:
        free = sum(stop - first for first, stop in self._free)
        longest = min(self._longest(asking), max(1, free // (2 * max(1, len(self._workers)))))
        for i, (first, stop) in enumerate(self._free):
            start = first
            while start < stop and not self._may_take(asking.source, start):
                start += 1
            end = start
            while end < stop and end - start < longest and self._may_take(asking.source, end):
                end += 1
            if end > start:
                self._free[i : i + 1] = [p for p in ((first, start), (end, stop)) if p[0] < p[1]]
                return Work(start, end)
        return None

    def _longest(self, asking: _Worker) -> int:
        """Chunks that a worker may have at once, however many are left."""
        if not asking.arrived:
            return 1
        soon = int((asking.rate or 0.0) * SHORT / self._largest)
        return min(MAX_RUN, max(SLOW_RUN, soon))

    def _slowest(self, asking: _Worker, now: float) -> TakeOver | None:
        mine = asking.rate or max((w.rate or 0.0 for w in self._workers.values()), default=0.0)
        worst: tuple[float, int] | None = None
        for name, other in self._workers.items():
            if other is asking or other.ending or not other.held:
                continue
            if not all(self._may_take(asking.source, index) for index in other.held):
                continue
            nbytes = sum(self._lengths[index] for index in other.held)
            left = other.needs(nbytes, now)
            gain = 2 * nbytes / mine + _GRACE if mine else _UNKNOWN
            if other.source == asking.source:
                gain = max(5 * gain, _UNKNOWN)  # two connections of one source share its speed
            if left > gain:
                worst = max(worst or (0.0, name), (left, name))
        if worst is None:
            return None
        self._workers[worst[1]].ending = True
        return TakeOver(worst[1])

    def _give_back(self, index: int) -> None:
        i = bisect.bisect_left(self._free, (index, index))
        first, stop = index, index + 1
        if i < len(self._free) and self._free[i][0] == stop:
            stop = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == first:
            first = self._free.pop(i - 1)[0]
            i -= 1
        self._free.insert(i, (first, stop))
