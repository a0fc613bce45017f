"""What a case is: a function that runs it once with one implementation and returns its figures by name.

Rules:

- A figure's name ends in its unit (`ms`, `s`, `GB/s`, `count`) or in what it counts (`steps`, `fraction`).
- Figures in GB/s, steps and fractions are better when larger, all others when smaller (`larger_is_better`).
- A figure is None where it did not come to be within the time that the case waits (`Case.patience`). The table
  says so; it never gets a number that is only the length of the wait.
- A case of minutes has a bound of its own on how often it is run, for both or for the peer alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.processes import OURS, Implementation

__all__ = ["Case", "Figures", "Run", "larger_is_better"]

Figures = dict[str, float | None]


def larger_is_better(figure: str) -> bool:
    """Whether of two values of this figure the larger one is the better."""
    return figure.endswith(("GB/s", "steps", "fraction"))


@dataclass(frozen=True)
class Run:
    """One run of a case: with what, which time (it seeds what is drawn), and whether only to try it out."""

    impl: Implementation
    index: int
    quick: bool

    @property
    def ours(self) -> bool:
        return self.impl is OURS


@dataclass(frozen=True)
class Case:
    """A case by name.

    Attributes:
        name: what `--only` is compared with.
        about: one line for `--list`.
        measure: runs it once.
        plain: it is the yardstick, which is run once for both implementations.
        patience: seconds it waits for a figure before that figure is None; for the table.
        target: what the figures of ours should be, in words; for the table.
        most: no more runs of either implementation than this, whatever `--repeat` says.
        most_peer: no more runs of the peer than this.
        only_ours: the peer has nothing that could be measured.
    """

    name: str
    about: str
    measure: Callable[[Run], Figures]
    plain: bool = False
    patience: float = 0.0
    target: str = ""
    most: int | None = None
    most_peer: int | None = None
    only_ours: bool = False

    def runs(self, impl: str, repeat: int) -> int:
        """How often the implementation of that name runs this case."""
        if self.only_ours and impl == "peer":
            return 0
        bounds = [self.most, self.most_peer if impl == "peer" else None]
        return min([repeat, *(b for b in bounds if b is not None)])
