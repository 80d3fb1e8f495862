"""Which linear layers run which GEMM in which format, and how many of the GEMM FLOPs each format gets.

Training a linear layer costs three GEMMs of equal FLOPs, and each may have its own format:

    fprop  y  = x W^T
    dgrad  dx = dy W
    wgrad  dW = dy^T x

Shares are of the FLOPs of the three GEMMs of all linear layers: head and router included, experts at their active
FLOPs. Attention's score and value products and the SSD's products are no linear layers; they are listed apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.count import linear_modules, other_products
from model.precision.gemm import GEMMS
from train.recipe.tree import Recipe

NOT_RUN = "-"
_SHOWN_RANGES = 5  # of layer numbers in one row


@dataclass(frozen=True)
class LinearRow:
    """One linear layer."""

    module: str
    """Canonical name."""
    flops: float
    """Forward FLOPs per token (2 x rows x columns; a block used several times counts each use; experts times top-k)."""
    formats: tuple[str | None, str | None, str | None]
    """Names of the formats of fprop, dgrad and wgrad: shares are of these. None: that GEMM is not run."""
    labels: tuple[str, str, str] | None = None
    """What the table calls them, where names alone do not tell variants of a format apart."""


@dataclass(frozen=True)
class OtherRow:
    """Matrix work outside the linear layers: `what` is "attention" or "SSD", `flops` forward FLOPs per token."""

    what: str
    module: str
    flops: float
    format: str


@dataclass(frozen=True)
class PrecisionTable:
    """`text` is for a person; `shares` maps a format to its share of the GEMM FLOPs (largest first, sum 1; 0 for formats of other times)."""

    text: str
    shares: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The metrics `precision/share/<format>`."""
        return {f"precision/share/{name}": share for name, share in self.shares.items()}


def precision_table(linear: Sequence[LinearRow], other: Sequence[OtherRow] = (), formats: Iterable[str] = ()) -> PrecisionTable:
    """The table of one moment of a run (a schedule may change formats later: make it again then).

    formats: names that shall have a share even where nothing runs in them now.

    Raises ValueError when there is no linear layer, or when the FLOPs of a row are not positive.
    """
    if not linear:
        raise ValueError("the precision table has no rows: give it every linear layer of the model")
    for module, flops in [(row.module, row.flops) for row in linear] + [(row.module, row.flops) for row in other]:
        if not flops > 0:
            raise ValueError(f"{module} has {flops} FLOPs per token: give a positive number")
    totals: dict[str, float] = dict.fromkeys(sorted(formats), 0.0)
    for linear_row in linear:
        for name in filter(None, linear_row.formats):
            totals[name] = totals.get(name, 0.0) + linear_row.flops
    whole = sum(totals.values())
    shares = {name: value / whole for name, value in sorted(totals.items(), key=lambda item: -item[1])}
    return PrecisionTable(_text(linear, other, shares), shares)


def precision_tables(recipe: Recipe) -> dict[float, PrecisionTable]:
    """The tables of a run, by the fraction of the run from which on each holds; 0.0 is always there."""
    policy, modules = recipe.policy, linear_modules(recipe.model)
    formats = {time: [policy.formats(module.name, time) for module in modules] for time in policy.times}
    known = {form.name for rows in formats.values() for row in rows for form in row}
    other = [
        OtherRow(one.what, one.module, one.flops, "fp32" if one.fp32 else recipe.precision.compute)
        for one in other_products(recipe.model, recipe.train.sequence_length)
    ]
    tables = {}
    for time, rows in formats.items():
        linear = []
        for module, row in zip(modules, rows, strict=True):
            run = _gemms_run(recipe, module.name)
            a, b, c = (form if gemm in run else None for form, gemm in zip(row, GEMMS, strict=True))
            names = (a.name if a else None, b.name if b else None, c.name if c else None)
            labels = (policy.label(a) if a else NOT_RUN, policy.label(b) if b else NOT_RUN, policy.label(c) if c else NOT_RUN)
            linear.append(LinearRow(module.name, module.flops, names, labels))
        tables[time] = precision_table(linear, other, known)
    return tables


def _gemms_run(recipe: Recipe, module: str) -> Sequence[str]:
    """Where MTP depths alone are trained, gradients flow through the head they share with the frozen trunk, and no further."""
    if recipe.train.only is None or module.startswith("mtp."):
        return GEMMS
    return GEMMS[:2] if module == "lm_head" else GEMMS[:1]


def table_at(tables: Mapping[float, PrecisionTable], progress: float) -> PrecisionTable:
    """The table that holds when `progress` of the run, in [0, 1], is behind us."""
    return tables[max(time for time in tables if time <= progress)]


def _text(linear: Sequence[LinearRow], other: Sequence[OtherRow], shares: dict[str, float]) -> str:
    forward = sum(row.flops for row in linear)
    cells: list[tuple[str, ...]] = [("linear layers", "count", *GEMMS, "FLOPs/token", "share")]
    groups: dict[tuple[str, tuple[str, ...]], list[LinearRow]] = {}
    for row in linear:
        groups.setdefault((_template(row.module), row.labels or tuple(name or NOT_RUN for name in row.formats)), []).append(row)
    for (_, labels), rows in groups.items():
        flops = sum(row.flops for row in rows)
        name = _merged_name([row.module for row in rows])
        cells.append((name, str(len(rows)), *labels, _flops(flops), f"{flops / forward:.1%}"))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = (1, 5, 6)
    lines = [
        "  "
        + "  ".join(
            f"{text:>{width}}" if column in right else f"{text:<{width}}"
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  " + "-" * (len(lines[0]) - 2))
    lines.append(lines[1])
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share)
    lines.append(f"  GEMM FLOPs by format: {listed}  ({_flops(forward)}/token in each of the three GEMMs)")
    apart: dict[tuple[str, str], float] = {}
    for other_row in other:
        key = (other_row.what, other_row.format)
        apart[key] = apart.get(key, 0.0) + other_row.flops
    if apart:
        listed = ", ".join(f"{what} in {name} {_flops(flops)}/token" for (what, name), flops in apart.items())
        lines.append(f"  Apart from these, forward: {listed}")
    return "\n".join(lines)


def _template(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", module)


def _merged_name(modules: Sequence[str]) -> str:
    """`layers.0.a, layers.2.a, layers.3.a` -> `layers.{0,2-3}.a`."""
    columns = list(zip(*(module.split(".") for module in modules), strict=True))
    return ".".join(
        column[0] if len(set(column)) == 1 else "{" + _ranges(sorted({int(part) for part in column})) + "}" for column in columns
    )


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    shown = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    if len(shown) > _SHOWN_RANGES:
        shown = [*shown[: _SHOWN_RANGES - 2], "...", shown[-1]]
    return ",".join(shown)


def _flops(flops: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= size:
            return f"{flops / size:.3g}{letter}"
    return f"{flops:.3g}"
