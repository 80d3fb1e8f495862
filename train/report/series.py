"""The numbers behind the pictures: the logged steps of a run as series, and what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.goodput import Start, read_starts
from train.lineage import read_parent
from train.observe.facts import read_facts
from train.observe.metrics import read_metrics


@dataclass(frozen=True)
class Series:
    """One run: `name` for the labels, `entries` the objects of its metrics.jsonl with rising `step`."""

    name: str
    entries: Sequence[dict[str, Any]]
    baseline: float | None = None
    """Nats per token of a trigram count model on the validation text."""
    facts: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    """The run directory, without links."""
    left: Path | None = None
    """Of a branch: the directory of the run it left, without links."""
    forked_at: int = 0
    """Of a branch: the step after which."""
    starts: Sequence[Start] = ()
    """the processes of the run, and where their time went"""

    def of(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a metric, both fp64 [n]."""
        pairs = [(entry["step"], entry[key]) for entry in self.entries if isinstance(entry.get(key), int | float)]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        array = array[np.isfinite(array[:, 1])]
        return array[:, 0], array[:, 1]

    def keys(self, prefix: str) -> list[str]:
        """The metrics that begin with `prefix` and have a finite value, sorted."""
        names = sorted({key for entry in self.entries for key in entry if key.startswith(prefix)})
        return [name for name in names if len(self.of(name)[0])]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean [n] -> [n] over `window` points (made odd).

    At the beginning, where losses fall steeply, the window shrinks on both sides; at the end it only loses the side
    that is not there, so that the last point is a mean too.
    """
    half = max(0, (min(window, len(values)) - 1) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    before = np.minimum(half, index)
    after = np.minimum(before, len(values) - 1 - index)
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def gap(run: Series, reference: Series, key: str = "loss/lm") -> tuple[np.ndarray, np.ndarray]:
    """Steps both runs logged, and 100 * (run / reference - 1) there."""
    steps, values = run.of(key)
    reference_steps, reference_values = reference.of(key)
    common, mine, theirs = np.intersect1d(steps, reference_steps, return_indices=True)
    return common, 100.0 * (values[mine] / reference_values[theirs] - 1.0)


def final(values: np.ndarray, share: float = 0.1) -> float:
    """The mean of the last tenth: what a curve has come to, without the noise of its last point."""
    return float(np.mean(values[-max(1, round(len(values) * share)) :]))


def load_run(run_dir: Path, name: str | None = None) -> Series:
    """The series of a run directory, named after it.

    Raises ValueError, in one sentence, when it has no usable metrics.jsonl.
    """
    run_dir = Path(run_dir)
    entries = read_metrics(run_dir)
    facts = read_facts(run_dir)
    parent = read_parent(run_dir)
    return Series(
        name or run_dir.resolve().name,
        entries,
        facts.get("baseline/trigram"),
        facts,
        starts=read_starts(run_dir),
        path=run_dir.resolve(),
        left=None if parent is None else Path(parent.run_dir).resolve(),
        forked_at=0 if parent is None else parent.step,
    )
