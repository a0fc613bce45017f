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
from torchft.checkpointing import IntegrityError, ManifestError, UnsafeStateError, register_dataclass
from torchft.checkpointing.chunks import (
    CHUNK_SIZE,
    ByteRun,
    Cut,
    Seal,
    digest,
    read_hashes,
    read_manifest,
    write_hashes,
    write_manifest,
)
from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.snapshot import host_run
from torchft.checkpointing.tree import MAX_DEPTH
from torchft.testing.transport_suite import assert_same


def document_of(state: object) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(describe(state)[0].body)
    return decoded


def parse(document: object) -> Manifest:
    return Manifest.parse(json.dumps(document).encode())


def seal(manifest: Manifest, run: ByteRun) -> Seal:
    """The hashes of a state."""
    cut = Cut.shared(manifest.total)
    chunks = b"".join(digest(run.views(*cut.span(i))) for i in range(cut.count))
    return Seal(cut, chunks, digest([memoryview(manifest.body)]))


@pytest.mark.parametrize(
    ("total", "size", "count"),
    [
        (0, CHUNK_SIZE, 0),
        (CHUNK_SIZE, CHUNK_SIZE, 1),
        (CHUNK_SIZE + 1, 1 << 20, 9),
        (16 << 20, 1 << 20, 16),
        ((16 << 20) + 1, (1 << 20) + (64 << 10), 16),
        (100 << 20, 6 * (1 << 20) + (256 << 10), 16),
        (128 << 20, CHUNK_SIZE, 16),
        (4 << 30, CHUNK_SIZE, 512),
    ],
)
def test_a_small_state_has_a_part_for_each_of_many_sources(total: int, size: int, count: int) -> None:
    cut = Cut.shared(total)
    assert (cut.chunk_size, cut.count) == (size, count)


def test_same_state_gives_the_same_root_and_another_byte_another_root() -> None:
    def root(value: float) -> str:
        manifest, sources = describe({"w": torch.full((10,), value), "lr": 0.1})
        return seal(manifest, host_run(sources)).root

    assert root(1.0) == root(1.0)
    assert root(1.0) != root(2.0)


def fill(destination: Destination, state: object) -> None:
    """Writes a state's bytes into what was made for it."""
    for view, extent in zip(destination.run.views(0, destination.run.total), describe(state)[1], strict=True):
        view[:] = host_run([extent]).views(0, extent.length)[0]


def test_views_whose_elements_share_memory_arrive_with_gaps_and_conjugated_too() -> None:
    state = {
        "gaps": torch.randn(200).as_strided((2, 2, 10), (0, 100, 1)),
        "windows": torch.randn(300).as_strided((2, 3, 4), (200, 2, 1)),
        "expanded": torch.randn(4, 1, dtype=torch.complex64).conj().expand(4, 50),
        "negated": torch.randn(20, dtype=torch.complex64).conj().imag.unfold(0, 4, 2),
        "empty": torch.empty(0, 3, dtype=torch.complex64).conj(),
    }
    assert_same(state, carry(state)[1])


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


def test_damaged_documents_are_refused() -> None:
    manifest, sources = describe({"w": torch.arange(CHUNK_SIZE // 4 + 5), "lr": 0.25})
    sealed = seal(manifest, host_run(sources))
    document, hashes = write_manifest(3, manifest), write_hashes(3, sealed)
    assert read_manifest(document) == (3, manifest, sealed.cut)
    assert read_hashes(hashes) == (3, sealed)
    assert sealed.cut.count == 16
    for damaged in (document.replace(b"0.25", b"0.26"), document[:-1], hashes):
        with pytest.raises((IntegrityError, ManifestError)):
            read_manifest(damaged)
    for damaged in (hashes.replace(sealed.root.encode(), b"0" * 32), hashes[:-1], document):
        with pytest.raises((IntegrityError, ManifestError)):
            read_hashes(damaged)
    with pytest.raises(ManifestError, match="torchft-checkpoint/1"):
        read_manifest(b"\x80\x04\x95pickle\n\n")
    with pytest.raises(ManifestError, match="chunk table"):
        read_hashes(write_hashes(3, Seal(sealed.cut, sealed.chunks[:-16], sealed.body)))


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


@_bounded
@given(st.binary(max_size=200))
def test_reading_arbitrary_bytes_only_ever_refuses(body: bytes) -> None:
    with pytest.raises((ManifestError, IntegrityError)):
        read_manifest(body)
    with pytest.raises((ManifestError, IntegrityError)):
        read_hashes(body)


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
