"""Durations: a number of optimizer steps, of tokens, or a share of the run. Only what was written is kept; steps follow from it.

300, 300steps          optimizer steps
200B tokens            tokens of the global batches, rounded up to a whole step
54.2%                  of all steps of the run, rounded down: shares that add up to the run, such as a warm-up and a decay, fit into it
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMBT]?)\s*(steps?|tokens?|%)\s*")


@dataclass(frozen=True)
class Duration:
    """count steps, count tokens, or count hundredths of the run (exact, so perhaps a fraction)."""

    count: int | Fraction
    unit: str  # "steps" | "tokens" | "%"

    def __str__(self) -> str:
        if self.unit == "%":
            exact = Decimal(self.count.numerator) / Decimal(self.count.denominator)  # it came from decimal digits
            return f"{exact:f}%"
        scale = next((s for s in ("T", "B", "M", "k") if self.count >= UNITS[s] and self.count % (UNITS[s] // 1000) == 0), "")
        number = float(self.count / UNITS[scale])
        return f"{number:g}{scale} {self.unit}" if scale and number == float(f"{number:g}") else f"{self.count} {self.unit}"

    def steps(self, tokens_per_step: int, total_steps: int) -> int:
        """In optimizer steps of a run of `total_steps`, each of `tokens_per_step`."""
        if self.unit == "%":
            return int(self.count * total_steps // 100)
        return int(self.count if self.unit == "steps" else -(-self.count // tokens_per_step))

    @classmethod
    def read(cls, value: object) -> "Duration":
        """From an int (steps) or a string such as `30steps`, `200B tokens` or `54.2%`. Raises ValueError, without the key, which the caller adds."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ValueError(f"{value} is negative: use 0 or more steps")
            return cls(value, "steps")
        match = FORM.fullmatch(value) if isinstance(value, str) else None
        if match is None or (match[2] and match[3] == "%"):
            raise ValueError(
                f"{value!r} is no duration: write a number of steps (300), or 300steps, 2.5M tokens, 200B tokens, 54% of the run"
            )
        number, scale, unit = match.groups()
        exact = Fraction(number) * UNITS[scale]  # 2.01 * 10^6 is whole; of binary fractions it is not
        if unit == "%":
            if exact > 100:
                raise ValueError(f"{value!r} is more than the run: use at most 100%")
            return cls(exact, "%")
        if exact.denominator != 1:
            raise ValueError(f"{value!r} is not a whole number of {unit}")
        return cls(int(exact), "steps" if unit.startswith("step") else "tokens")
