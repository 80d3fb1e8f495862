"""Pictures of metrics: one function per picture, from the series of one or several runs to a PNG.

Made to be read at a glance: lines are labelled where they end, in the colour of the line (the Okabe-Ito palette,
which colour blindness leaves distinct); the raw values stay visible, faint, under a running mean; the first steps,
whose loss would flatten everything after them, may leave the axis, and the picture says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FORMAT_COLOURS = {"nvfp4": "#009E73", "mxfp8": "#E69F00", "bf16": "#0072B2", "fp32": "#8C8C8C"}
_SHARE = "precision/share/"
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
class Series:
    """One run: `name` for the labels, `entries` the objects of its metrics.jsonl with rising `step`."""

    name: str
    entries: Sequence[dict[str, Any]]
    baseline: float | None = None  # nats per token of the trigram count model
    facts: dict[str, Any] = field(default_factory=dict)

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


# --- the pictures
# -------------------------------------------------------------------------------------------------------


def draw_losses(runs: Sequence[Series], path: Path) -> Path:
    """The losses of one run in one frame, or one frame per loss with a line per run.

    Raises ValueError when no run has a finite loss/lm.
    """
    if not any(len(run.of("loss/lm")[0]) for run in runs):
        raise ValueError(f"{', '.join(run.name for run in runs)}: no finite loss/lm was logged, so there is no curve to draw")
    with plt.rc_context(STYLE):
        return _one_run_losses(runs[0], path) if len(runs) == 1 else _many_run_losses(runs, path)


def _one_run_losses(run: Series, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(10, 5.6), layout="constrained")
    lines = [_loss_line(run, "loss/lm", "LM", RUN_COLOURS[0])]
    for index, key in enumerate(run.keys("loss/mtp_"), start=1):
        lines.append(_loss_line(run, key, f"MTP {key.rpartition('_')[2]}", RUN_COLOURS[index % len(RUN_COLOURS)]))
    if run.keys("eval/loss"):
        lines.append(_loss_line(run, "eval/loss", "validation", "#000000"))
    _draw_lines(axes, lines, clip=True, baseline=run.baseline)
    axes.set_title(f"Loss of {run.name}")
    axes.set_ylabel("nats per token")
    _step_axis(axes, [run])
    return _save(figure, path)


def _many_run_losses(runs: Sequence[Series], path: Path) -> Path:
    depths = sorted({key for run in runs for key in run.keys("loss/mtp_")})
    panels = [("loss/lm", "LM loss"), *((key, f"MTP {key.rpartition('_')[2]} loss") for key in depths)]
    if any(len(run.of("eval/loss")[0]) for run in runs):
        panels.insert(1, ("eval/loss", "Validation loss"))
    longest = max(run.entries[-1]["step"] for run in runs)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(7.0 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    for axes, (key, title) in zip(grid.flat, panels, strict=False):
        lines = [_loss_line(run, key, run.name, RUN_COLOURS[index], longest) for index, run in enumerate(runs) if len(run.of(key)[0])]
        baselines = {round(run.baseline, 6) for run in runs if run.baseline is not None}
        shown = baselines.pop() if key in ("loss/lm", "eval/loss") and len(baselines) == 1 else None
        _draw_lines(axes, lines, clip=True, baseline=shown)
        axes.set_title(title)
        axes.set_ylabel("nats per token")
        _step_axis(axes, runs)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return _save(figure, path)


def _loss_line(run: Series, key: str, label: str, colour: str, longest: int = 0) -> _Line:
    """Labelled with what the table of the report shows: the last evaluation, or the mean of the last tenth.

    A run that ends well before `longest` steps says where, as its loss is not comparable with the others'.
    """
    steps, values = run.of(key)
    dots = key == "eval/loss"
    where = f" at {steps[-1]:,.0f}" if run.entries[-1]["step"] < 0.98 * longest else ""
    return _Line(steps, values, f"{label} {values[-1] if dots else final(values):.3f}{where}", colour, dots=dots)


def draw_gap(runs: Sequence[Series], path: Path) -> Path:
    """How far each run's LM loss is from the first run's, in percent, on the steps both logged.

    Raises ValueError when no run shares a logged step with the first.
    """
    reference, *others = runs
    lines = []
    for index, run in enumerate(others, start=1):
        steps, percent = gap(run, reference)
        if len(steps):
            lines.append(_Line(steps, percent, f"{run.name} {final(percent):+.2f}%", RUN_COLOURS[index]))
    if not lines:
        raise ValueError(f"no run shares a logged step with {reference.name}: there is no gap to draw")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
        axes.axhline(0.0, color=RUN_COLOURS[0], linewidth=1.6)
        _draw_lines(axes, lines, clip=True, both_ends=True, window_share=20, zero=(reference.name, RUN_COLOURS[0]))
        axes.set_title(f"LM loss relative to {reference.name} (labels: mean of the last tenth of the steps)")
        axes.set_ylabel("gap in %  (above 0 is worse)")
        _step_axis(axes, runs)
        return _save(figure, path)


def draw_speed(runs: Sequence[Series], path: Path) -> Path:
    """Tokens per second."""
    title = "Throughput"
    return _draw_metric(runs, path, "tokens_per_second", title, "tokens per second", bottom=0.0, digits="{:,.0f}/s")


def draw_gradient_norms(runs: Sequence[Series], path: Path) -> Path:
    """Gradient norms before clipping, on a logarithmic axis."""
    return _draw_metric(runs, path, "grad_norm", "Gradient norm before clipping", "L2 norm (log scale)", log=True)


def draw_learning_rate(runs: Sequence[Series], path: Path) -> Path:
    """Learning rates; not smoothed."""
    return _draw_metric(runs, path, "learning_rate", "Learning rate", "learning rate", bottom=0.0, window_share=0)


def _draw_metric(
    runs: Sequence[Series],
    path: Path,
    key: str,
    title: str,
    unit: str,
    *,
    log: bool = False,
    bottom: float | None = None,
    window_share: int = 50,
    digits: str = "",
) -> Path:
    lines = []
    for index, run in enumerate(runs):
        steps, values = run.of(key)
        if log:
            steps, values = steps[values > 0], values[values > 0]
        if len(steps):
            label = run.name + (f" {digits.format(float(np.median(values)))}" if digits else "")
            lines.append(_Line(steps, values, label, RUN_COLOURS[index]))
    if not lines:
        raise ValueError(f"no run logged a usable {key}: there is nothing to draw")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
        if log:
            axes.set_yscale("log")
        _draw_lines(axes, lines, window_share=window_share, bottom=bottom)
        if log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(_short))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title + (" (labels: median)" if digits else ""))
        axes.set_ylabel(unit)
        if key == "tokens_per_second":
            axes.yaxis.set_major_formatter(FuncFormatter(_short))
        _step_axis(axes, runs)
        return _save(figure, path)


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
    return _save(figure, path)


def _share_areas(runs: Sequence[Series], formats: Sequence[str], tables: Sequence[tuple[np.ndarray, np.ndarray]], path: Path) -> Path:
    figure, grid = plt.subplots(len(runs), 1, figsize=(10, 1.2 + 1.6 * len(runs)), layout="constrained", squeeze=False, sharex=True)
    colours = [_format_colour(name, formats) for name in formats]
    for axes, run, (steps, shares) in zip(grid.flat, runs, tables, strict=True):
        axes.stackplot(steps, shares, labels=formats, colors=colours, step="post")
        axes.set_ylim(0.0, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(run.name)
        axes.margins(x=0)
    _step_axis(grid.flat[-1], runs)
    figure.suptitle("Share of the GEMM FLOPs by format", x=0.01, ha="left", weight="bold")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(formats), frameon=False)
    return _save(figure, path)


# --- heatmaps of quantisation and of the residual stream
# ------------------------------------------------------------------------------------------------

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
        return _save(figure, path)


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
        return _save(figure, path)


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
    names = {"M": "Mamba", "E": "MoE", "*": "attention", "-": "MLP"}
    letters = [letter for letter in str(run.facts.get("pattern", "")).split("/")[0] if letter in names]
    return [names[letter] for letter in letters] if len(letters) == count else [""] * count


def _step_ticks(axis: Axes, steps: Sequence[int]) -> None:
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(4, len(steps)))})
    axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown], fontsize=9)


# --- lines, labels, axes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    steps: np.ndarray
    values: np.ndarray
    label: str
    colour: str
    dots: bool = False  # few exact points instead of a noisy series


def _draw_lines(
    axes: Axes,
    lines: Sequence[_Line],
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


def _clip(axes: Axes, lines: Sequence[_Line], kept: np.ndarray, baseline: float | None, both_ends: bool) -> None:
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


def _step_axis(axes: Axes, runs: Sequence[Series]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    per_step = {
        round(run.entries[-1]["tokens"] / run.entries[-1]["step"])
        for run in runs
        if run.entries[-1].get("tokens") and run.entries[-1]["step"] > 0
    }
    axes.set_xlabel(f"step ({per_step.pop():,} tokens each)" if len(per_step) == 1 else "step")


def _short(value: float, _position: int | None = None) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, format="png", facecolor="white")
    plt.close(figure)
    temporary.replace(path)
    return path
