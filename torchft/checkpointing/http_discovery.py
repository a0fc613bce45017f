"""Finding the sources of one fetch: who there is, whether they answer, and what they offer.

The idea
    A source is asked for its manifest by a thread of its own. What the first one offers that answers is what is
    received; each further one that offers the same takes part, from then on.

Rules
    - Who is asked, and when, is for the fetch to say; nobody is asked twice, but for one that has no place for the
      connection yet: that is asked until it has.
    - A connection that cannot be made, or is refused, ends its source. So does an offer of another tree or layout,
      which is told to :mod:`torchft.checkpointing.http_comparison`.
    - The connection on which a manifest came is kept for the source's first worker.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchft.checkpointing.chunks import Cut, digest
from torchft.checkpointing.http_client import SourceBusy, SourceConnection
from torchft.checkpointing.http_comparison import Comparison
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.http_threads import FetchThreads
from torchft.checkpointing.http_workers import Workers
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import CheckpointError, IntegrityError
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Discovery", "Layout"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")


@dataclass(frozen=True)
class Layout:
    """What is offered."""

    cut: Cut
    """How the data is cut."""
    body: bytes
    """The manifest's."""
    digest: bytes
    """The body's hash."""


class Discovery:
    """Of one fetch. The condition of ``threads`` guards it, :meth:`connect` apart.

    Args:
        look: name and addresses of each source after the first so many, the assigned one first; asked again and
            again, as there may be more.
        outvoted: names of sources that are left out.
        token: presented to them if not None.
        receiver: what they know this receiver by.
        step: of the state.
        deadline: until when all must be done.
        transfer: that this is.
        threads: of the fetch.
        comparison: of the fetch.
    """

    def __init__(
        self,
        look: Callable[[int], Sequence[tuple[str, Sequence[str]]]],
        outvoted: frozenset[str],
        token: str | None,
        receiver: str,
        step: int,
        deadline: Deadline,
        transfer: Transfer,
        threads: FetchThreads,
        comparison: Comparison,
    ) -> None:
        self._look = look
        self._seen = 0
        self._outvoted = outvoted
        self._token = token
        self._receiver = receiver
        self._step = step
        self._deadline = deadline
        self._transfer = transfer
        self._threads = threads
        self._comparison = comparison
        self.sources: list[HTTPSource] = []
        """All that are known, the assigned one first."""
        self.layout: Layout | None = None
        """Of what is received; None: nobody has answered."""
        self.workers: Workers | None = None
        """Of the fetch, while the data comes: a source that answers then is given some at once."""

    def learn(self) -> None:
        """Looks for more sources."""
        new = self._look(self._seen)
        self._seen += len(new)
        for name, addresses in new:
            if name in self._outvoted:
                continue
            source = HTTPSource(len(self.sources), name, addresses)
            if not addresses:
                source.end(CheckpointError("it uses another transport"))
            self.sources.append(source)

    def ask(self, sources: Sequence[HTTPSource]) -> None:
        """Asks those of these that were not asked before, and returns at once."""
        for source in sources:
            if source.state == "idle":
                source.state, source.opened = "opening", time.monotonic()
                self._threads.start("open", self._ask, source)

    def connect(self, source: HTTPSource, deadline: Deadline | None = None) -> SourceConnection:
        """A new connection.

        Args:
            source: to whom.
            deadline: of what is asked on it; the fetch's by default.
        """
        deadline = deadline or self._deadline
        return SourceConnection(source.addresses, self._token, deadline, self._transfer, self._receiver, source.offered)

    def unused(self) -> list[SourceConnection]:
        """The connections that no worker has taken, and will not."""
        unused = [s.first for s in self.sources if s.first is not None]
        for source in self.sources:
            source.first = None
        return unused

    # -------------------------------------------------------------- the threads

    def _ask(self, source: HTTPSource) -> None:
        changed = self._threads.changed
        while (pause := self._ask_once(source)) is not None:
            until = Deadline(min(pause * random.uniform(0.5, 1.0), self._deadline.remaining()))
            with changed:
                if changed.wait_for(lambda: self._threads.over or source.state == "out", until.remaining()):
                    return

    def _ask_once(self, source: HTTPSource) -> float | None:
        """Seconds after which to ask again; None: it is not to be asked again."""
        connection = self.connect(source)
        handed_on = False
        try:
            cut, body = connection.manifest(self._step)
            layout = Layout(cut, body, digest([memoryview(body)]))
            with self._threads.changed:
                if self._threads.over or source.state == "out":
                    return None
                source.address = connection.address
                if self.layout is None:
                    self.layout = layout
                if not self._comparison.laid_out(source, cut, layout.digest, body):
                    raise IntegrityError(f"{source} offers another tree or layout as step {self._step}")
                source.state, source.first, handed_on = "ready", connection, True
                if self.workers is not None:
                    self.workers.staff(source)
            return None
        except SourceBusy as e:
            logger.debug("%s; asking again", e)
            return e.pause
        finally:
            if not handed_on:
                connection.close()
