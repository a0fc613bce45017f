"""Inner steps, counted by hooks on the optimizer, and the step of the Manager that ends a window of them.

The idea
    The training loop is an ordinary one: it calls ``optimizer.step()`` and nothing else. A hook counts, and at the
    end of a window it makes one step of the Manager: quorum, collectives, vote.

Rules
    - Hooks are there inside the ``with`` block only, and never twice.
    - An error that is reported to the Manager *between* two of its steps is one of the window under way: it would be
      forgotten when the step begins, so it is reported again in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchft.manager import Manager

__all__ = ["InnerSteps", "Window"]


class InnerSteps:
    """Calls back after each step of an optimizer.

    Args:
        optimizer: the plain one; the Manager's steps are not its steps.
        after_step: called on the training thread, after the optimizer has stepped.

    Raises:
        ValueError: the optimizer has no hooks: it is a wrapper.
    """

    def __init__(self, optimizer: Optimizer, after_step: Callable[[], None]) -> None:
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise ValueError(
                f"{type(optimizer).__name__} is a wrapper: pass the optimizer that it wraps. An inner step is local; "
                "the quorum is asked for only when a window ends"
            )
        self._optimizer = optimizer
        self._after_step = after_step
        self._handle: RemovableHandle | None = None

    def start(self) -> None:
        """Counts from now on.

        Raises:
            RuntimeError: it does already.
        """
        if self._handle is not None:
            raise RuntimeError("the with block is entered already: it cannot be entered twice at a time")

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._after_step()

        self._handle = self._optimizer.register_step_post_hook(hook)

    def stop(self) -> None:
        """Counts no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class Window:
    """The Manager's side of a window's end.

    Args:
        manager: of this rank.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._of_last_step: Exception | None = None

    def start(self) -> None:
        """The first window begins: what went wrong before has nothing to do with it."""
        self._of_last_step = self._manager.errored()

    def begin_step(self) -> None:
        """Starts the quorum of the step that ends the window."""
        reported = self._manager.errored()
        self._manager.start_quorum()
        if reported is not None and reported is not self._of_last_step:
            self._manager.report_error(reported)

    def commit(self) -> bool:
        """Ends that step: whether it counts."""
        try:
            return self._manager.should_commit()
        finally:
            self._of_last_step = self._manager.errored()
