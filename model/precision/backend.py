"""What a backend of NVFP4 offers, and which one runs.

All backends give the same values; `reference` defines them. They differ in where they run and how fast:

    reference            plain PyTorch, any device                  readable, slow
    cpu                  fused kernels compiled by Numba, CPUs      the default on a CPU
    triton               fused kernels, Ampere, Hopper, Blackwell   the default on a GPU
    transformer_engine   FP4 tensor cores, Blackwell                see model/precision/backends/transformer_engine.py

An operand is a matrix whose rows are tokens, or output features of a weight. Rows belong to groups that follow one another (`Rows`): the
routed experts' tokens, the experts of a stacked weight; a plain matrix is one group. Every group has an amax of its own.

    quantize_rows      blocks of 16 consecutive elements of a row, or 16 x 16 tiles        fprop's x, dgrad's dy, weights
    quantize_columns   blocks of 16 consecutive rows of a column, a group ending in a      wgrad's dy and x
                       zero-padded block of its own

Both give either products (code * scale, what a GEMM multiplies, exact in bf16) or a `Packed` operand, 4.5 bits an element, to be kept.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from model.precision.nvfp4 import BLOCK, Clipping, Quantized
from model.precision.philox import Stream

BackendName = Literal["auto", "reference", "cpu", "triton", "transformer_engine"]
BACKENDS: tuple[BackendName, ...] = ("auto", "reference", "cpu", "triton", "transformer_engine")


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

    def padded(self, block: int) -> "Rows":
        """Every group rounded up to whole blocks."""
        return Rows(tuple(-(-size // block) * block for size in self.sizes))


@dataclass(frozen=True)
class Packed:
    """A quantised operand as it is kept: two codes a byte, E4M3 scales; the amax is kept beside it.

    along   codes [uint8]                                        scales [raw E4M3 bytes, uint8]
    rows    [rows, features / 2], even column in the low nibble   [rows, features / 16]
    tiles   the same                                              [rows / 16, features / 16]
    columns [rows / 2, features], even row in the low nibble      [rows / 16, features]        (rows of whole blocks)

    features: columns of the operand, of which a ragged last block along rows is padded with zeros.
    """

    along: Literal["rows", "tiles", "columns"]
    codes: Tensor
    scales: Tensor
    features: int

    def part(self, start: int, stop: int) -> "Packed":
        """Rows start ... stop - 1 of the operand, whole blocks where blocks run along them."""
        per_code, per_scale = {"rows": (1, 1), "tiles": (1, BLOCK), "columns": (2, BLOCK)}[self.along]
        codes = self.codes[start // per_code : stop // per_code]
        return Packed(self.along, codes, self.scales[start // per_scale : stop // per_scale], self.features)


class Backend(Protocol):
    """NVFP4 on some kind of device. x: fp32 or bf16 [rows, features], contiguous
    (`quantize`: fp16 too); amax: fp32 [groups] of x, or [rows, 1]
    (row-scaled). Values are those of `model.precision.nvfp4`; products come in `gemm_dtype(x)`."""

    name: str

    def quantize(
        self,
        x: Tensor,
        *,
        scaling: Literal["1d", "2d"] = "1d",
        hadamard: bool = False,
        random_bits: Tensor | None = None,
        clipping: Clipping = "saturate",
        e4m3_bound: int = 448,
        row_scaled: bool = False,
        amax: Tensor | None = None,
        hadamard_signs: bool = True,
    ) -> Quantized:
        """Exactly `model.precision.nvfp4.quantize`."""
        ...

    def amax(self, x: Tensor, rows: Rows, *, hadamard: bool = False) -> Tensor:
        """Largest magnitude of each group, fp32 [groups], 0 for an empty one; of its rotation along (padded) rows with `hadamard`."""
        ...

    def quantize_rows(
        self,
        x: Tensor,
        amax: Tensor,
        rows: Rows,
        *,
        stream: Stream | None = None,
        clipping: Clipping = "saturate",
        bound: float = 448.0,
        tiles: bool = False,
        packed: bool = False,
    ) -> Tensor | Packed:
        """Products [rows, features], or Packed. stream: round stochastically with it. tiles: 16 x 16 blocks (groups of whole tiles)."""
        ...

    def quantize_columns(
        self,
        x: Tensor,
        amax: Tensor,
        rows: Rows,
        *,
        hadamard: bool = False,
        stream: Stream | None = None,
        clipping: Clipping = "saturate",
        bound: float = 448.0,
        packed: bool = False,
    ) -> Tensor | Packed:
        """Products [padded rows, features] in x's orientation, or Packed. hadamard: rotate every 16 rows first."""
        ...

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Products of a packed operand, [rows, features]."""
        ...

    def bf16(self, x: Tensor) -> Tensor:
        """x rounded to bf16, in `gemm_dtype(x)`."""
        ...


def gemm_dtype(like: Tensor) -> torch.dtype:
    """What products are multiplied in: bf16 GEMMs are slow on most CPUs, and every value prepared here is as exact in fp32."""
    return torch.bfloat16 if like.is_cuda else torch.float32


def rounded_to_bf16(x: Tensor) -> Tensor:
    """x rounded to bf16, in `gemm_dtype(x)`."""
    return x.to(torch.bfloat16).to(gemm_dtype(x))


def pad_rows(x: Tensor, rows: Rows, block: int = BLOCK) -> Tensor:
    """x [rows, ...] with zero rows after every group, up to whole blocks."""
    padded = rows.padded(block)
    if rows == padded:
        return x
    result = x.new_zeros(sum(padded.sizes), *x.shape[1:])
    sizes = torch.tensor(rows.sizes, device=x.device)
    shift = torch.tensor([p[0] - r[0] for p, r in zip(padded.bounds, rows.bounds, strict=True)], device=x.device)
    index = torch.arange(len(x), device=x.device) + shift.repeat_interleave(sizes)
    return result.index_copy_(0, index, x)


def per_row(values: Tensor, rows: Rows) -> Tensor:
    """values [groups] repeated for every row: [rows, 1]."""
    if len(rows.sizes) == 1:
        return values[:, None]
    return values.repeat_interleave(torch.tensor(rows.sizes, device=values.device))[:, None]


def _resolved(name: str, device: torch.device) -> str:
    """What "auto" means on a device. Never transformer_engine: its random bits cannot be drawn again, so a resume would be another run."""
    if name == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    return name


def missing(name: str, device: torch.device) -> str | None:
    """What keeps a backend from running on this device, as the end of a sentence; None when nothing does."""
    name = _resolved(name, device)
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"it runs on CPUs, and this run is on {device.type}"
    if name == "triton":
        from model.precision.backends.triton import missing as of_triton

        return of_triton(device)
    if name == "transformer_engine":
        from model.precision.backends.transformer_engine import missing as of_transformer_engine

        return of_transformer_engine(device)
    return f"it does not exist: use one of {', '.join(BACKENDS)}"


def choose(name: str, device: torch.device) -> Any:
    """The backend `precision.backend` asks for on a device; "auto": cpu or triton. Raises ValueError saying what it lacks."""
    name = _resolved(name, device)
    lacking = missing(name, device)
    if lacking is not None:
        raise ValueError(f"precision.backend={name} cannot run: {lacking}")
    if name == "reference":
        from model.precision.backends.reference import Reference

        return Reference()
    if name == "cpu":
        from model.precision.backends.cpu import FusedCPU

        return FusedCPU()
    if name == "triton":
        from model.precision.backends.triton import Triton

        return Triton()
    from model.precision.backends.transformer_engine import TransformerEngine

    return TransformerEngine()
