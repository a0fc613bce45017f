"""A group that fails when a test says so."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from torch.distributed import Work
from torch.futures import Future

from torchft.process_group.base import ProcessGroup
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.work import FutureWork

__all__ = ["FakeProcessGroupWrapper"]

_NO_TIMEOUT = timedelta(milliseconds=0)


class FakeProcessGroupWrapper(ProcessGroupWrapper):
    """Passes everything on to ``pg``, except for the errors it was told of. ``configure`` forgets them.

    Args:
        pg: the wrapped group.
    """

    def __init__(self, pg: ProcessGroup) -> None:
        super().__init__(pg)
        self._lock = threading.Lock()
        self._future_error: Exception | None = None
        self._configure_error: Exception | None = None

    def report_future_error(self, e: Exception) -> None:
        """The work of the next collective fails with ``e``, after the wrapped group has done it."""
        with self._lock:
            self._future_error = e

    def report_configure_error(self, e: Exception) -> None:
        """The next ``configure`` raises ``e``."""
        with self._lock:
            self._configure_error = e

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        with self._lock:
            error, self._configure_error, self._future_error = self._configure_error, None, None
        if error is not None:
            raise error
        super().configure(
            store_addr, replica_id, rank, world_size, quorum_id, group_rank, group_world_size, global_ranks
        )

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        work = super()._run(op, args, result)
        with self._lock:
            error, self._future_error = self._future_error, None
        return work if error is None else _failing(work, error)


def _failing(work: Work, error: Exception) -> Work:
    failed: Future[Any] = Future()

    def fail(_: Future[Any]) -> None:
        failed.set_exception(error)

    work.get_future().add_done_callback(fail)
    return FutureWork(failed)
