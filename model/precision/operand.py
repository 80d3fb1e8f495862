"""What an operand is: which rows belong together, how it becomes NVFP4, how it is kept, and what a GEMM multiplies.

An operand is a matrix whose rows are tokens, or output features of a weight. Rows belong to groups that follow one another (`Rows`): the
routed experts' tokens, the experts of a stacked weight; a plain matrix is one group. Every group has an amax of its own.

    Encoding     how an operand is quantised: where its blocks lie, random bits, rotation, choice of scales. One value, passed around whole
    Packed       4.5 bits an element, to be kept
    Operand      what one side of a GEMM multiplies: values, or what becomes values, and the factor of a second level of scaling
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from model.precision.hadamard import Rotation
from model.precision.nvfp4 import BLOCK, Clipping
from model.precision.philox import Draws
from model.precision.transfer import integers

Along = Literal["rows", "tiles", "columns"]


@dataclass(frozen=True)
class Rows:
    """How rows are cut into groups."""

    sizes: tuple[int, ...]
    """Rows of each group, which follow one another."""

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
class Encoding:
    """How an operand becomes NVFP4. Raises ValueError for combinations that have no meaning."""

    along: Along = "rows"
    """rows: blocks of 16 consecutive elements of a row. tiles: 16 x 16 blocks, of groups of whole tiles. columns: blocks of 16 consecutive
    rows of a column, each group ending in a zero-padded block of its own."""
    stream: Draws | None = field(default=None, compare=False)
    """Random bytes to round stochastically with; None: to nearest."""
    rotation: Rotation | None = None
    """Rotates every block first, and rounds the result to the operand's dtype."""
    clipping: Clipping = "saturate"
    """How the scale of a block is chosen."""
    bound: float = 448.0
    """The largest block scale; other than 448 with 4over6 only."""
    row_scaled: bool = False
    """One amax for each row, [rows, 1], instead of one for each group."""

    def __post_init__(self) -> None:
        if self.along == "tiles" and (self.stream is not None or self.rotation is not None):
            raise ValueError("16 x 16 tiles are rounded to nearest and not rotated: use blocks along rows or columns")
        if self.row_scaled and (self.along != "rows" or self.rotation is not None):
            raise ValueError("an amax for each row goes with blocks along rows that are not rotated")
        if self.clipping != "saturate" and self.stream is not None:
            raise ValueError(f"clipping={self.clipping} compares roundings to nearest: not with stochastic rounding")
        if self.rotation is not None and self.rotation.size != BLOCK:
            raise ValueError(f"a block is rotated over its {BLOCK} elements, not {self.rotation.size}: rotate the operand before")

    def stored(self, rows: Rows) -> Rows:
        """The rows of an operand as it is stored."""
        return rows.padded(BLOCK) if self.along == "columns" else rows


class Unpacks(Protocol):
    """Makes products of packed operands: see `model.precision.backend.Backend`."""

    def unpack(self, packed: "Packed", dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Packed:
    """A quantised operand as it is kept: two codes a byte, E4M3 scales; the amax is kept beside it.

    along   codes [uint8]                                        scales [raw E4M3 bytes, uint8]
    rows    [rows, features / 2], even column in the low nibble   [rows, features / 16]
    tiles   the same                                              [rows / 16, features / 16]
    columns [rows / 2, features], even row in the low nibble      [rows / 16, features]        (rows of whole blocks)
    """

    along: Along
    codes: Tensor
    scales: Tensor
    features: int
    """Columns of the operand, of which a ragged last block along rows is padded with zeros."""

    def part(self, start: int, stop: int) -> "Packed":
        """Rows start ... stop - 1 of the operand, whole blocks where blocks run along them."""
        per_code, per_scale = {"rows": (1, 1), "tiles": (1, BLOCK), "columns": (2, BLOCK)}[self.along]
        codes = self.codes[start // per_code : stop // per_code]
        return Packed(self.along, codes, self.scales[start // per_scale : stop // per_scale], self.features)

    def values(self, backend: Unpacks, dtype: torch.dtype) -> Tensor:
        """Products code * scale, [rows, features]."""
        return backend.unpack(self, dtype)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


class Kept(Protocol):
    """An operand in fewer bits than its values take: a frozen dataclass, whose tensors are fields (see `apart`)."""

    def values(self, backend: Unpacks, dtype: torch.dtype) -> Tensor:
        """[rows, inner] as stored."""
        ...


@dataclass(frozen=True)
class Operand:
    """What one side of a GEMM multiplies: `kept`, times amax / largest where there is an amax."""

    kept: Tensor | Kept
    """The values [rows, inner] themselves, or something smaller that gives them."""
    rows: Rows
    """Groups of the rows as they are stored: padded where blocks run along them."""
    amax: Tensor | None = None
    """NVFP4's second-level scale, fp32 [groups], or [rows, 1]; None: the values are what they are."""
    largest: float = 1.0
    """The value that stands for the amax (NVFP4: the largest code times the largest block scale)."""

    def values(self, backend: Unpacks, dtype: torch.dtype) -> Tensor:
        """[rows, inner] in `dtype`, without the factor."""
        return self.kept.to(dtype) if isinstance(self.kept, Tensor) else self.kept.values(backend, dtype)


@dataclass(frozen=True)
class _Place:
    index: int


def apart(value: Any, tensors: list[Tensor]) -> Any:
    """A dataclass without its tensors, also those of dataclasses in its fields, which are added to `tensors`: autograd keeps them, can check that
    nothing changed them, and can drop them to have them computed again. `together` is the inverse."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: apart(getattr(value, each.name), tensors) for each in fields(value)})
    return value


def together(value: Any, tensors: Sequence[Tensor]) -> Any:
    """What `apart` was given."""
    if isinstance(value, _Place):
        return tensors[value.index]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: together(getattr(value, each.name), tensors) for each in fields(value)})
    return value


def gemm_dtype(device: torch.device) -> torch.dtype:
    """What products are multiplied in: bf16 GEMMs are slow on most CPUs, and every value prepared here is as exact in fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def rounded_to_bf16(x: Tensor) -> Tensor:
    """x rounded to bf16, in the dtype GEMMs multiply."""
    return x.to(torch.bfloat16).to(gemm_dtype(x.device))


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each row of x [rows, features], fp32 [rows, 1]."""
    return x.abs().amax(-1, keepdim=True).float()


def pad_rows(x: Tensor, rows: Rows, block: int = BLOCK) -> Tensor:
    """x [rows, ...] with zero rows after every group, up to whole blocks."""
    padded = rows.padded(block)
    if rows == padded:
        return x
    result = x.new_zeros(sum(padded.sizes), *x.shape[1:])
    shift = integers([p[0] - r[0] for p, r in zip(padded.bounds, rows.bounds, strict=True)], x.device)
    index = torch.arange(len(x), device=x.device) + for_rows(shift, rows)
    return result.index_copy_(0, index, x)


def per_row(values: Tensor, rows: Rows) -> Tensor:
    """values [groups] repeated for every row: [rows, 1]."""
    if len(rows.sizes) == 1:
        return values[:, None]
    return for_rows(values, rows)[:, None]


def for_rows(values: Tensor, rows: Rows) -> Tensor:
    """values [groups] repeated for every row: [rows]."""
    return values.repeat_interleave(integers(rows.sizes, values.device), output_size=sum(rows.sizes))
