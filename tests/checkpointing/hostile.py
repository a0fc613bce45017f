"""Hostile bytes: seeded cases that a parser must refuse or read, never choke on.

The idea
    A case is made from the name of what is attacked and a number, so the same number is the same case on every machine:
    ``python -m tests.checkpointing.hostile manifest 1234`` prints it. Half of the cases are mutations of what real
    sources send, of its bytes or of its JSON; the others are made from the grammar with wrong numbers, kinds, sizes and
    depths in it.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

from tests.checkpointing.hostile_manifest import (
    DESCRIBED,
    NUMBERS,
    as_json,
    manifest,
    mutated_bytes,
    mutated_document,
    random_for,
)
from torchft.checkpointing.chunks import CHUNK_SIZE, Cut, Seal, digest, write_hashes, write_manifest, write_sample
from torchft.checkpointing.pg_stream import PROLOGUE_BYTES, ChunkHasher, Prologue

__all__ = ["CASES"]


def _header(draw: random.Random, body: bytes, total: int) -> dict[str, Any]:
    return json.loads(write_manifest(7, DESCRIBED[1][0]).partition(b"\n")[0]) | {
        "body": digest([memoryview(body)]).hex(),
        "total": total,
    }


def document(draw: random.Random) -> bytes:
    """A manifest document, its header right in most cases, so that what is in it is looked at."""
    kind = draw.randrange(6)
    real = write_manifest(draw.choice((0, 7, 1 << 40)), draw.choice(DESCRIBED)[0])
    if kind == 0:
        return mutated_bytes(real, draw)
    body = manifest(draw)
    header = _header(draw, body, draw.choice((0, 24, *NUMBERS)))
    if kind <= 3:
        header = mutated_document(header, draw)
    return as_json(header) + b"\n" + body


def hashes(draw: random.Random) -> bytes:
    """A hashes document."""
    total = draw.choice((0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 5 * CHUNK_SIZE))
    seal = Seal(Cut(total), draw.randbytes(16 * Cut(total).count), draw.randbytes(16))
    real = write_hashes(draw.choice((0, 7)), seal)
    kind = draw.randrange(3)
    if kind == 0:
        return mutated_bytes(real, draw)
    header = mutated_document(json.loads(real), draw)
    return as_json(header)


def sample(draw: random.Random) -> bytes:
    """A document with the hashes of some chunks."""
    cut = Cut(draw.choice((0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 5 * CHUNK_SIZE, 1 << 40)))
    chunks = [draw.randbytes(16) for _ in range(draw.choice((0, 1, 1, 2, 3, 8, 16, 17)))]
    real = write_sample(draw.choice((0, 7)), cut, draw.randbytes(16), chunks)
    kind = draw.randrange(3)
    if kind == 0:
        return mutated_bytes(real, draw)
    return real if kind == 1 else as_json(mutated_document(json.loads(real), draw))


_INDICES = (
    *(str(n).encode() for n in (0, 1, 2, 5, 17, 10**10, 10**11, 10**25)),
    b"",
    b"-1",
    b"\xb2",
    b" 3",
    b"0x1",
    b"01",
)


def indices(draw: random.Random) -> bytes:
    """What a client asks the hashes of."""
    kind = draw.randrange(4)
    if kind == 0:
        return b",".join(str(n).encode() for n in sorted(draw.sample(range(40), draw.choice((0, 1, 2, 16, 17, 40)))))
    data = b",".join(draw.choice(_INDICES) for _ in range(draw.choice((1, 2, 2, 3, 300))))
    return mutated_bytes(data, draw) if kind == 1 and data else data


_HEADS = (
    b"GET /checkpoint/7/manifest HTTP/1.1\r\nHost: a\r\nPrefer: wait=0.5\r\nReceiver: me\r\n\r\n",
    b"GET /checkpoint/7/data HTTP/1.1\r\nHost: a\r\nRange: bytes=0-99\r\nAccept: application/x-torchft-hashed\r\n\r\n",
    b"GET /checkpoint/7/data HTTP/1.1\r\nRange: bytes=0-1048575\r\nAccept: application/x-torchft-hashed\r\n"
    b"Prefer: wait=0.5, lend\r\n\r\n\x01\x00",
    b'GET /checkpoint/7/hashes HTTP/1.1\r\nAuthorization: Bearer s3cret\r\nIf-Match: "00"\r\n\r\n',
    b"GET /checkpoint/7/hashes?chunks=0,1 HTTP/1.1\r\nHost: a\r\nPrefer: wait=0.5\r\n\r\n",
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
    *(b"Prefer: wait=" + v for v in (b"0", b"-1", b"nan", b"1e9", b"0.000001", b"inf", b"1, lend", b"1,lend,lend")),
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
            b"/checkpoint/7/data?chunks=0",
        )
        out = out.replace(b"?chunks=0,1", b"?chunks=" + indices(draw).replace(b"\r", b"").replace(b"\n", b""))
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
    manifest, _ = draw.choice(DESCRIBED)
    data = bytearray(Prologue(draw.choice((0, 7)), len(manifest.body), manifest.total).pack())
    for _ in range(draw.choice((0, 1, 1, 2))):
        at = draw.choice((0, 8, 12, 20, 28, 36, 44, 52))
        data[at : at + 8] = (int(draw.choice(NUMBERS[:23]) or 0) % (1 << 64)).to_bytes(8, "little")
    return bytes(data) if kind else mutated_bytes(bytes(data), draw)[:PROLOGUE_BYTES].ljust(PROLOGUE_BYTES, b"\0")


def stream(draw: random.Random) -> bytes:
    """All messages of a process-group stream, one after another, of step 7."""
    index = draw.randrange(len(DESCRIBED))
    described, sources = DESCRIBED[index]
    body = described.body if draw.random() < 0.3 else manifest(draw)
    data = b"".join(bytes(s.view()) for s in sources)
    hasher = ChunkHasher()
    hasher.update([memoryview(data)])
    seal = Seal.of(described, hasher.finish())
    trailer = bytes.fromhex(seal.root) + seal.chunks
    total = described.total if draw.random() < 0.7 else int(draw.choice(NUMBERS[:23]) or 0) % (1 << 64)
    length = len(body) if draw.random() < 0.9 else int(draw.choice(NUMBERS[:23]) or 0) % (1 << 64)
    start = prologue(draw) if draw.random() < 0.2 else Prologue(7, length, total).pack()
    whole = start + body + data + trailer
    return mutated_bytes(whole, draw) if draw.random() < 0.3 else whole


def loan(draw: random.Random) -> bytes:
    """What a source says of where 1000 bytes are in its memory; where, nobody knows."""
    lengths = draw.choice(([1000], [999, 1], [250] * 4, [1] * 1000, [999], [1000, 0], [], [1 << 63, 1 << 63, 1000]))
    addresses = (0, 8, 1 << 46, (1 << 47) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 1000)
    data = b"".join(struct.pack("<QQ", draw.choice(addresses), length) for length in lengths)
    return mutated_bytes(data, draw) if data and draw.random() < 0.5 else data


CASES: dict[str, Callable[[random.Random], bytes]] = {
    f.__name__: f for f in (manifest, document, hashes, sample, indices, head, span, prologue, stream, loan)
}

if __name__ == "__main__":
    sys.stdout.buffer.write(CASES[sys.argv[1]](random_for(sys.argv[1], int(sys.argv[2]))))
