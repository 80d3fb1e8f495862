"""How far layouts are from one rank in NVFP4, beside how far NVFP4 itself is from fp32.

With `precision.amax_scope=tensor_parallel` an operand outside routed experts has on every layout the amax, the codes and the random bits that it
has on one rank, so that sums alone differ in their last bits; a code then differs only where such a bit decides how an element is rounded. With
`local` a part of an operand is scaled by its own amax: its codes are others, as good as those of one rank. Both are quantisations of the same
numbers, so they lie about as far from one another as each from fp32, and never by more than both together.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.layouts.cases import Case, case
from tests.layouts.compare import furthest
from tests.layouts.run import Outcome, given, train
from tests.ranks import RankPool

STEPS = 4
SCOPES = ("tensor_parallel", "local")
# Every part of a weight on two ranks is a multiple of NVFP4's tiles.
SIZES = ("precision=nvfp4", "model.mamba_heads=32", "model.ffn_hidden_size=64")
CASES: tuple[Case, ...] = (
    case(1, sequences=1),
    case(2),
    case(2, pipeline=2, virtual_pipeline=2),
    case(2, context=2),
    case(2, expert=2),
    case(2, expert_tensor=2),
    case(2, tensor=2),
    case(4, tensor=2, expert=2),
    case(4, tensor=2, pipeline=2),
)


class Quantised:
    """Runs in NVFP4 on one rank and on layouts. pool: of ranks; place: a directory for documents and their tokens."""

    def __init__(self, pool: RankPool, place: Path):
        self._pool, self._given = pool, (*given(place), *SIZES)
        self._single: dict[str, Outcome] = {}

    def run(self, case: Case, *overrides: str) -> Outcome:
        """Of the first rank."""
        return self._pool.run(case.ranks, train, (*self._given, *overrides, *case.overrides), False, STEPS, timeout=600)[0]

    def single(self, *overrides: str) -> Outcome:
        """Of one rank, run once."""
        key = " ".join(overrides)
        if key not in self._single:
            self._single[key] = self.run(case(1), *overrides)
        return self._single[key]

    def measure(self, case: Case, scope: str) -> dict[str, Any]:
        """Relative differences of the first step, and of all of them: from one rank, and (`format`) of that from fp32."""
        single, exact = self.single(f"precision.amax_scope={scope}"), self.single("precision=fp32")
        layout = self.run(case, f"precision.amax_scope={scope}")
        found: dict[str, Any] = {"ranks": case.ranks, "scope": scope}
        for key, prefix in (("losses", "loss/"), ("gradient_norm", "grad_norm")):
            for what, steps in (("first", 1), ("all", STEPS)):
                found[f"{key} {what}"] = furthest(layout.metrics[:steps], single.metrics[:steps], (prefix,))
                found[f"format {key} {what}"] = furthest(single.metrics[:steps], exact.metrics[:steps], (prefix,))
        found["problems"] = [
            f"{key} differ by {found[key]:.2g}, more than NVFP4 from fp32 ({found['format ' + key]:.2g})"
            for key in ("losses first", "losses all")
            if not found[key] <= found[f"format {key}"]
        ]
        return found

    def of_cases(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Every layout with every scope, to be measured."""
        for scope in SCOPES:
            for one in CASES:
                yield f"{one.ranks}: {one.name}; {scope}", partial(self.measure, one, scope)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    keys = ("losses first", "gradient_norm first", "losses all", "gradient_norm all")
    rows = [
        "| layout | ranks | losses, step 1 | gradient norm, step 1 | losses, 4 steps | gradient norm, 4 steps |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for scope in SCOPES:
        chosen = [line for line in lines if line["scope"] == scope]
        for line in chosen:
            values = " | ".join(f"{line[key]:.1e}" for key in keys)
            rows.append(f"| `{scope}`: {line['name'].partition(': ')[2].partition(';')[0]} | {line['ranks']} | {values} |")
        if chosen:
            values = " | ".join(f"{chosen[0]['format ' + key]:.1e}" for key in keys)
            rows.append(f"| `{scope}`: one rank from fp32 | 1 | {values} |")
    return "\n".join(rows)
