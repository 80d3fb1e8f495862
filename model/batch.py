"""What the model is told about one microbatch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.precision.site import TokenKeys


@dataclass(frozen=True)
class Microbatch:
    """tokens, labels: int64 [batch, sequence] (labels are the next tokens); loss_mask: bool [batch, sequence], the
    target counts; documents: int32 [batch, sequence], ordinal of the document inside the sample; reset: no state
    crosses documents; sample: int64 [batch], global sample indices; step: optimizer steps done; progress: the
    fraction of the run that is done; depth: of multi-token prediction, for which a module is called now (0: none)."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor
    reset: bool
    sample: Tensor
    step: int
    progress: float = 0.0
    depth: int = 0

    @property
    def sequence_length(self) -> int:
        return self.tokens.shape[1]

    def keys(self, first: int, length: int) -> TokenKeys:
        """Identity of the rows of a flattened [length, batch] operand whose first position is `first`."""
        position = torch.arange(first, first + length, device=self.sample.device)
        batch = len(self.sample)
        return TokenKeys(self.sample.repeat(length), position.repeat_interleave(batch), self.depth)

    def loss_valid(self, depth: int) -> Tensor:
        """bool [batch, sequence]: which targets of MTP depth `depth` (0: the LM loss) count.

        Depth k at position t predicts token t + k + 1. The target must exist, be wanted by the mask, and, when
        documents are kept apart, lie in the document of t.
        """
        if depth == 0:
            return self.loss_mask
        valid = torch.zeros_like(self.loss_mask)
        valid[:, :-depth] = self.loss_mask[:, depth:] & (self.documents[:, depth:] == self.documents[:, :-depth])
        return valid

    def loss_counts(self, depths: int) -> Tensor:
        """int64 [1 + depths]: valid targets of the LM loss and of every MTP depth."""
        return torch.stack([self.loss_valid(depth).sum() for depth in range(depths + 1)])


def shift_left(x: Tensor, by: int) -> Tensor:
    """x [batch, sequence] moved `by` positions to the left; the freed end holds zeros."""
    return torch.nn.functional.pad(x[:, by:], (0, by))
