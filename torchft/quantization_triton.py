"""The fp8 rows of :mod:`torchft.quantization` as Triton kernels, for CUDA devices that know the type.

One program works on one row: it reads it once and writes it once, where plain torch takes a pass for each
operation. The bytes mean the same, so that members with and without these kernels may meet. Where they cannot be
used, :func:`unavailable` says why, and plain torch does the work on the device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    triton = tl = None

__all__ = ["decode_rows", "encode_rows", "reduce_rows", "unavailable"]

_SCALE_BYTES = 4
_FP8_CAPABILITY = (8, 9)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why there are no kernels for ``device``; None where there are."""
    if device.type != "cuda":
        return f"Triton kernels are for CUDA, not for {device.type}"
    if triton is None:
        return "triton is not installed"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        return f"fp8 needs compute capability {_FP8_CAPABILITY}, this device has {capability}"
    return None


def encode_rows(flat: torch.Tensor, out: torch.Tensor) -> None:
    """Quantizes ``flat``, of any floating point type, into the rows ``out``; the last one is filled up with zeros."""
    values, scales = _parts(out)
    row = values.shape[-1]
    with _on(out):
        _jit(_encode)[(len(out),)](
            flat, values, scales, flat.numel(), values.stride(0), scales.stride(0), ROW=row, BLOCK=_block(row)
        )


def decode_rows(pieces: torch.Tensor, flat: torch.Tensor, divisor: float) -> None:
    """The sum of the pieces over ``divisor`` into ``flat``, of any floating point type."""
    values, scales = _parts(pieces)
    row = values.shape[-1]
    with _on(flat):
        _jit(_decode)[(pieces.shape[1],)](
            values,
            scales,
            flat,
            flat.numel(),
            float(divisor),
            *(values.stride(0), scales.stride(0), values.stride(1), scales.stride(1)),
            PIECES=len(pieces),
            DIVIDE=divisor != 1,
            ROW=row,
            BLOCK=_block(row),
        )


def reduce_rows(pieces: torch.Tensor, out: torch.Tensor, divisor: float) -> None:
    """The sum of the pieces over ``divisor``, quantized again, into the rows ``out``."""
    total = torch.empty(out.shape[0] * (out.shape[1] - _SCALE_BYTES), dtype=torch.float32, device=out.device)
    decode_rows(pieces, total, divisor)
    encode_rows(total, out)


def _parts(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = buffer[..., _SCALE_BYTES:].view(torch.float8_e4m3fn)
    return values, buffer[..., :_SCALE_BYTES].view(torch.float32)


def _on(tensor: torch.Tensor) -> Any:
    """The tensor's device is the one that kernels are launched on. Triton's interpreter works on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _block(row_length: int) -> int:
    return 1 << (row_length - 1).bit_length()


@functools.cache
def _jit(kernel: Any) -> Any:
    return triton.jit(kernel)


# The kernels. Parameters in capitals are constants for the compiler, which takes no other annotations.


def _encode(  # type: ignore[no-untyped-def]
    source,
    values,
    scales,
    numel,
    values_row,
    scales_row,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < ROW
    x = tl.load(source + row * ROW + at, mask=inside & (row * ROW + at < numel), other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / 448.0, 1.1754943508222875e-38)
    some_nan = tl.max((x != x).to(tl.int32), axis=0) > 0  # which a maximum leaves out
    scale = tl.where(some_nan, float("nan"), scale)
    tl.store(values + row * values_row + at, (x / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row * scales_row, scale)


def _decode(  # type: ignore[no-untyped-def]
    values,
    scales,
    target,
    numel,
    divisor,
    values_piece,
    scales_piece,
    values_row,
    scales_row,
    PIECES: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < ROW
    values += row * values_row + at
    scales += row * scales_row
    total = tl.load(values, mask=inside, other=0.0).to(tl.float32) * tl.load(scales)
    for _ in range(1, PIECES):
        values += values_piece
        scales += scales_piece
        total += tl.load(values, mask=inside, other=0.0).to(tl.float32) * tl.load(scales)
    if DIVIDE:
        total = total / divisor
    tl.store(target + row * ROW + at, total, mask=inside & (row * ROW + at < numel))
