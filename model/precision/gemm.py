"""The three GEMMs of a linear layer, on operands that are prepared.

    fprop   y  = x W^T      left: x [rows, K]          right: W [groups * N, K]        into [rows, N]
    dgrad   dx = dy W       left: dy [rows, N]         right: W                        into [rows, K]
    wgrad   dW += dy^T x    left: dy [stored, N]       right: x [stored, K]            into [groups, N, K], added

An operand's values are what an ordinary GEMM multiplies: the products code * scale of NVFP4 and the values of MXFP8 are exact in bf16, so a bf16
GEMM with fp32 accumulation on a GPU, or an fp32 one on a CPU, computes what FP4 tensor cores compute, up to the order of accumulation. What
remains of the scales, a factor for each group or row, is applied to the accumulated product, as tensor cores do: a GEMM's own alpha may be
applied earlier, and rounds elsewhere.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from model.precision.backend import Backend
from model.precision.operand import Operand, Packed

Gemm = Literal["fprop", "dgrad", "wgrad"]
GEMMS: tuple[Gemm, ...] = ("fprop", "dgrad", "wgrad")


def alpha(a: Operand, b: Operand) -> Tensor | None:
    """What the product of two operands is multiplied with, fp32 [groups] or, where one is row-scaled, [rows, groups]; None: 1."""
    if a.amax is None or b.amax is None:
        known = a if b.amax is None else b
        return None if known.amax is None else torch.div(known.amax, torch.full((), known.largest, device=known.amax.device))
    # Divided, not multiplied by a rounded reciprocal; 36 * bound^2 is exact in fp32.
    return torch.div(a.amax * b.amax, torch.full((), a.largest * b.largest, device=b.amax.device))


def multiply(
    gemm: Gemm, left: Operand, right: Operand, into: Tensor, backend: Backend, dtype: torch.dtype, *, singly: bool = False
) -> None:
    """One of the GEMMs of the module docstring, fp32 `into`; values are multiplied in `dtype`, accumulated in fp32. singly: see `Call`."""
    if backend.multiplies_packed and _one_amax_a_group(left) and _one_amax_a_group(right):
        _on_tensor_cores(gemm, left, right, into, backend)
        return
    a, b = left.values(backend, dtype), right.values(backend, dtype)
    factor = alpha(left, right)
    if singly and gemm == "fprop" and factor is None and into.device.type == "cpu":
        backend.multiply_rows(a, b, left.rows.sizes, into)
        return
    if gemm == "wgrad":
        groups, outputs, inputs = into.shape
        factors = [(a[i:j].T, b[k:m]) for (i, j), (k, m) in zip(left.rows.bounds, right.rows.bounds, strict=True)]
        places = [(g * outputs, (g + 1) * outputs) for g in range(groups)]
        _multiply_groups(into.view(groups * outputs, inputs), factors, places, factor, add=True)
        return
    inner = a.shape[1]
    factors = []
    for (i, j), (k, m) in zip(left.rows.bounds, right.rows.bounds, strict=True):
        # Rows of a weight are padded where blocks run along them.
        factors.append((a[i:j], b[k : k + inner]) if gemm == "dgrad" else (a[i:j], b[k:m].T))
    _multiply_groups(into, factors, left.rows.bounds, factor, add=False)


def _multiply_groups(
    into: Tensor, factors: Sequence[tuple[Tensor, Tensor]], places: Sequence[tuple[int, int]], alpha: Tensor | None, *, add: bool
) -> None:
    """into[start:stop] = alpha[g] * (a_g @ b_g) of every group g, or += with `add`.

    factors: (a, b) of each group, places: its (start, stop) in `into`.
    """
    for group, ((a, b), (start, stop)) in enumerate(zip(factors, places, strict=True)):
        part = into[start:stop]
        if stop == start or a.shape[1] == 0:
            if not add:
                part.zero_()
            continue
        if a.dtype == torch.bfloat16:
            product = torch.mm(a, b, out_dtype=torch.float32)
        else:
            product = torch.mm(a, b) if add else torch.mm(a, b, out=part)
        if alpha is None:
            scale = None
        elif alpha.dim() == 2:  # row-scaled
            scale = alpha[start:stop, group : group + 1]
        else:
            scale = alpha[group]
        if add:
            part.add_(product) if scale is None else part.addcmul_(product, scale)
        elif scale is not None:
            torch.mul(product, scale, out=part)
        elif product is not part:
            part.copy_(product)


def _one_amax_a_group(operand: Operand) -> bool:
    return isinstance(operand.kept, Packed) and operand.amax is not None and operand.amax.dim() == 1


def _on_tensor_cores(gemm: Gemm, left: Operand, right: Operand, into: Tensor, backend: Backend) -> None:
    a, b = left.kept, right.kept
    assert isinstance(a, Packed) and isinstance(b, Packed) and left.amax is not None and right.amax is not None
    across = gemm == "dgrad" and b.along == "tiles"
    for group, ((i, j), (k, m)) in enumerate(zip(left.rows.bounds, right.rows.bounds, strict=True)):
        if j == i:
            continue
        one = slice(group, group + 1)
        product = backend.multiply(a.part(i, j), left.amax[one], left.largest, b.part(k, m), right.amax[one], right.largest, across=across)
        if gemm == "wgrad":
            into[group] += product
        else:
            into[i:j] = product
