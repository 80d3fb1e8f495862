"""The random Hadamard transform of wgrad operands.

Every 16 consecutive tokens are rotated by y = (x * s) H16 / 4, with Sylvester's H16 and one fixed vector of signs for all layers and steps.
Both wgrad operands are rotated alike, the rotation is orthogonal, so their product over tokens is unchanged; what changes is that an outlier
is spread over its 16 neighbours before they share a block scale.
Source: Transformer Engine 2.20, arXiv 2509.25149.
"""

import torch
from torch import Tensor

GROUP = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix, fp32 [order, order], order a power of two: entry (i, j) is (-1)^(number of ones in i & j)."""
    index = torch.arange(order)
    both = index[:, None] & index[None, :]
    ones = torch.stack([(both >> bit) & 1 for bit in range(order.bit_length())]).sum(0)
    return (1 - 2 * (ones % 2)).float()


def rotation(*, signs: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """diag(s) H16 / 4, fp32 [16, 16]; orthogonal."""
    matrix = sylvester(GROUP) / 4
    if signs:
        matrix = torch.tensor(SIGNS, dtype=torch.float32)[:, None] * matrix
    return matrix.to(device)


def rotate(x: Tensor, *, signs: bool = True) -> Tensor:
    """Rotates every 16 consecutive elements of the last dimension; computed in fp32, rounded to x's dtype.

    Raises ValueError when the last dimension is no multiple of 16.
    """
    if x.shape[-1] % GROUP:
        raise ValueError(f"the Hadamard transform works on groups of {GROUP} tokens, but there are {x.shape[-1]}: pad them")
    groups = x.reshape(*x.shape[:-1], -1, GROUP).float()
    return (groups @ rotation(signs=signs, device=x.device)).reshape(x.shape).to(x.dtype)
