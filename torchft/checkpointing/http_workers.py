"""The threads that fetch chunks of one state: one to a connection, until there is nothing to do.

Rules
    - Each takes its work from the plan and says what came of it: verified, or bad.
    - A connection that is lost is made anew, ``ATTEMPTS`` times without a chunk in between; then its source is out.
    - A source that sends bad bytes is named, and out where there is another one.
    - A source that does not have a chunk any more is out: it went on before this receiver had it. It has kept for this
      receiver what it had not sent it, so that what it lacks was lost on the way, or this receiver came too late.
    - The fetch's condition guards plan, sources and progress; no call on a socket is made while it is held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torchft.checkpointing.chunks import ByteRun, Cut
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_client import ChunksGone, SourceConnection
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.http_threads import FetchThreads
from torchft.checkpointing.transport import IntegrityError, SourceLost
from torchft.core.transfer_plan import Hopeless, TakeOver, TransferPlan, Work
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Workers"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

ATTEMPTS = 3
_IDLE = 0.02


class Workers:
    """Of one fetch.

    Args:
        step: of the state.
        cut: how it is cut.
        run: where its bytes go.
        plan: what is to be fetched.
        sources: all of the fetch.
        connections: to each of them.
        connect: makes one.
        threads: of the fetch.
        progress: of the fetch.
        landed: told, under the condition, of each chunk that came and is what its source announced; whether that is
            news to who watches the fetch.
    """

    def __init__(
        self,
        step: int,
        cut: Cut,
        run: ByteRun,
        plan: TransferPlan,
        sources: Sequence[HTTPSource],
        connections: int,
        connect: Callable[[HTTPSource], SourceConnection],
        threads: FetchThreads,
        progress: FetchProgress,
        landed: Callable[[HTTPSource, int, bytes], bool],
    ) -> None:
        self._step = step
        self._cut = cut
        self._run = run
        self._plan = plan
        self._sources = sources
        self._connections = connections
        self._connect = connect
        self._threads = threads
        self._changed = threads.changed
        self._progress = progress
        self._tell = landed
        self._names = 0

    def staff(self, source: HTTPSource) -> None:
        """Gives a source its workers. The condition is held."""
        for _ in range(max(1, min(self._connections, self._plan.remaining))):
            self._threads.start("fetch", self._work, source, writes=True)

    def go_on(self) -> None:
        """Where nobody works any more, since those who took over from others were lost in their turn, these come back.

        The condition is held.
        """
        if not self._threads.writing:
            for source in self._sources:
                if source.usable:
                    self.staff(source)

    def _work(self, source: HTTPSource) -> None:
        """One connection after another, until there is nothing to do."""
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
                    taken_over = name in self._progress.taken_over
                    if self._threads.over or taken_over or not source.usable:
                        return
                    source.failures += 1
                    self._progress.retries += 1
                    if source.failures >= ATTEMPTS:
                        raise
                logger.warning("%s; going on where it stopped, if it answers again", e)
            except ChunksGone as e:
                logger.info("%s", e)
                raise
            finally:
                with self._changed:
                    self._plan.remove(name)
                    source.workers.pop(name, None)
                    source.closed += connection.received
                    self._progress.received += connection.received
                    self._progress.borrowed += connection.borrowed
                    self._changed.notify_all()
                connection.close()
                connection = None

    def _serve(self, name: int, source: HTTPSource, connection: SourceConnection) -> None:

        def landed(index: int, computed: bytes, announced: bytes) -> None:
            with self._changed:
                self._landed(name, source, index, computed, announced)

        while (work := self._next(name, source)) is not None:
            connection.fetch(self._step, self._cut, self._run, work.first, work.stop, landed)

    def _next(self, name: int, source: HTTPSource) -> Work | None:
        with self._changed:
            while not self._threads.over and source.usable and name not in self._progress.taken_over:
                if not self._plan.finished:
                    now = time.monotonic()
                    self._hear(now)
                    answer = self._plan.ask(name, now)
                    if isinstance(answer, Work):
                        return answer
                    if isinstance(answer, TakeOver):
                        self._take_over(answer.victim, source)
                self._changed.wait(_IDLE)
            return None

    def _hear(self, now: float) -> None:
        """Tells the plan what has come of the chunks that are not whole."""
        for source in self._sources:
            for worker, connection in source.workers.items():
                self._plan.heard(worker, connection.received, now)

    def _take_over(self, victim: int, by: HTTPSource) -> None:
        for source in self._sources:
            if (connection := source.workers.get(victim)) is not None:
                self._progress.taken_over.add(victim)
                logger.warning("%s is slow: %s takes over", source, by)
                connection.cut()

    def _landed(self, name: int, source: HTTPSource, index: int, computed: bytes, announced: bytes) -> None:
        self._plan.arrived(name, time.monotonic())
        news = True
        if computed == announced:
            self._plan.verified(name, index)
            news = self._tell(source, index, computed) or self._plan.finished
            source.failures = 0
            self._progress.landed(self._cut.length(index))
        else:
            self._progress.bad += 1
            logger.warning("chunk %d from %s does not have the hash that it announced: asked for again", index, source)
            try:
                self._plan.bad(name, index)
            except Hopeless as e:
                self._threads.failure = IntegrityError(
                    f"chunk {index} of step {self._step} from {', '.join(str(s) for s in self._sources if s.address)} "
                    f"does not have the announced hash ({e}): the memory of one of the machines or the network in "
                    "between corrupts data"
                )
            if self._plan.distrusted(source.index) and any(s.usable for s in self._sources if s is not source):
                self._progress.bad_sources.append(source.name)
                logger.error("%s sends bytes that are not what it announces, and is not used any more", source)
                source.end(IntegrityError(f"{source} sent bytes that are not what it announced"))
        if news:
            self._changed.notify_all()  # not for each: to wake who watches costs a twentieth of the time of a fast way
