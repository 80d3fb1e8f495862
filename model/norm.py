"""RMSNorm, in fp32 inside."""

from torch import Tensor, nn

from model import init
from model.context import ModelContext
from model.elementwise import evenly
from model.parameter import sharded_parameter
from parallel.shards import whole


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in x's dtype.

    The weight is whole on every rank of the tensor group.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        size = context.config.hidden_size
        self.eps = context.config.norm_eps
        self.weight = sharded_parameter(context, (size,), [whole(f"{name}.weight", (size,))], init.constant(1.0), "everywhere")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def gated_group_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float, *, singly: bool = False) -> Tensor:
    """Mamba-2's output norm: RMSNorm of x * silu(gate) per group of `group_size` channels, in fp32, in x's dtype. singly: see `model.cache`."""
    gate = gate.float()
    gated = x.float() * (evenly(nn.functional.silu, gate) if singly else nn.functional.silu(gate))
    groups = gated.unflatten(-1, (-1, group_size))
    normed = nn.functional.rms_norm(groups, (group_size,), eps=eps).flatten(-2)
    return (normed * weight.float()).to(x.dtype)
