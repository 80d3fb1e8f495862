"""Which share of the tokens that MTP depths draft the model accepts, by domain and over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from train.report.drawing import RUN_COLOURS, STYLE, label_ends, save, step_axis
from train.report.series import Series

COLOURS = (*RUN_COLOURS, "#000000", "#999999")


def draw_acceptance(runs: Sequence[Series], path: Path) -> Path:
    """A frame for each depth, a line for each domain, of the first run that has any. Raises ValueError where none was measured."""
    run = next((run for run in runs if run.keys("accept/")), None)
    if run is None:
        raise ValueError("no run measured accept/*, which evaluation.evaluators=[validation,acceptance] does: there is nothing to draw")
    names = [name for name in run.keys("accept/") if name.rpartition("/")[2].removeprefix("depth_").isdigit()]
    domains = list(dict.fromkeys(name.split("/")[1] for name in names))
    frames = [f"depth_{depth}" for depth in sorted({int(name.rpartition("_")[2]) for name in names})]
    frames += ["length"] if any(name.endswith("/length") for name in run.keys("accept/")) else []
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(frames), figsize=(1 + 6.5 * len(frames), 4.8), layout="constrained", squeeze=False)
        for axes, frame in zip(grid.flat, frames, strict=True):
            _draw_frame(axes, run, frame, domains)
        return save(figure, path)


def _draw_frame(axes: Axes, run: Series, frame: str, domains: Sequence[str]) -> None:
    ends = []
    for domain, colour in zip(domains, COLOURS, strict=False):
        name = f"accept/{domain}/{frame}"
        steps, values = run.of(name)
        if not len(steps):
            continue
        (low_steps, low), (_, high) = run.of(f"{name}_low"), run.of(f"{name}_high")
        axes.plot(steps, values, color=colour, linewidth=2.0, marker="o", markersize=4)
        if np.array_equal(low_steps, steps):
            axes.vlines(steps, low, high, color=colour, linewidth=1.2, alpha=0.6)
        ends.append((float(values[-1]), f"{domain} {values[-1]:.2f}" if frame == "length" else f"{domain} {values[-1]:.0%}", colour))
    axes.margins(x=0.03)
    if frame == "length":
        axes.set_title("When the model writes itself")
        axes.set_ylabel("tokens a pass")
        axes.set_ylim(bottom=1.0)
    else:
        axes.set_title(f"Depth {frame[6:]}" + (", where those before it are accepted" if frame != "depth_1" else ""))
        axes.set_ylabel("drafts that are the model's own choice")
        axes.set_ylim(0.0, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    step_axis(axes, [run])
    label_ends(axes, ends)
