"""What a group that does not take part contributes to a reduction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributed import ReduceOp

from torchft.reduction import contribute_nothing

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
