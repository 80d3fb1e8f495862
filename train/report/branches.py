"""The gap of a branch to the run it left, over the steps both took after the fork: a picture, and one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from train.report.drawing import RUN_COLOURS, STYLE, Line, draw_lines, save
from train.report.series import Series, gap
from train.report.trend import Trend, fit_trend


@dataclass(frozen=True)
class Fork:
    """A branch and its parent. steps: since the fork, percent: of the LM loss, both fp64 [n]; trend: per step, None for too few points."""

    branch: Series
    parent: Series
    steps: np.ndarray
    percent: np.ndarray
    trend: Trend | None

    @property
    def line(self) -> str:
        """The gap, its trend and their standard errors, for a person."""
        head = f"{self.branch.name}, branch of {self.parent.name} at step {self.branch.forked_at:,}:"
        if self.trend is None:
            return f"{head} gap {self.percent.mean():+.3f}% over {len(self.steps)} logged steps, too few for a trend"
        fit = self.trend
        rates = _rates_differ(self)
        return (
            f"{head} gap {fit.level:+.3f} ± {fit.level_error:.3f}% over {fit.points} logged steps, trend {1000 * fit.trend:+.3f} ± "
            f"{1000 * fit.trend_error:.3f} percentage points per 1,000 steps, {fit.at_end:+.3f} ± {fit.at_end_error:.3f}% at its end "
            f"(standard errors; noise correlated {fit.r:.2f} from one logged step to the next){rates}"
        )


def forks(runs: Sequence[Series]) -> list[Fork]:
    """Every branch among the runs whose parent is there too, and has logged a step of the branch."""
    found = []
    for branch in runs:
        parent = next((run for run in runs if branch.left is not None and run.path == branch.left), None)
        if parent is None:
            continue
        steps, percent = gap(branch, parent)
        later = steps > branch.forked_at
        steps, percent = steps[later] - branch.forked_at, percent[later]
        if len(steps):
            try:
                trend = fit_trend(steps, percent)
            except ValueError:
                trend = None
            found.append(Fork(branch, parent, steps, percent, trend))
    return found


def draw_branches(runs: Sequence[Series], path: Path) -> Path:
    """Raises ValueError where no run is a branch of another one here."""
    found = forks(runs)
    if not found:
        raise ValueError("no run is a branch of another one here (python -m train.branch)")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
        axes.axhline(0.0, color="#555555", linewidth=1.2)
        lines = []
        for fork in found:
            colour = RUN_COLOURS[list(runs).index(fork.branch)]
            fit = fork.trend
            label = f"{fork.branch.name} {fork.percent.mean():+.2f}" + ("%" if fit is None else f" ± {fit.level_error:.2f}%")
            lines.append(Line(fork.steps, fork.percent, label, colour))
            if fit is not None:
                centred = fork.steps - fork.steps.mean()
                middle = fit.level + fit.trend * centred
                band = 2 * np.sqrt(fit.level_error**2 + (centred * fit.trend_error) ** 2)
                axes.plot(fork.steps, middle, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=5)
                axes.fill_between(fork.steps, middle - band, middle + band, color=colour, alpha=0.15, linewidth=0, zorder=1)
        draw_lines(axes, lines, window_share=20)
        axes.set_title("LM loss of branches relative to their parents")
        axes.set_ylabel("gap in %  (below 0: better than the parent)")
        axes.set_xlabel("steps since the fork; dashed: straight line, with two standard errors")
        return save(figure, path)


def _rates_differ(fork: Fork) -> str:
    """Where the learning rate is another one, too, the gap has two causes."""
    mine, theirs = (dict(zip(*(a.tolist() for a in run.of("learning_rate")), strict=True)) for run in (fork.branch, fork.parent))
    common = [step for step in mine.keys() & theirs.keys() if step > fork.branch.forked_at]
    differing = sum(mine[step] != theirs[step] for step in common)
    return f"; NOTE: with another learning rate in {differing} of {len(common)} steps" if differing else ""
