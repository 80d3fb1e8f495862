"""One layer of the hybrid stack: x + mixer(norm(x)), the mixer by the pattern's letter."""

from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.mixer import MIXERS
from model.norm import RMSNorm


class Layer(nn.Module):
    """Pre-norm and residual around one mixer. kind: what it declares of itself."""

    def __init__(self, context: ModelContext, name: str, letter: str):
        super().__init__()
        self.context = context
        self.kind = MIXERS[letter]
        self.norm = RMSNorm(context, f"{name}.norm")
        self.mixer = self.kind.build(context, f"{name}.mixer")

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        return self.context.recompute.whole("layer", self._forward, x, microbatch)

    def _forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        with self.context.recompute.dropped("norm", self.norm, x) as normed:
            return x + self.mixer(normed, microbatch)
