"""Which share of the GEMM FLOPs ran in which format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from train.report.drawing import STYLE, save, step_axis
from train.report.series import Series

FORMAT_COLOURS = {"nvfp4": "#009E73", "mxfp8": "#E69F00", "bf16": "#0072B2", "fp32": "#8C8C8C"}
_SHARE = "precision/share/"


def draw_precision_shares(runs: Sequence[Series], path: Path) -> Path:
    """Which share of the GEMM FLOPs ran in which format: a bar per run, or areas over the steps where a schedule
    changes it.

    Raises ValueError when no run logged a precision share.
    """
    shown = [run for run in runs if run.keys(_SHARE)]
    if not shown:
        raise ValueError("no run logged precision/share/*: there is nothing to draw")
    formats = _ordered_formats({key.removeprefix(_SHARE) for run in shown for key in run.keys(_SHARE)})
    tables = [_shares(run, formats) for run in shown]
    with plt.rc_context(STYLE):
        if all(np.allclose(shares, shares[:, :1], atol=5e-4) for _, shares in tables):
            return _share_bars(shown, formats, [shares[:, 0] for _, shares in tables], path)
        return _share_areas(shown, formats, tables, path)


def _shares(run: Series, formats: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and shares [formats, n]; a format that a logged step does not name has share 0 there."""
    entries = [entry for entry in run.entries if any(key.startswith(_SHARE) for key in entry)]
    steps = np.array([entry["step"] for entry in entries], dtype=np.float64)
    return steps, np.array([[float(entry.get(_SHARE + name, 0.0)) for entry in entries] for name in formats])


def _ordered_formats(names: set[str]) -> list[str]:
    known = [name for name in FORMAT_COLOURS if name in names]
    return known + sorted(names - set(known))


def _format_colour(name: str, formats: Sequence[str]) -> str:
    unknown = [other for other in formats if other not in FORMAT_COLOURS]
    spare = ("#CC79A7", "#56B4E9", "#D55E00")
    return FORMAT_COLOURS.get(name) or spare[unknown.index(name) % len(spare)]


def _share_bars(runs: Sequence[Series], formats: Sequence[str], shares: Sequence[np.ndarray], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(10, 1.7 + 0.62 * len(runs)), layout="constrained")
    rows = np.arange(len(runs))
    left = np.zeros(len(runs))
    for index, name in enumerate(formats):
        widths = np.array([share[index] for share in shares])
        axes.barh(rows, widths, left=left, height=0.66, color=_format_colour(name, formats), label=name, edgecolor="white")
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 0.05:  # narrower parts have no room for their number; the table of the run has it
                ink = "black" if name == "mxfp8" else "white"  # white on orange is hard to read
                axes.text(start + width / 2, row, f"{width:.0%}", ha="center", va="center", color=ink, weight="bold")
        left = left + widths
    axes.set_yticks(rows, [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False, axis="y")
    axes.set_title("Share of the GEMM FLOPs by format", pad=30)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(formats), frameon=False, borderaxespad=0.2)
    return save(figure, path)


def _share_areas(runs: Sequence[Series], formats: Sequence[str], tables: Sequence[tuple[np.ndarray, np.ndarray]], path: Path) -> Path:
    figure, grid = plt.subplots(len(runs), 1, figsize=(10, 1.2 + 1.6 * len(runs)), layout="constrained", squeeze=False, sharex=True)
    colours = [_format_colour(name, formats) for name in formats]
    for axes, run, (steps, shares) in zip(grid.flat, runs, tables, strict=True):
        axes.stackplot(steps, shares, labels=formats, colors=colours, step="post")
        axes.set_ylim(0.0, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(run.name)
        axes.margins(x=0)
    step_axis(grid.flat[-1], runs)
    figure.suptitle("Share of the GEMM FLOPs by format", x=0.01, ha="left", weight="bold")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(formats), frameon=False)
    return save(figure, path)
