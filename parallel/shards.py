"""Pieces: where a rank's parameter lies in the global tensors the checkpoint knows; and over which ranks it is spread.

A parameter in memory may hold several tensors on disk (query, key and value fused into one matrix; experts stacked),
or several parts of one (the sections of a Mamba input projection, each split over the tensor group by itself).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Spread = Literal["rows", "columns", "everywhere", "expert_rows", "expert_columns"]
"""How a parameter lies on the ranks: split along dimension 0 or 1 over the tensor group, whole on each of its ranks, or stacked experts, some
on each rank of the expert group, their rows or columns split over the expert-tensor group."""


@dataclass(frozen=True)
class Piece:
    """A rectangular part of the global tensor `name`, and where it lies in the local parameter."""

    name: str
    shape: tuple[int, ...]
    """of the global tensor"""
    offset: tuple[int, ...]
    """of this rank's part in the global tensor"""
    local: tuple[int | slice, ...]
    """indexes the local parameter: `param[local]` has the part's shape"""


def set_pieces(param: Tensor, pieces: Sequence[Piece]) -> None:
    """Attaches the pieces to a parameter or buffer."""
    param.pieces = tuple(pieces)  # type: ignore[attr-defined]


def pieces_of(param: Tensor) -> tuple[Piece, ...]:
    """The pieces attached to a parameter or buffer; empty if there are none."""
    return getattr(param, "pieces", ())


def set_spread(param: Tensor, spread: Spread) -> None:
    """Says over which ranks a parameter is spread, so that an engine knows whose gradients to sum and where its norm counts once."""
    param.spread = spread  # type: ignore[attr-defined]


def spread_of(param: Tensor) -> Spread | None:
    """Over which ranks a parameter is spread; None where nothing was said: every rank holds it whole and sees all of its gradient."""
    return getattr(param, "spread", None)


@dataclass(frozen=True)
class Section:
    """Rows of a fused parameter that belong together: `rows` (global) of the tensor `name`, starting at its row `start`."""

    name: str
    rows: int
    start: int = 0


def split_sections(sections: Sequence[Section], trailing: tuple[int, ...], rank: int, size: int) -> list[Piece]:
    """Pieces of a parameter [rows / size, *trailing] made of sections, each split over `size` ranks along its rows.

    Sections with the same name are parts of one global tensor. Raises ValueError when a section does not divide.
    """
    total: dict[str, int] = {}
    for section in sections:
        total[section.name] = total.get(section.name, 0) + section.rows
    pieces, at = [], 0
    everything = tuple(slice(None) for _ in trailing)
    for section in sections:
        if section.rows % size:
            raise ValueError(f"{section.name} has a section of {section.rows} rows, which parallel.tensor={size} does not divide")
        rows = section.rows // size
        offset = (section.start + rank * rows, *(0 for _ in trailing))
        pieces.append(Piece(section.name, (total[section.name], *trailing), offset, (slice(at, at + rows), *everything)))
        at += rows
    return pieces


def whole(name: str, shape: tuple[int, ...]) -> Piece:
    """The piece of a parameter that is the global tensor `name`."""
    return Piece(name, shape, tuple(0 for _ in shape), tuple(slice(None) for _ in shape))
