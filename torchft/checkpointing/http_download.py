"""One state, fetched over HTTP from as many sources as it takes, and verified.

The idea
    The assigned source is asked first (:mod:`torchft.checkpointing.http_discovery`), and is enough where the rest
    would come within ``_SOON``. Otherwise, or if it is slow to answer, lost, or sends bad bytes, the other sources
    are asked as well. Threads, one to a connection and two connections to a source, take their work from a
    :class:`torchft.core.transfer_plan.TransferPlan` (:mod:`torchft.checkpointing.http_workers`); the calling thread
    watches, engages sources, and judges.

Rules
    - A chunk is verified when it lands, by the hash that its source sent right after it.
    - Where chunks came from more than one source, or were kept from an earlier attempt, the sources must agree on all
      of them before the state is handed out: :mod:`torchft.checkpointing.http_agreement`. Sources that give nothing
      are asked for a sample beside the transfer: :mod:`torchft.checkpointing.http_comparison`.
    - With all sources out, the fetch fails with the names of all.
    - When ``run`` or ``close`` has returned, no thread writes the memory any more.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torchft.checkpointing.chunks import ByteRun, Cut, Sample, Seal, parse_manifest
from torchft.checkpointing.differences import differing_values
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_agreement import Agreement
from torchft.checkpointing.http_comparison import Comparing, Comparison, Outvoted
from torchft.checkpointing.http_differences import Differences, look_closer
from torchft.checkpointing.http_discovery import Discovery, Layout
from torchft.checkpointing.http_source import HTTPSource, failure_of
from torchft.checkpointing.http_threads import FetchThreads
from torchft.checkpointing.http_workers import Workers
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTimeout,
    IntegrityError,
    TransferAborted,
)
from torchft.core.transfer_plan import TransferPlan
from torchft.runtime.deadline import Deadline

__all__ = ["Download"]

_TICK = 0.05
_QUIET = 0.25
"""Seconds between two looks for more sources, the only news that come without notice while an offer is waited for."""
_IDLE = 0.02
_PATIENCE = 0.5
"""Seconds that the assigned source has for its manifest before the others are asked as well."""
_SOON = 0.3
"""Seconds: what one source will have sent by then needs no other."""
_OFFERED = 0.25
"""Seconds of silence after which sources are believed to have left a step that failed."""


class Download:
    """A context manager: leaving it closes all connections and ends all threads.

    Args:
        sources: name and addresses of each source after the first so many, the assigned one first; asked again and
            again, as there may be more.
        token: presented to them if not None.
        step: of the state.
        deadline: until when all must be done.
        transfer: that this is.
        connections: to each source.
        allowance: seconds that the data may take, since others wait: what would take far longer is given up.
        unmeasured: nothing is known about the way to the sources: what looks too slow at a glance is given up at once.
        receiver: what the sources know this receiver by; None: a name that is drawn.
        compare: how sources that give nothing are compared with those that do.
        outvoted: names of sources that an earlier attempt has found to be wrong.
        differences: of the transport: what it has said of sources that differ.
    """

    def __init__(
        self,
        sources: Callable[[int], Sequence[tuple[str, Sequence[str]]]],
        token: str | None,
        step: int,
        deadline: Deadline,
        transfer: Transfer,
        connections: int = 2,
        allowance: float = math.inf,
        unmeasured: bool = False,
        receiver: str | None = None,
        compare: Comparing = "sample",
        outvoted: frozenset[str] = frozenset(),
        differences: Differences | None = None,
    ) -> None:
        self._step = step
        self._deadline = deadline
        self._transfer = transfer
        self._connections = connections
        self._allowance = allowance
        self._unmeasured = unmeasured
        self._changed = threading.Condition()
        self._threads = FetchThreads(self._changed)
        self._manifest: Manifest | None = None
        self._plan: TransferPlan | None = None
        self._differences = differences or Differences()
        self._unoffered: tuple[str, float] | None = None
        self.progress = FetchProgress(step)
        self.progress.bad_sources += sorted(outvoted) if compare != "unlike" else []
        self.comparison = Comparison(compare, step, self.progress)
        self.agreement = Agreement(step, self.progress, self.comparison.alike)
        self._discovery = Discovery(
            sources,
            outvoted,
            token,
            receiver or uuid.uuid4().hex,
            step,
            deadline,
            transfer,
            self._threads,
            self.comparison,
        )
        self._sources = self._discovery.sources

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all threads. Idempotent."""
        with self._changed:
            self._threads.over = True
            self._changed.notify_all()
            unused = self._discovery.unused()
        self._transfer.finish()
        for connection in unused:
            connection.close()
        try:
            self._threads.join()
        finally:
            # They know this fetch, and the memory, which would stay until cycles are looked for.
            self._discovery.workers = None
            self._threads.failure = None

    def expect_no_offer(self, reason: str) -> None:
        """A source that has not offered the step by now will not: ends the wait for it, but no transfer under way."""
        with self._changed:
            if self._unoffered is None:
                self._unoffered = reason, time.monotonic()
            self._changed.notify_all()

    # ------------------------------------------------------- the calling thread

    def ask(self) -> None:
        """Asks the assigned source what it has, and returns at once: ``begin`` waits for the answer."""
        with self._changed:
            self._discovery.learn()
            self._discovery.ask(self._sources[:1])

    def begin(self, allow_pickle: bool) -> tuple[Manifest, Cut]:
        """Waits until a source offers the step: what will arrive, and how it is cut.

        Raises:
            SourceLost, StepNotServed, ManifestError, CheckpointTimeout, TransferAborted
        """
        patience = time.monotonic() + _PATIENCE
        with self._changed:
            while (layout := self._discovery.layout) is None:
                self._discovery.learn()
                lost = any(s.state == "out" for s in self._sources)
                late = time.monotonic() > patience
                self._discovery.ask(self._sources if lost or late else self._sources[:1])
                self._check()
                if self._unoffered is not None:
                    raise TransferAborted(f"no source had offered step {self._step} when {self._unoffered[0]}")
                self._changed.wait(min(_QUIET, self._deadline.remaining()) if late else _TICK)
        self._manifest = parse_manifest(layout.body, layout.cut, allow_pickle)
        return self._manifest, layout.cut

    def run(self, run: ByteRun, kept: Mapping[int, bytes]) -> Seal:
        """Receives the data into ``run``; returns when all of it is verified.

        Args:
            run: memory for what ``begin`` announced.
            kept: chunks that are there from an earlier attempt, and the hashes that they have.

        Raises:
            IntegrityError: it is not what the sources announce.
            Outvoted: another tree or layout is what most sources have.
            SourceLost, StepNotServed, CheckpointTimeout, TransferAborted
        """
        try:
            seal = self._run(run, kept)
        except Outvoted:
            self._tell_other_trees()
            raise
        self._tell_other_trees()
        self._tell_other_states(run, seal)
        return seal

    def _run(self, run: ByteRun, kept: Mapping[int, bytes]) -> Seal:
        cut = self._layout.cut
        with self._changed:
            self._plan = plan = TransferPlan([cut.length(i) for i in range(cut.count)], kept)
            self.agreement.begin(kept, cut)
            self.progress.begin(cut.total, sum(cut.length(i) for i in kept))
            self._discovery.workers = workers = Workers(
                self._step,
                cut,
                run,
                plan,
                self._sources,
                self._connections,
                self._discovery.connect,
                self._threads,
                self.progress,
                self._landed,
            )
            for source in self._sources:
                if source.usable:
                    workers.staff(source)
            while True:
                self._compare()
                if plan.finished and (seal := self._settled()) is not None:
                    self._threads.over = True
                    self._changed.notify_all()
                    self.comparison.tell()
                    return seal
                self._check()
                if not plan.finished:
                    self._check_offered()
                    workers.go_on()
                self._changed.wait(_IDLE if plan.finished else _TICK)
                self._discovery.learn()
                if self._more_sources_pay():
                    self._discovery.ask(self._sources)
                self._ask_for_seals()
                received, left = self._received(), self._deadline.remaining()
                self.progress.check_pace(received, left, self._allowance, self._unmeasured, self._sources)
                self.progress.tell(received, sum(s.usable for s in self._sources))

    @property
    def _layout(self) -> Layout:
        """Of what is received, when some source has answered."""
        layout = self._discovery.layout
        assert layout is not None
        return layout

    def _received(self) -> int:
        return sum(s.received for s in self._sources)

    def _check(self) -> None:
        """Raises what makes it useless to wait."""
        self._transfer.check()
        if self._threads.failure is not None:
            raise self._threads.failure
        if self._deadline.expired:
            raise CheckpointTimeout(
                f"step {self._step} was not there within {self._deadline.timeout:g}s: {self.progress}; from "
                f"{', '.join(map(str, self._sources))}. A source is slow or hangs; a longer timeout allows for more"
            )
        if self._sources and all(s.state == "out" for s in self._sources):
            if self._discovery.layout is not None:
                self.comparison.judge_layouts(final=True)
            raise failure_of(self._sources, self._step)

    def _check_offered(self) -> None:
        """Sources that have left a step hold whom they do not know to have left it too, and wait for this receiver in
        the next one.

        Raises:
            TransferAborted: nothing comes any more of a step that failed.
        """
        if self._unoffered is None:
            return
        reason, since = self._unoffered
        asked = max(since, *(s.opened for s in self._sources))
        if min(time.monotonic() - asked, self.progress.silent_for(self._received())) > _OFFERED:
            raise TransferAborted(f"step {self._step} does not come any more ({self.progress}) since {reason}")

    def _more_sources_pay(self) -> bool:
        if not any(s.state == "idle" for s in self._sources):
            return False
        progress, received = self.progress, self._received()
        if any(s.state == "out" for s in self._sources) or progress.bad or progress.retries or progress.taken_over:
            return True
        if progress.silent_for(received) > _PATIENCE:  # however little is missing
            return True
        return self.comparison.alike and progress.seconds_left(received) > _SOON  # else theirs are of no use with these

    def _ask_for_seals(self) -> None:
        """Of all that take part, where one must be compared with another, or with what was kept."""
        ready = [s for s in self._sources if s.usable]
        if self.agreement.of_several or len(ready) > 1:
            for source in ready:
                if source.asked_for_seal is None:
                    source.asked_for_seal = time.monotonic()
                    self._threads.start("seal", self._fetch_seal, source)

    def _settled(self) -> Seal | None:
        """The hashes of a state that is all there, when those who take part agree on it."""
        assert self._plan is not None
        if self.agreement.of_several:
            self._ask_for_seals()
            seal = self.agreement.reached(self._sources, self._plan)
        else:
            seal = self.agreement.whole(self._layout.digest)
        if seal is None or self.comparison.waits:
            return None
        self.comparison.judge_layouts(final=True)
        if not self.agreement.disputed and self.comparison.contradicts(seal):
            return None
        return seal

    def _compare(self) -> None:
        """Asks those that give nothing, and all where one of them has told something else."""
        for source in self.comparison.next(self._sources, self.agreement.givers):
            self._threads.start("compare", self._ask_to_compare, source)
        self.comparison.judge_layouts(final=False)
        if self.comparison.disputed:
            self.agreement.disputed = True
            self._discovery.ask(self._sources)

    def _tell_other_trees(self) -> None:
        """One line on those with another tree or layout, where nobody can say whose is right."""
        sides = self.comparison.undecided
        if sides is not None:
            bodies = [b for s in (sides.believed, *sides.others) if (b := self.comparison.bodies.get(s)) is not None]
            paths = dict.fromkeys(path for body in bodies for path in differing_values(self._layout.body, body))
            self._differences.tell(self._step, sides, list(paths))

    def _tell_other_states(self, run: ByteRun, seal: Seal) -> None:
        """The same on those with other data, which is looked at once more. All is there, and no lock is held."""
        sides, manifest = self.agreement.undecided, self._manifest
        if sides is None or manifest is None:
            return
        other, cut = sides.others[0], seal.cut
        assert other.seal is not None
        chunks = [i for i in range(cut.count) if other.seal.digest_of(i) != seal.digest_of(i)]
        what = look_closer(partial(self._discovery.connect, other), self._step, manifest, cut, run, chunks)
        self._differences.tell(self._step, sides, *what)

    # -------------------------------------------------------------- the threads

    def _landed(self, source: HTTPSource, index: int, value: bytes) -> bool:
        first = self.agreement.landed(index, value, source)
        self.comparison.landed(index, value)
        return first or self.comparison.disputed

    def _ask_to_compare(self, source: HTTPSource) -> None:
        answer: Sample | Seal | CheckpointError
        manifest = None
        try:
            connect = partial(self._discovery.connect, source)
            answer, manifest = self.comparison.ask(connect, self._layout.cut, self._deadline)
        except CheckpointError as e:
            answer = e
        with self._changed:
            self.comparison.told(source, answer, manifest)

    def _fetch_seal(self, source: HTTPSource) -> None:
        connection = self._discovery.connect(source)
        try:
            seal = connection.hashes(self._step)
        finally:
            connection.close()
        with self._changed:
            if (seal.cut, seal.body) != (self._layout.cut, self._layout.digest):
                raise IntegrityError(f"{source} replaced its state of step {self._step} while it was read: try again")
            assert source.asked_for_seal is not None
            source.seal, source.seal_took = seal, time.monotonic() - source.asked_for_seal
