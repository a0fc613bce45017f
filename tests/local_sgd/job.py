"""Replica groups for the tests of this folder: imagined ones for arithmetic, real ones for faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from tests.groups import Replica
from torchft.manager import Manager
from torchft.work import FutureWork

TIMEOUT = 60.0


class Exchange:
    """Where imagined groups hand in what they want reduced."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._changed = threading.Condition()
        self._handed_in: dict[int, dict[int, torch.Tensor]] = {}

    def put(self, call: int, group: int, tensor: torch.Tensor) -> None:
        with self._changed:
            self._handed_in.setdefault(call, {})[group] = tensor.clone()
            self._changed.notify_all()

    def average(self, call: int) -> torch.Tensor:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._handed_in[call]) == self.groups, TIMEOUT)
            parts = self._handed_in[call]
            return torch.stack([parts[g] for g in sorted(parts)]).mean(0)


class _Late(Work):
    """The average arrives when it is waited for, not before."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish = finish

    def wait(self, timeout: Any = None) -> bool:
        self._finish()
        return True


class ImaginedManager:
    """What the algorithms use of a Manager, without anything behind it.

    Args:
        exchange: shared with the other groups.
        group: this one's index.
        fails: steps' attempts, counted from 0, that are not committed.
    """

    use_async_quorum = False

    def __init__(self, exchange: Exchange, group: int, fails: Sequence[int] = ()) -> None:
        self._exchange, self._group, self._fails = exchange, group, fails
        self._step = self._calls = self._attempts = 0
        self.sizes: list[int] = []

    def register_state_dict_fn(self, key: str, load: Any, save: Any, *, alike: bool = True) -> None:
        pass

    def errored(self) -> Exception | None:
        return None

    def report_error(self, e: Exception) -> None:
        raise AssertionError(e)

    def start_quorum(self) -> None:
        pass

    def current_step(self) -> int:
        return self._step

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Work:
        if reduce_op == ReduceOp.SUM:
            done: Future[Any] = Future()
            done.set_result(tensor)
            return FutureWork(done)
        call, self._calls = self._calls, self._calls + 1
        self.sizes.append(tensor.numel())
        self._exchange.put(call, self._group, tensor)
        return _Late(lambda: cast(None, tensor.copy_(self._exchange.average(call))))

    def should_commit(self) -> bool:
        attempt, self._attempts = self._attempts, self._attempts + 1
        if attempt in self._fails:
            return False
        self._step += 1
        return True


def imagined(groups: int, run: Callable[[Manager, int], Any], fails: Sequence[int] = ()) -> list[Any]:
    """Runs ``run(manager, group)`` for each group, all at the same time."""
    exchange = Exchange(groups)
    with ThreadPoolExecutor(groups) as pool:
        managers = [cast(Manager, ImaginedManager(exchange, g, fails)) for g in range(groups)]
        return [f.result(TIMEOUT) for f in [pool.submit(run, m, g) for g, m in enumerate(managers)]]


class Goal:
    """The step at which two groups stop, when one of them joins nobody knows when."""

    def __init__(self) -> None:
        self.step = 1_000_000

    def set_after(self, step: int) -> None:
        """The joiner is in: a few more steps together."""
        self.step = min(self.step, step + 4)

    @contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """Where the joiner fails, the other one need not wait for it."""
        try:
            yield
        except BaseException:
            self.step = 0
            raise


def uneven_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three modules of very different size."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False), nn.Linear(2, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def gradient(group: int, step: int, p: torch.Tensor) -> torch.Tensor:
    """A gradient that depends on all its arguments, and on where the parameter is."""
    return torch.sin(p.detach() * (1 + group) + step) + 0.1 * group


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, group: int, step: int) -> None:
    for p in model.parameters():
        p.grad = gradient(group, step, p)
    optimizer.step()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def raw(tensors: Sequence[torch.Tensor] | nn.Module) -> bytes:
    """All bits of them."""
    each = values(tensors) if isinstance(tensors, nn.Module) else tensors
    return b"".join(t.numpy().tobytes() for t in each)


def replace_model(replica: Replica, seed: int) -> None:
    """Gives a replica the uneven model, whose state and inner optimizer it registers."""
    replica.model = uneven_model(seed)  # type: ignore[assignment]
    replica.inner = torch.optim.Adam(replica.model.parameters(), lr=0.01)
