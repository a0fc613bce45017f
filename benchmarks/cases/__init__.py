"""What is measured, by subject. Each case starts its own processes and ends them, so the order of cases is free."""

from __future__ import annotations

from benchmarks.cases import (
    changes,
    collectives,
    faults,
    lighthouse,
    lighthouse_down,
    rejoin,
    soak,
    steps,
    transfer_http,
    transfer_pg,
)
from benchmarks.cases.base import Case, Figures, Run, larger_is_better

__all__ = ["CASES", "Case", "Figures", "Run", "larger_is_better"]

CASES: tuple[Case, ...] = (
    *steps.CASES,
    *collectives.CASES,
    *faults.CASES,
    *rejoin.CASES,
    *transfer_http.CASES,
    *transfer_pg.CASES,
    *soak.CASES,
    *lighthouse.CASES,
    *lighthouse_down.CASES,
    *changes.CASES,
)
