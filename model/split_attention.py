"""Causal attention where ranks split sequences: each rank's queries against the keys of all tokens up to their own.

Keys and values are gathered over the context group, once more in the backward pass instead of being kept: they are few heads, and all tokens.
Queries go in blocks whose masks stay small, and the backward pass attends again, block by block: nothing of the size of queries times keys is ever
kept. The gradients of keys and values are added up in fp32, over blocks and over ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.batch import Microbatch
from parallel.context import gather, scatter_sum

PAIRS = 1 << 22  # of a query and a key in one block


def split_attention(query: Tensor, key_value: Tensor, microbatch: Microbatch, group: dist.ProcessGroup) -> Tensor:
    """query [sequence / ranks, batch, heads, head_dim]; key_value [sequence / ranks, batch, 2, key-value heads, head_dim] -> as query."""
    return _Split.apply(query, key_value, microbatch, group)


def _blocks(microbatch: Microbatch) -> Iterator[tuple[slice, int, Tensor]]:
    """Queries, how many keys they may see, and which: bool [batch or 1, 1, queries, keys]."""
    first, count = microbatch.first, len(microbatch.positions)
    block = max(1, min(count, PAIRS // (first + count)))
    places = torch.arange(first + count, device=microbatch.positions.device)
    for start in range(0, count, block):
        own = slice(start, min(start + block, count))
        keys = first + own.stop
        visible = (places[first + own.start : keys, None] >= places[None, :keys])[None]
        if microbatch.reset:
            held = microbatch.whole_documents[:, :keys]
            visible = visible & (held[:, first + own.start :, None] == held[:, None, :])
        yield own, keys, visible[:, None]


def _attend(query: Tensor, key_value: Tensor, visible: Tensor) -> Tensor:
    """query [queries, batch, heads, head_dim], key_value [keys, batch, 2, heads, head_dim]."""
    by_head, key, value = (part.permute(1, 2, 0, 3) for part in (query, *key_value.unbind(2)))
    shared = query.shape[2] != key_value.shape[3]
    out = torch.nn.functional.scaled_dot_product_attention(by_head, key, value, attn_mask=visible, enable_gqa=shared)
    return out.permute(2, 0, 1, 3)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, microbatch: Microbatch, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(query, key_value)
        ctx.microbatch, ctx.group = microbatch, group
        whole, out = gather(key_value, group), torch.empty_like(query)
        for own, keys, visible in _blocks(microbatch):
            out[own] = _attend(query[own], whole[:keys], visible)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key_value = ctx.saved_tensors
        whole, dquery = gather(key_value, ctx.group), torch.empty_like(query)
        dwhole = torch.zeros(whole.shape, dtype=torch.float32, device=whole.device)
        for own, keys, visible in _blocks(ctx.microbatch):
            inputs = query[own].detach().requires_grad_(), whole[:keys].detach().requires_grad_()
            with torch.enable_grad():
                out = _attend(*inputs, visible)
            dquery[own], part = torch.autograd.grad(out, inputs, dout[own])
            dwhole[:keys] += part
        return dquery, scatter_sum(dwhole, ctx.group).to(key_value.dtype), None, None
