"""Log lines that say who speaks: ``[replica_id/group_rank - step N] message``."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

__all__ = ["RankLogger"]


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """Prefixes every line with replica id, group rank and the step at the time of the line.

    Args:
        logger: where the lines go.
        replica_id: of this group.
        group_rank: of this process inside its group.
        step: asked for each line.
    """

    def __init__(self, logger: logging.Logger, replica_id: str, group_rank: int | str, step: Callable[[], int]) -> None:
        super().__init__(logger, {})
        self._who = f"{replica_id}/{group_rank}"
        self._step = step

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"[{self._who} - step {self._step()}] {msg}", kwargs
