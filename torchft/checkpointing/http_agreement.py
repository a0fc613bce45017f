"""What has landed of a state that may come from many sources, and whether they agree on it.

The idea
    That a chunk is what its source announced does not say that the source is right. Where chunks came from more than
    one source, were kept from an earlier attempt, or are *disputed* by a source that gave nothing
    (:mod:`torchft.checkpointing.http_comparison`), every source that takes part tells its hashes of *all* chunks
    (:class:`torchft.checkpointing.chunks.Seal`), and the state is handed out when they are the same. In a dispute all
    sources take part.

Rules
    - One whose hashes differ from most (from the assigned one's, if there are as many on both sides) is named and not
      used, and what only it vouches for is missing again. It is an error where most contradict it.
    - One that gave another chunk than it says that it has is not used any more either.
    - When all is there and some have told their hashes, one that does not is not waited for much longer than for those.
      If nobody tells them in a few seconds, and the time that hashing the state may take, one source is believed, if
      possible the assigned one, and what it did not give is fetched again from it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torchft.checkpointing.chunks import Cut, Seal
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_differences import Undecided
from torchft.checkpointing.http_source import VERDICT, HTTPSource
from torchft.checkpointing.transport import IntegrityError, SourceLost
from torchft.core.transfer_plan import TransferPlan
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Agreement"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

_SILENT = 1.0
"""Seconds that a source has for its hashes at least, when all data and another source's hashes are there."""
_ALL_SILENT = 5.0
_HASHED = 0.5e9
"""Seconds that all have where none tells them, and bytes a second of hashing for which they have more."""


class Agreement:
    """Of one fetch. Its owner's lock guards it.

    Args:
        step: of the state.
        progress: of the fetch.
        alike: the sources ought to have the same.
    """

    def __init__(self, step: int, progress: FetchProgress, alike: bool = True) -> None:
        self._alike = alike
        self._step = step
        self._progress = progress
        self._cut = Cut(0)
        self._kept = self._taken_as_it_is = False
        self._there: float | None = None  # when all data was
        self.disputed = False
        """A source says that what was received is wrong."""
        self.undecided: Undecided | None = None
        """Who was found to differ, where as many are on the other side: it is for the fetch to say so."""
        self._givers: dict[int, HTTPSource] = {}
        self._gave: Counter[HTTPSource] = Counter()  # how many of these each one is
        self.verified: dict[int, bytes] = {}
        """The chunks that are there, and their hashes."""

    def begin(self, kept: Mapping[int, bytes], cut: Cut) -> None:
        """The data, which is cut so, is asked for, but for the chunks that are there from an earlier attempt."""
        self._cut = cut
        self._kept = bool(kept)
        self.verified = dict(kept)

    def landed(self, index: int, computed: bytes, source: HTTPSource) -> bool:
        """A chunk that was missing is there, and is what its source announced. Whether it is the first from there."""
        self.verified[index] = computed
        self._givers[index] = source
        self._gave[source] += 1
        self._progress.sources = len(self._gave)
        return self._gave[source] == 1

    @property
    def givers(self) -> list[HTTPSource]:
        """Who gave what was received."""
        return sorted(self._gave, key=lambda s: s.index)

    @property
    def of_several(self) -> bool:
        """Whether only the hashes of all tell: what is there came from more than one, was kept, or is disputed."""
        disputed = self.disputed and not self._taken_as_it_is
        return self._kept or disputed or len(self._gave) > 1

    def whole(self, body: bytes) -> Seal:
        """Of a state that is there and came from one source."""
        return Seal(self._cut, b"".join(self.verified[i] for i in range(self._cut.count)), body)

    def reached(self, sources: Sequence[HTTPSource], plan: TransferPlan) -> Seal | None:
        """What all agree on, when all is there and they do; else what is not agreed on is missing again.

        Args:
            sources: all of the fetch; those that are usable have been asked for their hashes.
            plan: in which all is there.
        """
        self._give_up_the_silent(sources, plan)
        taking_part = [s for s in sources if s.usable]
        if not taking_part or any(s.seal is None for s in taking_part):
            return None
        if self.disputed and any(s.state in ("idle", "opening") for s in sources):
            return None  # they are being asked
        distrusted = {s.index for s in taking_part if plan.distrusted(s.index)}
        seal, differing = _judge(taking_part, distrusted)
        believed = [s for s in taking_part if s not in differing]
        undecided = sum(s.index not in distrusted for s in differing) >= len(believed)
        if undecided and self._alike:
            self.undecided = Undecided.more(self.undecided, believed[0], differing)
        for source in differing:
            self._report(source, seal, believed[0], undecided)
            source.end(IntegrityError(f"{source} has another state of step {self._step} than the others"))
        wrong = [i for i, value in self.verified.items() if value != seal.digest_of(i)]
        for index in wrong:
            giver = self._givers.get(index)
            if giver is not None and giver not in differing:
                if self._alike:
                    logger.error("chunk %d of step %d from %s is not what the others have", index, self._step, giver)
                giver.end(
                    IntegrityError(f"{giver} gave chunk {index} of step {self._step} as another one than it says")
                )
        self._forget(wrong, plan)
        return seal if plan.finished else None

    def _report(self, source: HTTPSource, seal: Seal, believed: HTTPSource, undecided: bool) -> None:
        if not self._alike:
            logger.info(
                "%s has another state of step %d, as it may: all is taken from %s", source, self._step, believed
            )
            return
        self._progress.bad_sources.append(source.name)
        if not undecided:
            root = source.seal.root if source.seal else "-"
            logger.error(
                "%s announces root %s for step %d, the others %s: %s", source, root, self._step, seal.root, VERDICT
            )

    def _give_up_the_silent(self, sources: Sequence[HTTPSource], plan: TransferPlan) -> None:
        """All is there, and some say what it should be: who does not is not waited for much longer than for those."""
        usable = [s for s in sources if s.usable]
        told = [s.seal_took for s in usable if s.seal is not None]
        now = time.monotonic()
        if not told:
            self._believe_one(sources, usable, plan, now)
            return
        patience = max(_SILENT, 3 * max(told))
        for source in usable:
            asked = source.asked_for_seal
            if source.seal is None and asked is not None and now - asked > patience:
                logger.warning("%s does not tell its hashes: what it gave is compared with the others'", source)
                source.end(SourceLost(f"{source} did not tell its hashes within {patience:.1f}s"))
        for source in sources if self.disputed else ():
            if source.state == "opening" and now - source.opened > patience:
                logger.warning("%s does not answer: it has no say in what is right", source)
                source.end(SourceLost(f"{source} did not answer within {patience:.1f}s"))

    def _believe_one(
        self, sources: Sequence[HTTPSource], usable: Sequence[HTTPSource], plan: TransferPlan, now: float
    ) -> None:
        """All is there, and nobody says what it should be: in the end it is taken as one of them gave it."""
        if self._there is None:
            self._there = now
        patience = _ALL_SILENT + self._progress.total / _HASHED
        asked = [now if s.asked_for_seal is None else s.asked_for_seal for s in usable]
        if not usable or now - max(self._there, *asked) <= patience:
            return
        one = min(usable, key=lambda s: (s not in self._gave, s.index))
        again = [i for i in self.verified if self._givers.get(i) is not one]
        logger.warning(
            "no source of step %d told its hashes within %.1fs: %s is believed, with nothing to compare it to, and "
            "the %d chunks that it did not give are fetched from it",
            self._step,
            patience,
            one,
            len(again),
        )
        for source in sources:
            if source is not one:
                source.end(SourceLost(f"{source} did not tell its hashes within {patience:.1f}s"))
        self._forget(again, plan)
        self._kept, self._taken_as_it_is = False, True

    def _forget(self, chunks: Sequence[int], plan: TransferPlan) -> None:
        """They are missing again."""
        for index in chunks:
            giver = self._givers.pop(index, None)
            if giver is not None:
                self._gave -= Counter([giver])  # who has nothing left is gone
            self._progress.lost(self._cut.length(index))
            del self.verified[index]
        plan.revoke(chunks)


def _judge(sources: Sequence[HTTPSource], distrusted: Collection[int]) -> tuple[Seal, list[HTTPSource]]:
    """Whose hashes are right, and which sources have others.

    Most of those that sent no bad bytes decide; where as many stand on both sides, those with the assigned source, or
    the one nearest to it in the order.

    Args:
        sources: at least one; each with its hashes.
        distrusted: indices of those that do not count, unless there is no other.
    """
    voters = [s for s in sources if s.index not in distrusted] or list(sources)
    roots = {s.index: s.seal.root for s in sources if s.seal is not None}
    votes = Counter(roots[s.index] for s in voters)
    best = max(voters, key=lambda s: (votes[roots[s.index]], -s.index))
    assert best.seal is not None
    return best.seal, [s for s in sources if roots[s.index] != roots[best.index]]
