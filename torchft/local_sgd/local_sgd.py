"""Local SGD: replicas train alone and average their parameters now and then (arXiv 1805.09767, algorithm 1).

The idea
    Each replica group makes ``sync_every`` steps of its optimizer on its own, then the parameters are averaged over
    the groups and everybody goes on from the average. One all-reduce of the parameters per window instead of one of
    the gradients per step: ``sync_every`` times fewer bytes.

Rules
    - A *window* ends with one step of the Manager. Committed: the average becomes the parameters and the copy that
      is kept of them. Not committed, for whatever reason: the window is discarded, the copy is restored.
    - A joining group receives the copy, not what its source has made of it since.

Dangers
    - Only parameters that require a gradient are averaged. Buffers (BatchNorm's running statistics) are each group's
      own: use GroupNorm or LayerNorm, or recompute the statistics before evaluation.
    - The optimizer's state is each group's own and is not rolled back with a window; neither is a learning rate
      schedule, which goes on counting the steps of windows that were discarded, and the data that they have read.
      Drive a schedule by ``manager.current_step() * sync_every`` if all groups must agree on it.
    - A joining group has no parameters worth anything before its first synchronisation: steps that it makes until
      then are lost, and its optimizer's state comes from them unless it is registered with the Manager.
    - Steps after the last full window stay local: train a multiple of ``sync_every``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchft.local_sgd.averaging import Averaging
from torchft.local_sgd.parameters import SynchronisedParameters
from torchft.local_sgd.window import InnerSteps, Window
from torchft.manager import Manager

__all__ = ["LocalSGD"]


class LocalSGD:
    """A context manager: within it, each ``sync_every`` steps of the optimizer the parameters are averaged.

    The Manager may have an asynchronous or a synchronous quorum. Asynchronous is better: a group that joins is not
    counted in the synchronisation in which it heals. With a synchronous one it counts with the parameters it has
    just received, which draws the average of that window back to them.

    Registers ``"LocalSGD"`` with the Manager, so there is one for a Manager.

    Args:
        manager: of this rank.
        model: on its device, and sharded already where it is to be. FSDP2's DTensors are averaged shard by shard.
        optimizer: of the model, not wrapped in :class:`torchft.optim.OptimizerWrapper`.
        sync_every: steps in a window, at least 1.

    Raises:
        ValueError: an argument is out of range, or the Manager has a LocalSGD already.

    Example::

        with LocalSGD(manager, model, optimizer, sync_every=32):
            for batch in data:
                optimizer.zero_grad()
                loss(model(batch)).backward()
                optimizer.step()  # each 32nd time: quorum, average, commit
    """

    def __init__(self, manager: Manager, model: nn.Module, optimizer: Optimizer, sync_every: int) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every is {sync_every}: a window has at least one step")
        self._manager = manager
        self._sync_every = sync_every
        self._parameters = SynchronisedParameters(model)
        self._steps = InnerSteps(optimizer, self._after_step)
        self._window = Window(manager)
        self._done = 0
        self._loaded = False
        self.bytes_reduced = 0
        """Handed to the all-reduce by this rank so far."""
        # What else is registered, the model and the inner optimizer, is each group's own between two synchronisations.
        manager.register_state_dict_fn("LocalSGD", self.load_state_dict, self.state_dict, alike=False)

    def __enter__(self) -> LocalSGD:
        self._steps.start()
        self._window.start()
        self._done = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._steps.stop()

    def state_dict(self) -> dict[str, Any]:
        """``{"parameters": {name: tensor}}``: those that were last synchronised, this rank's shards, not copied."""
        return {"parameters": self._parameters.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, also as the model's parameters.

        Raises:
            ValueError: it is of another model.
        """
        self._parameters.load_state_dict(state["parameters"])
        self._parameters.restore()
        self._loaded = True

    def _after_step(self) -> None:
        self._done += 1
        if self._done >= self._sync_every:
            self._done = 0
            with torch.no_grad():
                self._synchronise()

    def _synchronise(self) -> None:
        self._loaded = False
        self._window.begin_step()
        if self._loaded:  # healed; what was registered after this object may have written the parameters since
            self._parameters.restore()
        committed = False
        try:
            local = self._parameters.local()
            averaging = Averaging(self._manager, local, lambda i, into: into.copy_(local[i]))
            self.bytes_reduced += averaging.nbytes
            averages = averaging.wait()
            committed = self._window.commit()
        finally:
            if not committed:
                self._parameters.restore()
        if committed:
            for parameter, average in zip(self._parameters.local(), averages, strict=True):
                parameter.copy_(average)
            self._parameters.save()
