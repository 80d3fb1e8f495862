"""Where the time of a run went, process by process: a mosaic whose areas are seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from train.goodput import CATEGORIES, seconds_of
from train.report.drawing import STYLE, save
from train.report.series import Series

COLOURS = {
    "useful": "#0072B2",
    "recomputed": "#D55E00",
    "data": "#CC79A7",
    "evaluation": "#56B4E9",
    "checkpoint": "#E69F00",
    "startup": "#009E73",
    "other": "#8C8C8C",
    "idle": "#EEEEEE",
}
NAMES = {"useful": "useful steps", "recomputed": "steps taken again", "data": "waiting for data", "startup": "start-up", "other": "other"}
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_goodput(runs: Sequence[Series], path: Path) -> Path:
    """A row per run. Raises ValueError when no run has kept an account of its time."""
    shown = [run for run in runs if run.starts]
    if not shown:
        raise ValueError("no run has a goodput.json: there is nothing to draw")
    with plt.rc_context(STYLE):
        figure, rows = plt.subplots(len(shown), 1, figsize=(10, 1.3 + 2.1 * len(shown)), layout="constrained", squeeze=False)
        for axes, run in zip(rows[:, 0], shown, strict=True):
            _mosaic(axes, run)
        used = [category for category in CATEGORIES if any(seconds_of(run.starts)[category] > 0 for run in shown)]
        handles = [Patch(facecolor=COLOURS[category], label=NAMES.get(category, category)) for category in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(used), frameon=False, columnspacing=1.2, handlelength=1.2)
        return save(figure, path)


def _mosaic(axes: Axes, run: Series) -> None:
    """A column per process, as wide as it lasted, cut by category."""
    begin, end = run.starts[0].begin, run.starts[-1].end
    spent = seconds_of(run.starts)
    whole = max(sum(spent.values()), 1e-9)
    size, unit = next(((size, unit) for size, unit in UNITS if end - begin >= 2 * size), UNITS[-1])
    axes.axvspan(0.0, (end - begin) / size, color=COLOURS["idle"], zorder=0)
    for start in run.starts:
        lasted = max(start.end - start.begin, 1e-9)
        bottom = 0.0
        for category in CATEGORIES[:-1]:
            share = start.seconds.get(category, 0.0) / lasted
            if share > 0:
                left, width = (start.begin - begin) / size, lasted / size
                axes.bar(left, share, width, bottom, align="edge", color=COLOURS[category], edgecolor="white", linewidth=0.4, zorder=2)
                bottom += share
    rest = sorted(
        ((seconds, category) for category, seconds in spent.items() if category != "useful" and seconds >= 0.01 * whole), reverse=True
    )
    losses = ", ".join(f"{NAMES.get(category, category)} {seconds / whole:.0%}" for seconds, category in rest[:4])
    axes.set_title(f"{run.name}: {spent['useful'] / whole:.1%} useful", fontsize=12)
    axes.set_title(losses, loc="right", fontsize=9, weight="normal", color="#555555")
    axes.set_ylim(0.0, 1.0)
    axes.set_xlim(0.0, max((end - begin) / size, 1e-9))
    axes.set_yticks(np.linspace(0, 1, 3), ["0%", "50%", "100%"])
    axes.grid(False)
    axes.set_xlabel(f"{unit} since the run began; a column per process, as wide as it lasted")
