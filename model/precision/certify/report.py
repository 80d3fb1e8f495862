"""What was compared, how much of it differs, and the table of all that."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.precision import nvfp4
from model.precision.backend import Backend
from model.precision.nvfp4 import Quantized
from model.precision.operand import Packed

ROTATED = 0.02  # share of codes that may differ where a backend sums the rotation in its own order


@dataclass
class Line:
    """One comparison of one backend. worst: largest difference, in the unit of what is compared. matters: whether a difference is a mismatch;
    allowed: the share of values that may differ all the same."""

    backend: str
    what: str
    values: int = 0
    unequal: int = 0
    worst: float = 0.0
    matters: bool = True
    allowed: float = 0.0
    note: str = ""

    @property
    def good(self) -> bool:
        return not self.matters or self.unequal <= self.allowed * self.values


@dataclass
class Report:
    """Comparisons, in the order in which they were first made."""

    lines: dict[tuple[str, str], Line] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def line(self, backend: str, what: str, **how: Any) -> Line:
        return self.lines.setdefault((backend, what), Line(backend, what, **how))

    def count(self, line: Line, ours: Tensor, theirs: Tensor) -> None:
        """Adds a comparison of two tensors, NaN equal to NaN."""
        a, b = ours.detach().cpu().double(), theirs.detach().cpu().double()
        if a.shape != b.shape:
            line.unequal += b.numel()
            line.values += b.numel()
            line.note = f"shape {tuple(a.shape)}, not {tuple(b.shape)}"
            return
        differs = (a != b) & ~(a.isnan() & b.isnan())
        line.values += b.numel()
        line.unequal += int(differs.sum())
        if differs.any():
            line.worst = max(line.worst, float((a - b)[differs].abs().nan_to_num(nan=float("inf")).max()))

    def refused(self, backend: str, error: ValueError) -> None:
        line = self.line(backend, "operations it refuses", matters=False)
        line.values += 1
        line.note = line.note or str(error)

    @property
    def good(self) -> bool:
        return all(line.good for line in self.lines.values())

    def text(self) -> str:
        rows = [("backend", "what", "values", "unequal", "worst", "")]
        for line in self.lines.values():
            verdict = "listed" if not line.matters else "good" if line.good else "MISMATCH"
            note = f"{verdict}{': ' + line.note if line.note else ''}"
            rows.append((line.backend, line.what, f"{line.values:,}", f"{line.unequal:,}", f"{line.worst:.3g}" if line.worst else "", note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if i in (2, 3, 4) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, (*widths, 0), strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(line.rstrip() for line in lines + [f"{name} is left out: {why}" for name, why in self.skipped.items()])


def _compare_codes(report: Report, backend: Backend, group: str, ours: Tensor, theirs: Tensor, *, matters: bool, allowed: float) -> None:
    """Two codes a byte: values, and apart from them the signs of zeros."""
    if ours.shape != theirs.shape:
        report.count(report.line(backend.name, f"{group}: code values", matters=matters, allowed=allowed), ours, theirs)
        return
    a, b = nvfp4.decode(ours.cpu()), nvfp4.decode(theirs.cpu())
    report.count(report.line(backend.name, f"{group}: code values", matters=matters, allowed=allowed), a, b)
    zero = (a == 0) & (b == 0)
    report.count(report.line(backend.name, f"{group}: signs of zero codes", matters=False), a.signbit()[zero], b.signbit()[zero])


def compare(report: Report, backend: Backend, group: str, ours: Any, theirs: Any, *, matters: bool, rotated: bool) -> None:
    allowed = ROTATED if rotated and backend.rotates_in_own_order else 0.0
    if isinstance(theirs, Packed | Quantized):
        scales = (s.cpu().view(torch.float8_e4m3fn).float() for s in (ours.scales, theirs.scales))
        report.count(report.line(backend.name, f"{group}: scales", matters=matters, allowed=allowed), *scales)
        _compare_codes(report, backend, group, ours.codes, theirs.codes, matters=matters, allowed=allowed)
    else:
        report.count(report.line(backend.name, f"{group}: values", matters=matters, allowed=allowed), ours.float(), theirs.float())
