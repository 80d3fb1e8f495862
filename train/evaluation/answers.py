"""Tasks whose answers are known: which of a task's sequences a model answers without a mistake, on any layout.

A target counts as right where the likeliest token is the one wanted, given the true tokens before it. For an answer of several tokens that is greedy
generation: where every token is right after the right ones, greedy decoding says the whole answer, and where one is not, it does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch, Sample
from model.batch import Microbatch
from train.evaluation.base import Measured
from train.step import sum_over_ranks, to_microbatch


@dataclass(frozen=True)
class Answers:
    """wrong, targets: int64 [sequences], wrong predictions and predictions of each."""

    wrong: np.ndarray
    targets: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of right predictions."""
        return 1.0 - float(self.wrong.sum()) / float(self.targets.sum())

    @property
    def exact(self) -> float:
        """The share of sequences without a wrong one."""
        return float((self.wrong == 0).mean())


class _Count:
    """The forward step Megatron's schedules call; rows: of every microbatch, where its sequences lie in `wrong`."""

    def __init__(self, rows: Iterator[slice], wrong: Tensor):
        self.rows, self.wrong = rows, wrong

    def __call__(self, microbatches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
        return model(next(microbatches)), self._count

    def _count(self, wrong: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.wrong[next(self.rows)] += wrong
        return wrong.sum(), torch.ones((), dtype=torch.int32, device=wrong.device), {}


def answers(run: Measured, step: int, samples: Sequence[Sample]) -> Answers:
    """What the model says to these sequences, all of one length. Collective; the same on every rank.

    Microbatches have about as many tokens as those of training; they are dealt out to the data-parallel replicas in turn.
    """
    count, length, layout, progress = len(samples), len(samples[0].tokens), run.layout, run.progress(step)
    size = min(count, max(1, run.micro_batch_size * run.sequence_length // length))
    batches = -(-count // size)
    rounds = -(-batches // layout.data_size)
    places = range(layout.data_rank, rounds * layout.data_size, layout.data_size)
    wrong = torch.zeros(rounds * layout.data_size * size, device=layout.device)

    def microbatches() -> Iterator[Microbatch]:
        for place in places:
            rows = [samples[(place * size + row) % count] for row in range(size)]
            microbatch = to_microbatch(_batch(rows, step), layout, progress, run.mtp_depths)
            yield replace(microbatch, wrong=True)

    own = (slice(place * size, (place + 1) * size) for place in places)
    run.engine.evaluate(_Count(own, wrong), microbatches(), rounds, sequence_length=length, micro_batch_size=size)
    missed = sum_over_ranks(wrong, layout, pipeline=True)[:count].round().long().cpu().numpy()
    return Answers(missed, np.array([sample.counts.sum() for sample in samples], dtype=np.int64))


def _batch(rows: list[Sample], step: int) -> Batch:
    tokens, labels, counts, documents = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("tokens", "labels", "counts", "documents")
    )
    return Batch(tokens, labels, counts, documents, False, torch.arange(len(rows)), step)
