"""Which share of the tokens that MTP depths draft the model accepts, by domain and over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
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
    depths = sorted({int(name.rpartition("_")[2]) for name in names})
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(depths), figsize=(1 + 6.5 * len(depths), 4.8), layout="constrained", squeeze=False)
        for axes, depth in zip(grid.flat, depths, strict=True):
            ends = []
            for domain, colour in zip(domains, COLOURS, strict=False):
                name = f"accept/{domain}/depth_{depth}"
                steps, shares = run.of(name)
                if not len(steps):
                    continue
                (low_steps, low), (_, high) = run.of(f"{name}_low"), run.of(f"{name}_high")
                axes.plot(steps, shares, color=colour, linewidth=2.0, marker="o", markersize=4)
                if np.array_equal(low_steps, steps):
                    axes.vlines(steps, low, high, color=colour, linewidth=1.2, alpha=0.6)
                ends.append((float(shares[-1]), f"{domain} {shares[-1]:.0%}", colour))
            axes.set_ylim(0.0, 1.0)
            axes.margins(x=0.03)
            axes.set_title(f"Depth {depth}" + (", where those before it are accepted" if depth > 1 else ""))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            step_axis(axes, [run])
            label_ends(axes, ends)
        grid[0, 0].set_ylabel("drafts that are the model's own choice")
        return save(figure, path)
