"""Mamba-2's short causal convolution with SiLU, as shifted multiply-adds.

    y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})          per channel; x before the sequence is 0

Tokens stay in rows, [sequence, batch, channels], so every shift is an offset of whole rows and nothing is transposed:
a third of the time of `conv1d` between two transpositions on a CPU. Where documents are packed, x of another document
counts 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None, before: Tensor | None = None) -> Tensor:
    """x: [sequence, batch, channels]; weight: [channels, 1, width]; bias: [channels]; documents: int [batch, sequence]
    or None for one document. Computed in fp32, returned in x's dtype.

    before: [width - 1, batch, channels], x before the sequence instead of 0; documents then has as many more, in front."""
    inside = []
    if documents is not None:
        order = documents.T
        inside = [(order[back:] == order[:-back]).unsqueeze(-1) for back in range(1, weight.shape[-1])]
    earlier = x.new_zeros(0, *x.shape[1:]) if before is None else before
    return _Convolution.apply(x.float(), weight.float(), bias.float(), inside, earlier.float()).to(x.dtype)


class _Convolution(torch.autograd.Function):
    """inside[k - 1]: bool [earlier + sequence - k, batch, 1], token t and t - k are of one document; empty: all are. earlier: x before x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, inside: list[Tensor], earlier: Tensor) -> Tensor:
        taps = weight[:, 0].flip(1).T.contiguous()  # [width, channels], tap k for the token k back
        y = torch.addcmul(bias, x, taps[0])
        for back in range(1, len(taps)):
            for to, source, seen in _runs(back, y, x, earlier, inside):
                to.addcmul_(source if seen is None else source * seen, taps[back])
        ctx.save_for_backward(x, taps, y, earlier)
        ctx.inside = inside
        return torch.nn.functional.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        x, taps, y, earlier = ctx.saved_tensors
        dy = torch.ops.aten.silu_backward(dy, y)
        dx, dtaps = dy * taps[0], torch.zeros_like(taps)
        dtaps[0] = (dy * x).sum((0, 1))
        dearlier = torch.zeros_like(earlier)
        for back in range(1, len(taps)):
            for (later, source, seen), (_, dsource, _) in zip(
                _runs(back, dy, x, earlier, ctx.inside), _runs(back, dy, dx, dearlier, ctx.inside), strict=True
            ):
                later = later if seen is None else later * seen
                dsource.addcmul_(later, taps[back])
                dtaps[back] += (later * source).sum((0, 1))
        return dx, dtaps.flip(0).T.unsqueeze(1), dy.sum((0, 1)), None, dearlier


def _runs(back: int, y: Tensor, x: Tensor, earlier: Tensor, inside: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows of y with the rows `back` tokens before them, in x and, for the first ones, in `earlier`; and where both are of one document."""
    held = len(earlier)
    first = min(back, len(x))
    if first < len(x):
        yield y[back:], x[:-back], inside[back - 1][held:] if inside else None
    if held:
        start = held - back
        yield y[:first], earlier[start : start + first], inside[back - 1][start : start + first] if inside else None
