"""Dense feed-forward layer: squared ReLU, no gate, no bias. Also the shared expert of a MoE layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.linear import Linear
from model.mixer import NOT_GIVEN, Dimension, HuggingFace, Mixer, Needed, Sizes, register_mixer
from model.parameter import output_std


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


@dataclass(frozen=True)
class MLPSizes(Sizes):
    ffn_hidden_size: Needed = NOT_GIVEN
    """Hidden features of a dense MLP layer."""


class MLP(nn.Module):
    """down(relu(up(x))^2); hidden features split over the tensor group."""

    def __init__(self, context: ModelContext, name: str, ffn_size: int):
        super().__init__()
        self.context = context
        hidden = context.config.hidden_size
        self.up_proj = Linear(context, f"{name}.up_proj", hidden, ffn_size, "column", std=context.config.init_std)
        self.down_proj = Linear(context, f"{name}.down_proj", ffn_size, hidden, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        with self.context.recompute.dropped("activation", squared_relu, self.up_proj(x, microbatch)) as active:
            return self.down_proj(active, microbatch)


def build(context: ModelContext, name: str) -> MLP:
    return MLP(context, name, context.config.sizes(MLPSizes).ffn_hidden_size)


register_mixer(
    Mixer(
        letter="-",
        name="MLP",
        build=build,
        sizes=MLPSizes,
        context_tokens=lambda sizes: 1,
        dimensions=(Dimension("ffn_hidden_size", ("tensor",)),),
        hugging_face=HuggingFace(
            "mlp", keys={"intermediate_size": "ffn_hidden_size"}, constants={"mlp_bias": False, "mlp_hidden_act": "relu2"}
        ),
    )
)
