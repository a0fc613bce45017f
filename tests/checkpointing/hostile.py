"""Hostile bytes: seeded cases that a parser must refuse or read, never choke on.

The idea
    A case is made from the name of what is attacked and a number, so the same number is the same case on every machine:
    ``python -m tests.checkpointing.hostile manifest 1234`` prints it. Half of the cases are mutations of what real
    sources send, of its bytes or of its JSON; the others are made from the grammar with wrong numbers, kinds, sizes and
    depths in it.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from torchft.checkpointing.chunks import CHUNK_SIZE, Cut, Seal, digest, write_hashes, write_manifest
from torchft.checkpointing.manifest import describe
from torchft.checkpointing.pg_stream import PROLOGUE_BYTES, ChunkHasher, Prologue
from torchft.checkpointing.tree import DTYPES

__all__ = ["CASES", "STATES", "mutated_bytes", "random_for"]

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
_DESCRIBED = [describe(state) for state in STATES]
BODIES = [manifest.body for manifest, _ in _DESCRIBED]
_MESH = {"device": "cpu", "shape": [2, 2], "ranks": [0, 1, 2, 3], "names": ["dp", "tp"]}
_SHARDED = {
    "extents": [24],
    "meshes": [_MESH],
    "tree": ["d", "w", ["D", [4, 6], [6, 1], 0, [["S", 0], ["R"]], ["T", "float32", [2, 3], None, 0, 0, False]]],
}
BODIES.append(json.dumps(_SHARDED, separators=(",", ":")).encode())


# ------------------------------------------------------------------------------------------------------- mutations


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


def _mutated_document(document: Any, draw: random.Random) -> Any:
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
        return _json(_mutated_document(json.loads(draw.choice(BODIES)), draw))
    body = _json(_generated_manifest(draw))
    return mutated_bytes(body, draw) if kind == 19 else body


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------------- documents


def _header(draw: random.Random, body: bytes, total: int) -> dict[str, Any]:
    return json.loads(write_manifest(7, _DESCRIBED[1][0]).partition(b"\n")[0]) | {
        "body": digest([memoryview(body)]).hex(),
        "total": total,
    }


def document(draw: random.Random) -> bytes:
    """A manifest document, its header right in most cases, so that what is in it is looked at."""
    kind = draw.randrange(6)
    real = write_manifest(draw.choice((0, 7, 1 << 40)), draw.choice(_DESCRIBED)[0])
    if kind == 0:
        return mutated_bytes(real, draw)
    body = manifest(draw)
    header = _header(draw, body, draw.choice((0, 24, *NUMBERS)))
    if kind <= 3:
        header = _mutated_document(header, draw)
    return _json(header) + b"\n" + body


def hashes(draw: random.Random) -> bytes:
    """A hashes document."""
    total = draw.choice((0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 5 * CHUNK_SIZE))
    seal = Seal(Cut(total), draw.randbytes(16 * Cut(total).count), draw.randbytes(16))
    real = write_hashes(draw.choice((0, 7)), seal)
    kind = draw.randrange(3)
    if kind == 0:
        return mutated_bytes(real, draw)
    header = _mutated_document(json.loads(real), draw)
    return _json(header)


_HEADS = (
    b"GET /checkpoint/7/manifest HTTP/1.1\r\nHost: a\r\nPrefer: wait=0.5\r\nReceiver: me\r\n\r\n",
    b"GET /checkpoint/7/data HTTP/1.1\r\nHost: a\r\nRange: bytes=0-99\r\nAccept: application/x-torchft-hashed\r\n\r\n",
    b'GET /checkpoint/7/hashes HTTP/1.1\r\nAuthorization: Bearer s3cret\r\nIf-Match: "00"\r\n\r\n',
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 116\r\n\r\n",
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 3\r\n\r\nno\n",
)
_HEADER_LINES = (
    *(b"Content-Length: 9" + b"9" * n for n in (0, 3, 17, 30, 5000)),
    *(b"Content-Length: " + v for v in (b"-1", b"0x10", b"\xb2", b"1e3", b"", b"+1", b"1, 1", b"00000000000000000001")),
    *(
        b"Range: bytes=" + v
        for v in (b"0-0", b"5-1", b"-5", b"0-", b"99-", b"0-0,5-9,2-8", b"9" * 18 + b"-" + b"9" * 18)
    ),
    *(
        b"Range: " + v
        for v in (b"bytes=" + b"9" * 400 + b"-", b"bytes=\xb2-3", b"lines=0-1", b"bytes=0-18446744073709551616")
    ),
    *(b"Content-Range: bytes " + v for v in (b"0-99/*", b"99-0/100", b"*/100", b"0-" + b"9" * 19 + b"/1")),
    *(b"Prefer: wait=" + v for v in (b"0", b"-1", b"nan", b"1e9", b"0.000001", b"inf")),
    *(b"X: " + b"y" * n for n in (1, 1000, 20000)),
    *(b"Connection: close", b"Connection: upgrade", b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"A" * 500),
    *(
        b": empty",
        b" folded: line",
        b"no colon",
        b"\x00: \x00",
        b"\xff\xfe: \xff",
        b"Accept: application/x-torchft-hashed",
    ),
    *(b"Receiver: " + b"z" * n for n in (0, 64, 9000)),
    *(b"If-Match: " + v for v in (b"*", b'"', b'"' + b"0" * 32 + b'"')),
)


def head(draw: random.Random) -> bytes:
    """The head of a request or an answer, and what may follow it."""
    kind = draw.randrange(8)
    base = draw.choice(_HEADS)
    if kind <= 1:
        return mutated_bytes(base, draw)
    lines = base.split(b"\r\n")
    for _ in range(draw.choice((1, 1, 2, 3, 70))):
        lines.insert(draw.randrange(1, len(lines) - 1), draw.choice(_HEADER_LINES))
    out = b"\r\n".join(lines)
    if kind == 2:
        return out[: draw.randrange(len(out))]
    if kind == 3:
        return out * draw.choice((2, 3, 10))
    if kind == 4:
        paths = (
            b"/",
            b"*",
            b"/checkpoint/%37/data",
            b"/checkpoint/" + b"9" * 30 + b"/data",
            b"/checkpoint/7/../8/data",
        )
        return out.replace(b"/checkpoint/7/data", draw.choice(paths))
    if kind == 5:
        methods = (b"POST", b"HEAD", b"get", b"", b"GET GET", b"\x16\x03\x01")
        return out.replace(b"GET", draw.choice(methods), 1).replace(
            b"HTTP/1.1", draw.choice((b"HTTP/9", b"HTTP/1.1")), 1
        )
    return mutated_bytes(out, draw) if kind == 6 else out


def span(draw: random.Random) -> bytes:
    """The value of a range or a content range."""
    kind = draw.randrange(4)
    first, last = (draw.choice((0, 1, 5, 99, 100, 1 << 40, 10**18, 10**19, 10**25)) for _ in range(2))
    text = (
        f"bytes={first}-{last}" if draw.random() < 0.5 else f"bytes {first}-{last}/{draw.choice((100, last, 10**20))}"
    )
    data = text.encode()
    return mutated_bytes(data, draw) if kind == 0 else data


def prologue(draw: random.Random) -> bytes:
    """The first message of a process-group stream."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randbytes(PROLOGUE_BYTES)
    manifest, _ = draw.choice(_DESCRIBED)
    data = bytearray(Prologue(draw.choice((0, 7)), len(manifest.body), manifest.total).pack())
    for _ in range(draw.choice((0, 1, 1, 2))):
        at = draw.choice((0, 8, 12, 20, 28, 36, 44, 52))
        data[at : at + 8] = (int(draw.choice(NUMBERS[:23]) or 0) % (1 << 64)).to_bytes(8, "little")
    return bytes(data) if kind else mutated_bytes(bytes(data), draw)[:PROLOGUE_BYTES].ljust(PROLOGUE_BYTES, b"\0")


def stream(draw: random.Random) -> bytes:
    """All messages of a process-group stream, one after another, of step 7."""
    index = draw.randrange(len(_DESCRIBED))
    described, sources = _DESCRIBED[index]
    body = described.body if draw.random() < 0.3 else manifest(draw)
    data = b"".join(bytes(memoryview(s.numpy())) for s in sources)
    hasher = ChunkHasher()
    hasher.update([memoryview(data)])
    seal = Seal.of(described, hasher.finish())
    trailer = bytes.fromhex(seal.root) + seal.chunks
    total = described.total if draw.random() < 0.7 else int(draw.choice(NUMBERS[:23]) or 0) % (1 << 64)
    length = len(body) if draw.random() < 0.9 else int(draw.choice(NUMBERS[:23]) or 0) % (1 << 64)
    start = prologue(draw) if draw.random() < 0.2 else Prologue(7, length, total).pack()
    whole = start + body + data + trailer
    return mutated_bytes(whole, draw) if draw.random() < 0.3 else whole


CASES: dict[str, Callable[[random.Random], bytes]] = {
    f.__name__: f for f in (manifest, document, hashes, head, span, prologue, stream)
}

if __name__ == "__main__":
    sys.stdout.buffer.write(CASES[sys.argv[1]](random_for(sys.argv[1], int(sys.argv[2]))))
