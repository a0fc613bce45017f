"""What a group that does not take part contributes to a reduction, and when a step's collectives have ended."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft.reduction import StepFutures, contribute_nothing
from torchft.step_error import StepError
from torchft.work import CompletedWork, FutureWork

BINARY: list[tuple[ReduceOp.RedOpType, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
    (ReduceOp.SUM, torch.add),
    (ReduceOp.AVG, torch.add),  # the divisor does not count those that take no part
    (ReduceOp.PRODUCT, torch.mul),
    (ReduceOp.MAX, torch.maximum),
    (ReduceOp.MIN, torch.minimum),
    (ReduceOp.BAND, torch.bitwise_and),
    (ReduceOp.BOR, torch.bitwise_or),
    (ReduceOp.BXOR, torch.bitwise_xor),
]
VALUES = {
    torch.float32: [-3.5, 0.0, 7.25, float("inf"), float("-inf")],
    torch.bfloat16: [-3.5, 0.0, 7.25],
    torch.int64: [-3, 0, 2**62],
    torch.uint8: [0, 3, 255],
    torch.bool: [False, True],
}


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize(("op", "combine"), BINARY, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "object"])
def test_it_changes_nothing_in_the_result(
    dtype: torch.dtype, op: ReduceOp.RedOpType, combine: Callable[..., torch.Tensor], wrapped: bool
) -> None:
    values = torch.tensor(VALUES[dtype], dtype=dtype)
    if op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR) and dtype.is_floating_point:
        pytest.skip("bits of floating point numbers are not reduced")
    nothing = values.clone()
    contribute_nothing(nothing, ReduceOp(op) if wrapped else op)
    torch.testing.assert_close(combine(values, nothing), values, rtol=0, atol=0)


class Device:
    """An accelerator that has carried out what it was given when a test says so."""

    def __init__(self) -> None:
        self.looked = threading.Event()
        self.done = False

    def record_event(self) -> Device:
        return self

    def query(self) -> bool:
        self.looked.set()
        return self.done


class Step:
    """One whose only collective is issued on the device: its future is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = Device()
        self.broken: Exception | None = None
        self.error = StepError(lambda _: None)
        self._works = StepFutures(self.error)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: self.device)
        self._works.reduce(cast(Any, self), torch.ones(3, device="meta"), ReduceOp.SUM, 2, 60.0)

    def allreduce(self, tensors: list[torch.Tensor], _: object) -> Work:
        return CompletedWork(tensors)

    def end(self, timeout: float = 60.0) -> threading.Thread:
        """What waits for it, when it has begun to."""
        arguments = timedelta(seconds=timeout), lambda: None, lambda: self.broken
        waiting = threading.Thread(target=self._works.wait, args=arguments)
        waiting.start()
        assert self.device.looked.wait(60)
        return waiting


def test_a_step_does_not_end_before_the_device_has_carried_out_its_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    waiting = step.end()
    waiting.join(0.05)
    assert waiting.is_alive()
    step.device.done = True
    waiting.join(60)
    assert not waiting.is_alive()
    assert step.error.current is None


def test_what_fails_on_the_device_is_the_error_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    waiting = step.end()
    step.broken = RuntimeError("a member died")
    waiting.join(60)
    assert step.error.current is step.broken


class Failing:
    """A group whose collectives fail."""

    def allreduce(self, tensors: list[torch.Tensor], _: object) -> Work:
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("a member died"))
        return FutureWork(future)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_collective_that_failed_does_not_keep_its_gradients(quantized: bool) -> None:
    error = StepError(lambda _: None)
    works = StepFutures(error)

    def reduce() -> weakref.ref[torch.Tensor]:
        gradients = torch.ones(3)
        pg = cast(Any, Failing())
        pg.size, pg.errored = lambda: 1, lambda: None
        works.reduce(pg, gradients, ReduceOp.SUM, 2, 60.0, quantized)
        works.wait(timedelta(seconds=60), lambda: None, lambda: None)
        assert "a member died" in str(error.current)
        error.begin()
        return weakref.ref(gradients)

    kept = reduce()
    gc.collect()
    assert kept() is None


def test_a_device_that_does_not_end_is_not_waited_for_beyond_the_timeout_or_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Step(monkeypatch)
    step.end(0.05).join(60)
    assert isinstance(step.error.current, TimeoutError)
    step = Step(monkeypatch)
    waiting = step.end()
    step.error.report(RuntimeError("a member is lost"))
    waiting.join(60)
    assert not waiting.is_alive()
