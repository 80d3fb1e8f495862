"""Mamba-2's short causal convolution with SiLU, as shifted multiply-adds.

    y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})          per channel; x before the sequence is 0

Tokens stay in rows, [sequence, batch, channels], so every shift is an offset of whole rows and nothing is transposed:
a third of the time of `conv1d` between two transpositions on a CPU. Where documents are packed, x of another document
counts 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None) -> Tensor:
    """x: [sequence, batch, channels]; weight: [channels, 1, width]; bias: [channels]; documents: int [batch, sequence]
    or None for one document. Computed in fp32, returned in x's dtype."""
    inside = []
    if documents is not None:
        order = documents.T
        inside = [(order[back:] == order[:-back]).unsqueeze(-1) for back in range(1, weight.shape[-1])]
    return _Convolution.apply(x.float(), weight.float(), bias.float(), inside).to(x.dtype)


class _Convolution(torch.autograd.Function):
    """inside[k - 1]: bool [sequence - k, batch, 1], token t and t - k are of one document; empty: all are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, inside: list[Tensor]) -> Tensor:
        taps = weight[:, 0].flip(1).T.contiguous()  # [width, channels], tap k for the token k back
        y = torch.addcmul(bias, x, taps[0])
        for back in range(1, min(len(taps), len(x))):
            y[back:].addcmul_(x[:-back] * inside[back - 1] if inside else x[:-back], taps[back])
        ctx.save_for_backward(x, taps, y)
        ctx.inside = inside
        return torch.nn.functional.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, taps, y = ctx.saved_tensors
        dy = torch.ops.aten.silu_backward(dy, y)
        dx, dtaps = dy * taps[0], torch.zeros_like(taps)
        dtaps[0] = (dy * x).sum((0, 1))
        for back in range(1, min(len(taps), len(x))):
            later = dy[back:] * ctx.inside[back - 1] if ctx.inside else dy[back:]
            dx[:-back].addcmul_(later, taps[back])
            dtaps[back] = (later * x[:-back]).sum((0, 1))
        return dx, dtaps.flip(0).T.unsqueeze(1), dy.sum((0, 1)), None
