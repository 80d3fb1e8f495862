"""What a backend of NVFP4 offers, and says about itself.

All backends give the same values; `reference` defines them. They differ in where they run and how fast:

    reference            plain PyTorch, any device                  readable, slow
    cpu                  fused kernels compiled by Numba, CPUs      the default on a CPU
    triton               fused kernels, Ampere, Hopper, Blackwell   the default on a GPU
    transformer_engine   FP4 tensor cores, Blackwell                see model/precision/backends/transformer_engine.py

What one of them can do that others cannot (a GEMM of packed operands, whole layers), or cannot do that others can, it declares here: nobody
asks for a name.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from model.precision.operand import Encoding, Packed, Rows, rounded_to_bf16


class Asked(Protocol):
    """A number format as a backend sees it: what it is called, and its options."""

    name: ClassVar[str]
    options: Any


class Layer(Protocol):
    """A linear layer of a backend's own over a weight of ours."""

    def __call__(self, x: Tensor, *, new_weight: bool) -> Tensor:
        """x [tokens, K] -> [tokens, N] in x's dtype, with gradients. new_weight: it has changed since the last call."""
        ...


class Backend(Protocol):
    """NVFP4 on some kind of device; backends inherit the defaults from here.

    x: fp32, bf16 or fp16 [rows, features], contiguous. amax: fp32 [groups], or [rows, 1] with a row-scaled encoding. Values are those of
    `model.precision.nvfp4`; products come in `gemm_dtype`.
    """

    name: str
    draws_own_bits: bool = False
    """Stochastic rounding draws other bits than the stream says, so a resume is another run."""
    rotates_in_own_order: bool = False
    """Rotations are summed in an order of its own, so last bits may differ."""
    multiplies_packed: bool = False
    """Packed operands are multiplied as they are, by `multiply`."""

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """What keeps it from running on this device, as the end of a sentence; None when nothing does."""
        return None

    @classmethod
    def check(cls, formats: Iterable[Asked], *, compute: str, amax_scope: str) -> None:
        """Raises ValueError, in one sentence, for formats it cannot run with these settings of `precision`."""
        return None

    @classmethod
    def describe(cls, modules: Sequence[tuple[str, tuple[Asked, Asked, Asked], bool]]) -> str:
        """A line for the head of a run. modules: name, formats and whether it is routed of every linear module."""
        return f"NVFP4 backend: {cls.name}"

    def amax(self, x: Tensor, rows: Rows, encoding: Encoding) -> Tensor:
        """Largest magnitude of each group (0 for an empty one) or, row-scaled, of each row; after the rotation, where there is one."""
        ...

    def quantize(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, *, packed: bool = False) -> Tensor | Packed:
        """Products [stored rows, features] in x's orientation (code * scale, what a GEMM multiplies, exact in bf16), or Packed."""
        ...

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Products of a packed operand, [rows, features]."""
        ...

    def bf16(self, x: Tensor) -> Tensor:
        """x rounded to bf16, in `gemm_dtype`."""
        return rounded_to_bf16(x)

    def multiply(
        self, left: Packed, left_amax: Tensor, left_largest: float, right: Packed, right_amax: Tensor, right_largest: float, *, across: bool
    ) -> Tensor:
        """The NVFP4 GEMM of two operands of one group each, fp32 [M, N], times the factors of both, where `multiplies_packed`.

            fprop   left: rows of x      right: rows or tiles of W      x W^T
            dgrad   left: rows of dy     right: tiles of W, across      dy W
            wgrad   left: columns of dy  right: columns of x            dy^T x

        Blocks of both run along the inner dimension. amax: fp32 of one element. across: use the tiles of `right` along their other side.
        """
        raise ValueError(f"the backend {self.name} does not multiply packed operands")

    def multiply_rows(self, x: Tensor, weight: Tensor, sizes: Sequence[int], into: Tensor) -> None:
        """fprop in fp32 on a CPU, every row in an order of sums that does not depend on the others: x [rows, K], of which each group has
        sizes[g], weight [groups * N, K], into [rows, N]."""
        starts = [sum(sizes[:group]) for group in range(len(sizes))]
        for matrix, start, size in zip(weight.split(into.shape[1]), starts, sizes, strict=True):
            for row in range(start, start + size):
                torch.mm(x[row : row + 1], matrix.T, out=into[row : row + 1])

    def layer(self, name: str, x: Tensor, weight: Tensor, formats: tuple[Asked, Asked, Asked]) -> Layer | None:
        """A layer of its own for module `name`, x [tokens, K] times the transpose of weight [N, K]; None where it has none that does just
        what the formats of fprop, dgrad and wgrad say."""
        return None
