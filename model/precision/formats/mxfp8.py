"""MXFP8 in all three GEMMs: blocks of 32 along the inner dimension of each, round to nearest. See `model.precision.mxfp8` for the numbers."""

import torch
from torch import Tensor

from model.precision import mxfp8
from model.precision.formats.base import Format, flat, weight_rows
from model.precision.health import Seen
from model.precision.mxfp8 import BLOCK, Along, Quantized
from model.precision.operand import Operand, Rows, pad_rows
from model.precision.site import Call


class MXFP8(Format):
    name = "mxfp8"

    def fprop(self, x: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return values_of(quantised("x", x, call.rows, call)), self._weight("w", weight, call)

    def keep(self, x: Tensor, multiplied: Operand, call: Call) -> Operand:
        return quantised("x_t", x, call.rows, call, along="columns")

    def dgrad(self, dy: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return values_of(quantised("dy", dy, call.rows, call)), self._weight("w_t", weight, call)

    def wgrad(self, dy: Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        return values_of(quantised("dy_t", dy, call.rows, call, along="columns")), kept

    def _weight(self, operand: str, weight: Tensor, call: Call) -> Operand:
        w, rows = flat(weight), weight_rows(weight)
        along: Along = "columns" if operand == "w_t" else "rows"
        found = call.cached((self, along), weight, lambda: encoded(w, rows, along))
        call.measure(operand, lambda: seen(w, found, rows))
        return found


def encoded(x: Tensor, rows: Rows, along: Along) -> Operand:
    """x [rows, features] in MXFP8; with blocks along columns every group is padded to whole blocks."""
    if along == "columns":
        return Operand(mxfp8.quantize(pad_rows(x, rows, BLOCK), "columns"), rows.padded(BLOCK))
    return Operand(mxfp8.quantize(x), rows)


def quantised(operand: str, x: Tensor, rows: Rows, call: Call, along: Along = "rows") -> Operand:
    """The same, with its health told under this name."""
    found = encoded(x, rows, along)
    call.measure(operand, lambda: seen(x, found, rows))
    return found


def values_of(operand: Operand) -> Operand:
    """As values, for an operand that is multiplied at once."""
    assert isinstance(operand.kept, Quantized)
    return Operand(operand.kept.dequantize(), operand.rows)


def seen(x: Tensor, operand: Operand, rows: Rows) -> Seen:
    """x [rows, features] and what it became, for its health."""
    quantized = operand.kept
    assert isinstance(quantized, Quantized)
    columns = quantized.along == "columns"
    exponent = quantized.exponents.int() - mxfp8.BIAS
    # The smallest E8M0 counts as zero: nothing smaller can be told apart.
    scale = torch.where(exponent > -mxfp8.BIAS, torch.exp2(exponent.clamp(min=-126).float()), torch.zeros((), device=x.device))
    return Seen(
        x=pad_rows(x, rows, BLOCK) if columns else x,
        q=quantized.dequantize(),
        at_limit=quantized.elements.float().abs() == 448,
        scale=scale,
        block=(BLOCK, 1) if columns else (1, BLOCK),
        bound=2.0**127,
    )
