"""The random Hadamard transform.

Consecutive elements along a GEMM's inner dimension are rotated by y = (x * s) H / sqrt(n), with Sylvester's H of order n and a vector s of
signs. Both operands of a GEMM are rotated alike, the rotation is orthogonal, so their product is unchanged; what changes is that an outlier is
spread over its n - 1 neighbours before they share a block scale.

A rotation is a value: NVFP4 as Transformer Engine does it rotates 16 tokens by one fixed vector of signs for all layers and steps (`FIXED`), of
wgrad's operands only. Other schemes draw the signs anew (`Rotation.drawn`), or rotate more elements.
Source: Transformer Engine 2.20, arXiv 2509.25149.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from model.precision.philox import philox
from model.precision.transfer import to_device

GROUP = 16


@dataclass(frozen=True)
class Rotation:
    """diag(signs) H / sqrt(n). Raises ValueError where n is no power of two or a sign is not 1 or -1."""

    signs: tuple[int, ...]
    """n numbers, 1 or -1."""

    def __post_init__(self) -> None:
        if self.size & (self.size - 1) or not self.signs or set(self.signs) - {1, -1}:
            raise ValueError(f"a rotation has a power of two of signs, each 1 or -1, not {self.signs}")

    @classmethod
    def drawn(cls, key: tuple[int, int], step: int, size: int = GROUP) -> "Rotation":
        """The rotation of a step: signs are the lowest bits of Philox words, which depend on nothing but key (see `philox.stream_key`)
        and step, so that both operands, every rank and a resumed run draw the same."""
        one = torch.zeros(1, 1, dtype=torch.int64)
        counter = (torch.arange(-(-size // 4))[:, None], one, one, one + step)
        words = torch.cat(torch.broadcast_tensors(*philox(counter, key)), dim=1).flatten()[:size]
        return cls(tuple((1 - 2 * (words & 1)).tolist()))

    @property
    def size(self) -> int:
        return len(self.signs)

    def matrix(self, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [n, n]; orthogonal. A row vector of n elements is multiplied with it from the right."""
        return to_device(_matrix(self), device)


FIXED = Rotation((1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1))
UNSIGNED = Rotation((1,) * GROUP)


def sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix, fp32 [order, order], order a power of two: entry (i, j) is (-1)^(number of ones in i & j)."""
    index = torch.arange(order)
    both = index[:, None] & index[None, :]
    ones = torch.stack([(both >> bit) & 1 for bit in range(order.bit_length())]).sum(0)
    return (1 - 2 * (ones % 2)).float()


@lru_cache(maxsize=64)
def _matrix(rotation: Rotation) -> Tensor:
    return torch.tensor(rotation.signs, dtype=torch.float32)[:, None] * (sylvester(rotation.size) / math.sqrt(rotation.size))


def rotate(x: Tensor, rotation: Rotation = FIXED) -> Tensor:
    """Rotates every n consecutive elements of the last dimension; computed in fp32, rounded to x's dtype.

    Raises ValueError when the last dimension is no multiple of n.
    """
    n = rotation.size
    if x.shape[-1] % n:
        raise ValueError(f"the Hadamard transform works on groups of {n} tokens, but there are {x.shape[-1]}: pad them")
    groups = x.unflatten(-1, (x.shape[-1] // n, n)).float()
    return (groups @ rotation.matrix(x.device)).reshape(x.shape).to(x.dtype)
