"""The three GEMMs of a linear layer, each in its own format.

    fprop   y  = x W^T      x: blocks along features                W: 16x16 tiles (or blocks along its inner dimension)
    dgrad   dx = dy W       dy: blocks along features, stochastic   W: the same tiles
    wgrad   dW = dy^T x     dy^T: rotated, stochastic; x^T: rotated; both with blocks along tokens

An operand is what an ordinary GEMM multiplies, and a factor for the product: the products code * scale of NVFP4 and the values of MXFP8
are exact in bf16, so a bf16 GEMM with fp32 accumulation on a GPU, or an fp32 one on a CPU, computes what FP4 tensor cores compute, up to
the order of accumulation. Weight gradients are added in fp32 into `weight.main_grad` where that exists (Megatron's DDP keeps it), so
nothing is rounded to bf16 on the way.

Nothing is quantised twice. A weight is quantised once per optimizer step and kept packed (`WeightCache`), for every microbatch and for both
fprop and dgrad where those share its tiles. Of x, only what wgrad will multiply outlives the forward pass, in wgrad's own format: 4.5 bits
an element in NVFP4, 8.25 in MXFP8, 16 in bf16.

Routed experts (`grouped_linear`) are the general case: rows belong to groups, every group is an operand of its own with its own amax, and
is padded with zero rows where blocks run along tokens. A plain linear layer is one group.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.precision import mxfp8, nvfp4, philox
from model.precision.backend import Backend, Packed, Rows, pad_rows
from model.precision.backends.reference import Reference
from model.precision.formats import Format, Formats
from model.precision.health import Health


@dataclass(frozen=True)
class TokenKeys:
    """Which token each row of an operand is: int64 [rows], the global sample and the position in its sequence. depth: of multi-token
    prediction, whose depths may share modules; 0: none."""

    sample: Tensor
    position: Tensor
    depth: int = 0


@dataclass(frozen=True)
class Operand:
    """What one side of a GEMM multiplies, rows [rows, inner] as stored, or on its way there.

    kept: the values themselves, or packed NVFP4 or MXFP8 (whose rows then are the columns of the operand). amax: fp32 [groups], NVFP4's
    second-level scale (None: 1), or fp32 [rows, 1] when row-scaled. bound: NVFP4's largest block scale.
    """

    kept: Tensor | Packed | mxfp8.Quantized
    amax: Tensor | None = None
    bound: float = 448.0

    def values(self, backend: Backend, dtype: torch.dtype) -> Tensor:
        """[rows, inner] in `dtype`."""
        if isinstance(self.kept, Packed):
            return backend.unpack(self.kept, dtype)
        if isinstance(self.kept, mxfp8.Quantized):
            return self.kept.dequantize().to(dtype)
        return self.kept.to(dtype)


class WeightCache:
    """Quantised weights of the current optimizer step, by module, format and direction.

    Whoever changes weights calls `clear`; a weight changed in place by PyTorch operations, or replaced, is noticed without.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[int, int], Operand | None]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def find(self, key: Hashable, weight: Tensor) -> Operand | None:
        state, operand = self._kept.get(key, (None, None))
        return operand if state == (weight.data_ptr(), weight._version) else None

    def keep(self, key: Hashable, weight: Tensor, operand: Operand | None) -> None:
        self._kept[key] = ((weight.data_ptr(), weight._version), operand)

    def first(self, key: Hashable, weight: Tensor) -> bool:
        """Whether this is the first time with this key since the weight changed; for backends that keep quantised weights themselves."""
        first = self._kept.get(key, (None,))[0] != (weight.data_ptr(), weight._version)
        self.keep(key, weight, None)
        return first


@dataclass(frozen=True)
class Site:
    """A linear module as the numerics know it.

    name: canonical module name. seed: of the run. outputs: (first global index, count) of each run of local output features, where the
    output is sharded; empty: all, from 0. amax_group: over which amaxes are maximised (precision.amax_scope=tensor_parallel), or None.
    first_expert: global index of group 0 of a grouped layer, or None for a plain one. own_tokens: other ranks of amax_group work on other
    tokens, so that amaxes of rows have nothing to do with theirs. backend: of NVFP4. weights: where quantised weights
    are kept for the rest of the step. health: what measures operands, when it is active.
    """

    name: str
    seed: int
    outputs: tuple[tuple[int, int], ...] = ()
    amax_group: Any = None
    first_expert: int | None = None
    own_tokens: bool = False
    backend: Backend = field(default_factory=Reference)
    weights: WeightCache = field(default_factory=WeightCache)
    health: Health = field(default_factory=Health)

    @property
    def packed(self) -> bool:
        """Whether operands are wanted packed even where they are multiplied at once."""
        return self.health.active or hasattr(self.backend, "multiply")

    def maximum(self, amax: Tensor) -> Tensor:
        if self.amax_group is not None:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.amax_group)
        return amax


# -- preparation of operands ---------------------------------------------------------------------------------------------------------------


def _block(form: Format) -> int:
    """Tokens of a block along tokens."""
    return {"nvfp4": nvfp4.BLOCK, "mxfp8": mxfp8.BLOCK}.get(form.name, 1)


def _bound(form: Format, clipping: str) -> float:
    return float(form.nvfp4.e4m3_bound) if clipping != "saturate" else 448.0


def along_features(x: Tensor, rows: Rows, form: Format, site: Site, *, stream: philox.Stream | None, forward: bool) -> Operand:
    """x [rows, features] with blocks along features, as values."""
    if form.name == "fp32":
        return Operand(x.float())
    if form.name == "bf16":
        return Operand(site.backend.bf16(x))
    operand = "x" if forward else "dy"
    if form.name == "mxfp8":
        quantized = mxfp8.quantize(x)
        site.health.mxfp8(site.name, operand, x, quantized, rows)
        return Operand(quantized.dequantize())
    clipping = form.nvfp4.clipping if forward else "saturate"
    bound, backend = _bound(form, clipping), site.backend
    if forward and form.nvfp4.row_scaled:
        amax = x.abs().amax(-1, keepdim=True).float()
        if not site.own_tokens:
            amax = site.maximum(amax)
    else:
        amax = site.maximum(backend.amax(x, rows))
    kept = backend.quantize_rows(x, amax, rows, stream=stream, clipping=clipping, bound=bound, packed=site.packed)
    if isinstance(kept, Packed):
        site.health.nvfp4(site.name, operand, x, kept, amax, bound, rows, backend)
    return Operand(kept, amax, bound)


def along_tokens(x: Tensor, rows: Rows, form: Format, site: Site, *, stream: philox.Stream | None = None, keep: bool) -> Operand:
    """x [rows, features] with blocks along tokens; every group padded to whole blocks.

    keep: as small as the format allows, to be multiplied later (x); otherwise as values (dy).
    """
    operand = "x_t" if keep else "dy_t"
    if form.name == "fp32":
        return Operand(x.float())
    if form.name == "bf16":
        return Operand(x.to(torch.bfloat16) if keep else site.backend.bf16(x))
    if form.name == "mxfp8":
        quantized = mxfp8.quantize(pad_rows(x, rows, mxfp8.BLOCK), "columns")
        site.health.mxfp8(site.name, operand, x, quantized, rows)
        return Operand(quantized if keep else quantized.dequantize())
    hadamard, backend = form.nvfp4.hadamard, site.backend
    amax = site.maximum(backend.amax(x, rows, hadamard=hadamard))
    kept = backend.quantize_columns(x, amax, rows, hadamard=hadamard, stream=stream, packed=keep or site.packed)
    if isinstance(kept, Packed):
        site.health.nvfp4(site.name, operand, x, kept, amax, 448.0, rows, backend, hadamard=hadamard)
    return Operand(kept, amax)


def weight_operand(weight: Tensor, form: Format, site: Site, *, dgrad: bool) -> Operand:
    """weight [groups, N, K], rows flattened to [groups * N, K], with blocks along K or, for dgrad, along N, or tiles of both."""
    w = weight.detach().flatten(0, 1)
    if form.name == "fp32":
        return Operand(w)
    if form.name == "bf16":
        return Operand(site.backend.bf16(w))
    tiles = form.name == "nvfp4" and form.nvfp4.weight_scaling == "2d"
    key = (site.name, form, dgrad and not tiles)
    found = site.weights.find(key, weight)
    if found is None:
        found = _quantize_weight(w, Rows((weight.shape[1],) * weight.shape[0]), form, site, tiles=tiles, columns=key[2])
        site.weights.keep(key, weight, found)
    return found


def _quantize_weight(w: Tensor, rows: Rows, form: Format, site: Site, *, tiles: bool, columns: bool) -> Operand:
    operand = "w_t" if columns else "w"
    if form.name == "mxfp8":
        quantized = mxfp8.quantize(pad_rows(w, rows, mxfp8.BLOCK), "columns") if columns else mxfp8.quantize(w)
        site.health.mxfp8(site.name, operand, w, quantized, rows)
        return Operand(quantized)
    if tiles and (rows.sizes[0] % nvfp4.BLOCK or w.shape[1] % nvfp4.BLOCK):
        raise ValueError(
            f"the weight of {site.name} is {rows.sizes[0]} x {w.shape[1]}, but 2d scaling needs multiples of 16: "
            "change the size, or use precision.nvfp4.weight_scaling=1d or another format for this module"
        )
    clipping = form.nvfp4.clipping
    bound, backend = _bound(form, clipping), site.backend
    amax = site.maximum(backend.amax(w, rows))
    if columns:
        packed = backend.quantize_columns(w, amax, rows, clipping=clipping, bound=bound, packed=True)
    else:
        packed = backend.quantize_rows(w, amax, rows, clipping=clipping, bound=bound, tiles=tiles, packed=True)
    assert isinstance(packed, Packed)
    site.health.nvfp4(site.name, operand, w, packed, amax, bound, rows, backend)
    return Operand(packed, amax, bound)


# -- the GEMMs -----------------------------------------------------------------------------------------------------------------------------


def _alpha(a: Operand, b: Operand) -> Tensor | None:
    """What the product of two operands is multiplied with, fp32 [groups] or, row-scaled, [rows, groups]."""
    if a.amax is None or b.amax is None:
        return None
    # Divided, not multiplied by a rounded reciprocal; 36 * bound^2 is exact in fp32.
    return torch.div(a.amax * b.amax, torch.tensor(36.0 * a.bound * b.bound, device=b.amax.device))


def _gemms(
    into: Tensor, factors: Sequence[tuple[Tensor, Tensor]], places: Sequence[tuple[int, int]], alpha: Tensor | None, *, add: bool
) -> None:
    """into[start:stop] = alpha[g] * (a_g @ b_g) of every group g, or += with `add`; fp32 accumulation, fp32 `into`.

    factors: (a, b) of each group, places: its (start, stop) in `into`. alpha is applied to the accumulated product, as tensor cores do:
    a GEMM's own alpha may be applied earlier, and rounds elsewhere.
    """
    for group, ((a, b), (start, stop)) in enumerate(zip(factors, places, strict=True)):
        part = into[start:stop]
        if stop == start or a.shape[1] == 0:
            if not add:
                part.zero_()
            continue
        if a.dtype == torch.bfloat16:
            product = torch.mm(a, b, out_dtype=torch.float32)
        else:
            product = torch.mm(a, b) if add else torch.mm(a, b, out=part)
        if alpha is None:
            scale = None
        elif alpha.dim() == 2:  # row-scaled
            scale = alpha[start:stop, group : group + 1]
        else:
            scale = alpha[group]
        if add:
            part.add_(product) if scale is None else part.addcmul_(product, scale)
        elif scale is not None:
            torch.mul(product, scale, out=part)
        elif product is not part:
            part.copy_(product)


def _in_four_bits(a: Operand, b: Operand, site: Site) -> bool:
    """Whether the backend multiplies these as they are: both packed, with one amax for a group."""
    if not hasattr(site.backend, "multiply") or not isinstance(a.kept, Packed) or not isinstance(b.kept, Packed):
        return False
    return a.amax is not None and b.amax is not None and a.amax.dim() == b.amax.dim() == 1


def _tensor_cores(a: Operand, a_rows: Rows, b: Operand, b_rows: Rows, site: Site, *, dgrad: bool) -> Iterator[tuple[int, Tensor]]:
    """The number of every group that has rows, and its product, times alpha, by the backend's own GEMM."""
    assert isinstance(a.kept, Packed) and isinstance(b.kept, Packed) and a.amax is not None and b.amax is not None
    multiply: Any = site.backend.multiply  # type: ignore[attr-defined]
    across = dgrad and b.kept.along == "tiles"
    for group, ((i, j), (k, m)) in enumerate(zip(a_rows.bounds, b_rows.bounds, strict=True)):
        if j > i:
            sides = (a.kept.part(i, j), a.amax[group : group + 1], b.kept.part(k, m), b.amax[group : group + 1])
            yield group, multiply(*sides, left_bound=a.bound, right_bound=b.bound, across=across)


def _multiplied_in(form: Format, device: torch.device) -> torch.dtype:
    # bf16 GEMMs are slow on most CPUs; what bf16 holds, fp32 holds too.
    return torch.bfloat16 if device.type == "cuda" and form.name != "fp32" else torch.float32


@dataclass(frozen=True)
class _Call:
    formats: Formats
    site: Site
    keys: TokenKeys
    step: int
    rows: Rows

    def stream(self, form: Format, operand: str) -> philox.Stream | None:
        if form.name != "nvfp4" or not form.nvfp4.stochastic_rounding:
            return None
        site, expert = self.site, None
        if site.first_expert is not None:
            sizes = torch.tensor(self.rows.sizes, device=self.keys.sample.device)
            expert = (torch.arange(len(sizes), device=sizes.device) + site.first_expert).repeat_interleave(sizes)
        key = philox.stream_key(site.seed, site.name, f"{operand}@{self.keys.depth}" if self.keys.depth else operand)
        return philox.Stream(key, self.keys.sample, self.keys.position, self.step, site.outputs, expert)

    def times_weight(self, x: Operand, weight: Tensor, form: Format, *, dgrad: bool) -> Tensor:
        """fprop: every group's rows times the transpose of its weight; dgrad: times the weight. fp32 [rows, N or K]."""
        operand = weight_operand(weight, form, self.site, dgrad=dgrad)
        groups, outputs, inputs = weight.shape
        result = torch.empty(sum(self.rows.sizes), inputs if dgrad else outputs, device=weight.device)
        if _in_four_bits(x, operand, self.site):
            weight_rows = Rows((outputs,) * groups).padded(nvfp4.BLOCK if dgrad else 1)
            for group, product in _tensor_cores(x, self.rows, operand, weight_rows, self.site, dgrad=dgrad):
                start, stop = self.rows.bounds[group]
                result[start:stop] = product
            return result
        dtype = _multiplied_in(form, weight.device)
        left, right = x.values(self.site.backend, dtype), operand.values(self.site.backend, dtype)
        stored = len(right) // groups  # rows of a group, padded where blocks run along them
        matrices = [right[g * stored : g * stored + outputs] for g in range(groups)]
        factors = [(left[i:j], w if dgrad else w.T) for (i, j), w in zip(self.rows.bounds, matrices, strict=True)]
        _gemms(result, factors, self.rows.bounds, _alpha(x, operand), add=False)
        return result

    def keep(self, x: Tensor) -> Operand:
        """Of x, what wgrad will multiply."""
        form, rows = self.formats[2], self.rows
        if form.name == "nvfp4" and form.nvfp4.hadamard and self.site.first_expert is None and rows != rows.padded(nvfp4.BLOCK):
            raise ValueError(
                f"{self.site.name} has {rows.sizes[0]} tokens in a microbatch, but the Hadamard transform of its wgrad needs a "
                "multiple of 16: change train.micro_batch_size or train.sequence_length, or use precision.nvfp4.hadamard=false"
            )
        return along_tokens(x, rows, form, self.site, keep=True)

    def weight_gradient(self, dy: Tensor, x: Operand, into: Tensor, left: Operand | None) -> None:
        """Adds dy^T x of every group to `into`, fp32 [groups, N, K]. left: dy as dgrad multiplied it."""
        form, backend = self.formats[2], self.site.backend
        # Without blocks, both GEMMs multiply the same dy.
        if left is None or form.name != self.formats[1].name or form.name not in ("fp32", "bf16"):
            left = along_tokens(dy, self.rows, form, self.site, stream=self.stream(form, "dy_t"), keep=False)
        if _in_four_bits(left, x, self.site):
            padded = self.rows.padded(nvfp4.BLOCK)
            for group, product in _tensor_cores(left, padded, x, padded, self.site, dgrad=False):
                into[group] += product
        else:
            dtype = _multiplied_in(form, dy.device)
            a, b = left.values(backend, dtype), x.values(backend, dtype)
            groups, outputs, inputs = into.shape
            factors = [(a[i:j].T, b[i:j]) for i, j in self.rows.padded(_block(form)).bounds]
            places = [(g * outputs, (g + 1) * outputs) for g in range(groups)]
            _gemms(into.view(groups * outputs, inputs), factors, places, _alpha(left, x), add=True)
        if form.name in ("nvfp4", "mxfp8"):
            self.site.health.gradient(self.site.name, into)


class _Linear(torch.autograd.Function):
    """x [rows, K], weight [groups, N, K] -> [rows, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, call: _Call, out_dtype: torch.dtype) -> Tensor:
        form = call.formats[0]
        y = call.times_weight(along_features(x, call.rows, form, call.site, stream=None, forward=True), weight, form, dgrad=False)
        ctx.call, ctx.target, ctx.x_dtype = call, target, x.dtype
        ctx.kept = call.keep(x) if ctx.needs_input_grad[1] else None
        # Saved the way autograd can check that nothing changed it meanwhile.
        whole = [ctx.kept.kept] if ctx.kept is not None and isinstance(ctx.kept.kept, Tensor) else []
        if whole:
            ctx.kept = None
        ctx.save_for_backward(weight, *whole)
        return y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, *whole = ctx.saved_tensors
        call: _Call = ctx.call
        dx = dw = left = None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            form = call.formats[1]
            left = along_features(dy, call.rows, form, call.site, stream=call.stream(form, "dy"), forward=False)
            dx = call.times_weight(left, weight, form, dgrad=True).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = Operand(whole[0]) if whole else ctx.kept
            main_grad = getattr(ctx.target, "main_grad", None)
            if main_grad is None:
                gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                call.weight_gradient(dy, x, gradient, left)
                dw = gradient.to(weight.dtype)
            else:
                call.weight_gradient(dy, x, main_grad.view(weight.shape), left)
                # Megatron's hook wants a gradient to fire on, and leaves main_grad alone when told it is complete.
                ctx.target.grad_added_to_main_grad = True
                dw = weight.new_zeros(1).expand(weight.shape)
            # Autograd drops saved tensors now, but attributes only with the whole graph.
            ctx.kept = None
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
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out_dtype = out_dtype or x.dtype
    # A backend's own layer rounds y to x's dtype, takes amaxes of its own, and shows no operands to be measured.
    may_be_whole = hasattr(site.backend, "layer") and out_dtype == x.dtype and site.amax_group is None and not site.health.active
    layer = site.backend.layer(site.name, flat, weight, formats) if may_be_whole else None  # type: ignore[attr-defined]
    if layer is not None:
        y = layer(flat, new_weight=site.weights.first((site.name, formats, "layer"), weight))
    else:
        call = _Call(formats, site, keys, step, Rows((len(flat),)))
        y = _Linear.apply(flat, weight.unsqueeze(0), weight, call, out_dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor, weight: Tensor, tokens_per_expert: Sequence[int], formats: Formats, site: Site, keys: TokenKeys, step: int
) -> Tensor:
    """Routed experts: x [tokens, K], sorted by expert, times each expert's weight [E, N, K]: [tokens, N].

    tokens_per_expert: E counts, zeros allowed. Every expert's tokens are an operand with its own amax, padded with zeros along tokens.
    """
    call = _Call(formats, site, keys, step, Rows(tuple(tokens_per_expert)))
    return _Linear.apply(x.contiguous(), weight, weight, call, x.dtype)
