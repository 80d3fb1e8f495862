"""NVFP4: 4-bit floating point with two levels of scaling. The readable definition every other backend must equal bit for bit.

An element has one sign, two exponent and one mantissa bit (E2M1): {0, .5, 1, 1.5, 2, 3, 4, 6} and their negatives. Sixteen consecutive
elements along a GEMM's inner dimension share a block scale in E4M3 (or 16 x 16 elements do: weights), and the whole operand shares one fp32
scale, so that the block scales themselves use E4M3's range:

    S     = min(2688 / amax, FLT_MAX)                        2688 = 6 * 448, the largest code times the largest block scale
    sf    = e4m3(block_amax * (S * fl32(1/6)))               round to nearest even, saturating
    enc   = min(1 / (sf * (1/S)), FLT_MAX)
    code  = e2m1(clamp(x * enc, -6, 6))                      round to nearest even, or stochastically
    value = code * (sf * amax * fl32(1/2688))

The order of these operations is part of the format: another order flips codes on ties. A code has the sign of x * enc, also where it is 0: an
input of -0, and one so small beside its block that x * enc underflows, get code +0. Codes of a block whose scale is NaN mean nothing. In a GEMM
the products code * sf (at most six significant bits, exact in bf16) are multiplied and accumulated in fp32, and alpha = amaxA * amaxB / 2688^2
is applied to the result.

Trade-off: about 4.5 bits an element, against a relative step of up to 1/3 between neighbouring codes.
Source: Transformer Engine 2.20.2 (its reference quantizer and kernels), arXiv 2509.25149.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.precision import hadamard as rht
from model.precision.transfer import to_device

BLOCK = 16
FLT_MAX = torch.finfo(torch.float32).max
MAX_CODE = 6.0
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Clipping = Literal["saturate", "4over6_mae", "4over6_mse"]
Scaling = Literal["1d", "2d"]


def _constant(value: float, like: Tensor) -> Tensor:
    # A 0-dim tensor, not a Python number: PyTorch turns `2688.0 / t` into `t.reciprocal() * 2688`, which rounds twice.
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _fold(x: Tensor) -> Tensor:
    """Sum of the 16 elements of the last dimension, halves added to halves: an order every backend can follow."""
    for half in (8, 4, 2, 1):
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _binade(magnitude: Tensor) -> Tensor:
    """1, 2 or 4: the power of two at or below a magnitude in [1, 8), and 1 below that; a grid step is half of it."""
    return (magnitude.clamp(min=1.0).view(torch.int32) & 0x7F800000).view(torch.float32)


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to even, of fp32 x in [-6, 6]; fp32 of the same shape."""
    # Adding 1.5 * 2^23 steps leaves no bit below a step, and the addition itself rounds to nearest even.
    shift = _binade(x.abs()).mul_(0.5 * 1.5 * 2**23)
    return (x + shift).sub_(shift)


def round_e2m1_stochastic(x: Tensor, random_bits: Tensor) -> Tensor:
    """One of x's two E2M1 neighbours, chosen by one random byte each; fp32 x in [-6, 6], uint8 random_bits of its shape.

    The byte moves |x| up by less than a step, then it is floored to the grid: the probability of the upper neighbour is |x|'s place
    between the two, truncated to a multiple of 1/256.
    """
    magnitude = x.abs()
    moved = (random_bits * torch.full((), 1 / 512, device=x.device)).mul_(_binade(magnitude)).add_(magnitude)
    step = _binade(moved).mul_(0.5)
    return (moved / step).floor_().mul_(step).clamp_(max=MAX_CODE).copysign_(x)


def round_e4m3(x: Tensor, bound: float = 448.0) -> Tensor:
    """Nearest E4M3 value, ties to even, saturating at `bound`; fp32 in and out."""
    return x.clamp(max=bound).to(torch.float8_e4m3fn).float()


def global_scale(amax: Tensor, bound: float = 448.0) -> Tensor:
    """S, fp32 of amax's shape: what brings the largest element to MAX_CODE * bound."""
    scale = torch.div(_constant(MAX_CODE * bound, amax), amax).clamp_(max=FLT_MAX)
    return torch.where((amax == 0) | (scale == 0), torch.ones_like(scale), scale)


@dataclass(frozen=True)
class Encoded:
    """Blocks as an NVFP4 GEMM sees them."""

    code: Tensor
    """fp32 E2M1 values [..., blocks, 16]."""
    scale: Tensor
    """fp32 E4M3 values [..., blocks]."""
    negative: Tensor
    """bool of code's shape: the sign bits, also of what rounds to zero."""

    def products(self) -> Tensor:
        """code * scale, exact in bf16, fp32 [..., blocks * 16]."""
        return (self.code * self.scale.unsqueeze(-1)).flatten(-2)


def encode(
    blocks: Tensor,
    block_amax: Tensor,
    amax: Tensor,
    *,
    random_bits: Tensor | None = None,
    clipping: Clipping = "saturate",
    bound: float = 448.0,
    tile: bool = False,
) -> Encoded:
    """Steps S ... code of the module docstring.

    blocks: fp32 [..., blocks, 16]. block_amax, amax: fp32, broadcastable to [..., blocks]. random_bits: uint8 of blocks' shape, for
    stochastic rounding. tile: with 4over6, 16 consecutive rows of a block share the choice of scale (2D scaling).
    """
    scale = global_scale(amax, bound)
    mult = scale * _constant(1 / 6, amax)

    def at(block_scale: Tensor) -> Encoded:
        decode = torch.div(_constant(1.0, amax), scale)
        enc = torch.div(_constant(1.0, amax), block_scale * decode).clamp_(max=FLT_MAX)
        scaled = (blocks * enc.unsqueeze(-1)).clamp_(-MAX_CODE, MAX_CODE)
        code = round_e2m1(scaled) if random_bits is None else round_e2m1_stochastic(scaled, random_bits)
        # The sign is that of x * enc, not of x: kept when the magnitude rounds to zero, but not when the product itself is -0.
        return Encoded(code, block_scale.expand(blocks.shape[:-1]), scaled < 0)

    if clipping == "saturate":
        return at(round_e4m3(block_amax * mult, bound=448.0))

    # 4over6 rounds elsewhere than the plain path: its scale is (block_amax / 6) * S, and its error code * sf * amax / (6 * bound) - x.
    def error(encoded: Encoded) -> Tensor:
        value = encoded.code * encoded.scale.unsqueeze(-1) * amax.unsqueeze(-1)
        difference = torch.div(value, _constant(MAX_CODE * bound, amax)) - blocks
        each = difference.abs() if clipping == "4over6_mae" else difference * difference
        total = each[..., 0]
        for j in range(1, BLOCK):
            total = total + each[..., j]
        if tile:  # rows of one tile decide together
            rows = total.unflatten(-2, (-1, BLOCK))
            total = _fold(rows.transpose(-1, -2)).unsqueeze(-2).expand(rows.shape).flatten(-3, -2)
        return total

    wanted = torch.div(block_amax, _constant(MAX_CODE, amax)) * scale
    to_six, to_four = at(round_e4m3(wanted)), at(round_e4m3(wanted * _constant(1.5, amax)))
    choose_four = error(to_four) < error(to_six)
    each = choose_four.unsqueeze(-1)
    return Encoded(
        torch.where(each, to_four.code, to_six.code),
        torch.where(choose_four, to_four.scale, to_six.scale),
        torch.where(each, to_four.negative, to_six.negative),
    )


def tile_amax(x: Tensor) -> Tensor:
    """Largest magnitude of every 16 x 16 tile of x [..., M, N], repeated for each row of the tile: fp32 [..., M, N / 16]."""
    tiles = x.abs().unflatten(-1, (-1, BLOCK)).amax(-1).unflatten(-2, (-1, BLOCK)).amax(-2)
    return tiles.repeat_interleave(BLOCK, dim=-2)


def pack(code: Tensor, negative: Tensor) -> Tensor:
    """E2M1 values fp32 [..., M, N] to uint8 [..., M, N / 2], the even column in the low nibble. negative: bool, the sign bit."""
    magnitude = code.abs()
    index = torch.where(magnitude <= 2, magnitude * 2, torch.where(magnitude <= 4, magnitude + 2, 7.0))
    index = index.to(torch.uint8) | (negative.to(torch.uint8) << 3)
    return index[..., ::2] | (index[..., 1::2] << 4)


def decode(codes: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 [M, N / 2] to E2M1 values, fp32 [M, N]."""
    index = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).long()
    return to_device(torch.tensor(GRID + tuple(-value for value in GRID)), codes.device)[index]


def scale_bytes(scale: Tensor) -> Tensor:
    """Raw E4M3 bytes, uint8, of E4M3 values in fp32."""
    return scale.to(torch.float8_e4m3fn).contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Quantized:
    """An operand in NVFP4.

    codes: uint8 [M, N/2], two per byte, the even column in the low nibble, code = sign << 3 | index into GRID. scales: uint8
    [M, ceil(N/16)], raw E4M3 bytes (also for 2D: repeated for each row). amax: fp32, 0-dim, or [M, 1] when row-scaled. bound: largest
    block scale, 448 or 256.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor
    bound: float

    def dequantize(self) -> Tensor:
        """fp32 [M, N]."""
        code = decode(self.codes)
        scale = self.scales.view(torch.float8_e4m3fn).float()
        scale = scale * self.amax * _constant(1 / (MAX_CODE * self.bound), self.amax)
        return code * scale.repeat_interleave(BLOCK, dim=-1)[:, : code.shape[-1]]


def check(
    x: Tensor,
    *,
    scaling: Scaling = "1d",
    hadamard: bool = False,
    random_bits: Tensor | None = None,
    clipping: Clipping = "saturate",
    row_scaled: bool = False,
    **others: Any,
) -> None:
    """Raises ValueError for what `quantize` does not define; the arguments are its own."""
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"NVFP4 quantises matrices with an even number of columns, not a tensor of shape {list(x.shape)}")
    if scaling == "2d" and (x.shape[0] % BLOCK or x.shape[1] % BLOCK):
        raise ValueError(f"2D scaling needs both dimensions to be multiples of 16, not {list(x.shape)}: use 1d scaling")
    if scaling == "2d" and (hadamard or random_bits is not None):
        raise ValueError("2D scaling is for weights only: not with the Hadamard transform or random bits")
    if clipping != "saturate" and (hadamard or random_bits is not None):
        raise ValueError(f"clipping={clipping} is for forward operands only: not with the Hadamard transform or random bits")
    if row_scaled and (hadamard or random_bits is not None or scaling == "2d"):
        raise ValueError("row_scaled is for forward activations only: not with 2d scaling, the Hadamard transform or random bits")
    if hadamard and x.shape[1] % BLOCK:
        raise ValueError(f"the Hadamard transform works on groups of {BLOCK} columns, but there are {x.shape[1]}: pad them")


def quantize(
    x: Tensor,
    *,
    scaling: Scaling = "1d",
    hadamard: bool = False,
    random_bits: Tensor | None = None,
    clipping: Clipping = "saturate",
    e4m3_bound: int = 448,
    row_scaled: bool = False,
    amax: Tensor | None = None,
    hadamard_signs: bool = True,
) -> Quantized:
    """Quantises a matrix along its last dimension.

    x: fp32, bf16 or fp16 [M, N], N even. hadamard: rotate every 16 elements of a row first. random_bits: uint8 [M, N] rounds
    stochastically with them. amax: fp32, the largest magnitude of the *whole* operand where x (after the rotation) is only a part of it.
    Raises ValueError for combinations and shapes the format does not define.
    """
    check(x, scaling=scaling, hadamard=hadamard, random_bits=random_bits, clipping=clipping, row_scaled=row_scaled)
    bound = float(e4m3_bound) if clipping != "saturate" else 448.0
    if hadamard:
        x = rht.rotate(x, rht.FIXED if hadamard_signs else rht.UNSIGNED)
    x = x.float()
    if amax is None:
        amax = x.abs().amax(1, keepdim=True) if row_scaled else x.abs().amax()
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK))
    if random_bits is not None:
        random_bits = torch.nn.functional.pad(random_bits, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block_amax = tile_amax(padded) if scaling == "2d" else blocks.abs().amax(-1)
    encoded = encode(blocks, block_amax, amax, random_bits=random_bits, clipping=clipping, bound=bound, tile=scaling == "2d")
    code, negative = (values.flatten(1)[:, : x.shape[1]] for values in (encoded.code, encoded.negative))
    return Quantized(pack(code, negative), scale_bytes(encoded.scale), amax, bound)
