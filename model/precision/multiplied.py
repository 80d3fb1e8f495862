"""A weight as its number format multiplies it: for making text with the weights training used, and for handing them to others, without quantising
activations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.precision.formats.base import Formats
from model.precision.nvfp4 import BLOCK, MAX_CODE, decode, global_scale
from model.precision.operand import Operand, Packed, Rows
from model.precision.site import Call, Site, TokenKeys, WeightCache


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] in NVFP4, as it is stored: value = code * (scale / global scale), the division first, both in fp32."""

    codes: Tensor
    """uint8 [N, K / 2], two codes a byte, the even column in the low nibble."""
    scales: Tensor
    """E4M3 [N, K / 16], also where 16 rows share them."""
    global_scale: Tensor
    """fp32 [1]: what brought the largest element to the largest code times the largest block scale."""

    def values(self) -> Tensor:
        """fp32 [N, K]."""
        code = decode(self.codes)
        scale = self.scales.float() / self.global_scale
        return code * scale.repeat_interleave(BLOCK, dim=-1)[:, : code.shape[-1]]


def _multiplied(weight: Tensor, formats: Formats, site: Site, step: int) -> Operand:
    """weight [groups, N, K] as fprop's operand. It does not depend on the tokens, of which there must be some."""
    groups, _, columns = weight.shape
    tokens = torch.ones(groups * BLOCK, columns, dtype=weight.dtype, device=weight.device)
    nobody = torch.zeros(len(tokens), dtype=torch.int64, device=weight.device)
    alone = replace(site, weights=WeightCache())  # that of the site takes another weight at the same address for this one
    call = Call(alone, formats, Rows((BLOCK,) * groups), TokenKeys(nobody, nobody), step)
    _, operand = formats[0].fprop(tokens, weight, call)
    return operand


def _blocks(operand: Operand, groups: int) -> list[Blocks] | None:
    """One a group; None where it is not in NVFP4."""
    packed = operand.kept
    if not isinstance(packed, Packed) or operand.amax is None:
        return None
    scales = packed.scales.repeat_interleave(BLOCK, dim=0) if packed.along == "tiles" else packed.scales
    whole = global_scale(operand.amax, operand.largest / MAX_CODE)
    parts = (packed.codes.chunk(groups), scales.contiguous().view(torch.float8_e4m3fn).chunk(groups), whole.view(-1, 1))
    return [Blocks(*part) for part in zip(*parts, strict=True)]


def blocks_of(weight: Tensor, formats: Formats, site: Site, step: int) -> Blocks | None:
    """weight [N, K] as fprop multiplies it; None where that is not in NVFP4."""
    blocks = _blocks(_multiplied(weight.unsqueeze(0), formats, site, step), 1)
    return None if blocks is None else blocks[0]


def as_multiplied(weight: Tensor, formats: Formats, site: Site, step: int) -> Tensor:
    """weight: [N, K], or of experts [E, N, K] -> the same shape and dtype, every element the value that fprop multiplies."""
    stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
    operand = _multiplied(stacked, formats, site, step)
    blocks = _blocks(operand, len(stacked))
    if blocks is not None:
        values = torch.stack([each.values() for each in blocks])
    else:
        values = operand.values(site.backend, torch.float32).view_as(stacked)
        if operand.amax is not None:
            values = values * (operand.amax.view(len(stacked), -1, 1) / operand.largest)
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
