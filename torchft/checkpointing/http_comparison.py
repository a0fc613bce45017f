"""Whether the sources that give nothing have the same state as what is received.

The idea
    That a source sends what it announces does not say that it is right, and a whole table of hashes costs a source a
    pass over its state. So each source that gives no chunk is asked, beside the transfer, for the hash of its
    manifest's body and of chunks of ``_SAMPLE`` bytes, drawn for it alone (``"all"``: its whole table). One that
    differs makes the fetch *disputed*: all tell all their hashes, and :mod:`torchft.checkpointing.http_agreement`
    decides.

Rules
    - Who cannot be asked, refuses, or does not answer is not compared: no failure of the fetch, nor of that source.
    - When all data is there, those who have not answered are waited for a moment at most.
    - Where the groups' states are not alike on purpose (``"unlike"``) nobody is asked, and who differs is no error: all
      is taken from one source, the first that lives.
    - Of different manifests those of most sources are believed; of two equal sides that of the assigned source, or the
      one nearest to it that lives. Where that is another one than what is received, the fetch must begin again without
      the outvoted: :class:`Outvoted`. Whom most contradict is named in an error; of equal sides nobody is.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torchft.checkpointing.chunks import Cut, Sample, Seal
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_client import SourceConnection
from torchft.checkpointing.http_differences import Undecided
from torchft.checkpointing.http_source import VERDICT, HTTPSource
from torchft.checkpointing.http_wire import MAX_SAMPLE
from torchft.checkpointing.transport import CheckpointError, IntegrityError
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Comparing", "Comparison", "Outvoted"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

Comparing = Literal["sample", "all", "none", "unlike"]
"""Of sources that give nothing: some chunks, drawn at random; all; nothing; nothing, as they differ on purpose."""
_SAMPLE = 64 << 20
"""Bytes whose hashes are asked for at most: 8 chunks of a large state, a small one as a whole."""
_MOMENT = 0.05
_MOMENT_FOR_ALL = 1.0
"""At least; a table takes about as long as the data, which is hashed, too."""
_PATIENCE = 5.0
_draw = random.SystemRandom()  # the user's own sequence is not touched

_Layout = tuple[Cut, bytes]
"""How the data is cut, and the hash of the manifest's body."""


class Outvoted(IntegrityError):
    """Most sources have another tree or layout than the one that is received.

    Args:
        message: what was found.
        names: of the sources that have it.
    """

    def __init__(self, message: str, names: frozenset[str]) -> None:
        super().__init__(message)
        self.names = names


class Comparison:
    """Of one fetch. Its owner's lock guards it, :meth:`ask` apart.

    Args:
        how: sources are compared.
        step: of the state.
        progress: of the fetch.
    """

    def __init__(self, how: Comparing, step: int, progress: FetchProgress) -> None:
        self._how = how
        self._step = step
        self._progress = progress
        self._asked: set[HTTPSource] = set()
        self._pending: set[HTTPSource] = set()
        self._answers: dict[HTTPSource, Sample | Seal] = {}
        self._layouts: dict[HTTPSource, _Layout] = {}
        self._ours: _Layout | None = None
        self._known: dict[int, bytes] = {}
        self._until: float | None = None
        self.bodies: dict[HTTPSource, bytes] = {}
        """Manifests' bodies of those that have another one than what is received, as far as they are known."""
        self.undecided: Undecided | None = None
        """Who was found to have another manifest, where as many have it: it is for the fetch to say so."""
        self.alike = how != "unlike"
        self.disputed = False
        """A source has another chunk than what was received: all must tell all their hashes."""

    def laid_out(self, source: HTTPSource, cut: Cut, body: bytes, manifest: bytes | None = None) -> bool:
        """What a source offers. The first is what is received; whether this one is the same.

        Args:
            source: who.
            cut: how the data is cut.
            body: the hash of the manifest's body.
            manifest: that body, where it came.
        """
        self._layouts[source] = cut, body
        if self._ours is None:
            self._ours = cut, body
        if self._ours == (cut, body):
            return True
        if manifest is not None:
            self.bodies[source] = manifest
        return False

    # ----------------------------------------------------- asking, and answers

    def next(self, sources: Sequence[HTTPSource], givers: Iterable[HTTPSource]) -> list[HTTPSource]:
        """Who is to be asked now: each is named once.

        Args:
            sources: all that are known.
            givers: those from whom chunks came.
        """
        giving = set(givers) or {s for s in sources if s.usable and s not in self._asked}
        if self._how in ("none", "unlike") or not giving:
            return []
        unasked = [s for s in sources if s not in giving and s not in self._asked and s.state != "out"]
        self._asked.update(unasked)
        self._pending.update(unasked)
        return unasked

    def ask(
        self, connect: Callable[[Deadline], SourceConnection], cut: Cut, deadline: Deadline
    ) -> tuple[Sample | Seal, bytes | None]:
        """Asks one source, on a connection of its own. Without the lock.

        Returns:
            Its answer, and its manifest's body if that is another one than what is received.

        Raises:
            CheckpointError: it does not tell.
        """
        whole = self._how == "all"
        connection = connect(deadline if whole else Deadline(min(_PATIENCE, deadline.remaining())))
        try:
            answer: Sample | Seal
            if whole:
                answer = connection.hashes(self._step)
            else:
                most = min(cut.count, MAX_SAMPLE, -(-_SAMPLE // cut.chunk_size))
                drawn = sorted(_draw.sample(range(cut.count), most))
                answer = connection.hashes_of(self._step, drawn)
            if (answer.cut, answer.body) == self._ours:
                return answer, None
            try:
                return answer, connection.manifest(self._step)[1]
            except CheckpointError as e:
                logger.debug("what its tree is like cannot be said: %s", e)
                return answer, None
        finally:
            connection.close()

    def told(self, source: HTTPSource, answer: Sample | Seal | CheckpointError, manifest: bytes | None = None) -> None:
        """What came of asking a source: its answer, and its manifest's body if that is another one."""
        self._pending.discard(source)
        if isinstance(answer, CheckpointError):
            logger.debug("%s is not compared: %s", source, answer)
            return
        if source.state == "out":
            return  # it is judged already
        self._answers[source] = answer
        self._progress.compared = len(self._answers)
        if self.laid_out(source, answer.cut, answer.body, manifest):
            for index, value in self._known.items():
                self._look(source, index, value)

    def landed(self, index: int, value: bytes) -> None:
        """A chunk came, from any source, and is what that source announced."""
        self._known[index] = value
        for source in self._answers:
            self._look(source, index, value)

    def _look(self, source: HTTPSource, index: int, value: bytes) -> None:
        said = self._answers[source].digest_of(index)
        if self.disputed or said is None or said == value or self._layouts.get(source) != self._ours:
            return
        self.disputed = True
        logger.info(
            "chunk %d of step %d is another one at %s than what was received: all sources are asked for all hashes",
            index,
            self._step,
            source,
        )

    # ------------------------------------------------------------- judgement

    @property
    def waits(self) -> bool:
        """All data is there: whether somebody's answer is waited for still."""
        if self.disputed or not self._pending:
            return False
        now = time.monotonic()
        if self._until is None:
            self._until = now + (max(_MOMENT_FOR_ALL, self._progress.elapsed) if self._how == "all" else _MOMENT)
        return now < self._until

    def contradicts(self, seal: Seal) -> bool:
        """Whether what is about to be handed out is disputed by what somebody told."""
        for source, answer in self._answers.items():
            told = answer.chunks if isinstance(answer, Sample) else range(seal.cut.count)
            for index in told:
                self._look(source, index, seal.digest_of(index))
        return self.disputed

    def judge_layouts(self, final: bool) -> None:
        """Names those with a manifest that is not believed, once all have answered.

        Args:
            final: nobody who has not answered is waited for.

        Raises:
            Outvoted: what is received is not believed.
        """
        assert self._ours is not None
        if (self._pending and not final) or len(set(self._layouts.values())) < 2:
            return
        votes = Counter(self._layouts.values())
        nearest: dict[_Layout, int] = {}
        for source, layout in self._layouts.items():
            nearest[layout] = min(source.index, nearest.get(layout, source.index))
        held = {la for s, la in self._layouts.items() if la != self._ours or s.state != "out"}  # by one that lives
        if self.alike:
            believed = max(held, key=lambda layout: (votes[layout], -nearest[layout]))
        else:
            if self._ours in held:
                return  # those with another one are needed if all who have this one are lost
            believed = min(held, key=lambda layout: nearest[layout])
        wrong = [
            s for s, la in self._layouts.items() if (la != believed if believed == self._ours else la == self._ours)
        ]
        right = next(s for s, la in self._layouts.items() if la == believed and s.index == nearest[believed])
        undecided = [s for s in wrong if votes[self._layouts[s]] >= votes[believed]] if self.alike else []
        if undecided:
            self.undecided = Undecided.more(self.undecided, right, undecided)
        for source in wrong:
            if source not in undecided:
                self._report(source, right)
        if believed != self._ours:
            names = [s.name for s in wrong]
            raise Outvoted(
                f"{', '.join(names)} offered step {self._step} with another tree or layout than {right}",
                frozenset(names),
            )
        for source in wrong:
            if self.alike:
                self._progress.bad_sources.append(source.name)
            source.end(IntegrityError(f"{source} offers another tree or layout as step {self._step}"))
            del self._layouts[source]
            self._answers.pop(source, None)

    def _report(self, source: HTTPSource, right: HTTPSource) -> None:
        if not self.alike:
            logger.info("%s has another tree at step %d, as it may: all is taken from %s", source, self._step, right)
            return
        logger.error("%s offers step %d with another tree or layout than %s: %s", source, self._step, right, VERDICT)

    def tell(self) -> None:
        """A line for the log, where somebody was asked."""
        if not self._asked:
            return
        missing = len(self._asked) - self._progress.compared
        logger.log(
            logging.WARNING if missing and self._how == "all" else logging.INFO,
            "step %d: %d of %d further sources were compared, by %s; %d did not answer in time",
            self._step,
            self._progress.compared,
            len(self._asked),
            "all their hashes" if self._how == "all" else f"a sample of {_SAMPLE >> 20} MiB each at most",
            missing,
        )
