"""Pieces: where a rank's parameter lies in the global tensors the checkpoint knows.

A parameter in memory may hold several tensors on disk (query, key and value fused into one matrix; experts stacked),
or several parts of one (the sections of a Mamba input projection, each split over the tensor group by itself).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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
