"""fp32: operands as they are, multiplied in fp32 everywhere."""

import torch
from torch import Tensor

from model.precision.formats.base import Format, flat, weight_rows
from model.precision.operand import Operand
from model.precision.site import Call


class FP32(Format):
    name = "fp32"
    quantises = False

    def fprop(self, x: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return Operand(x.float(), call.rows), Operand(flat(weight), weight_rows(weight))

    def keep(self, x: Tensor, multiplied: Operand, call: Call) -> Operand:
        return Operand(x.float(), call.rows)

    def dgrad(self, dy: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return self.fprop(dy, weight, call)

    def wgrad(self, dy: Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        return Operand(dy.float(), call.rows), kept

    def multiplied_in(self, device: torch.device) -> torch.dtype:
        return torch.float32
