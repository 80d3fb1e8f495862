"""What the data hand to a training step."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One row of a batch, as a source gives it. tokens, labels: int64 [sequence]; counts: bool [sequence], the target counts. documents: int32
    [sequence], ordinal of the document inside the sample."""

    tokens: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class Batch:
    """tokens, labels: int64 [batch, sequence], labels are the next tokens, or a task's answers. loss_mask: bool [batch, sequence], the target
    counts. documents: int32 [batch, sequence], ordinal of the document inside the sample, all zero unless documents are kept apart (`reset`).
    sample: int64 [batch], global sample indices. step: optimizer steps done."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor
    reset: bool
    sample: Tensor
    step: int
