"""Tokens to the rows of their experts and back, added up in one order.

    spread   tokens -> rows      a token's row once for each expert it visits, sorted by expert; its gradient is a gathered sum
    gather   rows -> tokens      a gathered sum; its gradient is a spread

Every token visits at most top_k experts of those that are looked at, so whatever returns to it are top_k rows or fewer: they are gathered side by
side, [tokens, top_k, width], and added in fp32 in the order of their experts. A scatter would add them with atomics in whatever order they come, and
in bf16 round after each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

Once = Callable[[Callable[[], Any]], Any]


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


def chosen(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], of which no row comes twice: its gradient is copied and not added."""
    result: Tensor = _Chosen.apply(x, rows)
    return result


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's, whose own permutation makes the host wait for the device twice, to learn how many rows there are. This one waits once, for all
    the numbers it asks for, and not at all where `once` still knows them."""

    TOLD = (
        "tokens_per_expert",
        "input_splits",
        "output_splits",
        "output_splits_tp",
        "num_out_tokens",
        "num_global_tokens_per_local_expert",
    )
    """What Megatron's dispatcher keeps on the host of one microbatch."""

    def __init__(self, experts: Sequence[int], config: TransformerConfig, groups: ProcessGroupCollection, once: Once) -> None:
        """experts: of this rank, consecutive; once: see `model.recompute.Recompute`."""
        super().__init__(len(experts), list(experts), config, groups)
        self.once = once
        self.num_global_tokens_per_local_expert = None  # of one expert: nobody asks

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states: [tokens, width], of which only the shape matters. routing_map: bool [tokens, experts]; probs: of its shape. Returns
        hidden_states as they came, and the weight of every row to be sent."""
        tokens = len(hidden_states)
        self.hidden_shape = self.hidden_shape_before_permute = hidden_states.shape  # type: ignore[assignment]
        self.probs, self.routing_map = probs, routing_map
        rows = routing_map.T.flatten().nonzero_static(size=tokens * self.config.moe_router_topk).squeeze(1)
        self.reversed_local_input_permutation_mapping = rows % tokens
        weights = chosen(probs.T.flatten(), rows)
        for name, value in self.once(self._told).items():
            setattr(self, name, value)
        return hidden_states, weights

    def _told(self) -> dict[str, Any]:
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.preprocess(self.routing_map))
        self.cuda_sync_point = "no_sync"  # further on: it is done here
        self.d2h_event.synchronize()
        return {name: getattr(self, name) for name in self.TOLD}


@dataclass(frozen=True)
class Places:
    """Which row belongs to which token."""

    tokens: Tensor
    """int64 [rows], the token of each row."""
    rows: Tensor
    """int64 [tokens, top_k], the rows of each token, in the order they are added; where `missing`, a number too high by one means none."""
    missing: bool = False
    """Whether tokens may have fewer rows than top_k."""

    @classmethod
    def of(cls, tokens: Tensor, top_k: int) -> "Places":
        """tokens: int64 [rows], every token top_k times; a token's rows are added in the order they have here."""
        return cls(tokens, tokens.argsort(stable=True).view(-1, top_k))

    @classmethod
    def of_some(cls, experts: Tensor, count: int) -> tuple["Places", Tensor]:
        """experts: int [tokens, top_k], the experts each token visits here, below 0 for none; count: how many there are. Rows are sorted by expert,
        and by token within one. Returns with them which visit, token x top_k + place, each row is: int64 [count]."""
        visits = experts.flatten()
        last = torch.iinfo(visits.dtype).max
        order = torch.where(visits < 0, last, visits).argsort(stable=True)[:count]
        rows = torch.full_like(visits, count, dtype=torch.int64)
        rows[order] = torch.arange(count, device=rows.device)
        top_k = experts.shape[1]
        by_expert = torch.where(experts < 0, last, experts).argsort(dim=1, stable=True)
        return cls(order // top_k, rows.view(-1, top_k).gather(1, by_expert), missing=True), order


def _added(x: Tensor, rows: Tensor, missing: bool) -> Tensor:
    count, top_k = rows.shape
    if missing:
        x = torch.cat((x, x.new_zeros(1, x.shape[1])))
    return x.index_select(0, rows.flatten()).view(count, top_k, -1).sum(1, dtype=torch.float32).to(x.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor, missing: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.missing = missing
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return _added(grad, rows, ctx.missing), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor, missing: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        return _added(x, rows, missing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None, None


def spread(x: Tensor, places: Places) -> Tensor:
    """x [tokens, width] -> [rows, width]."""
    result: Tensor = _Spread.apply(x, places.tokens, places.rows, places.missing)
    return result


def gather(x: Tensor, places: Places) -> Tensor:
    """x [rows, width] -> [tokens, width] in x's dtype: each token's rows added up in fp32."""
    result: Tensor = _Gather.apply(x, places.tokens, places.rows, places.missing)
    return result
