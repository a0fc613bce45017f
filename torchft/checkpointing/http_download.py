"""One state, fetched over HTTP from as many sources as it takes, and verified.

The idea
    The assigned source is asked first, and is enough where the rest would come within ``_SOON``. Otherwise, or if it
    is slow to answer, lost, or sends bad bytes, the other sources are asked as well. Threads, one to a connection and
    two connections to a source, take their work from a :class:`torchft.core.transfer_plan.TransferPlan`; the calling
    thread watches, engages sources, and judges.

Rules
    - A chunk is verified when it lands, by the hash that its source sent right after it.
    - Where chunks came from more than one source, or were kept from an earlier attempt, the sources must agree on all
      of them before the state is handed out: :mod:`torchft.checkpointing.http_agreement`.
    - A connection that is lost is made anew, ``ATTEMPTS`` times without a chunk in between; one that cannot be made, or
      is refused, ends its source; one that has no place for it yet is asked again. With all sources out, the fetch
      fails with the names of all.
    - When ``run`` or ``close`` has returned, no thread writes the memory any more.
"""

from __future__ import annotations

import contextvars
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from torchft.checkpointing.chunks import ByteRun, Cut, Seal, digest, parse_manifest
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_agreement import Agreement
from torchft.checkpointing.http_client import ChunksGone, SourceBusy, SourceConnection
from torchft.checkpointing.http_source import HTTPSource, failure_of
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTimeout,
    IntegrityError,
    SourceLost,
    TooSlow,
    TransferAborted,
)
from torchft.core.transfer_plan import Hopeless, TakeOver, TransferPlan, Work
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Download"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

ATTEMPTS = 3
_TICK = 0.05
_IDLE = 0.02
_PATIENCE = 0.5
"""Seconds that the assigned source has for its manifest before the others are asked as well."""
_SOON = 0.3
"""Seconds: what one source will have sent by then needs no other."""
_END = 10.0


class Download:
    """A context manager: leaving it closes all connections and ends all threads.

    Args:
        sources: name and addresses of each source, the assigned one first; asked again and again, may grow.
        token: presented to them if not None.
        step: of the state.
        deadline: until when all must be done.
        transfer: that this is.
        connections: to each source.
        unmeasured: nothing is known about the way to the sources, and others wait: what is far too slow is given up at
            once.
        receiver: what the sources know this receiver by; None: a name that is drawn.
    """

    def __init__(
        self,
        sources: Callable[[], Sequence[tuple[str, Sequence[str]]]],
        token: str | None,
        step: int,
        deadline: Deadline,
        transfer: Transfer,
        connections: int = 2,
        unmeasured: bool = False,
        receiver: str | None = None,
    ) -> None:
        self._look = sources
        self._token = token
        self._step = step
        self._deadline = deadline
        self._transfer = transfer
        self._connections = connections
        self._unmeasured = unmeasured
        self._receiver = receiver or uuid.uuid4().hex
        self._changed = threading.Condition()
        self._over = False
        self._sources: list[HTTPSource] = []
        self._threads: set[threading.Thread] = set()
        self._names = 0
        self._failure: Exception | None = None
        self._layout: tuple[Cut, bytes, bytes] | None = None  # how it is cut, the manifest's body, its hash
        self._plan: TransferPlan | None = None
        self._run: ByteRun | None = None
        self._unoffered: str | None = None
        self.progress = FetchProgress(step)
        self.agreement = Agreement(step, self.progress)

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all threads. Idempotent."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            threads = list(self._threads)
            unused = [s.first for s in self._sources if s.first is not None]
            for source in self._sources:
                source.first = None
        self._transfer.finish()
        for connection in unused:
            connection.close()
        limit = Deadline(_END)
        for thread in threads:
            thread.join(limit.remaining())
        if any(t.is_alive() and t.name == "torchft-http-fetch" for t in threads):
            raise CheckpointError(f"a connection to a source could not be ended within {_END:g}s")

    def expect_no_offer(self, reason: str) -> None:
        """A source that has not offered the step by now will not: ends the wait for it, but no transfer under way."""
        with self._changed:
            self._unoffered = reason
            self._changed.notify_all()

    # ------------------------------------------------------- the calling thread

    def begin(self, allow_pickle: bool) -> tuple[Manifest, Cut]:
        """Waits until a source offers the step: what will arrive, and how it is cut.

        Raises:
            SourceLost, StepNotServed, ManifestError, CheckpointTimeout, TransferAborted
        """
        patience = time.monotonic() + _PATIENCE
        with self._changed:
            while self._layout is None:
                self._learn()
                lost = any(s.state == "out" for s in self._sources)
                self._open(self._sources if lost or time.monotonic() > patience else self._sources[:1])
                self._check()
                if self._unoffered is not None:
                    raise TransferAborted(f"no source had offered step {self._step} when {self._unoffered}")
                self._changed.wait(_TICK)
            cut, body, _ = self._layout
        return parse_manifest(body, cut, allow_pickle), cut

    def run(self, run: ByteRun, kept: Mapping[int, bytes]) -> Seal:
        """Receives the data into ``run``; returns when all of it is verified.

        Args:
            run: memory for what ``begin`` announced.
            kept: chunks that are there from an earlier attempt, and the hashes that they have.

        Raises:
            IntegrityError: it is not what the sources announce.
            SourceLost, StepNotServed, CheckpointTimeout, TransferAborted
        """
        assert self._layout is not None
        cut = self._layout[0]
        with self._changed:
            self._plan = plan = TransferPlan(cut.count, kept)
            self._run = run
            self.agreement.begin(kept)
            self.progress.begin(cut.total, sum(cut.length(i) for i in kept))
            for source in self._sources:
                if source.usable:
                    self._staff(source)
            while True:
                if plan.finished and (seal := self._settled()) is not None:
                    self._over = True
                    self._changed.notify_all()
                    return seal
                self._check()
                self._changed.wait(_TICK)
                self._learn()
                if self._more_sources_pay():
                    self._open(self._sources)
                self._ask_for_seals()
                received, left = self._received(), self._deadline.remaining()
                if self.progress.hopeless(received, left) or (
                    self._unmeasured and self.progress.far_too_slow(received, left)
                ):
                    raise TooSlow(
                        f"step {self._step} comes too slowly from source {', '.join(map(str, self._sources))}: "
                        f"{received / 1e6:.1f} of {self.progress.total / 1e6:.0f} MB came in "
                        f"{self.progress.elapsed:.2f}s, and {left:.0f}s are left for the rest. A longer timeout lets "
                        "the other groups wait longer for this one",
                        self.progress.total,
                    )
                self.progress.tell(self._received(), sum(s.usable for s in self._sources))

    def _received(self) -> int:
        return sum(s.received for s in self._sources)

    def _learn(self) -> None:
        known = self._look()
        for name, addresses in known[len(self._sources) :]:
            source = HTTPSource(len(self._sources), name, addresses)
            if not addresses:
                source.end(CheckpointError("it uses another transport"))
            self._sources.append(source)

    def _check(self) -> None:
        """Raises what makes it useless to wait."""
        self._transfer.check()
        if self._failure is not None:
            raise self._failure
        if self._deadline.expired:
            raise CheckpointTimeout(
                f"step {self._step} was not there within {self._deadline.timeout:g}s: {self.progress}; from "
                f"{', '.join(map(str, self._sources))}. A source is slow or hangs; a longer timeout allows for more"
            )
        if self._sources and all(s.state == "out" for s in self._sources):
            raise failure_of(self._sources, self._step)

    def _more_sources_pay(self) -> bool:
        if not any(s.state == "idle" for s in self._sources):
            return False
        if any(s.state == "out" for s in self._sources) or self.progress.bad or self.progress.retries:
            return True
        return self.progress.seconds_left(self._received()) > _SOON

    def _ask_for_seals(self) -> None:
        """Of all that take part, where one must be compared with another, or with what was kept."""
        ready = [s for s in self._sources if s.usable]
        if self.agreement.of_several or len(ready) > 1:
            for source in ready:
                if source.asked_for_seal is None:
                    source.asked_for_seal = time.monotonic()
                    self._start("seal", self._fetch_seal, source)

    def _settled(self) -> Seal | None:
        """The hashes of a state that is all there, when those who take part agree on it."""
        assert self._layout is not None
        assert self._plan is not None
        if not self.agreement.of_several:
            cut, _, body = self._layout
            return self.agreement.whole(cut, body)
        self._ask_for_seals()
        return self.agreement.reached(self._sources, self._plan)

    # -------------------------------------------------------------- the threads

    def _start(self, kind: str, call: Callable[[HTTPSource], None], source: HTTPSource) -> None:
        context = contextvars.copy_context()  # the threads' log lines are said by whoever called
        thread = threading.Thread(
            target=context.run, args=(self._guard, call, source), name=f"torchft-http-{kind}", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    def _guard(self, call: Callable[[HTTPSource], None], source: HTTPSource) -> None:
        try:
            call(source)
        except CheckpointError as e:
            with self._changed:
                source.end(e)
        except Exception as e:  # a mistake of ours must end the fetch, not hang it
            with self._changed:
                self._failure = self._failure or e
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()

    def _open(self, sources: Sequence[HTTPSource]) -> None:
        for source in sources:
            if source.state == "idle":
                source.state = "opening"
                self._start("open", self._ask_for_manifest, source)

    def _connect(self, source: HTTPSource) -> SourceConnection:
        return SourceConnection(source.addresses, self._token, self._deadline, self._transfer, self._receiver)

    def _ask_for_manifest(self, source: HTTPSource) -> None:
        while (pause := self._ask_once_for_manifest(source)) is not None:
            until = Deadline(min(pause * random.uniform(0.5, 1.0), self._deadline.remaining()))
            with self._changed:
                if self._changed.wait_for(lambda: self._over, until.remaining()):
                    return

    def _ask_once_for_manifest(self, source: HTTPSource) -> float | None:
        """Seconds after which to ask again; None: it is not to be asked again."""
        connection = self._connect(source)
        handed_on = False
        try:
            cut, body = connection.manifest(self._step)
            layout = cut, body, digest([memoryview(body)])
            with self._changed:
                if self._over:
                    return None
                source.address = connection.address
                if self._layout is None:
                    self._layout = layout
                elif self._layout != layout:
                    self.progress.bad_sources.append(source.name)
                    logger.error("%s offers step %d with another tree or layout: it is not used", source, self._step)
                    raise IntegrityError(f"{source} offers another tree or layout as step {self._step}")
                source.state, source.first, handed_on = "ready", connection, True
                if self._plan is not None:
                    self._staff(source)
            return None
        except SourceBusy as e:
            logger.debug("%s; asking again", e)
            return e.pause
        finally:
            if not handed_on:
                connection.close()

    def _fetch_seal(self, source: HTTPSource) -> None:
        connection = self._connect(source)
        try:
            seal = connection.hashes(self._step)
        finally:
            connection.close()
        assert self._layout is not None
        with self._changed:
            if (seal.cut, seal.body) != (self._layout[0], self._layout[2]):
                raise IntegrityError(f"{source} replaced its state of step {self._step} while it was read: try again")
            assert source.asked_for_seal is not None
            source.seal, source.seal_took = seal, time.monotonic() - source.asked_for_seal

    def _staff(self, source: HTTPSource) -> None:
        assert self._plan is not None
        for _ in range(max(1, min(self._connections, self._plan.remaining))):
            self._start("fetch", self._work, source)

    def _work(self, source: HTTPSource) -> None:
        """One connection after another, until there is nothing to do."""
        assert self._plan is not None
        with self._changed:
            self._names += 1
            name = self._names
            connection, source.first = source.first, None
        while True:
            if connection is None:
                connection = self._connect(source)
            with self._changed:
                self._plan.add(name, source.index)
                source.workers[name] = connection
            try:
                self._serve(name, source, connection)
                return
            except SourceLost as e:
                with self._changed:
                    taken_over = name in self.progress.taken_over
                    if self._over or taken_over or not source.usable:
                        return
                    source.failures += 1
                    self.progress.retries += 1
                    if source.failures >= ATTEMPTS:
                        raise
                logger.warning("%s; going on where it stopped, if it answers again", e)
            finally:
                with self._changed:
                    self._plan.remove(name)
                    source.workers.pop(name, None)
                    source.closed += connection.received
                    self.progress.received += connection.received
                    self._changed.notify_all()
                connection.close()
                connection = None

    def _serve(self, name: int, source: HTTPSource, connection: SourceConnection) -> None:
        assert self._layout is not None
        assert self._run is not None

        def landed(index: int, computed: bytes, announced: bytes) -> None:
            with self._changed:
                self._landed(name, source, index, computed, announced)

        while (work := self._next(name, source)) is not None:
            try:
                connection.fetch(self._step, self._layout[0], self._run, work.first, work.stop, landed)
            except ChunksGone as e:
                logger.info("%s", e)
                with self._changed:
                    assert self._plan is not None
                    self._plan.unavailable(name)

    def _next(self, name: int, source: HTTPSource) -> Work | None:
        assert self._plan is not None
        with self._changed:
            while not self._over and source.usable:
                if not self._plan.finished:
                    answer = self._plan.ask(name, time.monotonic())
                    if isinstance(answer, Work):
                        return answer
                    if isinstance(answer, TakeOver):
                        self._take_over(answer.victim, source)
                self._changed.wait(_IDLE)
            return None

    def _take_over(self, victim: int, by: HTTPSource) -> None:
        for source in self._sources:
            if (connection := source.workers.get(victim)) is not None:
                self.progress.taken_over.add(victim)
                logger.warning("%s is slow: %s takes over", source, by)
                connection.cut()

    def _landed(self, name: int, source: HTTPSource, index: int, computed: bytes, announced: bytes) -> None:
        assert self._plan is not None
        assert self._layout is not None
        self._plan.arrived(name, time.monotonic())
        if computed == announced:
            self._plan.verified(name, index)
            self.agreement.landed(index, computed, source)
            source.failures = 0
            self.progress.landed(self._layout[0].length(index))
        else:
            self.progress.bad += 1
            logger.warning("chunk %d from %s does not have the hash that it announced: asked for again", index, source)
            try:
                self._plan.bad(name, index)
            except Hopeless as e:
                self._failure = IntegrityError(
                    f"chunk {index} of step {self._step} from {', '.join(str(s) for s in self._sources if s.address)} "
                    f"does not have the announced hash ({e}): the memory of one of the machines or the network in "
                    "between corrupts data"
                )
            if self._plan.distrusted(source.index) and any(s.usable for s in self._sources if s is not source):
                self.progress.bad_sources.append(source.name)
                logger.error("%s sends bytes that are not what it announces, and is not used any more", source)
                source.end(IntegrityError(f"{source} sent bytes that are not what it announced"))
        self._changed.notify_all()
