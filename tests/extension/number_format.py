"""A number format with a rounding of its own: eighths of each row's largest magnitude, dithered by the token's random bytes in the backward pass.

value = round(x * 8 / amax + dither) * amax / 8            dither: 0 in fprop, uniform in (-1/2, 1/2) for dy
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.precision.backends.reference import Reference
from model.precision.formats.base import Format, FormatOptions, flat, weight_rows
from model.precision.formats.registry import register_format
from model.precision.gemm import Gemm
from model.precision.health import Seen
from model.precision.operand import Operand, Rows, row_amax
from model.precision.site import Call


@dataclass(frozen=True)
class EighthsOptions(FormatOptions):
    levels: int = 8
    """Steps from 0 to the largest magnitude of a row."""

    def validate(self, key: str) -> None:
        if self.levels < 1:
            raise ValueError(f"{key}.levels={self.levels} must be at least 1: use for instance 8")


class Eighths(Format):
    name = "eighths"
    Options = EighthsOptions

    def _rounded(self, x: Tensor, rows: Rows, dither: Tensor | None = None) -> Operand:
        unit = torch.div(row_amax(x), float(self.options.levels)).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = torch.div(x.float(), unit)
        return Operand((scaled if dither is None else scaled + dither).round() * unit, rows)

    def _dithered(self, dy: Tensor, call: Call) -> Operand:
        drawn = call.stream("dy").bytes(dy.shape[1])
        return self._rounded(dy, call.rows, (drawn.float() + 0.5) / 256 - 0.5)

    def fprop(self, x: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        w = call.cached(self, weight, lambda: self._rounded(flat(weight), weight_rows(weight)))
        left = self._rounded(x, call.rows)
        call.measure("x", lambda: self._seen(x, left))
        return left, w

    def _seen(self, x: Tensor, operand: Operand) -> Seen:
        """For the health of the operand: a row is a block."""
        q, amax = operand.values(Reference(), torch.float32), row_amax(x)
        return Seen(x=x, q=q, at_limit=q.abs() >= amax, scale=amax / self.options.levels, block=(1, x.shape[1]), bound=float("inf"))

    def keep(self, x: Tensor, multiplied: Operand, call: Call) -> Operand:
        return self._rounded(x, call.rows)

    def dgrad(self, dy: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return self._dithered(dy, call), self.fprop(dy[:0], weight, call)[1]

    def wgrad(self, dy: Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        return self._dithered(dy, call), kept

    def draws(self, gemm: Gemm) -> bool:
        return gemm != "fprop"


def register() -> None:
    register_format(Eighths.name, Eighths)
