"""Dense feed-forward layer: squared ReLU, no gate, no bias. Also the shared expert of a MoE layer."""

import math

import torch
from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.linear import Linear


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def output_std(context: ModelContext) -> float:
    """Standard deviation of projections back to the residual stream, smaller the more layers add to it."""
    return context.config.init_std / math.sqrt(2 * len(context.config.layers))


class MLP(nn.Module):
    """down(relu(up(x))^2); hidden features split over the tensor group."""

    def __init__(self, context: ModelContext, name: str, ffn_size: int):
        super().__init__()
        hidden = context.config.hidden_size
        self.up_proj = Linear(context, f"{name}.up_proj", hidden, ffn_size, "column", std=context.config.init_std)
        self.down_proj = Linear(context, f"{name}.down_proj", ffn_size, hidden, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        return self.down_proj(squared_relu(self.up_proj(x, microbatch)), microbatch)
