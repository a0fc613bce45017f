"""What a fetch that failed leaves behind: the chunks that were there already, for the next attempt.

The idea
    A chunk is known by its place, its size and its hash. The next attempt looks whether its bytes are still in the
    memory that it is going to fill (hashing them: ten times faster than fetching them), and takes those as kept;
    whether the sources have the same bytes there, at the same step or at another one, their tables of hashes say
    (:mod:`torchft.checkpointing.http_agreement`). So nothing is believed that is not verified in both places, whatever
    has happened to the memory in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchft.checkpointing.chunks import Cut, digest
from torchft.checkpointing.destination import Destination

__all__ = ["Partial"]


@dataclass(frozen=True)
class Partial:
    """Of one failed fetch."""

    cut: Cut
    verified: dict[int, bytes]
    """Chunks and their hashes."""
    destination: Destination
    """Where they are; keeps fresh memory alive."""

    def still_in(self, destination: Destination, cut: Cut) -> dict[int, bytes]:
        """The chunks whose bytes are in the memory of the next attempt as they were."""
        if cut != self.cut:
            return {}
        return {
            index: value
            for index, value in self.verified.items()
            if digest(destination.run.views(*cut.span(index))) == value
        }
