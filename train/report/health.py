"""Heatmaps of what quantisation does to every operand, and of the residual stream; measured by `model.precision.health`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from train.report.drawing import STYLE, save
from train.report.series import Series

_OPERANDS = ("x", "x_t", "w", "w_t", "dy", "dy_t", "wgrad")
_MOST_ROWS = 48  # of a heatmap; more are merged by layer
_HEALTH = re.compile(r"precision/(?P<module>[^/]+)/(?P<operand>x|x_t|w|w_t|dy|dy_t|wgrad)/(?P<metric>[a-z0-9_]+)$")
_LAYER = re.compile(r"(?:mtp\.layers\.\d+\.)?(?:layers\.\d+|eh_proj)|lm_head")


def draw_sqnr(runs: Sequence[Series], path: Path) -> Path:
    """Signal to quantisation noise of every quantised operand over the steps it was measured at. Raises ValueError when none was."""
    return _draw_operands(runs, path, "sqnr_db", "Signal to quantisation noise", "dB", "viridis", worst=min)


def draw_underflow(runs: Sequence[Series], path: Path) -> Path:
    """Share of the nonzero elements of every quantised operand that became 0. Raises ValueError when none was measured."""
    return _draw_operands(runs, path, "underflow", "Nonzero elements that became 0", "share", "magma_r", worst=max)


def draw_clipped(runs: Sequence[Series], path: Path) -> Path:
    """Share of the elements of every quantised operand above the largest value of their block. Raises ValueError when none was measured."""
    return _draw_operands(runs, path, "clipped", "Elements that clip", "share", "magma_r", worst=max)


def draw_bias(runs: Sequence[Series], path: Path) -> Path:
    """Signed error of the magnitudes of every quantised operand. Raises ValueError when none was measured."""
    title = "Bias of magnitudes (below 0: they shrink)"
    return _draw_operands(runs, path, "bias", title, "of sum |x|", "RdBu", worst=lambda values: max(values, key=abs), around_zero=True)


def draw_zero_scales(runs: Sequence[Series], path: Path) -> Path:
    """Share of the block scales that are zero though their block is not. Raises ValueError when none was measured."""
    return _draw_operands(runs, path, "scale_zero", "Block scales that became 0", "share", "magma_r", worst=max)


def draw_zero_gradients(runs: Sequence[Series], path: Path) -> Path:
    """Share of the elements of every weight gradient that are exactly zero. Raises ValueError when none was measured."""
    return _draw_operands(runs, path, "zero", "Weight-gradient elements that are exactly 0", "share", "magma_r", worst=max)


def _draw_operands(
    runs: Sequence[Series],
    path: Path,
    metric: str,
    title: str,
    unit: str,
    colours: str,
    *,
    worst: Callable[[list[float]], float],
    around_zero: bool = False,
) -> Path:
    run, found = _first_with(runs, _HEALTH, metric)
    steps = sorted({entry["step"] for entry in run.entries if found[0][2] in entry})
    modules = sorted({module for module, _, _ in found}, key=_natural)
    merged = len(modules) > _MOST_ROWS
    rows = list(dict.fromkeys(_row_name(module, merged) for module in modules))
    operands = [operand for operand in _OPERANDS if any(operand == other for _, other, _ in found)]
    values: dict[tuple[str, str, int], list[float]] = {}
    entries = {entry["step"]: entry for entry in run.entries}
    for module, operand, key in found:
        for step in steps:
            value = entries[step].get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault((operand, _row_name(module, merged), step), []).append(float(value))
    tables = {
        operand: np.array([[worst(values.get((operand, row, step), [math.nan])) for step in steps] for row in rows]) for operand in operands
    }
    known = np.concatenate([table[np.isfinite(table)] for table in tables.values()])
    low, high = float(known.min()), float(known.max())
    if around_zero:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        width = max(7.0, 3.2 + len(operands) * max(1.5, min(2.6, 0.18 * len(steps))))  # room for the title above a single operand
        figure, axes = plt.subplots(
            1, len(operands), figsize=(width, 1.9 + 0.24 * len(rows)), layout="constrained", sharey=True, squeeze=False
        )
        for axis, operand in zip(axes[0], operands, strict=True):
            axis.set_facecolor("#EEEEEE")  # not quantised
            image = axis.imshow(tables[operand], aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            axis.set_title(operand)
            _step_ticks(axis, steps)
            axis.spines[:].set_visible(False)
        axes[0, 0].set_yticks(range(len(rows)), rows, fontsize=9)
        figure.colorbar(image, ax=axes[0].tolist(), label=unit, shrink=0.9, pad=0.01)
        figure.suptitle(f"{title}{', worst of each layer' if merged else ''}: {run.name}", x=0.01, ha="left", weight="bold")
        figure.supxlabel("step", fontsize=11)
        return save(figure, path)


def draw_residual(runs: Sequence[Series], path: Path) -> Path:
    """Size and outliers of the residual stream behind every layer. Raises ValueError when none was measured."""
    pattern = re.compile(r"residual/(?P<module>[^/]+)/(?P<operand>)(?P<metric>[a-z_]+)$")
    run, found = _first_with(runs, pattern, "rms")
    layers = sorted((module for module, _, _ in found), key=_natural)
    entries = [entry for entry in run.entries if f"residual/{layers[0]}/rms" in entry]
    steps = [entry["step"] for entry in entries]
    kinds = _layer_kinds(run, len(layers))
    last = entries[-1]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 1.9 + 0.3 * len(layers)), layout="constrained", sharey=True)
        for axis, metric, title, colours in (
            (axes[0], "rms", "root mean square", "viridis"),
            (axes[1], "outlier_ratio", "largest magnitude / rms", "magma_r"),
        ):
            table = np.array([[float(entry.get(f"residual/{layer}/{metric}", math.nan)) for entry in entries] for layer in layers])
            image = axis.imshow(table, aspect="auto", cmap=colours, interpolation="nearest")
            axis.set_title(title)
            axis.set_xlabel("step")
            _step_ticks(axis, steps)
            axis.spines[:].set_visible(False)
            figure.colorbar(image, ax=axis, shrink=0.9, pad=0.12 if metric == "outlier_ratio" else 0.02)
        axes[0].set_yticks(
            range(len(layers)), [f"{layer.removeprefix('layers.')} {kind}" for layer, kind in zip(layers, kinds, strict=True)]
        )
        for row, layer in enumerate(layers):
            place = f"token {last[f'residual/{layer}/outlier_position']}"
            axes[1].text(1.01, row, place, transform=axes[1].get_yaxis_transform(), va="center", fontsize=8)
        figure.suptitle(
            f"Residual stream behind every layer: {run.name} (right: where its largest element was at step {steps[-1]:,})",
            x=0.01, ha="left", weight="bold", fontsize=12,
        )  # fmt: skip
        return save(figure, path)


def _first_with(runs: Sequence[Series], pattern: re.Pattern[str], metric: str) -> tuple[Series, list[tuple[str, str, str]]]:
    """The first run that logged the metric: its (module, operand, key)."""
    for run in runs:
        keys = sorted({key for entry in run.entries for key in entry})
        matches = [(m["module"], m["operand"], key) for key in keys if (m := pattern.match(key)) is not None and m["metric"] == metric]
        if matches:
            return run, matches
    raise ValueError("no run measured it: set monitor.quantization.every")


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _row_name(module: str, merged: bool) -> str:
    if not merged:
        return module.replace(".mixer.", " ")
    match = _LAYER.match(module)
    return match[0] if match else module


def _layer_kinds(run: Series, count: int) -> list[str]:
    kinds = [str(kind) for kind in run.facts.get("layers", ())]
    return kinds if len(kinds) == count else [""] * count


def _step_ticks(axis: Axes, steps: Sequence[int]) -> None:
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(4, len(steps)))})
    axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown], fontsize=9)
