"""Floating point numbers in one byte each, by rows with a scale.

The idea
    A tensor is cut into rows of ``row_length`` elements. A row travels as one float32 scale, its largest magnitude
    over the format's largest number, and a byte for each element: the element over the scale, rounded to nearest
    even. All rows lie in one ``uint8`` buffer of shape ``[rows, 4 + row_length]``, so that a collective can send
    them, and any part of them, without knowing what they are.

Rules
    1. A tensor begins on a row of its own: what lies beside it does not cost it precision. Its last row is filled
       up with zeros.
    2. The same bytes give the same numbers everywhere: decoding is one exact conversion and one float32 product.
    3. Sums are float32, in the order of the pieces.

Errors of one quantization, where ``amax`` is the row's largest magnitude:

- ``INT8``: at most half a step, ``amax / 254``.
- ``FP8`` (e4m3fn): at most ``|x| / 16``, or ``amax / 448 / 1024`` where that is more.
- No scale is smaller than 2**-126, the smallest normal float32, so that a row of still smaller numbers has an error
  of up to 2**-127. Zeros are exact.
- A row with an infinity or a NaN in it has such a scale: it arrives as infinities and NaNs in *every* element. The
  same holds for float64 numbers that float32 cannot hold. Nothing that is not finite becomes finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

import torch

from torchft import quantization_triton

__all__ = ["ROW_LENGTH", "SCALE_BYTES", "Format", "dequantize", "quantize", "reduce", "row_count", "sum_into"]

ROW_LENGTH = 512
"""Elements in a row, by default."""
SCALE_BYTES = 4

_SMALLEST_SCALE = 2.0**-126
_ROUNDING = 1.5 * 2.0**23
# Elements worked on at a time on a CPU: what lies between two passes stays in the processor's cache.
_BLOCK = 1 << 18
# Where torch has several threads, less than it gives to more than the calling one: a team of threads for each of a
# thousand small passes gains little, and costs a hundred times the work where others use the processors too.
_SERIAL_BLOCK = (1 << 15) - 1


class Format(Enum):
    """What an element becomes."""

    INT8 = "int8"
    """-127 to 127 in equal steps: the better one where the numbers of a row are of one size, as gradients are."""
    FP8 = "fp8"
    """e4m3fn, up to 448: three bits of mantissa, so that small numbers beside large ones keep theirs."""

    @property
    def largest(self) -> float:
        """What a row's largest magnitude becomes."""
        return 127.0 if self is Format.INT8 else 448.0


def row_count(tensors: Sequence[torch.Tensor], row_length: int = ROW_LENGTH) -> int:
    """Rows that ``tensors`` take.

    Raises:
        ValueError: ``row_length`` is not a positive multiple of 4.
    """
    if row_length < 4 or row_length % 4:
        raise ValueError(f"row_length is {row_length}: it must be a positive multiple of 4, as scales are aligned")
    return sum(-(-t.numel() // row_length) for t in tensors)


@torch.no_grad()
def quantize(
    tensors: Sequence[torch.Tensor],
    format: Format = Format.INT8,
    *,
    row_length: int = ROW_LENGTH,
    multiple_of: int = 1,
) -> torch.Tensor:
    """Packs ``tensors``.

    Args:
        tensors: any shapes and strides, each of a floating point type, on one device.
        format: of the elements.
        row_length: elements that share a scale.
        multiple_of: rows of zeros are added until the number of rows is a multiple of this.

    Returns:
        ``uint8`` of shape ``[rows, 4 + row_length]`` on the device of the tensors.

    Raises:
        ValueError: no tensors, a type that is not floating point, several devices, or a bad ``row_length``.
    """
    if not tensors:
        raise ValueError("there is nothing to quantize: no tensors were given")
    device = tensors[0].device
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"only floating point tensors can be quantized, not {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"tensors on one device are needed, not on {device} and {tensor.device}")
    used = row_count(tensors, row_length)
    rows = -(-used // multiple_of) * multiple_of
    buffer = torch.empty((rows, SCALE_BYTES + row_length), dtype=torch.uint8, device=device)
    buffer[used:].zero_()
    begin = 0
    for tensor in tensors:
        end = begin + row_count([tensor], row_length)
        if end > begin:
            _encode(tensor.detach().reshape(-1), buffer[begin:end], format)
        begin = end
    return buffer


def dequantize(buffer: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format) -> None:
    """Unpacks what :func:`quantize` packed.

    Args:
        buffer: of :func:`quantize`.
        tensors: written in place; of the shapes that were packed. Their type may be another floating point type.
        format: the one used then.

    Raises:
        ValueError: the buffer has not enough rows for them.
    """
    sum_into(buffer.unsqueeze(0), tensors, format)


@torch.no_grad()
def sum_into(pieces: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, *, divisor: float = 1) -> None:
    """Unpacks several buffers of the same tensors, and sums them.

    Args:
        pieces: ``[n, rows, 4 + row_length]``.
        tensors: written in place: the sum in float32, divided by ``divisor``, in the tensor's type.
        format: of the pieces.
        divisor: the sum is divided by it.

    Raises:
        ValueError: the pieces have not enough rows for them.
    """
    row_length = pieces.shape[2] - SCALE_BYTES
    if (needed := row_count(tensors, row_length)) > pieces.shape[1]:
        raise ValueError(f"the tensors take {needed} rows of {row_length}, the buffer has {pieces.shape[1]}")
    begin = 0
    for tensor in tensors:
        end = begin + row_count([tensor], row_length)
        if end > begin:
            target = tensor.detach()
            flat = target.view(-1) if target.is_contiguous() else target.new_empty(target.numel())
            _decode(pieces[:, begin:end], flat, format, divisor)
            if not target.is_contiguous():
                target.copy_(flat.view(target.shape))
        begin = end


@torch.no_grad()
def reduce(pieces: torch.Tensor, format: Format, *, divisor: float = 1) -> torch.Tensor:
    """Unpacks several buffers, sums them in float32, divides, and packs the result.

    Args:
        pieces: ``[n, rows, 4 + row_length]``.
        format: of the pieces and of the result.
        divisor: the sum is divided by it.

    Returns:
        A buffer ``[rows, 4 + row_length]``.
    """
    out = torch.empty_like(pieces[0])
    if _by_triton(pieces, format):
        quantization_triton.reduce_rows(pieces, out, divisor)
        return out
    total, scratch = _scratch(out), _scratch(out)
    for (values, scales), (out_values, out_scales) in zip(_blocks(pieces), _blocks(out), strict=True):
        block = _sum(values, scales, total[: len(out_values)], scratch[: len(out_values)], format, divisor)
        _encode_block(block, out_values, out_scales, scratch[: len(out_values)], format)
    return out


def _by_triton(tensor: torch.Tensor, format: Format) -> bool:
    return format is Format.FP8 and quantization_triton.unavailable(tensor.device) is None


def _encode(flat: torch.Tensor, out: torch.Tensor, format: Format) -> None:
    """All elements of ``flat`` into the rows ``out``."""
    if _by_triton(flat, format):
        quantization_triton.encode_rows(flat, out)
        return
    row_length = out.shape[1] - SCALE_BYTES
    full = flat.numel() // row_length
    scratch = _scratch(out)
    converted = scratch if flat.dtype == torch.float32 else _scratch(out)
    sources = torch.split(flat[: full * row_length].view(full, row_length), _block_rows(out))
    for source, (values, scales) in zip(sources, _blocks(out[:full]), strict=True):
        block = source if source.dtype == torch.float32 else converted[: len(source)].copy_(source)
        _encode_block(block, values, scales, scratch[: len(source)], format)
    if rest := flat.numel() - full * row_length:
        last = torch.zeros((1, row_length), dtype=torch.float32, device=flat.device)
        last[0, :rest].copy_(flat[full * row_length :])
        ((values, scales),) = _blocks(out[full:])
        _encode_block(last, values, scales, scratch[:1], format)


def _decode(pieces: torch.Tensor, flat: torch.Tensor, format: Format, divisor: float) -> None:
    """The sum of the pieces into all elements of ``flat``."""
    if _by_triton(flat, format):
        quantization_triton.decode_rows(pieces, flat, divisor)
        return
    row_length = pieces.shape[2] - SCALE_BYTES
    full = flat.numel() // row_length
    total, scratch = _scratch(pieces[0]), _scratch(pieces[0])
    targets = torch.split(flat[: full * row_length].view(full, row_length), _block_rows(pieces))
    for target, (values, scales) in zip(targets, _blocks(pieces[:, :full]), strict=True):
        if target.dtype == torch.float32:
            _sum(values, scales, target, scratch[: len(target)], format, divisor)
        else:
            target.copy_(_sum(values, scales, total[: len(target)], scratch[: len(target)], format, divisor))
    if rest := flat.numel() - full * row_length:
        ((values, scales),) = _blocks(pieces[:, full:])
        last = _sum(values, scales, total[:1], scratch[:1], format, divisor)
        flat[full * row_length :].copy_(last[0, :rest])


def _encode_block(
    block: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, scratch: torch.Tensor, format: Format
) -> None:
    """Rows of float32 into as many rows of bytes."""
    scale = torch.abs(block, out=scratch).amax(dim=1, keepdim=True).div_(format.largest)
    scale.clamp_(min=_SMALLEST_SCALE)  # its reciprocal is finite; infinity and NaN stay what they are
    # Nothing overflows: a product exceeds the largest number by its own rounding only. What becomes of the numbers
    # of a row that is not finite does not matter: its scale is not finite, so no product with it is.
    if format is Format.INT8:
        # Beside a number this large float32 holds integers only, so that adding it rounds to nearest even; and it
        # ends in eight bits that are zero, so that the sum ends in the byte wanted.
        rounding = torch.full((1, 1), _ROUNDING, device=block.device)
        torch.addcmul(rounding, block, scale.reciprocal(), out=scratch)
        values.copy_(scratch.view(torch.int32))
    else:
        torch.mul(block, scale.reciprocal(), out=scratch)
        values.view(torch.float8_e4m3fn).copy_(scratch)  # rounds to nearest even
    scales.copy_(scale)


def _sum(
    values: torch.Tensor,
    scales: torch.Tensor,
    total: torch.Tensor,
    scratch: torch.Tensor,
    format: Format,
    divisor: float,
) -> torch.Tensor:
    """The sum of ``[n, rows, row_length]`` bytes over the pieces, in ``total``."""
    for i, (value, scale) in enumerate(zip(values.unbind(), scales.unbind(), strict=True)):
        target = scratch if i else total
        if format is Format.INT8:
            target.copy_(value)
        else:
            # The bits of a float16 2**8 times smaller: several times faster than torch's conversion on a CPU. It
            # makes 480 of NaN, which is in rows without a finite scale only.
            target.copy_(value.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16))
            scale = scale * 2.0**8
        if i:
            total.addcmul_(scratch, scale)
        else:
            total.mul_(scale)
    return total if divisor == 1 else total.div_(divisor)


def _block_rows(buffer: torch.Tensor) -> int:
    if buffer.device.type != "cpu":
        return max(1, buffer.shape[-2])  # few large kernels
    elements = _BLOCK if torch.get_num_threads() == 1 else _SERIAL_BLOCK
    return max(1, elements // (buffer.shape[-1] - SCALE_BYTES))


def _blocks(buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Values, as int8, and scales of a buffer, or of several, some rows at a time."""
    step = _block_rows(buffer)
    values = buffer[..., SCALE_BYTES:].view(torch.int8)
    scales = buffer[..., :SCALE_BYTES].view(torch.float32)
    return zip(torch.split(values, step, dim=-2), torch.split(scales, step, dim=-2), strict=True)


def _scratch(buffer: torch.Tensor) -> torch.Tensor:
    shape = (min(buffer.shape[-2], _block_rows(buffer)), buffer.shape[-1] - SCALE_BYTES)
    return torch.empty(shape, dtype=torch.float32, device=buffer.device)
