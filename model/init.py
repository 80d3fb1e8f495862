"""Initial values that depend on the seed and the parameter's name alone.

Every tensor the checkpoint knows (a `Piece`'s global tensor) is drawn whole, in fp32, from a CPU generator seeded by
its name, and each rank keeps its part: any layout and any device starts from the same weights.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from parallel.shards import pieces_of

Draw = Callable[[tuple[int, ...], Generator], Tensor]


def normal(std: float) -> Draw:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Draw:
    return lambda shape, generator: torch.full(shape, value)


def uniform(bound: float) -> Draw:
    return lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def log_of_uniform(low: float, high: float) -> Draw:
    """Mamba-2's A_log: A itself is uniform."""
    return lambda shape, generator: (torch.rand(shape, generator=generator) * (high - low) + low).log()


def step_size_bias(low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Draw:
    """Mamba-2's dt_bias: softplus of it is log-uniform in [low, high]."""

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        dt = torch.exp(torch.rand(shape, generator=generator) * (math.log(high) - math.log(low)) + math.log(low))
        dt = dt.clamp(min=floor)
        return dt + torch.log(-torch.expm1(-dt))

    return draw


def generator_for(seed: int, name: str) -> Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialize(param: nn.Parameter, seed: int, draw: Draw) -> None:
    """Fills a parameter piece by piece (see `parallel.shards.Piece`); one without memory, on the meta device or fake, is left alone."""
    if param.is_meta or is_fake(param):
        return
    drawn: dict[str, Tensor] = {}
    for piece in pieces_of(param):
        if piece.name not in drawn:
            drawn = {piece.name: draw(piece.shape, generator_for(seed, piece.name))}
        part = param[piece.local]
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, part.shape, strict=True))
        part.copy_(drawn[piece.name][box])
