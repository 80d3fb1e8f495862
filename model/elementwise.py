"""Functions of single elements whose last bit depends on nothing else.

PyTorch's CPU kernels of sigmoid, SiLU and softplus compute whole vectors of elements in one way and what is left over at the end in another, which
rounds differently: an element's value depends on how many others there are. It does not where none is left over, neither of the whole nor of the
parts that threads share.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

VECTORS = 64  # elements: a multiple of what any kernel computes at once
ONE_THREAD = 16384  # elements: below PyTorch's grain size, 32768, nothing is shared out


def evenly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function, of every element, of x, as whole vectors."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % VECTORS))
    return torch.cat([function(part) for part in flat.split(ONE_THREAD)])[: x.numel()].view(x.shape)


def even_rows(rows: int, features: int) -> int:
    """At least so many rows that, contiguous, leave nothing over."""
    step = VECTORS // math.gcd(VECTORS, features)
    return -(-rows // step) * step
