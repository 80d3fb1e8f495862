"""MXFP8: E4M3 elements, one power-of-two scale for every 32 consecutive elements along a GEMM's inner dimension.

    exponent = the power of two of block_amax * fl32(1/448), rounded *up*     so that no element saturates
    value    = e4m3(x / 2^exponent) * 2^exponent

The OCP specification rounds the exponent down and lets the largest elements clip; Transformer Engine rounds up, and so do we.
An element and its scale together are exact in bf16, so an MXFP8 GEMM is a bf16 GEMM of the values.
Source: Transformer Engine 2.20.2; torchao's RCEIL mode computes the same scales.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 32
Along = Literal["rows", "columns"]
BIAS = 127


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, fp32, of int32 exponents in [-126, 127], by writing the exponent field."""
    return ((exponent + BIAS) << 23).view(torch.float32)


@dataclass(frozen=True)
class Quantized:
    """along rows: elements float8_e4m3fn [M, N], exponents uint8 [M, ceil(N/32)], E8M0 (biased by 127). along columns: blocks run down
    the columns, [M, N] and [ceil(M/32), N]."""

    elements: Tensor
    exponents: Tensor
    along: Along = "rows"

    def values(self, backend: object, dtype: torch.dtype) -> Tensor:
        """[M, N] in `dtype`, whatever the backend."""
        return self.dequantize().to(dtype)

    @property
    def nbytes(self) -> int:
        return self.elements.nbytes + self.exponents.nbytes

    def dequantize(self) -> Tensor:
        """fp32 [M, N]."""
        if self.along == "columns":
            return Quantized(self.elements.T, self.exponents.T).dequantize().T
        n = self.elements.shape[1]
        blocks = torch.nn.functional.pad(self.elements.float(), (0, -n % BLOCK)).unflatten(1, (-1, BLOCK))
        return _scale_blocks(blocks, self.exponents.int() - BIAS).flatten(1)[:, :n]


def _scale_blocks(blocks: Tensor, exponent: Tensor) -> Tensor:
    """blocks [..., blocks, 32] times 2^exponent [..., blocks], in two factors because one alone may leave fp32's range."""
    half = torch.div(exponent, 2, rounding_mode="trunc")
    return blocks * _power_of_two(half).unsqueeze(-1) * _power_of_two(exponent - half).unsqueeze(-1)


def biased_exponent(block_amax: Tensor) -> Tensor:
    """E8M0 byte of the scale of blocks with this largest magnitude; int32 of its shape."""
    ratio = block_amax * torch.full((), 1 / 448, dtype=torch.float32, device=block_amax.device)
    bits = ratio.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Round up unless exactly a power of two; a denormal ratio up to 2^-127 is byte 0, above it byte 1.
    up = torch.where(exponent > 0, mantissa > 0, mantissa > 0x400000)
    return (exponent + up.int()).clamp(max=254)


def quantize(x: Tensor, along: Along = "rows") -> Quantized:
    """Quantises x [M, N] (fp32, bf16 or fp16) with blocks along rows or columns; a ragged last block is padded with zeros for its scale."""
    if along == "columns":
        columns = quantize(x.T)
        return Quantized(columns.elements.T, columns.exponents.T, "columns")
    n = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -n % BLOCK)).unflatten(1, (-1, BLOCK))
    exponent = biased_exponent(blocks.abs().amax(-1))
    scaled = _scale_blocks(blocks, BIAS - exponent)
    elements = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1)[:, :n]
    return Quantized(elements, exponent.to(torch.uint8))
