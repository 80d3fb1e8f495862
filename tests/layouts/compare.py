"""How far a layout is from one rank: losses, gradient norm and MoE statistics of every step, and the weights at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.layouts.cases import SETTINGS, STARVING, Case
from tests.layouts.run import Held, Outcome, given, train
from tests.ranks import RankPool

LIMIT = 2e-6  # relative, of every number a step gives
PARAMETERS = 1e-5  # of the largest magnitude of a tensor
MARGIN = 4e-7  # by which every token of the run on one rank must choose its experts, or rounding may choose others, see `Margins`


@dataclass(frozen=True)
class Difference:
    """Largest relative differences over steps and ranks; of parameters over tensors, each relative to its largest magnitude. replicas: of which
    tensors two ranks hold other bits. learned: by how much the LM loss fell, so that agreement means something."""

    losses: float
    gradient_norm: float
    moe: float
    parameters: float
    replicas: tuple[str, ...]
    learned: float

    def problems(self) -> list[str]:
        """What exceeds its limit."""
        found = [
            f"{what} differ by {value:.2g}, more than {limit:g}"
            for what, value, limit in (
                ("losses", self.losses, LIMIT),
                ("gradient norms", self.gradient_norm, LIMIT),
                ("MoE statistics", self.moe, LIMIT),
                ("parameters", self.parameters, PARAMETERS),
            )
            if not value <= limit
        ]
        if self.replicas:
            found.append(f"replicas differ in {', '.join(self.replicas)}")
        if self.learned < 0.5:
            found.append(f"the loss fell by {self.learned:.2g} only")
        return found


def relative(ours: float, theirs: float) -> float:
    """Of `theirs`; infinite for what is no number on one side."""
    if ours == theirs:
        return 0.0
    distance = abs(ours - theirs)
    return distance / abs(theirs) if theirs and distance == distance else float("inf")


def furthest(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], prefixes: tuple[str, ...]) -> float:
    """The largest relative difference of metrics with one of these prefixes; infinite where one side has a step or a metric that the other lacks."""
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        keys, there = ({key for key in metrics if key.startswith(prefixes)} for metrics in (mine, other))
        if not keys or keys != there:
            return float("inf")
        worst = max(worst, *(relative(mine[key], other[key]) for key in keys))
    return worst


def gathered(parts: Iterable[Held]) -> dict[str, np.ndarray]:
    """Whole tensors of what all ranks hold, NaN where nobody holds anything."""
    whole: dict[str, np.ndarray] = {}
    for part in parts:
        tensor = whole.setdefault(part.name, np.full(part.shape, np.nan, np.float32))
        assert tensor.shape == part.shape, part.name
        tensor[part.box.slices] = part.values
    return whole


def furthest_tensor(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The largest difference of an element, relative to the largest magnitude of its tensor; infinite where elements or tensors are missing."""
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for name, other in theirs.items():
        distance = float(np.abs(ours[name] - other).max())
        worst = max(worst, distance / max(float(np.abs(other).max()), 1e-30) if distance == distance else float("inf"))
    return worst


def difference(layout: Sequence[Outcome], single: Outcome) -> Difference:
    """Of the ranks of a layout from one rank."""
    whole = gathered(part for outcome in layout for part in outcome.parts)
    losses = [furthest(outcome.metrics, single.metrics, ("loss/",)) for outcome in layout]
    losses += [relative(outcome.evaluated, single.evaluated) for outcome in layout]
    return Difference(
        max(losses),
        max(furthest(outcome.metrics, single.metrics, ("grad_norm",)) for outcome in layout),
        max(furthest(outcome.metrics, single.metrics, ("moe/",)) for outcome in layout),
        furthest_tensor(whole, gathered(single.parts)),
        tuple(sorted({name for outcome in layout for name in outcome.differing})),
        single.metrics[0]["loss/lm"] - single.metrics[-1]["loss/lm"],
    )


class Comparison:
    """Layouts against one rank, whose run of each setting is done once. pool: of ranks; place: a directory for documents and their tokens."""

    def __init__(self, pool: RankPool, place: Path):
        self._pool, self._given = pool, given(place)
        self._single: dict[str, Outcome] = {}

    def single(self, setting: str) -> Outcome:
        """What one rank gives."""
        if setting not in self._single:
            (outcome,) = self._pool.run(1, train, (*self._given, *SETTINGS[setting]), setting == STARVING, timeout=300)
            if outcome.margin < MARGIN:
                raise ValueError(
                    f"{setting or 'one rank'}: a token chooses its experts by {outcome.margin:.1e} only: take another run.seed"
                )
            self._single[setting] = outcome
        return self._single[setting]

    def __call__(self, case: Case, timeout: float = 600) -> Difference:
        """Trains with this layout. timeout: in seconds."""
        single = self.single(case.setting)
        return difference(self._pool.run(case.ranks, train, (*self._given, *case.overrides), case.starved, timeout=timeout), single)
