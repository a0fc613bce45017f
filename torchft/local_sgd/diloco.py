"""DiLoCo and Streaming DiLoCo: an outer optimizer over what replicas learn alone.

The idea
    DiLoCo (arXiv 2311.08105, algorithm 1): each replica group makes ``sync_every`` steps of an inner optimizer on its
    own. How far the parameters have come since the last synchronisation, averaged over the groups, is a
    *pseudogradient*, with which an outer optimizer (in the paper SGD with Nesterov momentum) steps from the
    parameters that were last synchronised. With an outer SGD of learning rate 1 without momentum it is LocalSGD.

    Streaming DiLoCo (arXiv 2501.18512, algorithm 2) spreads this out in time: the model is cut into fragments, each
    synchronised every ``sync_every`` inner steps at an offset of its own (*streaming partial updates*); the average
    travels while the inner optimizer goes on for ``fragment_sync_delay`` steps (*overlapping communication with
    computation*); and what those steps have learnt is kept to a share of ``fragment_update_alpha``.

                     |-- gap --|-- gap --|      gap = sync_every / fragments
        inner steps  ....................
        average      .         0===>     1===>          ===> fragment_sync_delay inner steps
        commit       .             0         1

Rules
    - The synchronisation of a fragment is one step of the Manager. Committed: outer step. Not committed, for whatever
      reason: the fragment goes back to what was last synchronised and the outer optimizer is left as it was; the
      same fragment is tried again a gap later. Other fragments are not touched.
    - Which fragment it is follows from ``manager.current_step()`` once the quorum is there and a healing group has
      healed: it is the same on all groups, whenever they joined and whatever they have counted themselves.
    - All groups all-reduce the same buckets in the same order.
    - A joining group receives all synchronised parameters and the outer optimizers' state.
    - With a delay, inner steps write parameters while the Manager's step is open, and a joining group may be reading
      them just then: one small all-reduce, which a joining group enters once it has healed, is waited for first.

Dangers
    - Only parameters that require a gradient are synchronised. Buffers (BatchNorm's running statistics) are each
      group's own: use GroupNorm or LayerNorm, or recompute the statistics before evaluation.
    - The inner optimizer's state is each group's own, as in the papers; it is not rolled back when a fragment is.
      Register it with the Manager, so that a joining group does not begin with that of its steps before it healed.
    - A learning rate schedule of the inner optimizer counts inner steps, those of discarded windows too. One of the
      outer optimizers must depend on ``manager.current_step()`` alone, or groups come apart. Learning rates that are
      in an outer optimizer's state heal with it.
    - A joining group has nothing to contribute to the synchronisation in which it heals but is counted in its
      average. At step 0 with ``Manager(init_sync=True)`` all groups but one heal: begin from the same seed with
      ``init_sync=False`` so that the first windows are not lost.
    - Pseudogradients have the dtype of the parameters: keep the parameters in fp32 where a window changes them little.
    - Steps after the last synchronisation stay local. What all groups agree on is :meth:`DiLoCo.state_dict`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from torchft.local_sgd.averaging import Averaging
from torchft.local_sgd.fragment import Fragment
from torchft.local_sgd.window import InnerSteps, Window
from torchft.manager import Manager

__all__ = ["DiLoCo"]

logger = logging.getLogger(__name__)
_DEFAULT_CAP_MB = 32


class DiLoCo:
    """A context manager: within it, the fragments are synchronised one after the other as the inner optimizer steps.

    Registers ``"DiLoCo"`` with the Manager, so there is one for a Manager.

    Args:
        manager: of this rank, with ``use_async_quorum=False``: which fragment is due, and from where its
            pseudogradient is measured, is known only once a joining group has healed.
        model_fragments: the parts of the model, on their device and sharded already where they are to be; a list of
            the whole model alone is DiLoCo as in the first paper. The same on all groups, in the same order. FSDP2's
            DTensors are synchronised shard by shard.
        inner_optimizer: of the model, not wrapped in :class:`torchft.optim.OptimizerWrapper`.
        outer_optimizer: one over the parameters of all fragments, or one for each fragment.
        sync_every: inner steps from one synchronisation of a fragment to its next; a multiple of the number of
            fragments.
        backup_device: where the synchronised copy is kept; None: beside the parameters.
        pin_memory: keep a copy on the host, of parameters on an accelerator, in page-locked memory.
        use_bucketization: all-reduce a fragment in a few large pieces instead of parameter by parameter.
        bucket_cap_mb: largest bucket in MiB; 32 by default. A larger parameter is a bucket of its own.
        should_quantize: as of :meth:`torchft.manager.Manager.allreduce`.
        fragment_sync_delay: inner steps between the beginning of an average and its outer step; less than
            ``sync_every / len(model_fragments)``.
        fragment_update_alpha: share of a group's own parameters in what it goes on from, 0 to 1. 0: what was
            synchronised; 1: the group never hears of the others.

    Raises:
        TypeError: ``model_fragments`` is a module instead of a list.
        ValueError: an argument is out of range or does not fit another, the Manager's quorum is asynchronous, or it
            has a DiLoCo already.

    Example::

        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        with DiLoCo(manager, [model], inner, outer, sync_every=100):
            for batch in data:
                inner.zero_grad()
                loss(model(batch)).backward()
                inner.step()  # each 100th time: quorum, average of the pseudogradients, commit, outer step
    """

    def __init__(
        self,
        manager: Manager,
        model_fragments: list[nn.Module],
        inner_optimizer: Optimizer,
        outer_optimizer: Optimizer | list[Optimizer],
        sync_every: int,
        backup_device: torch.device | None = None,
        pin_memory: bool = True,
        use_bucketization: bool = False,
        bucket_cap_mb: int | None = None,
        should_quantize: bool = False,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
    ) -> None:
        if isinstance(model_fragments, nn.Module) and not isinstance(model_fragments, nn.ModuleList):
            raise TypeError(
                "model_fragments is a module: pass a list of the parts, [model] for the whole model at once"
            )
        modules = list(model_fragments)
        if manager.use_async_quorum:
            raise ValueError(
                "DiLoCo needs Manager(use_async_quorum=False): the fragment that is due follows the quorum"
            )
        self._gap = _gap(sync_every, len(modules), fragment_sync_delay)
        if not 0.0 <= fragment_update_alpha <= 1.0:
            raise ValueError(f"fragment_update_alpha is {fragment_update_alpha}: it is a share, 0 to 1")
        if bucket_cap_mb is not None and bucket_cap_mb <= 0:
            raise ValueError(f"bucket_cap_mb is {bucket_cap_mb}: a bucket holds something")
        self._outer = _outer_optimizers(outer_optimizer, inner_optimizer, len(modules))
        outer_of = self._outer if len(self._outer) == len(modules) else self._outer * len(modules)
        self._fragments = [
            Fragment(module, outer, backup_device, pin_memory) for module, outer in zip(modules, outer_of, strict=True)
        ]
        _check_cover(self._fragments, inner_optimizer)
        self._manager = manager
        self._cap_bytes = (bucket_cap_mb or _DEFAULT_CAP_MB) << 20 if use_bucketization else None
        self._should_quantize = should_quantize
        self._delay = fragment_sync_delay
        self._alpha = fragment_update_alpha
        self._steps = InnerSteps(inner_optimizer, self._after_step)
        self._window = Window(manager)
        self._done = 0  # inner steps since the last synchronisation began
        self._under_way: tuple[Fragment, Averaging] | None = None
        self._loaded = False
        self.bytes_reduced = 0
        """Handed to the all-reduce by this rank so far, before any quantization."""
        # What else is registered, the model and the inner optimizer, is each group's own between two synchronisations.
        manager.register_state_dict_fn("DiLoCo", self.load_state_dict, self.state_dict, alike=False)

    def __enter__(self) -> DiLoCo:
        self._steps.start()
        self._window.start()
        self._done = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._steps.stop()
        if self._under_way is None:
            return
        if error is None:
            with torch.no_grad():
                self._finish()
            return
        self._under_way = None
        cause = error if isinstance(error, Exception) else RuntimeError(f"the training loop ended with {error!r}")
        self._manager.report_error(cause)  # others wait for a commit that will not come

    def state_dict(self) -> dict[str, Any]:
        """What was last synchronised: ``{"fragments": [{name: tensor}], "outer_optimizers": [state_dict]}``.

        This rank's shards, the tensors themselves: save or copy them before the next inner step.
        """
        return {
            "fragments": [f.parameters.state_dict() for f in self._fragments],
            "outer_optimizers": [outer.state_dict() for outer in self._outer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, also as the model's parameters.

        Raises:
            ValueError: it is of another model or another number of fragments.
        """
        fragments, outer = state["fragments"], state["outer_optimizers"]
        if len(fragments) != len(self._fragments) or len(outer) != len(self._outer):
            raise ValueError(
                f"the state has {len(fragments)} fragments and {len(outer)} outer optimizers, "
                f"here are {len(self._fragments)} and {len(self._outer)}"
            )
        for fragment, saved in zip(self._fragments, fragments, strict=True):
            fragment.parameters.load_state_dict(saved)
            fragment.parameters.restore()
        for optimizer, saved in zip(self._outer, outer, strict=True):
            optimizer.load_state_dict(saved)
        self._loaded = True

    def _after_step(self) -> None:
        self._done += 1
        with torch.no_grad():
            if self._under_way is not None and self._done == self._delay:
                self._finish()
            if self._done == self._gap:
                self._done = 0
                self._begin()
                if self._delay == 0:
                    self._finish()

    def _begin(self) -> None:
        """Quorum, and the average of the due fragment's pseudogradient on its way."""
        self._loaded = False
        self._window.begin_step()
        if self._loaded:  # healed; what was registered after this object may have written the parameters since
            for each in self._fragments:
                each.parameters.restore()
        fragment = self._fragments[self._manager.current_step() % len(self._fragments)]
        averaging = fragment.average_pseudogradient(self._manager, self._cap_bytes, self._should_quantize)
        self.bytes_reduced += averaging.nbytes
        self._under_way = (fragment, averaging)
        if self._delay:
            self._wait_for_healing(fragment)

    def _wait_for_healing(self, fragment: Fragment) -> None:
        """Until nobody reads this replica's state any more: see the last of the rules."""
        here = torch.zeros(1, dtype=torch.int32, device=fragment.parameters.local()[0].device)
        self._manager.allreduce(here, reduce_op=ReduceOp.SUM).wait()
        here.item()  # on an accelerator waiting for the work makes only the stream wait

    def _finish(self) -> None:
        """Vote, and the outer step or the way back."""
        assert self._under_way is not None
        fragment, averaging = self._under_way
        self._under_way = None
        committed = False
        try:
            pseudogradient = averaging.wait()
            committed = self._window.commit()
        finally:
            if not committed:
                fragment.discard()
        if committed:
            fragment.step(pseudogradient, self._alpha)


def _gap(sync_every: int, fragments: int, delay: int) -> int:
    """Inner steps from one synchronisation to the next."""
    if fragments == 0:
        raise ValueError("model_fragments is empty: there is nothing to synchronise")
    if sync_every < 1 or sync_every % fragments:
        raise ValueError(f"sync_every is {sync_every}: it must be a multiple of the number of fragments, {fragments}")
    gap = sync_every // fragments
    if not 0 <= delay < gap:
        raise ValueError(
            f"fragment_sync_delay is {delay}: it must be at least 0 and less than sync_every / fragments = {gap}, so "
            "that a fragment is done before the next one begins"
        )
    return gap


def _outer_optimizers(given: Optimizer | Sequence[Optimizer], inner: Optimizer, fragments: int) -> list[Optimizer]:
    outer = [given] if isinstance(given, Optimizer) else list(given)
    if not isinstance(given, Optimizer) and len(outer) != fragments:
        raise ValueError(f"{len(outer)} outer optimizers for {fragments} fragments: pass one, or one for each")
    if any(o is inner for o in outer):
        raise ValueError("the inner optimizer is also an outer one: they are two, over the same parameters")
    return outer


def _check_cover(fragments: Iterable[Fragment], inner: Optimizer) -> None:
    covered: set[int] = set()
    for i, fragment in enumerate(fragments):
        for name, parameter in fragment.parameters.named:
            if id(parameter) in covered:
                raise ValueError(f"parameter {name!r} of fragment {i} is in an earlier fragment or another one too")
            covered.add(id(parameter))
    trained = [p for group in inner.param_groups for p in group["params"]]
    if left := sum(1 for p in trained if p.requires_grad and id(p) not in covered):
        logger.warning("%d parameters of the inner optimizer are in no fragment: they will never be synchronised", left)
