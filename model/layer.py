"""One layer of the hybrid stack: x + mixer(norm(x)), the mixer by the pattern's letter."""

from collections.abc import Callable

from torch import Tensor, nn

from model.attention import Attention
from model.batch import Microbatch
from model.context import ModelContext
from model.mamba import MambaMixer
from model.mlp import MLP
from model.moe import MoE
from model.norm import RMSNorm


def _mlp(context: ModelContext, name: str) -> MLP:
    assert context.config.ffn_hidden_size
    return MLP(context, name, context.config.ffn_hidden_size)


MIXERS: dict[str, Callable[[ModelContext, str], nn.Module]] = {"M": MambaMixer, "*": Attention, "E": MoE, "-": _mlp}


class Layer(nn.Module):
    """Pre-norm and residual around one mixer."""

    def __init__(self, context: ModelContext, name: str, letter: str):
        super().__init__()
        self.norm = RMSNorm(context, f"{name}.norm")
        self.mixer = MIXERS[letter](context, f"{name}.mixer")

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        return x + self.mixer(self.norm(x), microbatch)
