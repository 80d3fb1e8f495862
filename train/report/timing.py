"""Where the time of a step goes: the phases `train.timing` measures, as one bar a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from train.report.drawing import STYLE, save
from train.report.series import Series

# metric behind seconds/ -> name, colour; in the order of the bar
PHASES = {
    "data": ("waiting for data", "#D55E00"),
    "forward_backward": ("forward and backward", "#0072B2"),
    "optimizer": ("optimizer", "#009E73"),
    "other": ("rest of the step", "#8C8C8C"),
}
# measured now and then; their seconds are spread over all steps
BESIDE = {"evaluation": ("evaluation", "#CC79A7"), "checkpoint": ("checkpoints", "#E69F00")}
_NARROW = 0.035  # of the longest bar: parts below this have no room for their number


def phases(run: Series) -> dict[str, float]:
    """Seconds of a step by phase: medians of the logged steps, and evaluations and checkpoints as a mean over the steps they cover."""
    result = {}
    for name in PHASES:
        values = run.of(f"seconds/{name}")[1]
        if len(values):
            result[name] = float(np.median(values))
    last = run.entries[-1]["step"]
    for name in BESIDE:
        values = run.of(f"seconds/{name}")[1]
        if result and len(values) and last > 0:
            result[name] = float(values.sum() / last)
    return result


def draw_phases(runs: Sequence[Series], path: Path) -> Path:
    """A bar per run. Raises ValueError when no run logged seconds/*."""
    shown = [(run, seconds) for run in runs if (seconds := phases(run))]
    if not shown:
        raise ValueError("no run logged seconds/*: there is nothing to draw")
    longest = max(sum(seconds.values()) for _, seconds in shown)
    size, unit = (1e3, "milliseconds") if longest < 1 else (1.0, "seconds")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 2.1 + 0.62 * len(shown)), layout="constrained")
        rows, left = np.arange(len(shown)), np.zeros(len(shown))
        for name, (label, colour) in {**PHASES, **BESIDE}.items():
            widths = np.array([seconds.get(name, 0.0) for _, seconds in shown])
            if not widths.any():
                continue
            axes.barh(rows, widths * size, left=left * size, height=0.66, color=colour, label=label, edgecolor="white")
            for row, (start, width, (_, seconds)) in enumerate(zip(left, widths, shown, strict=True)):
                if width >= _NARROW * longest:
                    share = f"{width / sum(seconds.values()):.0%}"
                    ink = "black" if name in ("checkpoint", "evaluation") else "white"
                    axes.text((start + width / 2) * size, row, share, ha="center", va="center", color=ink, weight="bold")
            left = left + widths
        axes.set_yticks(rows, [run.name for run, _ in shown])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0.0, 1.02 * longest * size)
        axes.set_xlabel(f"{unit} per step: medians of the logged steps; evaluations and checkpoints spread over all steps")
        axes.set_title("Where the time of a step goes", pad=52)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, borderaxespad=0.2)
        return save(figure, path)
