"""What is said where sources differ and as many stand on each side, so that nobody can say which is right.

The idea
    It may be a silent corruption, or state that each group has for itself and that was not registered so. Which it is
    shows in what differs. The hashes say in which chunks, and the manifest which tensors lie there; a few of these
    chunks are fetched from the other side and compared, so that the tensors themselves can be named.

Rules
    - Looking costs at most ``_LOOK`` seconds, when all data is there. Where it fails, all tensors of the chunks are
      named.
    - It is one line, and said once: what a transport has said of the same tensors it does not say again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from torchft.checkpointing.chunks import ByteRun, Cut
from torchft.checkpointing.differences import differing_tensors, tensors_in
from torchft.checkpointing.http_client import SourceConnection
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.transport import CheckpointError
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Differences", "Undecided", "look_closer"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

_LOOK = 0.25
_CHUNKS = 4
"""So many are looked at."""
_NAMES = 6
_LONGEST_NAME = 200


@dataclass
class Undecided:
    """Sources that are not used because they differ, though nobody can say that they are wrong."""

    believed: HTTPSource
    """One of those that are used instead."""
    others: list[HTTPSource]

    @classmethod
    def more(cls, before: Undecided | None, believed: HTTPSource, others: list[HTTPSource]) -> Undecided:
        """With those that were found before, in the same fetch."""
        return cls(believed, [*(before.others if before is not None else []), *others])


class Differences:
    """Of one transport, over all its fetches."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, step: int, sides: Undecided, what: Sequence[str], where: str = "") -> None:
        """Says that sources differ, unless it was said.

        Args:
            step: of the state.
            sides: who differs.
            what: paths; none: only that it is their trees or layouts is known.
            where: what is known beside that.
        """
        named = what or ["their trees or layouts"]
        new = not self._said.issuperset(named)
        self._said.update(named)
        shown = ", ".join(path[:_LONGEST_NAME] for path in named[:_NAMES])
        more = f" and {len(named) - _NAMES} more" if len(named) > _NAMES else ""
        logger.log(
            logging.WARNING if new else logging.DEBUG,
            "step %d: %s and %s have different states, and nobody can say which is right. They differ in %s%s%s. State "
            "that each group has for itself (statistics of batch norm, for instance) may differ: register it on all "
            "groups with register_state_dict_fn(..., alike=False). Any other difference is a silent corruption, of one "
            "machine's memory for instance. The state of %s is taken. This is said once (docs/transfer.md)",
            step,
            sides.believed,
            ", ".join(map(str, sides.others)),
            shown,
            more,
            where,
            sides.believed.name,
        )


def look_closer(
    connect: Callable[[Deadline], SourceConnection],
    step: int,
    manifest: Manifest,
    cut: Cut,
    run: ByteRun,
    chunks: Collection[int],
) -> tuple[list[str], str]:
    """Which tensors of a state are others at a source: their paths, and how much of it was looked at, in words.

    Args:
        connect: to that source.
        step: of the state.
        manifest, cut, run: what was received.
        chunks: that differ.
    """
    found: list[str] = []
    looked = 0
    try:
        connection = connect(Deadline(_LOOK))
        try:
            for index in sorted(chunks)[:_CHUNKS]:
                found += _compare(connection, step, manifest, cut, run, index)
                looked += 1
        finally:
            connection.close()
    except CheckpointError as e:
        logger.debug("what differs cannot be looked at: %s", e)
    if not found:
        return tensors_in(
            manifest, cut, chunks
        ), f" (or in some of these, which lie in {len(chunks)} of {cut.count} chunks)"
    rest = len(chunks) - looked
    return list(dict.fromkeys(found)), f", and in {rest} more of {cut.count} chunks" if rest else ""


def _compare(
    connection: SourceConnection, step: int, manifest: Manifest, cut: Cut, run: ByteRun, index: int
) -> list[str]:
    piece = _Piece(cut, index)
    connection.fetch(step, cut, piece, index, index + 1, lambda *_: None)
    span = cut.span(index)
    mine, theirs = (b"".join(views) for views in (run.views(*span), piece.views(*span)))
    return differing_tensors(manifest, span[0], mine, theirs)


class _Piece(ByteRun):
    """Memory for one chunk, addressed as the whole data is."""

    def __init__(self, cut: Cut, index: int) -> None:
        super().__init__([torch.empty(cut.length(index), dtype=torch.uint8)])
        self._start = cut.span(index)[0]

    def views(self, start: int, stop: int) -> list[memoryview]:
        return super().views(start - self._start, stop - self._start)
