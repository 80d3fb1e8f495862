"""A mixer: every token's hidden features are gated by those of the token before. Letter S.

y = W_out (relu(W_in x)_t * relu(W_in x)_{t-1})        0 before the sequence, and before a document where those are kept apart
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.linear import Linear
from model.mixer import NOT_GIVEN, Dimension, Mixer, Needed, Sizes, register_mixer
from model.parameter import output_std


@dataclass(frozen=True)
class ShiftSizes(Sizes):
    shift_size: Needed = NOT_GIVEN
    """Hidden features of a shift layer."""


class Shift(nn.Module):
    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config = context.config
        inner = config.sizes(ShiftSizes).shift_size
        self.in_proj = Linear(context, f"{name}.in_proj", config.hidden_size, inner, "column", std=config.init_std)
        self.out_proj = Linear(context, f"{name}.out_proj", inner, config.hidden_size, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        now = torch.relu(self.in_proj(x, microbatch))
        before = nn.functional.pad(now[:-1], (0, 0, 0, 0, 1, 0))
        if microbatch.reset:
            order = microbatch.documents.T
            before = before * nn.functional.pad(order[1:] == order[:-1], (0, 0, 1, 0)).unsqueeze(-1)
        return self.out_proj(now * before, microbatch)


def register() -> None:
    register_mixer(Mixer(letter="S", name="shift", build=Shift, sizes=ShiftSizes, dimensions=(Dimension("shift_size", ("tensor",)),)))
