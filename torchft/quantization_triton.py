"""The fp8 rows of :mod:`torchft.quantization` as Triton kernels, for CUDA devices that know the type.

One program works on one row: it reads it once and writes it once, where plain torch takes a pass for each
operation. The bytes mean the same, so that members with and without these kernels may meet. Where they cannot be
used, :func:`unavailable` says why, and plain torch does the work on the device.
"""

from __future__ import annotations

import torch

__all__ = ["decode_rows", "encode_rows", "reduce_rows", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """Why there are no kernels for ``device``; None where there are."""
    return f"Triton kernels are for CUDA, not for {device.type}"


def encode_rows(flat: torch.Tensor, out: torch.Tensor) -> None:
    raise NotImplementedError


def decode_rows(pieces: torch.Tensor, flat: torch.Tensor, divisor: float) -> None:
    raise NotImplementedError


def reduce_rows(pieces: torch.Tensor, out: torch.Tensor, divisor: float) -> None:
    raise NotImplementedError
