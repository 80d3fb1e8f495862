"""A weight as its number format multiplies it: for making text with the weights training used, without quantising activations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.precision.formats.base import Formats
from model.precision.nvfp4 import BLOCK
from model.precision.operand import Rows
from model.precision.site import Call, Site, TokenKeys


def as_multiplied(weight: Tensor, formats: Formats, site: Site, step: int) -> Tensor:
    """weight: [N, K], or of experts [E, N, K] -> the same shape and dtype, every element the value that fprop multiplies."""
    stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
    groups, rows, columns = stacked.shape
    # The weight's operand does not depend on the tokens, of which there must be some.
    tokens = torch.ones(groups * BLOCK, columns, dtype=weight.dtype, device=weight.device)
    nobody = torch.zeros(len(tokens), dtype=torch.int64, device=weight.device)
    call = Call(site, formats, Rows((BLOCK,) * groups), TokenKeys(nobody, nobody), step)
    _, operand = formats[0].fprop(tokens, stacked, call)
    values = operand.values(site.backend, torch.float32).view(groups, rows, columns)
    if operand.amax is not None:
        values = values * (operand.amax.view(groups, -1, 1) / operand.largest)
    return values.to(weight.dtype).view_as(weight)


@torch.no_grad()
def round_weights(weights: Sequence[tuple[Site, nn.Parameter, Formats]], step: int) -> int:
    """Puts the multiplied values in the place of those weights whose fprop rounds them; returns how many."""
    rounded = 0
    for site, weight, formats in weights:
        if formats[0].quantises:
            weight.copy_(as_multiplied(weight, formats, site, step))
            rounded += 1
    return rounded
