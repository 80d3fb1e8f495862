"""The interface of DeepEP (deep_ep, which needs GPUs) as its documentation gives it, made of gloo's all-to-all: for tests of what stands before it.

It shows nothing of DeepEP's own kernels.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor
from torch.distributed import ProcessGroup

Splits = tuple[list[int], list[int]]
"""Rows that go to each rank, and that come from each."""


def exchanged(rows: Tensor, splits: Splits, group: ProcessGroup) -> Tensor:
    """rows, sorted by the rank they go to -> those that came, sorted by the rank they came from."""
    width = rows[:1].nbytes if len(rows) else rows.new_empty(1, *rows.shape[1:]).nbytes
    sent = rows.contiguous().view(torch.uint8).view(len(rows), width) if len(rows) else torch.empty(0, width, dtype=torch.uint8)
    came = torch.empty(sum(splits[1]), width, dtype=torch.uint8)
    dist.all_to_all_single(came, sent, splits[1], splits[0], group=group)
    return came.view(rows.dtype).view(sum(splits[1]), *rows.shape[1:])


def known(counts: Tensor, group: ProcessGroup) -> Splits:
    """counts: int64 [ranks], rows for each."""
    came = torch.empty_like(counts)
    dist.all_to_all_single(came, counts, group=group)
    return counts.tolist(), came.tolist()


def added(rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """rows: of tokens, in the order they are added, in fp32."""
    total = torch.zeros(count, *rows.shape[1:])
    for row, token in zip(rows.float(), tokens.tolist(), strict=True):
        total[token] += row
    return total.to(rows.dtype)


def checked(x: Tensor, multiple: int) -> None:
    assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.is_contiguous() and x.shape[1] % multiple == 0


class Event:
    def current_stream_wait(self) -> None: ...


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class Buffer:
    """A token goes once to each rank that has any of its experts."""

    def __init__(self, group: ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        ranks = self.group.size()
        there = torch.zeros(len(topk_idx), ranks, dtype=torch.bool)
        there.scatter_(1, topk_idx // (num_experts // ranks), True)
        return there.sum(0).int(), None, topk_idx.flatten().bincount(minlength=num_experts).int(), there, Event()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        checked(x, 8)
        if handle is not None:
            tokens, splits = handle[:2]
            return exchanged(x[tokens], splits, self.group), None, None, None, None, Event()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None and topk_idx is not None and topk_weights is not None
        assert topk_weights.dtype == torch.float32
        ranks, tokens = is_token_in_rank.T.nonzero(as_tuple=True)
        splits = known(is_token_in_rank.sum(0), self.group)
        local = len(num_tokens_per_expert) // self.group.size()
        places = topk_idx[tokens] - local * ranks.unsqueeze(1)
        elsewhere = (places < 0) | (places >= local)
        here = exchanged(places.masked_fill(elsewhere, -1), splits, self.group)
        weights = exchanged(topk_weights[tokens].masked_fill(elsewhere, 0.0), splits, self.group)
        counts = here[here >= 0].bincount(minlength=local).tolist()
        return exchanged(x[tokens], splits, self.group), here, weights, counts, (tokens, splits, len(x)), Event()

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None, Event]:
        checked(x, 8)
        tokens, (sent, came), count = handle

        def back(rows: Tensor) -> Tensor:
            return added(exchanged(rows, (came, sent), self.group), tokens, count)

        return back(x), None if topk_weights is None else back(topk_weights), Event()


class HybridEPBuffer:
    """A row for each expert that a token visits, sorted by expert."""

    def __init__(self, *, group: ProcessGroup, hidden_dim: int, num_local_experts: int, use_fp8: bool, **_: Any) -> None:
        assert not use_fp8
        self.group, self.local = group, num_local_experts

    def dispatch_with_permute(
        self, *, hidden: Tensor, routing_map: Tensor | None = None, probs: Tensor | None = None, handle: Any = None, **_: Any
    ) -> tuple[Any, ...]:
        checked(hidden, 16)
        if handle is None:
            assert routing_map is not None and routing_map.dtype == torch.bool
            experts, tokens = routing_map.T.nonzero(as_tuple=True)
            splits = known(routing_map.sum(0).view(-1, self.local).sum(1), self.group)
            places = exchanged(experts % self.local, splits, self.group)
            handle = (experts, tokens, splits, places.argsort(stable=True), places.bincount(minlength=self.local), len(hidden))
        experts, tokens, splits, order, counts, _count = handle
        weights = None
        if probs is not None:
            assert probs.dtype == torch.float32
            weights = exchanged(probs[tokens, experts], splits, self.group)[order]
        return exchanged(hidden[tokens], splits, self.group)[order], weights, None, counts, handle

    def combine_with_unpermute(self, *, hidden: Tensor, probs: Tensor | None = None, handle: Any, **_: Any) -> tuple[Tensor, Tensor | None]:
        checked(hidden, 16)
        experts, tokens, (sent, came), order, _counts, count = handle

        def back(rows: Tensor) -> Tensor:
            return exchanged(rows[order.argsort()], (came, sent), self.group)

        if probs is not None:
            spread = torch.zeros(count, self.local * self.group.size())
            spread[tokens, experts] = back(probs)
        return added(back(hidden), tokens, count), None if probs is None else spread


@contextmanager
def installed() -> Iterator[None]:
    """deep_ep can be imported, and Megatron has found it."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer = Buffer, HybridEPBuffer  # type: ignore[attr-defined]
    utils.EventHandle, utils.EventOverlap = Event, lambda handle: Event()  # type: ignore[attr-defined]
    names = {"deep_ep": package, "deep_ep.utils": utils}
    sys.modules |= names
    try:
        importlib.reload(fused_a2a)
        yield
    finally:
        for name in names:
            del sys.modules[name]
        importlib.reload(fused_a2a)
