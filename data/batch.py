"""What the data hand to a training step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """tokens, labels: int64 [batch, sequence], labels are the next tokens. loss_mask: bool [batch, sequence], the target counts.
    documents: int32 [batch, sequence], ordinal of the document inside the sample, all zero unless documents are kept apart (`reset`).
    sample: int64 [batch], global sample indices. step: optimizer steps done."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor
    reset: bool
    sample: Tensor
    step: int
