"""Hostile manifests: real ones with bytes or JSON changed, and generated ones with something wrong in them.

What all hostile cases draw from is here too: numbers, texts, states, and mutations of bytes and of documents.
"""

from __future__ import annotations

import copy
import json
import random
from collections import OrderedDict, defaultdict
from typing import Any

import torch

from torchft.checkpointing.description import describe
from torchft.checkpointing.tree import DTYPES

__all__ = [
    "BODIES",
    "DESCRIBED",
    "NUMBERS",
    "STATES",
    "TEXTS",
    "as_json",
    "manifest",
    "mutated_bytes",
    "mutated_document",
    "random_for",
]

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 8, 63, 64, 65, 255, 4096, (1 << 20) - 1, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 50, (1 << 50) + 1),
    *((1 << 62), (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 64, 10**18, 10**30, 10**400, -(10**400), True, False, None),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", "T", "D", "d", "l", "t", "b", "f", "np", "dd", "dc", "od", "size", "dtype", "device", "pickle", "nan", "inf"),
    *(
        "float32",
        "uint8",
        "bool",
        "float4_e2m1fn_x2",
        "qint8",
        "onnx",
        "_dynamo",
        "cuda:99",
        "meta",
        "cpu",
        "none",
        "xpu",
    ),
    *(
        "\ud800",
        "\udfff\ud800",
        "\x00",
        "é",
        "²",
        "１",
        "\U0010ffff" * 50,
        "x" * 3000,
        "AAAA",
        "A",
        "=",
        "é===",
        "__class__",
    ),
    *("state", "sum", "R", "S", "SS", "P", "dict", "bool_", "int8", "float16", "uint64", "../../etc/passwd", "%s%n{0}"),
)
KEYS = (
    "extents",
    "meshes",
    "tree",
    "device",
    "shape",
    "ranks",
    "names",
    "format",
    "step",
    "total",
    "chunk_size",
    "body",
)


def random_for(name: str, number: int) -> random.Random:
    """Where all that is random about one case comes from."""
    return random.Random(f"{name}:{number}")


def _states() -> list[object]:
    base = torch.arange(64, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return [
        {},
        {"step": 3, "x": [1.5, None, True, "text", float("inf"), float("nan"), b"bytes", (1, 2), -(1 << 70)]},
        {"w": base, "tied": base, "part": base[3:9], "every other": base[::2], "matrix": base.view(8, 8).t()},
        {"user": {"default": {"model": model.state_dict(), "optim": optimizer.state_dict()}}, "torchft": {"step": 9}},
        {name: torch.zeros(3, dtype=torch.uint8).view(torch.uint8) for name in ("a", "b", "c")},
        [torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.bool, torch.complex64, torch.int64)],
        {"empty": torch.empty(0, 5), "scalar": torch.tensor(1.0), "types": [torch.float16, torch.device("cpu")]},
        OrderedDict(a=torch.Size([1, 2]), b=defaultdict(int, {1: 2}), c={"deep": [[[[[[[[torch.ones(2)]]]]]]]]}),
        torch.ones(5),
        {"strided": torch.empty_strided((3, 4), (9, 2)).fill_(1.0), **{f"k{i}": torch.ones(i) for i in range(30)}},
    ]


STATES = _states()
DESCRIBED = [describe(state) for state in STATES]
BODIES = [manifest.body for manifest, _ in DESCRIBED]
_MESH = {"device": "cpu", "shape": [2, 2], "ranks": [0, 1, 2, 3], "names": ["dp", "tp"]}
_SHARDED = {
    "extents": [24],
    "meshes": [_MESH],
    "tree": ["d", "w", ["D", [4, 6], [6, 1], 0, [["S", 0], ["R"]], ["T", "float32", [2, 3], None, 0, 0, False]]],
}
BODIES.append(json.dumps(_SHARDED, separators=(",", ":")).encode())


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes of it changed, cut out, put in, repeated or cut off."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(out) + 1)
        kind = draw.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at:at] = draw.randbytes(draw.choice((1, 2, 9)))
        elif kind == 2:
            del out[at : at + draw.choice((1, 2, 50))]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = out[at : at + draw.choice((1, 10, 200))] * draw.choice((1, 2, 20))
        elif kind == 5:
            piece = (b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"-", b"[" * 200, b'"\\ud800"', b"{", b"null", b"\xff")
            out[at:at] = draw.choice(piece)
        elif at < len(out):
            out[at] = draw.choice(b'0123456789,[]{}":-+.eE\\ \r\n\x00\xff')
    return bytes(out)


def _nodes(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in a document: its container and its key or index."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        found.append((node, key))
        _nodes(item, found)
    return found


def _junk(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 4 else 3)
    if kind <= 1:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(TEXTS)
    if kind == 3:
        return {draw.choice(KEYS + TEXTS): _junk(draw, depth + 1) for _ in range(draw.randrange(4))}
    return [_junk(draw, depth + 1) for _ in range(draw.randrange(6))]


def _deep(draw: random.Random) -> Any:
    node: Any = draw.choice((1, ["T"], []))
    for _ in range(draw.choice((99, 100, 101, 102, 150, 400))):
        node = ["l", node] if draw.random() < 0.8 else ["d", draw.choice(TEXTS), node]
    return node


def mutated_document(document: Any, draw: random.Random) -> Any:
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = _nodes(document, [])
        if not places:
            return _junk(draw)
        container, key = draw.choice(places)
        kind = draw.randrange(7)
        if kind <= 2:
            container[key] = _junk(draw)
        elif kind == 3:
            del container[key]
        elif kind == 4:
            other, where = draw.choice(places)
            container[key] = copy.deepcopy(other[where]) if where in range(len(other)) or where in other else 0
        elif kind == 5 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 6:
            container[key] = _deep(draw) if draw.random() < 0.2 else _node(draw, 3)
    return document


def _node(draw: random.Random, depth: int) -> Any:
    """A node of the tree's grammar, now and then with something wrong in it."""
    if draw.random() < 0.05:
        return _junk(draw)
    kind = draw.randrange(13 if depth else 6)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice(TEXTS)
    if kind == 2:
        return [draw.choice(("b", "f", "dtype", "device", "pickle", "size", "np")), draw.choice(TEXTS)]
    if kind == 3:
        return ["np", draw.choice((*TEXTS, [], {})), draw.choice(NUMBERS)]
    if kind == 4:
        return ["size", *(draw.choice(NUMBERS) for _ in range(draw.randrange(4)))]
    if kind == 5:
        return _tensor(draw)
    if kind == 6:
        return ["D", _sizes(draw), _sizes(draw), draw.choice((0, 0, 0, 1, -1)), _placements(draw), _tensor(draw)]
    if kind <= 8:
        return [draw.choice("lt"), *(_node(draw, depth - 1) for _ in range(draw.randrange(5)))]
    head = [["d"], ["od"], ["dd", draw.choice(TEXTS)], ["dc", draw.choice(TEXTS)]][draw.randrange(4)]
    for _ in range(draw.randrange(4)):
        head += [draw.choice((*TEXTS, 1, -5, True, None, 1.5)), _node(draw, depth - 1)]
    return head


def _sizes(draw: random.Random) -> Any:
    good = draw.random() < 0.7
    return [draw.choice((0, 1, 2, 3, 8) if good else NUMBERS) for _ in range(draw.choice((0, 1, 1, 2, 2, 3, 70)))]


def _placements(draw: random.Random) -> Any:
    choices: tuple[Any, ...] = (
        ["R"],
        ["S", 0],
        ["S", 1],
        ["SS", 0, 2],
        ["P", "sum"],
        ["P", "x"],
        ["S", -1],
        ["SS", 0, 0],
    )
    return [draw.choice(choices) for _ in range(draw.choice((2, 2, 2, 0, 1, 3)))]


def _tensor(draw: random.Random) -> Any:
    names = (*DTYPES, "complex256", "object") if draw.random() < 0.9 else NUMBERS
    node = ["T", draw.choice(names), _sizes(draw), None if draw.random() < 0.5 else _sizes(draw)]
    small = draw.random() < 0.8
    node += [draw.choice((0, 0, 4, 8, 1) if small else NUMBERS), draw.choice((0, 0, 1, 2, -1) if small else NUMBERS)]
    return [*node, draw.choice((False, False, True, 1))]


def _generated_manifest(draw: random.Random) -> Any:
    sizes = (1, 4, 8, 12, 24, 32, 64, 4096) if draw.random() < 0.8 else NUMBERS
    extents = [draw.choice(sizes) for _ in range(draw.choice((0, 1, 1, 2, 3, 5)))]
    return {
        "extents": extents,
        "meshes": [_MESH] * draw.choice((0, 1, 1, 2)),
        "tree": _node(draw, draw.choice((2, 4, 6))),
    }


def manifest(draw: random.Random) -> bytes:
    """A manifest's body."""
    kind = draw.randrange(20)
    if kind == 0:
        return b"[" * draw.choice((10, 1000, 100_000)) + b"]" * draw.choice((0, 10, 1000))
    if kind == 1:
        return draw.choice(BODIES)
    if kind <= 6:
        return mutated_bytes(draw.choice(BODIES), draw)
    if kind <= 13:
        return as_json(mutated_document(json.loads(draw.choice(BODIES)), draw))
    body = as_json(_generated_manifest(draw))
    return mutated_bytes(body, draw) if kind == 19 else body


def as_json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
