"""The three GEMMs of a linear layer, each in its own format.

    fprop   y  = x W^T      x: blocks along features                W: 16x16 tiles (or blocks along its inner dimension)
    dgrad   dx = dy W       dy: blocks along features, stochastic   W: the same tiles
    wgrad   dW = dy^T x     dy^T: rotated, stochastic; x^T: rotated; both with blocks along tokens

An operand is prepared once (`Operand`: what to multiply, and a factor for the product), then multiplied by an ordinary GEMM: the products
code * scale of NVFP4 and the values of MXFP8 are exact in bf16, so a bf16 GEMM with fp32 accumulation on a GPU, or an fp32 one on a CPU,
computes what FP4 tensor cores compute, up to the order of accumulation. Weight gradients are added in fp32 into `weight.main_grad` where
that exists (Megatron's DDP keeps it), so nothing is rounded to bf16 on the way.

Routed experts (`grouped_linear`) are the general case: rows belong to groups, every group is an operand of its own with its own amax, and
is padded with zero rows where blocks run along tokens. A plain linear layer is one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.precision import hadamard, mxfp8, nvfp4, philox
from model.precision.formats import Format

Formats = tuple[Format, Format, Format]  # of fprop, dgrad, wgrad


@dataclass(frozen=True)
class TokenKeys:
    """Which token each row of an operand is: int64 [rows], the global sample and the position in its sequence."""

    sample: Tensor
    position: Tensor


@dataclass(frozen=True)
class Site:
    """A linear module as the numerics know it.

    name: canonical module name. seed: of the run. outputs: (first global index, count) of each run of local output features, where the
    output is sharded; empty: all, from 0. amax_group: over which amaxes are maximised
    (precision.amax_scope=tensor_parallel), or None. first_expert: global index of group 0 of a grouped layer, or None for a plain one.
    """

    name: str
    seed: int
    outputs: tuple[tuple[int, int], ...] = ()
    amax_group: Any = None
    first_expert: int | None = None


@dataclass(frozen=True)
class Rows:
    """How rows are cut into groups. sizes: rows of each group, which follow one another."""

    sizes: tuple[int, ...]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        bounds, start = [], 0
        for size in self.sizes:
            bounds.append((start, start + size))
            start += size
        return bounds


@dataclass(frozen=True)
class Operand:
    """values: what the GEMM multiplies, [rows, inner] or [groups, rows, inner]; amax: fp32 [groups], NVFP4's second-level scale (None: 1);
    row_amax: fp32 [rows, 1] instead, when row-scaled; bound: NVFP4's largest block scale."""

    values: Tensor
    amax: Tensor | None = None
    row_amax: Tensor | None = None
    bound: float = 448.0


# -- preparation of operands: the seam for faster backends --------------------------------------------------------------------------------


def _gemm_dtype(like: Tensor) -> torch.dtype:
    # bf16 GEMMs are slow on most CPUs; every value prepared here is as exact in fp32.
    return torch.bfloat16 if like.is_cuda else torch.float32


def _maximum(amax: Tensor, site: Site) -> Tensor:
    if site.amax_group is not None:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=site.amax_group)
    return amax


def _group_amax(x: Tensor, rows: Rows, site: Site) -> Tensor:
    """Largest magnitude of each group of rows, fp32 [groups]; 0 for an empty group."""
    per_row = x.abs().amax(-1).float()
    if len(rows.sizes) == 1:
        amax = per_row.amax(0, keepdim=True) if len(per_row) else per_row.new_zeros(1)
    else:
        amax = torch.segment_reduce(per_row, "max", lengths=torch.tensor(rows.sizes, device=x.device), initial=0.0)
    return _maximum(amax, site)


def _per_row(values: Tensor, rows: Rows) -> Tensor:
    """values [groups] repeated for every row: [rows, 1]."""
    if len(rows.sizes) == 1:
        return values[:, None]
    return values.repeat_interleave(torch.tensor(rows.sizes, device=values.device))[:, None]


def _pad_features(x: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block))


def along_features(x: Tensor, rows: Rows, form: Format, site: Site, *, bits: Tensor | None, forward: bool) -> Operand:
    """x [rows, features] with blocks along features. bits: uint8 [rows, features] for stochastic rounding."""
    if form.name == "fp32":
        return Operand(x.float())
    if form.name == "bf16":
        return Operand(x.to(torch.bfloat16).to(_gemm_dtype(x)))
    if form.name == "mxfp8":
        return Operand(mxfp8.fake_quantize(x).to(_gemm_dtype(x)))
    features = x.shape[1]
    blocks = _pad_features(x.float(), nvfp4.BLOCK).unflatten(1, (-1, nvfp4.BLOCK))
    if bits is not None:
        bits = _pad_features(bits, nvfp4.BLOCK).unflatten(1, (-1, nvfp4.BLOCK))
    clipping, bound = form.nvfp4.clipping if forward else "saturate", 448.0
    if clipping != "saturate":
        bound = float(form.nvfp4.e4m3_bound)
    block_amax = blocks.abs().amax(-1)
    if forward and form.nvfp4.row_scaled:
        amax = row_amax = _maximum(block_amax.amax(-1, keepdim=True), site)
        group_amax = None
    else:
        row_amax, group_amax = None, _group_amax(block_amax, rows, site)
        amax = _per_row(group_amax, rows)
    encoded = nvfp4.encode(blocks, block_amax, amax, random_bits=bits, clipping=clipping, bound=bound)
    return Operand(encoded.products()[:, :features].to(_gemm_dtype(x)), group_amax, row_amax, bound)


def weight_operand(weight: Tensor, form: Format, site: Site, *, transposed: bool) -> Operand:
    """weight [groups, N, K] with blocks along K, or its transpose [groups, K, N] with blocks along N."""
    w = weight.detach()
    if form.name == "nvfp4" and form.nvfp4.weight_scaling == "2d":
        if w.shape[1] % nvfp4.BLOCK or w.shape[2] % nvfp4.BLOCK:
            raise ValueError(
                f"the weight of {site.name} is {w.shape[1]} x {w.shape[2]}, but 2d scaling needs multiples of 16: "
                "change the size, or use precision.nvfp4.weight_scaling=1d or another format for this module"
            )
    elif transposed:
        w = w.transpose(1, 2)
    if form.name == "fp32":
        return Operand(w.float())
    if form.name == "bf16":
        return Operand(w.to(torch.bfloat16).to(_gemm_dtype(w)))
    if form.name == "mxfp8":
        return Operand(mxfp8.fake_quantize(w.flatten(0, 1)).view(w.shape).to(_gemm_dtype(w)))
    inner = w.shape[2]
    padded = _pad_features(w.float(), nvfp4.BLOCK)
    blocks = padded.unflatten(2, (-1, nvfp4.BLOCK))
    tile = form.nvfp4.weight_scaling == "2d"
    block_amax = nvfp4.tile_amax(padded) if tile else blocks.abs().amax(-1)
    amax = _maximum(block_amax.flatten(1).amax(1), site)
    clipping = form.nvfp4.clipping
    bound = float(form.nvfp4.e4m3_bound) if clipping != "saturate" else 448.0
    encoded = nvfp4.encode(blocks, block_amax, amax[:, None, None], clipping=clipping, bound=bound, tile=tile)
    values = encoded.products()[..., :inner].to(_gemm_dtype(w))
    return Operand(values.transpose(1, 2) if tile and transposed else values, amax, bound=bound)


def padded_rows(rows: Rows, form: Format) -> Rows:
    """The rows of each group rounded up to whole blocks along tokens."""
    block = {"nvfp4": nvfp4.BLOCK, "mxfp8": mxfp8.BLOCK}.get(form.name, 1)
    return Rows(tuple(-(-size // block) * block for size in rows.sizes))


def pad_rows(x: Tensor, rows: Rows, padded: Rows) -> Tensor:
    """x [rows, ...] with zero rows after every group."""
    if rows == padded:
        return x
    result = x.new_zeros(sum(padded.sizes), *x.shape[1:])
    sizes = torch.tensor(rows.sizes, device=x.device)
    shift = torch.tensor([p[0] - r[0] for p, r in zip(padded.bounds, rows.bounds, strict=True)], device=x.device)
    index = torch.arange(len(x), device=x.device) + shift.repeat_interleave(sizes)
    return result.index_copy_(0, index, x)


def along_tokens(x: Tensor, rows: Rows, form: Format, site: Site, *, bits: Tensor | None) -> Operand:
    """The transpose of x [rows, features], [features, rows], with blocks along tokens; rows are whole blocks (see `pad_rows`)."""
    if form.name == "fp32":
        return Operand(x.T.float())
    if form.name == "bf16":
        return Operand(x.T.to(torch.bfloat16).to(_gemm_dtype(x)))
    if form.name == "mxfp8":
        return Operand(mxfp8.fake_quantize(x.T).to(_gemm_dtype(x)))
    columns = x.T
    if form.nvfp4.hadamard:
        columns = hadamard.rotate(columns)
    blocks = columns.float().unflatten(1, (-1, nvfp4.BLOCK))
    if bits is not None:
        bits = bits.T.unflatten(1, (-1, nvfp4.BLOCK))
    block_amax = blocks.abs().amax(-1)
    in_blocks = Rows(tuple(size // nvfp4.BLOCK for size in rows.sizes))
    group_amax = _group_amax(block_amax.T, in_blocks, site)
    encoded = nvfp4.encode(blocks, block_amax, _per_row(group_amax, in_blocks).T, random_bits=bits)
    return Operand(encoded.products().to(_gemm_dtype(x)), group_amax)


# -- the GEMMs -------------------------------------------------------------------------------------------------------------------------


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and an fp32 result."""
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _alpha(a: Operand, b: Operand, group: int) -> Tensor | None:
    """What the product of two operands of a group is multiplied with."""
    if b.amax is None:
        return None
    # Divided, not multiplied by a rounded reciprocal; 36 * bound^2 is exact in fp32.
    scale = torch.tensor(36.0 * a.bound * b.bound, device=b.amax.device)
    if a.row_amax is not None:
        return torch.div(a.row_amax * b.amax[group], scale)
    assert a.amax is not None
    return torch.div(a.amax[group] * b.amax[group], scale)


def _rows_times_weight(x: Operand, weight: Operand, rows: Rows) -> Tensor:
    """[rows, out] fp32: every group's rows times the transpose of its [out, inner] weight."""
    single = len(rows.sizes) == 1
    parts = []
    for group, (start, stop) in enumerate(rows.bounds):
        product = _multiply(x.values if single else x.values[start:stop], weight.values[group].T)
        alpha = _alpha(x, weight, group)
        if alpha is not None:
            product *= alpha if alpha.dim() == 0 else alpha[start:stop]
        parts.append(product)
    return parts[0] if single else torch.cat(parts)


def _weight_gradient(dy: Operand, x: Operand, rows: Rows, into: Tensor) -> None:
    """Adds dy^T x of every group to `into`, fp32 [groups, N, K]."""
    for group, (start, stop) in enumerate(rows.bounds):
        if stop == start:
            continue
        product = _multiply(dy.values[:, start:stop], x.values[:, start:stop].T)
        alpha = _alpha(dy, x, group)
        into[group] += product if alpha is None else product.mul_(alpha)


@dataclass(frozen=True)
class _Call:
    formats: Formats
    site: Site
    keys: TokenKeys
    step: int
    rows: Rows

    def random_bits(self, form: Format, operand: str, features: int) -> Tensor | None:
        if form.name != "nvfp4" or not form.nvfp4.stochastic_rounding:
            return None
        expert = None
        if self.site.first_expert is not None:
            sizes = torch.tensor(self.rows.sizes, device=self.keys.sample.device)
            expert = (torch.arange(len(sizes), device=sizes.device) + self.site.first_expert).repeat_interleave(sizes)
        key = philox.stream_key(self.site.seed, self.site.name, operand)
        runs = [
            philox.random_bytes(
                key,
                sample=self.keys.sample,
                position=self.keys.position,
                step=self.step,
                features=count,
                first_feature=first,
                expert=expert,
            )
            for first, count in self.site.outputs or ((0, features),)
        ]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


class _Linear(torch.autograd.Function):
    """x [rows, K], weight [groups, N, K] -> [rows, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, call: _Call, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call, ctx.target = call, target
        form = call.formats[0]
        left = along_features(x, call.rows, form, call.site, bits=None, forward=True)
        return _rows_times_weight(left, weight_operand(weight, form, call.site, transposed=False), call.rows).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        call: _Call = ctx.call
        _, dgrad, wgrad = call.formats
        dx = dw = None
        if ctx.needs_input_grad[0]:
            bits = call.random_bits(dgrad, "dy", dy.shape[1])
            left = along_features(dy, call.rows, dgrad, call.site, bits=bits, forward=False)
            dx = _rows_times_weight(left, weight_operand(weight, dgrad, call.site, transposed=True), call.rows).to(x.dtype)
        if ctx.needs_input_grad[1]:
            padded = padded_rows(call.rows, wgrad)
            if call.site.first_expert is None and padded != call.rows and wgrad.name == "nvfp4" and wgrad.nvfp4.hadamard:
                raise ValueError(
                    f"{call.site.name} has {call.rows.sizes[0]} tokens in a microbatch, but the Hadamard transform of its wgrad needs a "
                    "multiple of 16: change train.micro_batch_size or train.sequence_length, or use precision.nvfp4.hadamard=false"
                )
            bits = call.random_bits(wgrad, "dy_t", dy.shape[1])
            if bits is not None:
                bits = pad_rows(bits, call.rows, padded)
            left = along_tokens(pad_rows(dy, call.rows, padded), padded, wgrad, call.site, bits=bits)
            right = along_tokens(pad_rows(x, call.rows, padded), padded, wgrad, call.site, bits=None)
            main_grad = getattr(ctx.target, "main_grad", None)
            if main_grad is None:
                gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                _weight_gradient(left, right, padded, gradient)
                dw = gradient.to(weight.dtype)
            else:
                _weight_gradient(left, right, padded, main_grad.view(weight.shape))
                # Megatron's hook wants a gradient to fire on, and leaves main_grad alone when told it is complete.
                ctx.target.grad_added_to_main_grad = True
                dw = weight.new_zeros(1).expand(weight.shape)
        return dx, dw, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    site: Site,
    keys: TokenKeys,
    step: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], each GEMM in its format: [..., N] in out_dtype (default: x's dtype).

    keys: one entry for each row of the flattened x. Raises ValueError, naming the module, for shapes a format cannot take.
    """
    flat = x.reshape(-1, x.shape[-1])
    call = _Call(formats, site, keys, step, Rows((len(flat),)))
    y = _Linear.apply(flat, weight.unsqueeze(0), weight, call, out_dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor, weight: Tensor, tokens_per_expert: Sequence[int], formats: Formats, site: Site, keys: TokenKeys, step: int
) -> Tensor:
    """Routed experts: x [tokens, K], sorted by expert, times each expert's weight [E, N, K]: [tokens, N].

    tokens_per_expert: E counts, zeros allowed. Every expert's tokens are an operand with its own amax, padded with zeros along tokens.
    """
    call = _Call(formats, site, keys, step, Rows(tuple(tokens_per_expert)))
    return _Linear.apply(x, weight, weight, call, x.dtype)
