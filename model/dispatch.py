"""Tokens to the rows of their experts and back, added up in one order.

    spread   tokens -> rows      a token's row once for each expert it visits, sorted by expert; its gradient is a gathered sum
    gather   rows -> tokens      a gathered sum; its gradient is a spread

Every token visits exactly top_k experts, so whatever returns to it are top_k rows: they are gathered side by side, [tokens, top_k, width], and added
in fp32 in the order of their experts. A scatter would add them with atomics in whatever order they come, and in bf16 round after each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Places:
    """Which row belongs to which token."""

    tokens: Tensor
    """int64 [rows], the token of each row."""
    rows: Tensor
    """int64 [tokens, top_k], the rows of each token, in the order they are added."""

    @classmethod
    def of(cls, tokens: Tensor, top_k: int) -> "Places":
        """tokens: int64 [rows], every token top_k times; a token's rows are added in the order they have here."""
        return cls(tokens, tokens.argsort(stable=True).view(-1, top_k))


def _added(x: Tensor, rows: Tensor) -> Tensor:
    count, top_k = rows.shape
    return x.index_select(0, rows.flatten()).view(count, top_k, -1).sum(1, dtype=torch.float32).to(x.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _added(grad, rows), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _added(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None


def spread(x: Tensor, places: Places) -> Tensor:
    """x [tokens, width] -> [rows, width]."""
    result: Tensor = _Spread.apply(x, places.tokens, places.rows)
    return result


def gather(x: Tensor, places: Places) -> Tensor:
    """x [rows, width] -> [tokens, width] in x's dtype: each token's rows added up in fp32."""
    result: Tensor = _Gather.apply(x, places.tokens, places.rows)
    return result
