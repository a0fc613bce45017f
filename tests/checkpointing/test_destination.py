"""Where the bytes of a state that arrives go: which live tensors are written, and which are left alone."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.checkpointing.carried import carry
from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination

ELEMENTS = 8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12))
@example([50, 40, 30, 20, 10, 0])
@example([0, 8, 16, 16, 24])
@example([3, 0, 8, 11])
def test_no_memory_is_written_twice(starts: list[int]) -> None:
    sent = {str(i): torch.full((ELEMENTS,), float(i + 1)) for i in range(len(starts))}
    buffer = torch.zeros(60 + ELEMENTS)
    live = {str(i): buffer[start : start + ELEMENTS] for i, start in enumerate(starts)}
    expected, taken = torch.zeros_like(buffer), set[int]()
    for i, start in enumerate(starts):
        if taken.isdisjoint(range(start, start + ELEMENTS)):
            taken.update(range(start, start + ELEMENTS))
            expected[start : start + ELEMENTS] = float(i + 1)
    destination, got = carry(sent, live)
    assert torch.equal(buffer, expected)
    assert destination.bytes_in_place == 4 * len(taken)
    assert isinstance(got, dict)
    for key, tensor in sent.items():
        assert torch.equal(got[key], tensor)
        in_place = bool((expected[starts[int(key)] : starts[int(key)] + ELEMENTS] == tensor).all())
        assert (got[key] is live[key]) == in_place


def test_parameters_of_other_strides_get_the_values_and_stay_what_they_are() -> None:
    sent = {"weight": torch.randn(3, 4)}
    weight = torch.nn.Parameter(torch.zeros(4, 3).t())
    destination, got = carry(sent, {"weight": weight})
    assert destination.bytes_in_place == 0
    assert got == {"weight": weight}
    assert torch.equal(weight.detach(), sent["weight"])
    assert weight.requires_grad
    assert weight.stride() == (1, 3)


def test_what_a_tensor_was_given_meanwhile_is_not_taken_for_its_old_memory() -> None:
    def with_gaps() -> torch.Tensor:
        return torch.zeros(8, 64)[:, ::2]

    manifest, _ = describe({"weight": torch.ones(8, 32)})
    for _ in range(50):
        weight = torch.nn.Parameter(with_gaps())
        destination = Destination(manifest, {"weight": weight})
        weight.data = torch.zeros(1)  # who looked at the old memory holds it: else it would be given out anew
        weight.data = with_gaps()
        for view in destination.run.views(0, manifest.total):
            view[:] = b"\1" * len(view)
        got = destination.finish()
        assert isinstance(got, dict)
        assert got["weight"] is not weight
        assert not weight.any(), "it was written"
