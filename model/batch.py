"""What the model is told about one microbatch."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.precision.site import TokenKeys
from parallel.layout import Layout


@dataclass(frozen=True)
class Microbatch:
    """Everything that depends on where a token is, found on whole sequences (see `of`) before any rank takes its part of them.

    tokens, labels: int64 [1 + depths, batch, sequence]; row k, of multi-token-prediction depth k (0: the LM loss), holds the tokens k places
    ahead, and their targets. loss_mask: bool of the same shape, the target counts. documents: int32 [batch, sequence], ordinal of the document
    inside the sample; reset: no state crosses documents. positions: int64 [sequence], of the tokens in their sample. sequence_length: of the
    whole samples. sample: int64 [batch], global sample indices. step: optimizer steps done; progress: the fraction of the run that is done.
    depth: of multi-token prediction, for which a module is called now (0: none).
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor
    reset: bool
    positions: Tensor
    sequence_length: int
    sample: Tensor
    step: int
    progress: float = 0.0
    depth: int = 0

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
            sample=sample,
            step=step,
            progress=progress,
        )

    def own_positions(self, layout: Layout) -> Tensor:
        """Positions of the tokens this rank works on outside the tensor-parallel GEMMs: with sequence parallelism its part, else all."""
        if not layout.sequence_parallel:
            return self.positions
        return self.positions.chunk(layout.tensor_size)[layout.tensor_rank]

    def keys(self, positions: Tensor) -> TokenKeys:
        """Identity of the rows of a flattened [len(positions), batch] operand."""
        return TokenKeys(self.sample.repeat(len(positions)), positions.repeat_interleave(len(self.sample)), self.depth)

    def loss_counts(self) -> Tensor:
        """int64 [1 + depths]: valid targets of the LM loss and of every MTP depth."""
        return self.loss_mask.sum((1, 2))


def _ahead(x: Tensor, by: int) -> Tensor:
    """x [batch, sequence] moved `by` positions to the left; the freed end holds zeros."""
    return torch.nn.functional.pad(x, (0, by))[:, by:]
