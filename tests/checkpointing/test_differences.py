"""Where two states differ, by the paths of what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchft.checkpointing.chunks import Cut
from torchft.checkpointing.description import Description
from torchft.checkpointing.differences import differing_tensors, differing_values, tensors_in
from torchft.checkpointing.manifest import Manifest


def manifest(state: object) -> Manifest:
    return Description(state).manifest


def data(state: object) -> bytes:
    return b"".join(bytes(extent.view()) for extent in Description(state).extents())


@pytest.mark.parametrize(
    ("other", "paths"),
    [
        ({}, []),
        ({"lr": 0.2}, ["state['lr']"]),
        ({"a": torch.zeros(7)}, ["state['a']"]),
        ({"a": torch.ones(3)}, []),
        ({"list": [1, {"x": 3}]}, ["state['list'][1]['x']"]),
        ({"list": [1]}, ["state['list']"]),
        ({"more": 1}, ["state['more']"]),
        ({"lr": [0.1]}, ["state['lr']"]),
    ],
)
def test_values_that_differ_are_found_and_tensors_by_their_shape(other: dict[str, Any], paths: list[str]) -> None:
    mine = {"lr": 0.1, "a": torch.zeros(3), "b": torch.zeros(5), "list": [1, {"x": 2}]}
    assert differing_values(manifest(mine).body, manifest(mine | other).body) == paths
    assert differing_values(manifest(mine | other).body, manifest(mine).body) == paths


@pytest.mark.parametrize("hostile", [b"", b"{}", b"[]", b"[" * 100_000, b'{"tree": ["d", [], 1, 2]}', b"\xff"])
def test_what_is_no_manifest_differs_somewhere(hostile: bytes) -> None:
    assert differing_values(manifest({"a": 1}).body, hostile)


def test_tensors_are_found_by_the_chunks_that_they_lie_in() -> None:
    state = {"a": torch.zeros(10), "b": torch.zeros(30), "none": torch.zeros(0), "c": torch.zeros(4, 6)[:, :3]}
    found = manifest(state)
    assert found.total == 40 + 120 + 48
    cut = Cut(found.total, 64)
    assert tensors_in(found, cut, {0}) == ["state['a']", "state['b']"]
    assert tensors_in(found, cut, {1}) == ["state['b']"]
    assert tensors_in(found, cut, {2, 3}) == ["state['b']", "state['c']"]
    assert tensors_in(found, cut, {3}) == ["state['c']"]
    assert tensors_in(found, cut, {}) == []


def test_tensors_of_a_piece_are_compared_by_their_bytes() -> None:
    state = {"a": torch.zeros(10), "b": torch.zeros(30), "tied": [], "c": torch.zeros(4)}
    state["tied"] = state["b"][:3]
    found, mine = manifest(state), data(state)
    state["b"][1] = 1.0
    state["c"][3] = 1.0
    theirs = data(state)
    assert differing_tensors(found, 0, mine, mine) == []
    assert differing_tensors(found, 0, mine, theirs) == ["state['b']", "state['tied']", "state['c']"]
    assert differing_tensors(found, 0, mine[:44], theirs[:44]) == []
    assert differing_tensors(found, 40, mine[40:50], theirs[40:50]) == ["state['b']", "state['tied']"]
    assert differing_tensors(found, 160, mine[160:], theirs[160:]) == ["state['c']"]
