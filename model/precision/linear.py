"""A linear layer whose three GEMMs run each in a format of its own, for autograd.

    fprop   y  = x W^T
    dgrad   dx = dy W
    wgrad   dW = dy^T x

What an operand is made of, and how products are scaled, is the formats' matter (`model.precision.formats.base`). Here is when that happens:
the forward pass multiplies x and the weight, and keeps of x only what wgrad asks for; the backward pass prepares dy for both of its GEMMs.
Weight gradients are added in fp32 into `weight.main_grad` where that exists (Megatron's DDP keeps it), so nothing is rounded to bf16 on the way.

Routed experts (`grouped_linear`) are the general case: rows belong to groups, every group is an operand of its own. A plain linear layer is
one group.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.precision.formats.base import Formats
from model.precision.operand import Operand, Rows, apart, together
from model.precision.site import Call, Site, TokenKeys

NOBODY = TokenKeys(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def leave_in_main_grad(weight: Tensor) -> None:
    """For a backward pass that has added the gradient to `weight.main_grad` itself, and returns none.

    Megatron's hook runs all the same. It leaves main_grad alone when told that it is complete, and wants to see a gradient: one number, for one of
    the weight's size would be written, or added up where a weight is used several times.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    weight.grad = weight.new_zeros(()).expand(weight.shape)


def _multiplied(x: Tensor, weight: Tensor, formats: Formats, call: Call) -> tuple[Operand, Tensor]:
    """x as fprop multiplied it, and y."""
    left, right = formats[0].fprop(x, weight, call)
    y = torch.empty(len(x), weight.shape[1], device=weight.device)
    formats[0].multiply("fprop", left, right, y, call)
    return left, y


def _linear(x: Tensor, weight: Tensor, target: Tensor, formats: Formats, call: Call, out_dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():
        result: Tensor = _Linear.apply(x, weight, target, formats, call, out_dtype)
        return result
    return _multiplied(x, weight, formats, call)[1].to(out_dtype)


class _Linear(torch.autograd.Function):
    """x [rows, K], weight [groups, N, K] -> [rows, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, formats: Formats, call: Call, out_dtype: torch.dtype) -> Tensor:
        _, _, wgrad = formats
        left, y = _multiplied(x, weight, formats, call)
        ctx.formats, ctx.target, ctx.x_dtype = formats, target, x.dtype
        tensors = [weight]
        ctx.kept = apart(wgrad.keep(x, left, call) if ctx.needs_input_grad[1] else None, tensors)
        ctx.keys, ctx.call = apart(call.keys, tensors), replace(call, keys=NOBODY)
        ctx.save_for_backward(*tensors)
        return y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        tensors = ctx.saved_tensors
        weight = tensors[0]
        call: Call = replace(ctx.call, keys=together(ctx.keys, tensors))
        _, dgrad, wgrad = ctx.formats
        dx = dw = left = None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            left, right = dgrad.dgrad(dy, weight, call)
            result = torch.empty(len(dy), weight.shape[2], device=weight.device)
            dgrad.multiply("dgrad", left, right, result, call)
            dx = result.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            kept: Operand = together(ctx.kept, tensors)
            main_grad = getattr(ctx.target, "main_grad", None)
            into = torch.zeros(weight.shape, device=weight.device) if main_grad is None else main_grad.view(weight.shape)
            wgrad.multiply("wgrad", *wgrad.wgrad(dy, kept, left, call), into, call)
            if wgrad.quantises:
                call.site.health.gradient(call.site.name, into)
            if main_grad is None:
                dw = into.to(weight.dtype)
            else:
                leave_in_main_grad(ctx.target)
        return dx, dw, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    site: Site,
    keys: TokenKeys,
    step: int,
    out_dtype: torch.dtype | None = None,
    *,
    singly: bool = False,
) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], each GEMM in its format: [..., N] in out_dtype (default: x's dtype).

    keys: one entry for each row of the flattened x. singly: see `Call`. Raises ValueError, naming the module, for shapes a format cannot take.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out_dtype = out_dtype or x.dtype
    # A backend's own layer rounds y to x's dtype, takes amaxes of its own, and shows no operands to be measured.
    may_be_whole = out_dtype == x.dtype and site.amax_group is None and not site.health.active
    layer = site.backend.layer(site.name, flat, weight, formats) if may_be_whole else None
    if layer is not None:
        y = layer(flat, new_weight=site.weights.first((site.name, formats, "layer"), weight))
    else:
        call = Call(site, formats, Rows((len(flat),)), keys, step, singly)
        y = _linear(flat, weight.unsqueeze(0), weight, formats, call, out_dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    tokens_per_expert: Sequence[int],
    formats: Formats,
    site: Site,
    keys: TokenKeys,
    step: int,
    *,
    singly: bool = False,
) -> Tensor:
    """Routed experts: x [tokens, K], sorted by expert, times each expert's weight [E, N, K]: [tokens, N].

    tokens_per_expert: E counts, zeros allowed. Every expert's tokens are an operand with its own amax, padded with zeros along tokens.
    """
    call = Call(site, formats, Rows(tuple(tokens_per_expert)), keys, step, singly)
    return _linear(x.contiguous(), weight, weight, formats, call, x.dtype)
