"""Durations: a number of optimizer steps or of tokens. One is derived from the other; only what was written is kept."""

import re
from dataclasses import dataclass
from fractions import Fraction

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMBT]?)\s*(steps?|tokens?)\s*")


@dataclass(frozen=True)
class Duration:
    """count steps, or count tokens."""

    count: int
    unit: str  # "steps" | "tokens"

    def __str__(self) -> str:
        scale = next((s for s in ("T", "B", "M", "k") if self.count >= UNITS[s] and self.count % (UNITS[s] // 1000) == 0), "")
        number = self.count / UNITS[scale]
        return f"{number:g}{scale} {self.unit}" if scale and number == float(f"{number:g}") else f"{self.count} {self.unit}"

    def steps(self, tokens_per_step: int) -> int:
        """In optimizer steps, rounded up to a whole one."""
        return self.count if self.unit == "steps" else -(-self.count // tokens_per_step)

    @classmethod
    def read(cls, value: object) -> "Duration":
        """From an int (steps) or a string such as `30steps` or `200B tokens`. Raises ValueError, without the key, which the caller adds."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ValueError(f"{value} is negative: use 0 or more steps")
            return cls(value, "steps")
        match = FORM.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{value!r} is no duration: write a number of steps (300), or 300steps, 2.5M tokens, 200B tokens")
        number, scale, unit = match.groups()
        exact = Fraction(number) * UNITS[scale]  # 2.01 * 10^6 is whole; of binary fractions it is not
        if exact.denominator != 1:
            raise ValueError(f"{value!r} is not a whole number of {unit}")
        return cls(int(exact), "steps" if unit.startswith("step") else "tokens")
