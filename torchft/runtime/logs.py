"""Log lines that say who speaks: ``[replica_id/group_rank - step N] message``.

A :class:`RankLogger` belongs to one rank and knows. Code that works for whichever rank calls it (a transport) logs
through a :class:`SpeakerLogger`: its lines carry the prefix of the rank on whose behalf the thread runs, as said by
:func:`speaking`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["RankLogger", "SpeakerLogger", "speaking"]


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """Prefixes every line with replica id, group rank and the step at the time of the line.

    Args:
        logger: where the lines go.
        replica_id: of this group.
        group_rank: of this process inside its group.
        step: asked for each line.
    """

    def __init__(
        self, logger: logging.Logger, replica_id: str, group_rank: int | str, step: Callable[[], object]
    ) -> None:
        super().__init__(logger, {})
        self._who = f"{replica_id}/{group_rank}"
        self._step = step

    @property
    def prefix(self) -> str:
        """As of now."""
        return f"[{self._who} - step {self._step()}]"

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{self.prefix} {msg}", kwargs


_speaker: ContextVar[RankLogger | None] = ContextVar("torchft_speaker", default=None)


@contextmanager
def speaking(rank: RankLogger) -> Iterator[None]:
    """What this thread logs through a :class:`SpeakerLogger` meanwhile is said by ``rank``."""
    token = _speaker.set(rank)
    try:
        yield
    finally:
        _speaker.reset(token)


class SpeakerLogger(logging.LoggerAdapter[logging.Logger]):
    """Prefixes its lines as the rank that speaks would, or not at all where nobody does.

    Args:
        name: of the logger where the lines go.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        rank = _speaker.get()
        return (msg if rank is None else f"{rank.prefix} {msg}"), kwargs
