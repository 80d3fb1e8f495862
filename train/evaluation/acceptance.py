"""How many of the tokens that MTP depths draft the model itself would have chosen, by domain.

A draft is worth something when it is what the trunk says, right or wrong. On a given text x, with the text's own tokens as inputs everywhere:

    c(t)     the trunk's likeliest token behind x_0 ... x_t
    d_k(s)   that of MTP depth k, which sees x_0 ... x_{s+k}, for the same place as c(s + k)

    depth k is accepted at s      where d_j(s) = c(s + j) for every j = 1 ... k
    accept/<domain>/depth_k       accepted(k) / accepted(k - 1), over the positions s of all windows; accepted(0) counts every position

so depth k is asked only where the depths before it were accepted, as a verifier does. Positions are those whose deepest draft still lies in the
window. On a text the model has written greedily itself, c(t) = x_{t+1} and this is exactly what speculative decoding accepts from each position;
on other texts it is what it would accept with the context corrected behind each token. Limits of the 95% interval of each share, from a bootstrap
over windows, are logged as accept/<domain>/depth_k_low and _high.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.domains import DOMAINS, Windows, domain_windows
from model.batch import Microbatch
from train.evaluation.base import Evaluator, Measured, register_evaluator
from train.evaluation.intervals import share_interval
from train.step import sum_over_ranks, to_microbatch


@dataclass(frozen=True)
class Acceptance(Evaluator):
    """accept/<domain>/depth_k, and _low and _high beside it: see above."""

    domains: tuple[str, ...] = DOMAINS
    """Kinds of text that are looked at, see `data.domains`."""
    windows: int = 16
    """Pieces of text of a domain, each of train.sequence_length tokens."""
    seed: int = 1
    """Of generated text."""
    length_every: int = 0
    """Steps from one evaluation to the next, and at the end, that also lets the model write, with its drafts, and says how many tokens a pass gave
    (accept/<domain>/length); 0: none does."""
    length_tokens: int = 64
    """Tokens it then writes behind the first half of each window, each the likeliest."""

    def __post_init__(self) -> None:
        key = "evaluation.acceptance"
        for index, domain in enumerate(self.domains):
            if domain not in DOMAINS:
                raise ValueError(f"{key}.domains[{index}]={domain!r} is unknown: use some of {', '.join(DOMAINS)}")
            if domain in self.domains[:index]:
                raise ValueError(f"{key}.domains names {domain!r} twice: leave one out")
        if not self.domains:
            raise ValueError(
                f"{key}.domains=[] names none: use some of {', '.join(DOMAINS)}, or leave acceptance out of evaluation.evaluators"
            )
        if self.length_every < 0:
            raise ValueError(f"{key}.length_every={self.length_every} is negative: use 0 for never, or for instance 1000")
        if self.length_tokens < 1:
            raise ValueError(f"{key}.length_tokens={self.length_tokens} must be at least 1")
        if self.windows < 2:
            raise ValueError(f"{key}.windows={self.windows} must be at least 2, between which an interval can be seen")

    def evaluate(self, run: Measured, step: int) -> dict[str, float]:
        texts = [self.text(domain, run) for domain in self.domains]
        ids, sizes = np.concatenate([text.ids for text in texts]), np.concatenate([text.sizes for text in texts])
        chosen = choices(run, step, ids)
        accepted = accepted_counts(chosen, sizes)
        metrics = {}
        for number, domain in enumerate(self.domains):
            own = accepted[number * self.windows : (number + 1) * self.windows]
            for depth in range(1, run.mtp_depths + 1):
                if own[:, depth - 1].any():
                    name = f"accept/{domain}/depth_{depth}"
                    metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"] = share_interval(own[:, depth], own[:, depth - 1])
        return metrics

    def length_due(self, step: int, last: int) -> bool:
        """Whether an evaluation after step (from 1) of a run that ends with step `last` lets the model write."""
        return self.length_every > 0 and (step % self.length_every == 0 or step == last)

    def text(self, domain: str, run: Measured) -> Windows:
        """The windows of a domain."""
        data = run.data
        return domain_windows(
            domain, data.config, data.tokenizer, length=run.sequence_length, count=self.windows, seed=self.seed, run_seed=data.seed
        )


def accepted_counts(chosen: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """chosen: int64 [windows, 1 + depths, length], of the trunk and each depth; sizes: int64 [windows], tokens of text in each. Returns int64
    [windows, 1 + depths]: positions, and of those the ones where every depth up to k is accepted."""
    depths, length = chosen.shape[1] - 1, chosen.shape[2]
    good = np.arange(length - depths)[None, :] < sizes[:, None] - depths
    counts = [good.sum(1)]
    for depth in range(1, depths + 1):
        good = good & (chosen[:, depth, : length - depths] == chosen[:, 0, depth : length - depths + depth])
        counts.append(good.sum(1))
    return np.stack(counts, axis=1)


def choices(run: Measured, step: int, ids: np.ndarray) -> np.ndarray:
    """The likeliest next token for the trunk and each MTP depth, int64 [windows, 1 + depths, length], the same on every rank.

    ids: int64 [windows, length]. Windows are dealt out to the data-parallel replicas; those that run out of them repeat the last ones, whose
    choices are left out, because every rank must take part in every collective.
    """
    layout, size, length = run.layout, run.micro_batch_size, run.sequence_length
    batches = -(-len(ids) // size)
    rounds = -(-batches // layout.data_size)
    own = [number * layout.data_size + layout.data_rank for number in range(rounds)]
    padded = np.concatenate([ids, np.repeat(ids[-1:], batches * size - len(ids), axis=0)])

    def microbatches() -> Iterator[Microbatch]:
        for number in own:
            first = min(number, batches - 1) * size
            batch = _batch(padded[first : first + size], first)
            microbatch = to_microbatch(batch, layout, run.progress(step), run.mtp_depths)
            yield replace(microbatch, choose_from=run.data.tokenizer.vocab_size)

    kept = _Choices()
    run.engine.evaluate(kept, microbatches(), rounds, sequence_length=length, micro_batch_size=size)
    whole = torch.zeros((batches, 1 + run.mtp_depths, size, length), dtype=torch.int64, device=layout.device)
    part = length // layout.context_size
    for number, chosen in zip(own, kept.made, strict=False):  # only the last pipeline stage has any
        if number < batches:
            whole[number, :, :, layout.context_rank * part : (layout.context_rank + 1) * part] = chosen
    whole = sum_over_ranks(whole, layout, pipeline=True)
    return whole.transpose(1, 2).flatten(0, 1)[: len(ids)].cpu().numpy()


def _batch(ids: np.ndarray, first: int) -> Batch:
    """Windows without targets, each one document."""
    tokens = torch.from_numpy(ids.copy())
    nothing = torch.zeros_like(tokens)
    sample = torch.arange(first, first + len(ids))
    return Batch(tokens=tokens, labels=nothing, loss_mask=nothing.bool(), documents=nothing.int(), reset=False, sample=sample, step=0)


class _Choices:
    """The forward step that keeps what the model gives, int64 [1 + depths, batch, sequence] of each microbatch, in order."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __call__(self, microbatches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
        return model(next(microbatches)), self._keep

    def _keep(self, chosen: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.made.append(chosen)
        return torch.zeros((), device=chosen.device), torch.ones((), dtype=torch.int32, device=chosen.device), {}


register_evaluator("acceptance", Acceptance)
