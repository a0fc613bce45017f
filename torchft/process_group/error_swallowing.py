"""Errors that wait for their time: a training step goes on with no-ops and is thrown away at its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import Work
from torch.futures import Future

from torchft.futures import outcome
from torchft.process_group.base import ProcessGroup
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.work import CompletedWork

__all__ = ["ErrorSwallowingProcessGroupWrapper"]

logger = logging.getLogger(__name__)

_NO_TIMEOUT = timedelta(milliseconds=0)


class ErrorSwallowingProcessGroupWrapper(ProcessGroupWrapper):
    """Keeps the first error of the wrapped group instead of raising it. From then on collectives do nothing and
    complete with the tensors as they are, until the next ``configure``.

    Args:
        pg: the wrapped group.
    """

    def __init__(self, pg: ProcessGroup) -> None:
        super().__init__(pg)
        self._error: Exception | None = None
        self._error_lock = threading.Lock()

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
        """Forgets the error and configures the wrapped group; an error of that is raised."""
        with self._error_lock:
            self._error = None
        super().configure(
            store_addr, replica_id, rank, world_size, quorum_id, group_rank, group_world_size, global_ranks
        )

    def error(self) -> Exception | None:
        """The first error since the last ``configure``."""
        return self._error or self.parent.errored()

    def errored(self) -> Exception | None:
        """Same as :meth:`error`."""
        return self.error()

    def report_error(self, e: Exception) -> None:
        """Treats ``e`` as an error of the group."""
        with self._error_lock:
            if self._error is not None:
                return
            self._error = e
        logger.warning("the process group failed, its collectives do nothing until it is configured again: %s", e)

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        if self._error is not None:
            return CompletedWork(result)
        try:
            work = super()._run(op, args, result)
        except Exception as e:
            self.report_error(e)
            return CompletedWork(result)
        return _SwallowingWork(work, result, self.report_error)


class _SwallowingWork(Work):
    """Completes with ``result`` when the wrapped work fails, after reporting it."""

    def __init__(self, work: Work, result: Any, report: Callable[[Exception], None]) -> None:
        super().__init__()
        self._work = work
        self._result = result
        self._report = report

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        try:
            self._work.wait(timeout) if timeout > _NO_TIMEOUT else self._work.wait()
        except Exception as e:
            self._report(e)
        return True

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def get_future(self) -> Future[Any]:
        def value(done: Future[Any]) -> Any:
            told, error = outcome(done)
            if error is None:
                return told
            self._report(error)
            return self._result

        return self._work.get_future().then(value)
