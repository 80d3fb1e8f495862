"""NVFP4 as Transformer Engine trains with it, and its options. See `model.precision.nvfp4` for the numbers.

    fprop   y  = x W^T      x: blocks along features                W: 16x16 tiles (or blocks along its inner dimension)
    dgrad   dx = dy W       dy: blocks along features, stochastic   W: the same tiles
    wgrad   dW = dy^T x     dy^T: rotated, stochastic; x^T: rotated; both with blocks along tokens

Nothing is quantised twice. A weight is quantised once per optimizer step and kept packed, for every microbatch and for both fprop and dgrad
where those share its tiles. Of x, only what wgrad will multiply outlives the forward pass: 4.5 bits an element.

A variant inherits from `NVFP4`: `encoding` is where operands differ.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.precision.backend import Backend
from model.precision.formats.base import Format, FormatOptions, Unfit, Use, flat, weight_rows
from model.precision.gemm import Gemm
from model.precision.hadamard import FIXED, rotate
from model.precision.health import Seen
from model.precision.nvfp4 import BLOCK, MAX_CODE, Clipping
from model.precision.operand import Encoding, Operand, Packed, Rows, pad_rows, per_row
from model.precision.site import Call

Name = Literal["x", "x_t", "w", "w_t", "dy", "dy_t"]  # of an operand; _t: blocks along its rows


@dataclass(frozen=True)
class NVFP4Options(FormatOptions):
    """How operands become NVFP4; the defaults are the recipe Nemotron 3 Super was trained with."""

    weight_scaling: Literal["1d", "2d"] = "2d"
    """2d: one scale per 16x16 tile, so W and its transpose get the same values. 1d: blocks of 16 along each GEMM's inner dimension."""
    stochastic_rounding: bool = True
    """Of dy, in dgrad and wgrad; never of weights or forward activations."""
    hadamard: bool = True
    """Random Hadamard transform of both wgrad operands, over 16 tokens."""
    clipping: Literal["saturate", "4over6_mae", "4over6_mse"] = "saturate"
    """4over6: the largest code of a block is 6 or 4, whichever has the smaller error, mean absolute or squared; forward operands only."""
    e4m3_bound: Literal[448, 256] = 448
    """Largest block scale used with 4over6; 256 leaves room for the candidate 1.5 times as large."""
    row_scaled: bool = False
    """One amax per row of the forward activation instead of one for all."""

    def validate(self, key: str) -> None:
        for name, value, known in (
            ("weight_scaling", self.weight_scaling, ("1d", "2d")),
            ("clipping", self.clipping, ("saturate", "4over6_mae", "4over6_mse")),
            ("e4m3_bound", self.e4m3_bound, (448, 256)),
        ):
            if value not in known:
                raise ValueError(f"{key}.{name}={value!r} is unknown: use {' or '.join(map(str, known))}")
        if self.e4m3_bound != 448 and self.clipping == "saturate":
            raise ValueError(
                f"{key}.e4m3_bound={self.e4m3_bound} is for 4over6_mae and 4over6_mse, but {key}.clipping is saturate: use 448, or another clipping"
            )


class NVFP4(Format):
    name = "nvfp4"
    Options = NVFP4Options
    options: NVFP4Options

    def encoding(self, operand: Name, call: Call) -> Encoding:
        """How an operand is quantised."""
        options = self.options
        clipping: Clipping = options.clipping
        bound = float(options.e4m3_bound) if clipping != "saturate" else 448.0
        stream = call.stream(operand) if operand in ("dy", "dy_t") and options.stochastic_rounding else None
        if operand in ("x_t", "dy_t"):
            return Encoding("columns", stream, FIXED if options.hadamard else None)
        if operand == "dy":
            return Encoding("rows", stream)
        if operand == "x":
            return Encoding("rows", clipping=clipping, bound=bound, row_scaled=options.row_scaled)
        if options.weight_scaling == "2d":
            return Encoding("tiles", clipping=clipping, bound=bound)
        return Encoding("columns" if operand == "w_t" else "rows", clipping=clipping, bound=bound)

    def fprop(self, x: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return self.quantised("x", x, call), self.weight("w", weight, call)

    def keep(self, x: Tensor, multiplied: Operand, call: Call) -> Operand:
        if self.options.hadamard and call.site.first_expert is None:
            self._check_tokens(call.site.name, call.rows.sizes[0])
        return self.quantised("x_t", x, call, packed=True)

    def dgrad(self, dy: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        return self.quantised("dy", dy, call), self.weight("w_t", weight, call)

    def wgrad(self, dy: Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        return self.quantised("dy_t", dy, call), kept

    def quantised(self, operand: Name, x: Tensor, call: Call, *, packed: bool = False) -> Operand:
        """An activation or gradient [rows, features] as `encoding` says, with its health told. packed: it is to be kept."""
        encoding = self.encoding(operand, call)
        found = encode(x, call.rows, encoding, call, packed=packed)
        if isinstance(found.kept, Packed):
            call.measure(operand, lambda: seen(x, found, call.rows, encoding, call.backend))
        return found

    def weight(self, operand: Literal["w", "w_t"], weight: Tensor, call: Call) -> Operand:
        """A weight [groups, N, K], quantised once for every change of it."""
        encoding = self.encoding(operand, call)
        if encoding.along == "tiles":
            self._check_weight(call.site.name, *weight.shape[1:])
        w, rows = flat(weight), weight_rows(weight)
        found = call.cached((self, encoding), weight, lambda: encode(w, rows, encoding, call, packed=True))
        # Tiles serve both sides. Measured here and not where it is quantised: that may have been before this step's health was asked for.
        call.measure("w" if encoding.along == "tiles" else operand, lambda: seen(w, found, rows, encoding, call.backend))
        return found

    def draws(self, gemm: Gemm) -> bool:
        return gemm != "fprop" and self.options.stochastic_rounding

    def check(self, use: Use) -> None:
        super().check(use)
        if {"fprop", "dgrad"} & set(use.gemms) and self.options.weight_scaling == "2d":
            self._check_weight(use.module, use.rows, use.columns)
        if "wgrad" in use.gemms and self.options.hadamard and not use.routed:
            self._check_tokens(use.module, use.tokens)

    def _check_weight(self, module: str, rows: int, columns: int) -> None:
        if rows % BLOCK or columns % BLOCK:
            raise Unfit(
                f"precision asks for {self} in {module}, whose weight on one rank is {rows} x {columns}, but 2d scaling needs multiples of {BLOCK} "
                f"({_near(rows)} x {_near(columns)}, for instance)",
                f"set precision.{self}.weight_scaling=1d, or give the module another format",
                "weight",
            )

    def _check_tokens(self, module: str, tokens: int) -> None:
        if tokens % BLOCK:
            raise Unfit(
                f"precision asks for {self} in {module}, which gets {tokens} tokens of a microbatch on one rank, but the Hadamard transform of its "
                f"wgrad works on groups of {BLOCK}",
                f"set precision.{self}.hadamard=false",
                "tokens",
            )


def _near(size: int) -> int:
    """The nearest multiple of a block."""
    return max(1, round(size / BLOCK)) * BLOCK


def encode(x: Tensor, rows: Rows, encoding: Encoding, call: Call, *, packed: bool) -> Operand:
    """x [rows, features] as an encoding says: packed, or as products where neither health nor the backend's GEMM wants it packed."""
    backend = call.backend
    amax = call.maximum(backend.amax(x, rows, encoding))
    kept = backend.quantize(x, amax, rows, encoding, packed=packed or call.packed)
    return Operand(kept, encoding.stored(rows), amax, MAX_CODE * encoding.bound)


def seen(x: Tensor, operand: Operand, rows: Rows, encoding: Encoding, backend: Backend) -> Seen:
    """x [rows, features] and what it became, packed, for its health."""
    packed, amax = operand.kept, operand.amax
    assert isinstance(packed, Packed) and amax is not None
    columns = packed.along == "columns"
    if columns:
        x = pad_rows(x, rows)
    if encoding.rotation is not None:
        x = rotate(x.T.contiguous(), encoding.rotation).T if columns else rotate(x, encoding.rotation)
    factor = amax if amax.dim() == 2 else per_row(amax, operand.rows)
    largest = packed.codes & 0x77  # both codes of a byte without their signs
    at_limit = torch.stack(((largest & 0xF) == 7, (largest >> 4) == 7), -1)
    limit = at_limit.movedim(-1, 1).flatten(0, 1) if columns else at_limit.flatten(-2)
    return Seen(
        x=x,
        q=backend.unpack(packed, torch.float32) * (factor / operand.largest),
        at_limit=limit[:, : x.shape[1]],
        scale=packed.scales.view(torch.float8_e4m3fn).float(),
        block={"rows": (1, BLOCK), "tiles": (BLOCK, BLOCK), "columns": (BLOCK, 1)}[packed.along],
        bound=encoding.bound,
    )
