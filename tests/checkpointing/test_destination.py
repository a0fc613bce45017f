"""Where the bytes of a state that arrives go: which live tensors are written, and which are left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.checkpointing.carried import carry
from torchft.checkpointing import UnsafeStateError
from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.snapshot import host_run
from torchft.testing.transport_suite import assert_same

ELEMENTS = 8


def fill(destination: Destination, state: object) -> None:
    """Writes a state's bytes into what was made for it."""
    for view, extent in zip(destination.run.views(0, destination.run.total), describe(state)[1], strict=True):
        view[:] = host_run([extent]).views(0, extent.length)[0]


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


def test_a_tensor_whose_memory_was_freed_is_refused_and_left_alone_on_both_sides() -> None:
    freed = torch.randn(100)
    freed.untyped_storage().resize_(0)
    with pytest.raises(UnsafeStateError, match=r"state\['w'\].*freed"):
        describe({"w": freed})
    state = {"w": torch.ones(100)}
    destination = Destination(describe(state)[0], {"w": freed})
    fill(destination, state)
    assert_same(state, destination.finish())
    assert not freed.untyped_storage().nbytes()


def test_memory_that_is_read_or_written_as_bytes_is_not_freed_by_a_resize() -> None:
    sent, live = torch.ones(100), torch.zeros(100, dtype=torch.bfloat16)
    run = host_run(describe({"w": sent})[1])
    destination = Destination(describe({"w": live})[0], {"w": live})
    for tensor in (sent, live):
        with pytest.raises(RuntimeError, match="not resizable"):
            tensor.untyped_storage().resize_(0)
    assert bytes(run.views(0, 4)[0]) == b"\0\0\x80?"
    del live
    fill(destination, {"w": torch.ones(100, dtype=torch.bfloat16)})  # kept by its view


def test_a_live_tensor_that_is_given_other_memory_meanwhile_does_not_pass_for_what_came() -> None:
    state = {
        "in place": torch.randn(6, 4),
        "by copy": torch.randn(4, 6).t(),
        "resized": torch.randn(3),
        "same": torch.ones(2),
    }
    live = {key: torch.nn.Parameter(torch.zeros(value.shape)) for key, value in state.items()}
    destination = Destination(describe(state)[0], live)
    live["in place"].data = torch.zeros(6, 4)
    live["by copy"].data = torch.zeros(6, 4)
    live["resized"].data = live["resized"].data[:2]
    fill(destination, state)
    received = destination.finish()
    assert isinstance(received, dict)
    assert received["same"] is live["same"]
    assert_same(state, {key: value.detach() for key, value in received.items()})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_live_tensors_without_a_shape_are_passed_over() -> None:
    state = {"w": torch.ones(3), "lazy": torch.ones(4), "nested": torch.ones(2)}
    live = torch.ones(3)
    lazy = torch.nn.UninitializedParameter()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    destination = Destination(describe(state)[0], {"w": live, "lazy": lazy, "nested": nested})
    fill(destination, state)
    received = destination.finish()
    assert isinstance(received, dict)
    assert received["w"] is live
    assert_same(state, received)
    for odd in (lazy, nested):
        with pytest.raises(UnsafeStateError, match="cannot be sent"):
            describe([odd])


def test_small_storages_are_copied_and_large_ones_are_read_and_written_where_they_are() -> None:
    live = {"small": torch.zeros(100), "large": torch.zeros(1000)}
    manifest, sources = describe({"small": torch.ones(100), "large": torch.ones(1000)})
    run = host_run(sources, copy_below=1000)
    for source in sources:
        source.tensor().fill_(0xFF)  # the small one has been copied, the large one is what it is now
    destination = Destination(manifest, live, in_place_from=1000)
    assert destination.bytes_in_place == 4000
    for to, of in zip(destination.run.views(0, run.total), run.views(0, run.total), strict=True):
        to[:] = of
    state = destination.finish()
    assert isinstance(state, dict)
    assert state["large"] is live["large"]
    assert bool(live["large"].isnan().all())
    assert torch.equal(state["small"], torch.ones(100))
    assert torch.equal(live["small"], torch.zeros(100))


def test_live_tensors_that_are_not_like_what_arrives_are_named_the_first_few_of_them() -> None:
    manifest, _ = describe({"w": torch.ones(4, 3), "b": torch.ones(3), "same": torch.ones(2), "new": torch.ones(1)})
    live = {"w": torch.zeros(4, 5), "b": torch.zeros(3, dtype=torch.float64), "same": torch.zeros(2)}
    found = Destination(manifest, live).misfits()
    assert len(found) == 2
    assert any("(4, 3) at the source" in text and "(4, 5) here" in text for text in found)
    many, _ = describe({f"w{i}": torch.ones(4) for i in range(10)})
    found = Destination(many, {f"w{i}": torch.ones(5) for i in range(10)}).misfits()
    assert len(found) == 4
    assert found[-1] == "and 7 further tensors differ"
    assert Destination(many).misfits() == []
