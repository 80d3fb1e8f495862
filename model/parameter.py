"""How a parameter of the model comes to be: allocated, told where it lies in the stored tensors and over which ranks, and filled."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from model import init
from model.context import ModelContext
from parallel.shards import Piece, Spread, set_pieces, set_spread


def sharded_parameter(
    context: ModelContext, shape: tuple[int, ...], pieces: Sequence[Piece], draw: init.Draw, spread: Spread
) -> nn.Parameter:
    """A parameter of which this rank holds `shape`, in the model's dtype and on its device.

    pieces: where it lies in the tensors of a checkpoint. draw: initial values of those, which depend on the run's seed and their names alone;
    on the meta device nothing is drawn. spread: over which ranks.
    """
    param = nn.Parameter(torch.empty(shape, device=context.device, dtype=context.params_dtype))
    set_pieces(param, pieces)
    set_spread(param, spread)
    init.initialize(param, context.seed, draw)
    return param


def output_std(context: ModelContext) -> float:
    """Standard deviation of projections back to the residual stream, smaller the more layers add to it."""
    return context.config.init_std / math.sqrt(2 * len(context.config.layers))
