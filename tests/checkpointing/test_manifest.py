"""Manifests: what is written can be read, and what comes from the network is refused unless it is safe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpointing.carried import carry
from torchft.checkpointing import ManifestError, UnsafeStateError, register_dataclass
from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.tree import MAX_DEPTH
from torchft.testing.transport_suite import assert_same


def document_of(state: object) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(describe(state)[0].body)
    return decoded


def parse(document: object) -> Manifest:
    return Manifest.parse(json.dumps(document).encode())


def test_views_whose_elements_share_memory_arrive_with_gaps_and_conjugated_too() -> None:
    state = {
        "gaps": torch.randn(200).as_strided((2, 2, 10), (0, 100, 1)),
        "windows": torch.randn(300).as_strided((2, 3, 4), (200, 2, 1)),
        "expanded": torch.randn(4, 1, dtype=torch.complex64).conj().expand(4, 50),
        "negated": torch.randn(20, dtype=torch.complex64).conj().imag.unfold(0, 4, 2),
        "empty": torch.empty(0, 3, dtype=torch.complex64).conj(),
    }
    assert_same(state, carry(state)[1])


def test_a_key_that_is_too_large_a_number_is_refused_with_where_it_is() -> None:
    with pytest.raises(UnsafeStateError, match=r"state\['a'\] has a key of more than"):
        describe({"a": {10**5000: 1}})


def test_a_view_of_a_large_buffer_does_not_send_the_buffer() -> None:
    buffer = torch.zeros(1_000_000)
    manifest, _ = describe({"a": buffer[10:20], "b": buffer[-10:], "c": buffer[15:30]})
    assert manifest.extents == (80, 40)
    manifest, _ = describe({"column": torch.zeros(1000, 1000)[:, 1]})
    assert manifest.extents == (4000,)


def test_views_of_different_element_sizes_keep_aligned_offsets() -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    state = {"bytes": raw[1:9], "ints": raw[4:12].view(torch.int32)}
    assert_same(state, carry(state)[1])


@register_dataclass
@dataclass
class Progress:
    epoch: int
    loss: torch.Tensor


def test_registered_dataclasses_arrive_and_others_are_refused() -> None:
    _, arrived = carry({"p": Progress(3, torch.tensor(0.5))})
    assert isinstance(arrived, dict)
    assert arrived["p"] == Progress(3, torch.tensor(0.5))

    @dataclass
    class Unknown:
        x: int = 1

    with pytest.raises(UnsafeStateError, match=r"state\['p'\]"):
        describe({"p": Unknown()})
    document = document_of({"p": Progress(3, torch.tensor(0.5))})
    document["tree"][2][1] = "os.system"
    with pytest.raises(ManifestError, match="not registered"):
        parse(document)


def test_pickled_objects_are_refused_unless_allowed() -> None:
    manifest, _ = describe({"s": {1, 2}}, allow_pickle=True)
    with pytest.raises(ManifestError, match="allow_pickle=True"):
        Manifest.parse(manifest.body)
    assert Manifest.parse(manifest.body, allow_pickle=True).build([], allow_pickle=True) == {"s": {1, 2}}


T = ["T", "float32", [4], None, 0, 0, False]


@pytest.mark.parametrize(
    ("tensor", "extents"),
    [
        (["T", "float32", [5], None, 0, 0, False], [16]),  # longer than its extent
        (["T", "float32", [4], None, 4, 0, False], [16]),  # begins inside, ends outside
        (["T", "float32", [4], [2], 0, 0, False], [16]),  # strides lead outside
        (["T", "float32", [4], [-1], 0, 0, False], [16]),
        (["T", "float32", [3], None, 2, 0, False], [16]),  # not aligned
        (["T", "float32", [4], None, -4, 0, False], [16]),
        (["T", "float32", [4], None, 0, 1, False], [16]),  # no such extent
        (["T", "float32", [4], None, 0, -1, False], []),  # elements, but no extent
        (["T", "float32", [0], None, 0, 0, False], [16]),  # no elements, but an extent
        (["T", "float32", [4], None, 0, True, False], [16, 16]),
        (["T", "float32", [4], None, 0, 0, 0], [16]),
        (["T", "float32", [2**40, 2**40], None, 0, 0, False], [16]),
        (["T", "float32", [2**62, 4, 0], None, 0, -1, False], []),
        (["T", "float32", [1] * 65, None, 0, 0, False], [4]),
        (["T", "float32", [1.0], None, 0, 0, False], [4]),
        (["T", "float32", [4], [10**14], 0, 0, True], [16]),  # packed, would unpack to far more memory
        (["T", "float32", [3], None, 0, 0, True], [16]),
        (["T", "float32", [2, 2, 10], [0, 100, 1], 0, 0, True], [160]),  # packed, but its elements share memory
        (["T", "qint8", [4], None, 0, 0, False], [4]),
        (["T", "load", [4], None, 0, 0, False], [4]),
        (["T", "float32", [4]], [16]),
        (["D", [4], [1], 0, [["R"]], T], [16]),  # no such mesh
        (T, [16, 8]),  # bytes of no tensor
        (T, [-16]),
        (T, [2**60]),
        (T, ["16"]),
    ],
)
def test_tensors_that_do_not_fit_their_bytes_are_refused(tensor: object, extents: object) -> None:
    parse({"extents": [16], "meshes": [], "tree": T})
    with pytest.raises(ManifestError):
        parse({"extents": extents, "meshes": [], "tree": tensor})


@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        [1],
        ["x", 1],
        ["d", "key"],
        ["d", ["l"], 1],
        ["d", True, 1],
        ["d", "a", 1, "a", 2],
        ["f", "1.0"],
        ["b", "%%%"],
        ["dtype", "load"],
        ["dtype", "float32", "x"],
        ["device", "nowhere"],
        ["size", -1],
        ["size", 2**64],
        ["dd", "eval"],
        ["dc", "builtins.exec", "x", 1],
        ["np", "int8", 1000],
        ["np", "load", 1],
        ["pickle", "gASVAAA="],
        {"__reduce__": 1},
    ],
)
def test_trees_of_other_forms_are_refused(tree: object) -> None:
    with pytest.raises(ManifestError):
        parse({"extents": [], "meshes": [], "tree": tree})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\x80\x04N.", b'{"tree": 1}', b"NaN", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_not_a_manifest_is_refused(body: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(body)


def test_depth_is_bounded_on_both_sides() -> None:
    deep: list[object] = []
    for _ in range(MAX_DEPTH + 5):
        deep = [deep]
    with pytest.raises(UnsafeStateError, match="deep"):
        describe(deep)
    node: list[object] = ["l"]
    for _ in range(MAX_DEPTH + 5):
        node = ["l", node]
    with pytest.raises(ManifestError, match="deep"):
        parse({"extents": [], "meshes": [], "tree": node})


def test_the_memory_that_paths_take_is_bounded_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"k" * 4000: [torch.empty(0)] * 100}
    document = document_of(state)
    for module in ("description", "manifest"):
        monkeypatch.setattr(f"torchft.checkpointing.{module}.MAX_PATHS", 400_000)
    with pytest.raises(UnsafeStateError, match="paths"):
        describe(state)
    with pytest.raises(ManifestError, match="paths"):
        parse(document)
    monkeypatch.undo()
    assert len(parse(document).tensors) == 100


_leaf = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([1, 2])])
    | st.builds(lambda n, k: torch.arange(n * k)[::k], st.integers(0, 5), st.integers(1, 3))
)
_trees = st.recursive(
    _leaf,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=20,
)
_bounded = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_bounded
@given(_trees)
def test_any_tree_of_safe_values_arrives_as_it_was(state: object) -> None:
    assert_same(state, carry(state)[1])


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["T", "D", "d", "l", "t", "size", "od", "dd", "dc", "np", "b", "f", "pickle", "float32", "R"]),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=15,
)


@_bounded
@given(st.lists(st.integers(-1, 64), max_size=3), _json, st.data())
def test_reading_arbitrary_documents_only_ever_refuses(extents: list[int], tree: object, data: st.DataObject) -> None:
    document = {"extents": extents, "meshes": [], "tree": tree}
    if data.draw(st.booleans()):  # a real one with one thing replaced
        document = document_of({"a": [torch.ones(3), torch.ones(4, 4)[:, 1]], "b": (1, b"x")})
        node: Any = document["tree"]
        while isinstance(node, list) and node:
            i = data.draw(st.integers(0, len(node) - 1))
            if not isinstance(node[i], list) or data.draw(st.booleans()):
                node[i] = data.draw(_json)
                break
            node = node[i]
    try:
        manifest = parse(document)
    except ManifestError:
        return
    destination = Destination(manifest)
    assert destination.run.total == sum(manifest.extents)
    destination.finish()
