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
        scale_saturated   share of the block scales at the format's largest (NVFP4: 448, or nvfp4.e4m3_bound)
        scale_p05, scale_p50, scale_p95   quantiles of floor(log2(scale)) over blocks
    precision/<module>/wgrad/zero        share of the elements of dW that are exactly 0 after the first microbatch
    residual/<layer>/                    of the residual stream behind a layer
        rms, outlier_ratio (largest magnitude / rms), outlier_position (in its sequence), outlier_feature

x is what the quantiser saw, after the Hadamard transform where there is one; a format describes it as `Seen`. Every number comes from sums,
which `finish` adds over all ranks: shards of one operand, of one layer's experts and of the batch are seen as one, and copies do not change a ratio.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOWEST, EXPONENTS = -64, 96  # of scales, as far as they are told apart
QUANTILES = {"scale_p05": 0.05, "scale_p50": 0.5, "scale_p95": 0.95}


@dataclass(frozen=True)
class Seen:
    """An operand and what became of it, as a format tells it."""

    x: Tensor
    """What the quantiser saw, [rows, features]."""
    q: Tensor
    """What became of it, fp32 of x's shape."""
    at_limit: Tensor
    """bool of x's shape: which codes are the largest."""
    scale: Tensor
    """fp32 [blocks down, blocks across]."""
    block: tuple[int, int]
    """Rows and columns of a block."""
    bound: float
    """The format's largest scale."""


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
    def operand(self, module: str, operand: str, seen: Callable[[], Seen]) -> None:
        """seen: called where this operand is wanted."""
        key = f"{module}/{operand}"
        if self._wants(self._operands, key, module) and (described := seen()).x.numel():
            self._operands[key] = _sums(described)

    @torch.no_grad()
    def gradient(self, module: str, dw: Tensor) -> None:
        """dw: the weight gradient of the step as far as it is accumulated."""
        if self._wants(self._gradients, module, module):
            self._gradients[module] = torch.stack(((dw == 0).sum(), torch.full((), dw.numel(), device=dw.device))).double()

    @torch.no_grad()
    def residual(self, layer: str, x: Tensor, first_position: int) -> None:
        """x [sequence, batch, hidden] behind a layer; first_position: of its first row in the sequence."""
        if not self._wants(self._residuals, layer, layer):
            return
        where = x.abs().argmax()
        position, feature = where // x[0].numel() + first_position, where % x.shape[-1]
        values = (
            torch.linalg.vector_norm(x, dtype=torch.float64).square(),
            torch.full((), x.numel(), device=x.device),
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


def _any_in_block(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Whether blocks hold anything but zeros, in the shape of their scales."""
    return torch.nn.functional.max_pool2d((x != 0).float()[None, None], block, ceil_mode=True)[0, 0] > 0


def _sums(seen: Seen) -> Tensor:
    """fp64: what `_operand_metrics` reads."""
    x, q, scale = seen.x.float(), seen.q, seen.scale
    magnitude, kept = x.abs(), q.abs()
    lost = kept == 0
    exponent = torch.frexp(scale)[1] - 1
    present = scale > 0
    whole = magnitude.sum(dtype=torch.float64)
    places = (exponent.long() - LOWEST).clamp(0, EXPONENTS - 1).flatten()
    counts = torch.zeros(EXPONENTS, dtype=torch.int64, device=x.device).scatter_add_(0, places, present.long().flatten())
    first = (
        torch.linalg.vector_norm(x, dtype=torch.float64).square(),
        torch.linalg.vector_norm(q - x, dtype=torch.float64).square(),
        magnitude.count_nonzero(),
        (lost & (magnitude != 0)).sum(),
        torch.full((), x.numel(), device=x.device),
        (seen.at_limit & ~lost & (magnitude > kept)).sum(),  # a block of scale 0 underflowed
        kept.sum(dtype=torch.float64) - whole,  # q has the sign of x, or is 0
        whole,
        torch.full((), scale.numel(), device=x.device),
        (_any_in_block(x, seen.block) & ~present).sum(),
        (scale >= seen.bound).sum(),
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
