"""One optimizer step: which samples this rank sees, what the loss is, and how it is normalised.

Every loss is a sum over valid tokens divided by the number of valid tokens of the *global* batch, each prediction depth over its own
count. The counts depend on the token masks alone, so they are known (one small all-reduce over the ranks with other tokens) before the first
forward pass; afterwards contributions of microbatches and of those ranks are plain sums and no rank ever rescales a gradient.

    loss/total = LM + scale * mean over depths (MTP) + auxiliary losses
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from model.batch import Microbatch
from parallel.layout import Layout


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are cut over data-parallel ranks and microbatches.

    Step t (counted from 0) consumes samples t * global_batch_size ... (t + 1) * global_batch_size - 1; a data-parallel rank takes one
    contiguous slice of them and cuts it, in order, into microbatches.

    skipped: global samples that no step reads, as rising, disjoint (first, behind the last); those behind them move up. It is part of a run's
    state, the same on every rank, so every layout reads the same samples.
    """

    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def microbatches(self) -> int:
        """Microbatches a rank processes in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def samples(self, step: int) -> list[Sequence[int]]:
        """Global sample indices of each of this rank's microbatches of step `step` (from 0)."""
        per_rank = self.global_batch_size // self.data_size
        first = step * self.global_batch_size + self.data_rank * per_rank
        places = [range(first + i, first + i + self.micro_batch_size) for i in range(0, per_rank, self.micro_batch_size)]
        return [[self._sample(place) for place in part] if self.skipped else part for part in places]

    def of_steps(self, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """The samples of all ranks in steps `first` to `last` (from 0), as (first, behind the last) without what is skipped already."""
        begin, end = self._sample(first * self.global_batch_size), self._sample((last + 1) * self.global_batch_size - 1) + 1
        edges = [begin, *(edge for pair in self.skipped if begin < pair[0] < end for edge in pair), end]
        return tuple(zip(edges[::2], edges[1::2], strict=True))

    def skipping(self, ranges: Sequence[Sequence[int]]) -> "BatchPlan":
        """The plan that skips these samples, as (first, behind the last), as well."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted((int(begin), int(end)) for begin, end in (*self.skipped, *ranges)):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        return replace(self, skipped=tuple(merged))

    def read(self, steps: int) -> int:
        """How many samples, from the first on, are behind a run of so many steps: read, or passed over."""
        return self._sample(steps * self.global_batch_size) if steps else 0

    def _sample(self, place: int) -> int:
        """Which sample is number `place` (from 0) of those that are not skipped."""
        for begin, end in self.skipped:
            if place < begin:
                break
            place += end - begin
        return place


def to_microbatch(batch: Batch, layout: Layout, progress: float, depths: int, *, targets: bool = False) -> Microbatch:
    """The model's view of this rank's part of a data batch, on its device. progress: the fraction of the run behind us, in [0, 1). depths: of
    multi-token prediction. targets: it is to know where they count (`Microbatch.targets`)."""
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    part = Microbatch.of(**values, progress=progress, depths=depths).part(layout.context_rank, layout.context_size)
    return (part.with_targets() if targets else part).to(layout.device)


def loss_weights(counts: Tensor, mtp_loss_scale: float) -> Tensor:
    """Weight of each summed loss in the total, fp32 [1 + depths]: 1/N for the LM loss, scale / (depths * N_k) for depth k.

    counts: int64 [1 + depths], valid tokens of the global batch. A depth without a valid token weighs nothing.
    """
    scales = torch.ones_like(counts, dtype=torch.float64)
    if len(counts) > 1:
        scales[1:] = mtp_loss_scale / (len(counts) - 1)
    return torch.where(counts > 0, scales / counts.clamp(min=1), torch.zeros_like(scales)).float()


def sum_over_ranks(values: Tensor, layout: Layout, *, pipeline: bool) -> Tensor:
    """Sum of `values` over the ranks with other sequences or other parts of them and, with `pipeline`, over the stages (which hold zeros where
    they do not know)."""
    total = values.clone()
    if layout.data_size * layout.context_size > 1:
        torch.distributed.all_reduce(total, group=layout.groups.dp_cp)
    if pipeline and layout.pipeline_size > 1:
        torch.distributed.all_reduce(total, group=layout.groups.pp)
    return total


class LossStep:
    """The forward step Megatron's schedules call, and the sums it leaves behind.

    counts: int64 [1 + depths], valid tokens of the whole global batch (see `loss_weights`).
    """

    def __init__(self, layout: Layout, counts: Tensor, mtp_loss_scale: float):
        self.layout = layout
        self.counts = counts
        self.weights = loss_weights(counts, mtp_loss_scale)
        self.sums = torch.zeros(len(counts), dtype=torch.float32, device=counts.device)

    def __call__(self, microbatches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
        return model(next(microbatches)), partial(self._loss)

    def _loss(self, sums: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.sums += sums.detach()
        # The schedules divide losses in place (by one here): the weighted sum is a fresh tensor, so nothing logged changes with it.
        total = (sums * self.weights).sum()
        return total, torch.ones((), dtype=torch.int32, device=total.device), {}

    def finite(self) -> bool:
        """Whether the losses of this rank are; known once its microbatches are done."""
        return bool(self.sums.isfinite().all())

    def means(self) -> Tensor:
        """Mean loss per valid token of the global batch, fp32 [1 + depths], the same on every rank."""
        sums = sum_over_ranks(self.sums, self.layout, pipeline=True)
        return sums / self.counts.clamp(min=1)
