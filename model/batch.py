"""What the model is told about one microbatch."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from model.cache import Cache
from model.precision.site import TokenKeys
from parallel.layout import Layout


@dataclass(frozen=True)
class Bounds:
    """Documents as they follow one another in [batch, sequence], flattened; one ends where its sequence does."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    starts: Tensor
    """int32 [documents + 1], the first token of each, and the number of tokens."""

    @classmethod
    def of(cls, documents: Tensor) -> Self:
        """documents: int [batch, sequence], ordinals, on the host, or reading them waits for the device."""
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=documents.numel())
        return cls(tuple(starts.diff().tolist()), starts.int())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same on a device."""
        return replace(self, starts=self.starts.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Microbatch:
    """Everything that depends on where a token is, found on whole sequences (see `of`) before any rank takes its part of them (see `part`).

    tokens, labels: int64 [1 + depths, batch, sequence]; row k, of multi-token-prediction depth k (0: the LM loss), holds the tokens k places
    ahead, and their targets. loss_mask: bool of the same shape, the target counts. documents: int32 [batch, sequence], ordinal of the document
    inside the sample; reset: no state crosses documents. positions: int64 [sequence], of the tokens in their sample; first: of the first one.
    sequence_length: of the whole samples; whole_documents: int32 [batch, sequence_length], of all their tokens. sample: int64 [batch], global
    sample indices. step: optimizer steps done; progress: the fraction of the run that is done. depth: of multi-token prediction, for which a
    module is called now (0: none). wrong: wrong predictions are counted instead of losses. choose_from: every head names the likeliest of so many
    ids instead (0: losses). bounds: of the documents; None unless reset, and where ranks split sequences. targets: of each depth, the rows of a
    flattened [sequence, batch] whose target counts, int64 [any]; None: whoever wants them finds them, which waits for a GPU. cache: of the tokens
    before these, where a text is made; then reset is False.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor
    reset: bool
    positions: Tensor
    sequence_length: int
    whole_documents: Tensor
    sample: Tensor
    step: int
    progress: float = 0.0
    depth: int = 0
    first: int = 0
    choose_from: int = 0
    wrong: bool = False
    bounds: Bounds | None = None
    targets: tuple[Tensor, ...] | None = None
    cache: Cache | None = None

    @classmethod
    def of(
        cls,
        *,
        tokens: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        documents: Tensor,
        reset: bool,
        sample: Tensor,
        step: int,
        depths: int,
        progress: float = 0.0,
    ) -> Self:
        """From whole sequences, all [batch, sequence], for a model that predicts `depths` tokens beyond the next one.

        Depth k at position t predicts token t + k + 1. The target must exist, be wanted by the mask, and, when documents are kept apart, lie in
        the document of t.
        """
        length = tokens.shape[1]
        masks = [loss_mask]
        for depth in range(1, depths + 1):
            valid = torch.zeros_like(loss_mask)
            valid[:, :-depth] = loss_mask[:, depth:] & (documents[:, depth:] == documents[:, :-depth])
            masks.append(valid)
        return cls(
            tokens=torch.stack([_ahead(tokens, depth) for depth in range(depths + 1)]),
            labels=torch.stack([_ahead(labels, depth) for depth in range(depths + 1)]),
            loss_mask=torch.stack(masks),
            documents=documents,
            reset=reset,
            positions=torch.arange(length, device=tokens.device),
            sequence_length=length,
            whole_documents=documents,
            sample=sample,
            step=step,
            progress=progress,
            bounds=Bounds.of(documents) if reset else None,
        )

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        moved = {each.name: getattr(self, each.name) for each in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in moved.items() if isinstance(value, Tensor | Bounds)}
        if self.targets is not None:
            moved["targets"] = tuple(rows.to(device, non_blocking=True) for rows in self.targets)
        return replace(self, **moved)

    def with_targets(self) -> Self:
        """The same that knows `targets`; to be asked on the host."""
        return replace(self, targets=tuple(mask.T.flatten().nonzero().flatten() for mask in self.loss_mask))

    @classmethod
    def following(cls, tokens: Tensor, cache: Cache, sample: Tensor, *, step: int, progress: float) -> Self:
        """The next tokens of the sequences of a cache, int64 [batch, sequence], without targets. sample: int64 [batch], as anywhere."""
        length, nothing = tokens.shape[1], torch.zeros_like(tokens)
        documents = nothing.int()
        return cls(
            tokens=tokens.unsqueeze(0),
            labels=nothing.unsqueeze(0),
            loss_mask=nothing.bool().unsqueeze(0),
            documents=documents,
            reset=False,
            positions=torch.arange(length, device=tokens.device),
            sequence_length=length,
            whole_documents=documents,
            sample=sample,
            step=step,
            progress=progress,
            cache=cache,
        )

    @property
    def few(self) -> bool:
        """Whether these are some tokens of a text that is being made: see `Cache.revocable`."""
        return self.cache is not None and self.cache.revocable

    @property
    def singly(self) -> bool:
        """Whether every token is to be computed as if it came alone: see `Cache`."""
        return self.cache is not None and self.cache.singly

    def part(self, rank: int, size: int) -> Self:
        """What rank `rank` of `size` ranks that split sequences works on: consecutive tokens, as many on each."""
        length = self.sequence_length // size
        own = slice(rank * length, (rank + 1) * length)
        return replace(
            self,
            tokens=self.tokens[..., own],
            labels=self.labels[..., own],
            loss_mask=self.loss_mask[..., own],
            documents=self.documents[:, own],
            positions=self.positions[own],
            first=self.first + own.start,
            bounds=self.bounds if size == 1 else None,
        )

    def documents_before(self, count: int) -> Tensor:
        """int32 [batch, count]: documents of the tokens right before these, -1 where the sample has none."""
        held = self.whole_documents[:, max(0, self.first - count) : self.first]
        return torch.nn.functional.pad(held, (count - held.shape[1], 0), value=-1)

    def own_positions(self, layout: Layout) -> Tensor:
        """Positions of the tokens this rank works on outside the tensor-parallel GEMMs: with sequence parallelism its part, else all."""
        if not layout.sequence_parallel:
            return self.positions
        return self.positions.chunk(layout.tensor_size)[layout.tensor_rank]

    def own_first(self, layout: Layout) -> int:
        """The first of `own_positions`, on the host."""
        return self.first + (self.positions.numel() // layout.tensor_size * layout.tensor_rank if layout.sequence_parallel else 0)

    def keys(self, positions: Tensor) -> TokenKeys:
        """Identity of the rows of a flattened [len(positions), batch] operand."""
        return TokenKeys(self.sample.repeat(len(positions)), positions.repeat_interleave(len(self.sample)), self.depth)

    def loss_counts(self) -> Tensor:
        """int64 [1 + depths]: valid targets of the LM loss and of every MTP depth."""
        return self.loss_mask.sum((1, 2))


def _ahead(x: Tensor, by: int) -> Tensor:
    """x [batch, sequence] moved `by` positions to the left; the freed end holds zeros."""
    return torch.nn.functional.pad(x, (0, by))[:, by:]
