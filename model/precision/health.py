"""How well operands survive quantisation, and how large the residual stream grows: measured on the tensors of a real step.

A `Health` is asked by the linear layers and the layer stack of the model. Between `start` and `finish`, a training step, it measures every
operand the first time it is quantised: in the first microbatch, and of a block that is used several times, in its first use. It reads and
never writes, so a step gives the same bits with and without it.

    precision/<module>/<operand>/        operand: x, w, dy along features (fprop, dgrad); x_t, w_t, dy_t along tokens, or outputs of w
        sqnr_db           10 log10(sum x^2 / sum (q - x)^2)
        underflow         share of the nonzero elements that became 0
        clipped           share of the elements above the largest value their block can hold
        bias              sum sign(x) (q - x) / sum |x|: below 0, magnitudes shrink on average
        scale_zero        share of the block scales that are 0 although their block is not
        scale_saturated   share of the block scales at the format's largest (NVFP4: precision.nvfp4.e4m3_bound)
        scale_p05, scale_p50, scale_p95   quantiles of floor(log2(scale)) over blocks
    precision/<module>/wgrad/zero        share of the elements of dW that are exactly 0 after the first microbatch
    residual/<layer>/                    of the residual stream behind a layer
        rms, outlier_ratio (largest magnitude / rms), outlier_position (in its sequence), outlier_feature

x is what the quantiser saw: x_t and dy_t after the Hadamard transform where there is one. Every number comes from sums, which `finish` adds
over all ranks: shards of one operand, of one layer's experts and of the batch are seen as one, and copies do not change a ratio.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.precision import mxfp8
from model.precision.backend import Backend, Packed, Rows, pad_rows, per_row
from model.precision.hadamard import rotate
from model.precision.nvfp4 import BLOCK, MAX_CODE

LOWEST, EXPONENTS = -64, 96  # of scales, as far as they are told apart
QUANTILES = {"scale_p05": 0.05, "scale_p50": 0.5, "scale_p95": 0.95}


class Health:
    """modules: globs over canonical module names; empty: every module."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self.modules = tuple(modules)
        self.active = False
        self._operands: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._residuals: dict[str, Tensor] = {}

    def start(self) -> None:
        """Measures what comes from here on."""
        self.active = True

    def _wants(self, kept: Mapping[str, Tensor], key: str, module: str) -> bool:
        return self.active and key not in kept and (not self.modules or any(fnmatchcase(module, glob) for glob in self.modules))

    @torch.no_grad()
    def nvfp4(
        self,
        module: str,
        operand: str,
        x: Tensor,
        packed: Packed,
        amax: Tensor,
        bound: float,
        rows: Rows,
        backend: Backend,
        *,
        hadamard: bool = False,
    ) -> None:
        """x [rows, features] and what it became."""
        key = f"{module}/{operand}"
        if not len(x) or not self._wants(self._operands, key, module):
            return
        if packed.along == "columns":
            x, rows = pad_rows(x, rows), rows.padded(BLOCK)
            if hadamard:
                x = rotate(x.T.contiguous()).T
        factor = amax if amax.dim() == 2 else per_row(amax, rows)
        largest = packed.codes & 0x77  # both codes of a byte without their signs
        at_limit = torch.stack(((largest & 0xF) == 7, (largest >> 4) == 7), -1)
        limit = at_limit.flatten(-2) if packed.along != "columns" else at_limit.movedim(-1, 1).flatten(0, 1)
        q = backend.unpack(packed, torch.float32) * (factor / (MAX_CODE * bound))
        scale = packed.scales.view(torch.float8_e4m3fn).float()
        blocks = partial(_any_in_block, x, packed.along, BLOCK)
        self._operands[key] = _sums(x.float(), q, limit[:, : x.shape[1]], scale, blocks, bound)

    @torch.no_grad()
    def mxfp8(self, module: str, operand: str, x: Tensor, quantized: mxfp8.Quantized, rows: Rows) -> None:
        """The same for MXFP8; blocks along columns where it says so."""
        key = f"{module}/{operand}"
        if not len(x) or not self._wants(self._operands, key, module):
            return
        if len(x) != len(quantized.elements):
            x = pad_rows(x, rows, mxfp8.BLOCK)
        exponent = quantized.exponents.int() - mxfp8.BIAS
        # The smallest E8M0 counts as zero: nothing smaller can be told apart.
        scale = torch.where(exponent > -mxfp8.BIAS, torch.exp2(exponent.clamp(min=-126).float()), torch.zeros(()))
        limit = quantized.elements.float().abs() == 448
        blocks = partial(_any_in_block, x, quantized.along, mxfp8.BLOCK)
        self._operands[key] = _sums(x.float(), quantized.dequantize(), limit, scale, blocks, 2.0**127)

    @torch.no_grad()
    def gradient(self, module: str, dw: Tensor) -> None:
        """dw: the weight gradient of the step as far as it is accumulated."""
        if self._wants(self._gradients, module, module):
            self._gradients[module] = torch.stack(((dw == 0).sum(), torch.tensor(dw.numel(), device=dw.device))).double()

    @torch.no_grad()
    def residual(self, layer: str, x: Tensor, first_position: int) -> None:
        """x [sequence, batch, hidden] behind a layer; first_position: of its first row in the sequence."""
        if not self._wants(self._residuals, layer, layer):
            return
        where = x.abs().argmax()
        position, feature = where // x[0].numel() + first_position, where % x.shape[-1]
        values = (
            torch.linalg.vector_norm(x, dtype=torch.float64).square(),
            torch.tensor(x.numel(), device=x.device),
            x.abs().amax(),
            position,
            feature,
        )
        self._residuals[layer] = torch.stack([value.double() for value in values])

    def finish(self) -> dict[str, float]:
        """The metrics of everything measured since `start`, the same on every rank, and forgets it. Collective."""
        self.active = False
        mine = [{key: value.tolist() for key, value in kept.items()} for kept in (self._operands, self._gradients, self._residuals)]
        for kept in (self._operands, self._gradients, self._residuals):
            kept.clear()
        everyone: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        operands, gradients, residuals = ([rank[kind] for rank in everyone] for kind in range(3))
        metrics: dict[str, float] = {}
        for key, sums in _added(operands).items():
            metrics |= {f"precision/{key}/{name}": value for name, value in _operand_metrics(sums).items()}
        for module, (zeros, elements) in _added(gradients).items():
            metrics[f"precision/{module}/wgrad/zero"] = zeros / elements
        for layer in dict.fromkeys(layer for rank in residuals for layer in rank):
            parts = [rank[layer] for rank in residuals if layer in rank]
            rms = math.sqrt(sum(part[0] for part in parts) / sum(part[1] for part in parts))
            _, _, largest, position, feature = max(parts, key=lambda part: part[2])
            names: dict[str, float] = {"rms": rms, "outlier_position": int(position), "outlier_feature": int(feature)}
            names |= {"outlier_ratio": largest / rms} if rms else {}
            metrics |= {f"residual/{layer}/{name}": value for name, value in names.items()}
        return metrics


def _any_in_block(x: Tensor, along: str, block: int) -> Tensor:
    """Whether blocks hold anything but zeros, in the shape of their scales."""
    present = (x != 0).float()[None, None]
    size = {"rows": (1, block), "tiles": (block, block), "columns": (block, 1)}[along]
    return torch.nn.functional.max_pool2d(present, size, ceil_mode=True)[0, 0] > 0


def _sums(x: Tensor, q: Tensor, at_limit: Tensor, scale: Tensor, blocks: Callable[[], Tensor], bound: float) -> Tensor:
    """fp64: what `_operand_metrics` reads. blocks: which hold anything but zeros; asked for where there is a scale of 0."""
    magnitude, kept = x.abs(), q.abs()
    lost = kept == 0
    exponent = torch.frexp(scale)[1] - 1
    present = scale > 0
    zero = torch.zeros((), device=x.device) if present.all() else (blocks() & ~present).sum()
    whole = magnitude.sum(dtype=torch.float64)
    counts = torch.bincount((exponent[present].long() - LOWEST).clamp(0, EXPONENTS - 1), minlength=EXPONENTS)
    first = (
        torch.linalg.vector_norm(x, dtype=torch.float64).square(),
        torch.linalg.vector_norm(q - x, dtype=torch.float64).square(),
        magnitude.count_nonzero(),
        magnitude[lost].count_nonzero(),
        torch.tensor(x.numel(), device=x.device),
        (at_limit & ~lost & (magnitude > kept)).sum(),  # a block of scale 0 underflowed
        kept.sum(dtype=torch.float64) - whole,  # q has the sign of x, or is 0
        whole,
        torch.tensor(scale.numel(), device=x.device),
        zero,
        (scale >= bound).sum(),
    )
    return torch.cat((torch.stack([value.double() for value in first]), counts.double()))


def _operand_metrics(sums: Sequence[float]) -> dict[str, float]:
    signal, noise, nonzero, lost, elements, clipped, drift, magnitude, blocks, zero, saturated, *counts = sums
    metrics = {
        "underflow": lost / max(nonzero, 1.0),
        "clipped": clipped / elements,
        "bias": drift / magnitude if magnitude else 0.0,
        "scale_zero": zero / blocks,
        "scale_saturated": saturated / blocks,
    }
    if signal:  # of zeros there is none
        metrics["sqnr_db"] = 10 * math.log10(signal / noise) if noise else math.inf
    total = sum(counts)
    for name, share in QUANTILES.items():
        reached = 0.0
        for index, count in enumerate(counts):
            reached += count
            if total and reached >= share * total:
                metrics[name] = float(LOWEST + index)
                break
    return metrics


def _added(ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    total: dict[str, list[float]] = {}
    for rank in ranks:
        for key, values in rank.items():
            total[key] = [a + b for a, b in zip(total[key], values, strict=True)] if key in total else list(values)
    return total
