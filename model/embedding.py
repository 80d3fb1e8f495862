"""Token embedding and the loss of the output head, both split over the vocabulary."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn

from model import init
from model.context import ModelContext
from model.parameter import sharded_parameter
from model.precision.linear import leave_in_main_grad
from parallel.layout import Layout
from parallel.shards import Section, split_sections


class _Lookup(torch.autograd.Function):
    """weight[index], whose gradient is summed over tokens in fp32, into main_grad where Megatron's DDP keeps one.

    A bf16 sum over thousands of equal tokens would lose most of them.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, outside: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(index, outside)
        ctx.target = target
        return weight[index].masked_fill_(outside.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, None]:
        index, outside = ctx.saved_tensors
        weight = ctx.target
        grad = grad.float().masked_fill(outside.unsqueeze(-1), 0.0).flatten(0, -2)
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            total = torch.zeros(weight.shape, dtype=torch.float32, device=grad.device)
            return None, None, total.index_add_(0, index.flatten(), grad).to(weight.dtype), None
        main_grad.index_add_(0, index.flatten(), grad)
        leave_in_main_grad(weight)
        return None, None, None, None


class Embedding(nn.Module):
    """Rows of the vocabulary split over the tensor group."""

    def __init__(self, context: ModelContext):
        super().__init__()
        self.context = context
        config, layout = context.config, context.layout
        shape = (config.vocab_size // layout.tensor_size, config.hidden_size)
        self.first = layout.tensor_rank * shape[0]
        pieces = split_sections(
            [Section("embeddings.weight", config.vocab_size)], (config.hidden_size,), layout.tensor_rank, layout.tensor_size
        )
        self.weight = sharded_parameter(context, shape, pieces, init.normal(config.init_std), "rows")

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [batch, sequence] -> [sequence, batch, hidden], or this rank's part of the sequence."""
        layout = self.context.layout
        local = tokens.T - self.first
        outside = (local < 0) | (local >= self.weight.shape[0])
        rows = _Lookup.apply(local.masked_fill(outside, 0), outside, self.weight, self.weight)
        if layout.tensor_size == 1:
            return rows
        if layout.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(rows)
        return mappings.reduce_from_tensor_model_parallel_region(rows)


def summed_cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Sum of -log p(label) over the valid tokens, fp32, 0-dim.

    logits: [sequence, batch, vocabulary / tensor], overwritten if fp32; labels int64 and valid bool [batch, sequence].
    """
    losses = vocab_parallel_cross_entropy(logits.float(), labels.T.contiguous())
    return (losses * valid.T).sum()


def likeliest(logits: Tensor, ids: int, layout: Layout) -> Tensor:
    """The likeliest of the ids below `ids`, the lowest of several: int64 [batch, sequence], the same on every rank of the tensor group.

    logits: [sequence, batch, vocabulary / tensor]. Collective.
    """
    first = layout.tensor_rank * logits.shape[-1]
    beyond = torch.arange(first, first + logits.shape[-1], device=logits.device) >= ids
    best, chosen = logits.float().masked_fill(beyond, -torch.inf).max(-1)
    chosen = chosen + first
    if layout.tensor_size > 1:
        offers = [torch.empty_like(best) for _ in range(layout.tensor_size)]
        named = [torch.empty_like(chosen) for _ in range(layout.tensor_size)]
        dist.all_gather(offers, best.contiguous(), group=layout.groups.tp)
        dist.all_gather(named, chosen.contiguous(), group=layout.groups.tp)
        rank = torch.stack(offers).argmax(0, keepdim=True)  # the first of several
        chosen = torch.stack(named).gather(0, rank).squeeze(0)
    return chosen.T
