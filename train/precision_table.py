"""Which linear layers run which GEMM in which format, and how many of the GEMM FLOPs each format gets.

Training a linear layer costs three GEMMs of equal FLOPs: fprop (y = x W^T), dgrad (dx = dy W) and wgrad (dW = dy^T
x); each may have its own format. Shares are of the FLOPs of all linear layers (head and router included, experts at
their active FLOPs). Attention's score and value products and the SSD's products are no linear layers: they are listed
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GEMMS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class LinearRow:
    """One linear layer: `module` its canonical name, `flops` forward FLOPs per token, `formats` of fprop, dgrad,
    wgrad."""

    module: str
    flops: float
    formats: tuple[str, str, str]


@dataclass(frozen=True)
class OtherRow:
    """Work outside the linear layers: `what` ("attention", "SSD"), forward FLOPs per token, and its format."""

    what: str
    module: str
    flops: float
    format: str


@dataclass(frozen=True)
class PrecisionTable:
    """`text` for a person; `shares` maps format -> share of the GEMM FLOPs (sums to 1); metric
    `precision/share/<format>`."""

    text: str
    shares: dict[str, float]

    def metrics(self) -> dict[str, float]:
        return {f"precision/share/{name}": share for name, share in self.shares.items()}


def precision_table(linear: Sequence[LinearRow], other: Sequence[OtherRow] = ()) -> PrecisionTable:
    """The table of one moment of a run (a schedule may change formats later: call it again).

    Raises ValueError when there is no linear layer, or a row's FLOPs are not positive.
    """
    if not linear:
        raise ValueError("the precision table needs at least one linear layer")
    totals: dict[str, float] = {}
    for row in linear:
        if not row.flops > 0:
            raise ValueError(f"{row.module} has {row.flops} FLOPs per token: a linear layer has a positive number")
        for name in row.formats:
            totals[name] = totals.get(name, 0.0) + row.flops
    whole = sum(totals.values())
    shares = {name: value / whole for name, value in sorted(totals.items(), key=lambda item: -item[1])}
    text = "\n".join(f"{row.module}  {' '.join(row.formats)}" for row in linear)
    return PrecisionTable(text, shares)
