"""What the ranks that split sequences among themselves tell each other: rank r of the context group holds the r-th run of consecutive tokens.

shift         something from the rank so many places earlier or later
halo          the tokens right before one's own, with their gradient
Scan          a linear recurrence over the ranks: what reaches each of them from all earlier ones, and back from all later ones
gather,       the tokens of all ranks; the sum of what all ranks have for one's own tokens
scatter_sum
to_heads,     all-to-all: from some tokens and all features to all tokens and some features, and back
to_tokens
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor


def shift(x: Tensor, by: int, group: dist.ProcessGroup) -> Tensor:
    """x of the rank `by` places earlier (by < 0: later), zeros where there is none. Every rank passes a tensor of the same shape."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    source, target = rank - by, rank + by
    received, sent = [0] * size, [0] * size
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    into, out = result.view(-1)[:0], x.reshape(-1)[:0]
    if 0 <= source < size:
        received[source], into = x.numel(), result.view(-1)
    if 0 <= target < size:
        sent[target], out = x.numel(), x.reshape(-1)
    # As one all-to-all: point-to-point calls in a row could wait for each other.
    dist.all_to_all_single(into, out, received, sent, group=group)
    return result


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.shape, ctx.group = x.shape, group
        return shift(x[-rows:], 1, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(ctx.shape)
        whole[-len(grad) :] = shift(grad, -1, ctx.group)
        return whole, None, None


def halo(x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """The last `rows` rows of the rank before, zeros on the first one; x [sequence / ranks, ...] has at least as many."""
    return _Halo.apply(x, rows, group)


class Scan:
    """h_r+1 = kept_r h_r + added_r over the ranks r of the group, h_0 = 0, in log2(ranks) exchanges (Hillis and Steele, 1986)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def entering(self, added: Tensor, kept: Tensor) -> Tensor:
        """h of this rank. kept broadcasts against `added`; fp32 (or both fp64)."""
        return self._exclusive(added, kept, 1)

    def returning(self, added: Tensor, kept: Tensor) -> Tensor:
        """The same from the last rank to the first: g_r-1 = kept_r g_r + added_r."""
        return self._exclusive(added, kept, -1)

    def _exclusive(self, added: Tensor, kept: Tensor, direction: int) -> Tensor:
        total, distance = added, 1
        while distance < dist.get_world_size(self.group):
            # A rank without one so far away has heard of all, and whatever it multiplies zeros with.
            heard = shift(torch.cat((total.reshape(-1), kept.reshape(-1))), direction * distance, self.group)
            other, other_kept = heard.split((total.numel(), kept.numel()))
            total = total + kept * other.view(total.shape)
            kept = kept * other_kept.view(kept.shape)
            distance *= 2
        return shift(total, direction, self.group)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [sequence / ranks, ...] -> [sequence, ...] on every rank; not differentiable."""
    whole = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [sequence, ...], summed over the ranks -> [sequence / ranks, ...], the own part; not differentiable."""
    part = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [sequence / ranks, batch, ranks, features], where x[:, :, r] is for rank r -> [sequence, batch, features]; differentiable."""
    return mappings.all_to_all(group, x.movedim(2, 0).contiguous()).flatten(0, 1)


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: x [sequence, batch, features] -> [sequence / ranks, batch, ranks, features]; differentiable."""
    size = dist.get_world_size(group)
    return mappings.all_to_all(group, x.unflatten(0, (size, -1)).contiguous()).movedim(0, 2)
