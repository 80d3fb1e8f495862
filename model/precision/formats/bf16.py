"""bf16: operands rounded to bf16, products accumulated in fp32; it never means fp32. On a CPU an fp32 GEMM multiplies the rounded values."""

import torch
from torch import Tensor

from model.precision.formats.base import Format, flat, weight_rows
from model.precision.operand import Operand
from model.precision.site import Call


class BF16(Format):
    name = "bf16"
    quantises = False

    def fprop(self, x: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return Operand(call.backend.bf16(x), call.rows), Operand(call.backend.bf16(flat(weight)), weight_rows(weight))

    def keep(self, x: Tensor, multiplied: Operand, call: Call) -> Operand:
        return Operand(x.to(torch.bfloat16), call.rows)

    def dgrad(self, dy: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return self.fprop(dy, weight, call)

    def wgrad(self, dy: Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        # Without blocks, both GEMMs multiply the same dy.
        if multiplied is None or call.formats[1] != self:
            multiplied = Operand(call.backend.bf16(dy), call.rows)
        return multiplied, kept
