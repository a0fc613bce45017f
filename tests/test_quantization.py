"""Rows with a scale: errors within the bounds that the module states, measured in float64."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft import quantization_triton
from torchft.quantization import SCALE_BYTES, Format, dequantize, quantize, reduce, row_count, sum_into

FORMATS = list(Format)
ROUNDING = 1 + 2.0**-12
"""What float32 adds: the scale, its reciprocal and two products are each rounded."""
SMALLEST = 2.0**-127

# Beyond 1e37 a sum of a few numbers, or 127 times a rounded scale, may leave float32: that is not a matter of rows.
NUMBERS = st.floats(-(2.0**120), 2.0**120, width=32) | st.floats(-1, 1, width=32)
VALUES = st.lists(NUMBERS, min_size=0, max_size=70)


def amax_of_rows(values: np.ndarray, row_length: int) -> np.ndarray:
    """For each element the largest magnitude of its row."""
    out = np.zeros_like(values)
    for begin in range(0, len(values), row_length):
        out[begin : begin + row_length] = np.abs(values[begin : begin + row_length]).max()
    return out


def bound(values: np.ndarray, amax: np.ndarray, format: Format) -> np.ndarray:
    """The largest error of one quantization of each of ``values``, from rows with ``amax``."""
    if format is Format.INT8:
        error = amax / 127 / 2
    else:
        error = np.maximum(np.abs(values) * 2.0**-4, amax / 448 * 2.0**-10)
    return np.maximum(error * ROUNDING, SMALLEST)


def check(got: torch.Tensor, wanted: np.ndarray, limit: np.ndarray) -> None:
    error = np.abs(got.double().numpy().reshape(-1) - wanted.reshape(-1))
    assert (error <= limit.reshape(-1)).all(), f"errors {error}, limits {limit}"


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=150)
@given(lists=st.lists(VALUES, min_size=1, max_size=4), row_length=st.sampled_from([4, 16, 64]))
def test_the_error_of_each_element_is_within_its_rows_bound(
    lists: list[list[float]], row_length: int, format: Format
) -> None:
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    buffer = quantize(tensors, format, row_length=row_length)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (row_count(tensors, row_length), SCALE_BYTES + row_length)
    got = [torch.full_like(t, torch.nan) for t in tensors]
    dequantize(buffer, got, format)
    for before, after in zip(tensors, got, strict=True):
        values = before.double().numpy()
        check(after, values, bound(values, amax_of_rows(values, row_length), format))


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=150)
@given(
    pieces=st.integers(1, 5).flatmap(
        lambda n: st.integers(1, 40).flatmap(
            lambda size: st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=n, max_size=n)
        )
    ),
    divisor=st.sampled_from([1, 2, 3, 7]),
)
def test_a_reduction_adds_one_error_to_those_of_its_pieces(
    pieces: list[list[float]], divisor: int, format: Format
) -> None:
    row_length = 16
    exact = np.array(pieces, dtype=np.float32).astype(np.float64)
    stacked = torch.stack(
        [quantize([torch.tensor(p, dtype=torch.float32)], format, row_length=row_length) for p in pieces]
    )
    wanted = exact.sum(axis=0) / divisor
    first = sum(bound(p, amax_of_rows(p, row_length), format) for p in exact) / divisor
    # Sums in float32 are rounded themselves, n - 1 times.
    first = first + np.abs(exact).sum(axis=0) / divisor * 2.0**-20 + SMALLEST

    once = torch.empty(exact.shape[1])
    sum_into(stacked, [once], format, divisor=divisor)
    check(once, wanted, first)

    again = torch.empty(exact.shape[1])
    dequantize(reduce(stacked, format, divisor=divisor), [again], format)
    reduced = np.abs(wanted) + first  # no larger than this
    check(again, wanted, first + bound(reduced, amax_of_rows(reduced, row_length), format))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_are_exact_also_beside_other_rows(format: Format) -> None:
    tensor = torch.cat([torch.zeros(512), torch.randn(512), torch.zeros(100)])
    got = torch.full_like(tensor, 7.0)
    dequantize(quantize([tensor], format), [got], format)
    assert got[:512].count_nonzero() == 0
    assert got[1024:].count_nonzero() == 0
    assert got[512:1024].count_nonzero() > 400


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 1e300])
def test_a_row_with_something_not_finite_arrives_as_not_finite_and_others_do_not(format: Format, bad: float) -> None:
    tensor = torch.ones(5 * 512 - 10, dtype=torch.float64)
    tensor[512 + 3] = bad
    tensor[-1] = bad
    got = torch.zeros_like(tensor)
    buffer = quantize([tensor], format)
    dequantize(buffer, [got], format)
    finite = torch.isfinite(got)
    assert finite[:512].all()
    assert not finite[512:1024].any()
    assert finite[1024:2048].all()
    assert not finite[2048:].any()
    # Nor does it become finite in a sum.
    healthy = quantize([torch.ones_like(tensor)], format)
    dequantize(reduce(torch.stack([healthy, buffer]), format, divisor=2), [got], format)
    assert torch.equal(torch.isfinite(got), finite)


def test_int8_rounds_to_nearest_even() -> None:
    tensor = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.4999])
    got = torch.empty_like(tensor)
    dequantize(quantize([tensor], Format.INT8), [got], Format.INT8)
    assert got.tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 0.0]


def test_fp8_rounds_to_nearest_even_and_keeps_small_numbers_beside_large_ones() -> None:
    tensor = torch.tensor([448.0, 17.0, 19.0, 0.25, 2.0**-9, 1.5 * 2.0**-9, -18.0, 447.0])
    got = torch.empty_like(tensor)
    dequantize(quantize([tensor], Format.FP8), [got], Format.FP8)
    assert got.tolist() == [448.0, 16.0, 20.0, 0.25, 2.0**-9, 2.0**-8, -18.0, 448.0]


def test_numbers_that_the_format_has_are_exact_whatever_the_block() -> None:
    # More elements than are worked on at a time, and a row that is not full.
    tensor = (torch.arange(100_003) % 255 - 127).float()
    for format in (Format.INT8, Format.FP8):
        sent = tensor if format is Format.INT8 else tensor.clamp(-14, 14) * 32
        got = torch.full_like(sent, torch.nan)
        dequantize(quantize([sent], format), [got], format)
        assert torch.equal(got, sent)


def test_a_tensors_neighbour_costs_it_nothing() -> None:
    small = torch.full((10,), 1e-6)
    got, beside = torch.empty(10), torch.empty(10)
    dequantize(quantize([torch.full((10,), 1e6), small], Format.INT8), [beside, got], Format.INT8)
    torch.testing.assert_close(got, small, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_type_and_stride_is_packed_as_its_contiguous_float32_would_be(dtype: torch.dtype) -> None:
    base = torch.randn(7, 130, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    tensors = [base.T, base[:, ::3], base[3, 4], base[:0], base.detach().T.contiguous()]
    plain = [t.detach().contiguous().float() for t in tensors]
    buffer = quantize(tensors, Format.INT8, row_length=64)
    assert torch.equal(buffer, quantize(plain, Format.INT8, row_length=64))
    strided = torch.zeros(130, 14, dtype=dtype).T[::2]
    dequantize(quantize([base], Format.INT8), [strided], Format.INT8)
    torch.testing.assert_close(strided, base.detach(), rtol=0, atol=float(base.detach().abs().max()) / 100)
    scalar = torch.empty((), dtype=dtype)
    dequantize(quantize([base[3, 4]], Format.INT8), [scalar], Format.INT8)
    torch.testing.assert_close(scalar, base.detach()[3, 4])


def test_rows_are_added_up_to_a_multiple_and_are_zeros() -> None:
    buffer = quantize([torch.ones(10), torch.ones(600)], Format.INT8, multiple_of=4)
    assert buffer.shape == (4, 516)
    assert buffer[3].count_nonzero() == 0
    with pytest.raises(ValueError, match="take 5 rows of 512, the buffer has 4"):
        dequantize(buffer, [torch.empty(2560)], Format.INT8)


def test_what_cannot_be_quantized_says_why() -> None:
    with pytest.raises(ValueError, match="no tensors"):
        quantize([])
    with pytest.raises(ValueError, match=r"can be quantized, not torch\.int64"):
        quantize([torch.arange(3)])
    with pytest.raises(ValueError, match="multiple of 4"):
        quantize([torch.ones(3)], row_length=6)
    with pytest.raises(ValueError, match="on one device"):
        quantize([torch.ones(3), torch.ones(3, device="meta")])


@pytest.fixture
def kernels_device() -> torch.device:
    """Where Triton kernels run: a GPU, or with ``TRITON_INTERPRET=1`` Triton's interpreter."""
    device = torch.device("cuda")
    reason = quantization_triton.unavailable(device)
    if reason is None:
        return device
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.importorskip("triton")
        return torch.device("cpu")
    pytest.skip(f"no Triton kernels here: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_and_plain_torch_understand_each_other(kernels_device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (3 * 512 + 100,)

    def numbers(size: float) -> torch.Tensor:
        """Numbers that fp8 has, times ``size``: Triton's interpreter does not round as a GPU does."""
        exponent = torch.randint(-6, 8, shape, generator=generator)
        mantissa = 8 + torch.randint(0, 8, shape, generator=generator)
        tensor = mantissa.clamp(max=14) / 8 * 2.0**exponent * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
        tensor[::128] = 448
        return (tensor * size).to(dtype)

    given = [numbers(1.0), numbers(2.0**-10)]
    given[0][600] = torch.inf
    given[1][-1] = torch.nan
    given[1][:512] = 0
    pieces = torch.zeros((2, 4, 516), dtype=torch.uint8, device=kernels_device)
    for piece, tensor in zip(pieces, given, strict=True):
        quantization_triton.encode_rows(tensor.to(kernels_device), piece)
        got = torch.empty(shape)
        dequantize(piece.cpu(), [got], Format.FP8)
        finite = torch.from_numpy(np.isfinite(amax_of_rows(tensor.double().numpy(), 512)))
        assert torch.equal(torch.isfinite(got), finite)
        torch.testing.assert_close(got[finite], tensor[finite].float(), rtol=1e-6, atol=0)
        decoded = torch.empty(shape, device=kernels_device)
        quantization_triton.decode_rows(piece.unsqueeze(0), decoded, 1)
        assert torch.equal(torch.isfinite(decoded.cpu()), finite)
        assert torch.equal(decoded.cpu()[finite], got[finite])  # the same bits
    summed, wanted = torch.empty(shape, device=kernels_device), torch.empty(shape)
    quantization_triton.decode_rows(pieces, summed, 3)
    sum_into(pieces.cpu(), [wanted], Format.FP8, divisor=3)
    torch.testing.assert_close(summed.cpu(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)

    same = pieces[1:].expand(3, -1, -1)
    reduced = torch.empty_like(pieces[1])
    quantization_triton.reduce_rows(same, reduced, 6)
    got = torch.empty(shape)
    dequantize(reduced.cpu(), [got], Format.FP8)
    finite = torch.isfinite(given[1])
    finite[3 * 512 :] = False
    assert torch.equal(torch.isfinite(got), finite)
    torch.testing.assert_close(got[finite], given[1][finite].float() / 2, rtol=1e-6, atol=0)


def test_without_a_gpu_the_reason_is_told() -> None:
    assert quantization_triton.unavailable(torch.device("cpu")) == "Triton kernels are for CUDA, not for cpu"
    if not torch.cuda.is_available():
        assert quantization_triton.unavailable(torch.device("cuda")) is not None
