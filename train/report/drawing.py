"""How pictures look here: the style, and the few pieces they are drawn with.

Made to be read at a glance: lines are labelled where they end, in the colour of the line (the Okabe-Ito palette,
which colour blindness leaves distinct); the raw values stay visible, faint, under a running mean; the first steps,
whose loss would flatten everything after them, may leave the axis, and the picture says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.report.series import Series, smooth

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.dpi": 120,
    "savefig.dpi": 120,
}


@dataclass(frozen=True)
class Line:
    steps: np.ndarray
    values: np.ndarray
    label: str
    colour: str
    dots: bool = False  # few exact points instead of a noisy series


def draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    *,
    clip: bool = False,
    both_ends: bool = False,
    window_share: int = 50,
    bottom: float | None = None,
    baseline: float | None = None,
    zero: tuple[str, str] | None = None,
) -> None:
    """Raw values faint (of up to three lines; more would be a fog), the running mean strong, labels at the right end.

    The mean is over 1/`window_share` of the points, at least 5 of a series of 20 or more (`window_share` 0: no mean).
    `clip` lets the first twentieth of the steps leave the axis, at its top or at `both_ends`; `baseline` and `zero` are
    horizontal lines with their own labels.
    """
    labels: list[tuple[float, str, str]] = []
    kept: list[np.ndarray] = []
    last = max(float(line.steps[-1]) for line in lines)
    faint = sum(not line.dots for line in lines) <= 3
    for line in lines:
        count = len(line.values)
        if line.dots or count == 1:
            axes.plot(line.steps, line.values, color=line.colour, linewidth=1.0, marker="o", markersize=4.5, zorder=4)
            mean = line.values
        else:
            mean = smooth(line.values, max(min(5, count // 4), count // window_share)) if window_share else line.values
            if faint:
                axes.plot(line.steps, line.values, color=line.colour, linewidth=0.8, alpha=0.25, zorder=2)
            axes.plot(line.steps, mean, color=line.colour, linewidth=2.0, zorder=3)
        late = line.steps >= 0.05 * last
        kept.append(mean[late] if late.any() else mean)
        labels.append((float(mean[-1]), line.label, line.colour))
    if clip:
        _clip(axes, lines, np.concatenate(kept), baseline, both_ends)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if baseline is not None:
        axes.axhline(baseline, color="#555555", linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
        labels.append((baseline, f"trigram model {baseline:.2f}", "#555555"))
    if zero is not None:
        labels.append((0.0, zero[0], zero[1]))
    axes.set_xlim(0.0, max(last, 1.0))
    label_ends(axes, labels)


def _clip(axes: Axes, lines: Sequence[Line], kept: np.ndarray, baseline: float | None, both_ends: bool) -> None:
    low, high = float(kept.min()), float(kept.max())
    if baseline is not None:
        low, high = min(low, baseline), max(high, baseline)
    if both_ends:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + margin)
    start = max(float(line.values[: max(1, len(line.values) // 20)].max()) for line in lines)
    if start > high + margin and not both_ends:
        note = f"first steps, up to {start:.2f}, above the axis"
        axes.set_title(note, loc="right", fontsize=9, weight="normal", color="#555555")


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes each label right of the axis at its value, moved up or down until none overlaps another."""
    figure_height = axes.figure.bbox.height * 72 / axes.figure.dpi  # points
    space = 13.0 / (figure_height * axes.get_position().height)
    low, high = (axes.transData.transform((0.0, value))[1] for value in axes.get_ylim())
    wanted = []
    for value, text, colour in labels:
        place = (axes.transData.transform((0.0, value))[1] - low) / (high - low)
        wanted.append((min(max(float(place), 0.0), 1.0), text, colour))
    wanted.sort()
    places = spread([place for place, _, _ in wanted], space)
    for (_, text, colour), place in zip(wanted, places, strict=True):
        axes.annotate(
            text, (1.0, place), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points",
            va="center", ha="left", color=colour, weight="bold", fontsize=10, annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], space: float) -> list[float]:
    """Moves rising places apart to at least `space`, each as little as that allows, inside 0..1 while there is room."""
    blocks: list[list[float]] = []  # [sum of where each member wants the block to begin, count]
    for place in places:
        blocks.append([place, 1.0])
        while len(blocks) > 1:
            (first_sum, first_count), (second_sum, second_count) = blocks[-2:]
            if second_sum / second_count >= first_sum / first_count + first_count * space - 1e-12:
                break
            blocks[-2:] = [[first_sum + second_sum - second_count * first_count * space, first_count + second_count]]
    apart = [total / count + index * space for total, count in blocks for index in range(int(count))]
    top = [1.0 - (len(apart) - 1 - index) * space for index in range(len(apart))]
    if not apart or top[0] < 0.0:  # no room inside: they may leave it
        return apart
    apart = [min(place, highest) for place, highest in zip(apart, top, strict=True)]
    return [max(place, index * space) for index, place in enumerate(apart)]


def step_axis(axes: Axes, runs: Sequence[Series]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    per_step = {
        round(run.entries[-1]["tokens"] / run.entries[-1]["step"])
        for run in runs
        if run.entries[-1].get("tokens") and run.entries[-1]["step"] > 0
    }
    axes.set_xlabel(f"step ({per_step.pop():,} tokens each)" if len(per_step) == 1 else "step")


def short(value: float, _position: int | None = None) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, format="png", facecolor="white")
    plt.close(figure)
    temporary.replace(path)
    return path
