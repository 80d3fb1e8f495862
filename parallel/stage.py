"""What an engine expects of a model: one module for each pipeline stage, or for each part of one."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Stage(nn.Module, ABC):
    """A contiguous part of the model's layers, on one rank of the pipeline. is_first, is_last: of all parts."""

    is_first: bool = True
    is_last: bool = True

    @property
    def shared_weight(self) -> nn.Parameter | None:
        """What the first and the last stage both hold and train as one, in their own copies; None where there is nothing of the kind."""
        return None

    @abstractmethod
    def forward(self, microbatch: Any, input: Tensor | None = None) -> Tensor:
        """input: what the stage before passed on, [sequence, batch, hidden]; None for the first. Returns what the next stage gets, or, on
        the last one, what the loss function takes."""
