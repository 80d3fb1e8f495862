"""Metrics over the steps, as lines: losses, the gap between runs, speed, gradient norms, the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from train.report.drawing import RUN_COLOURS, STYLE, Line, draw_lines, save, short, step_axis
from train.report.series import Series, final, gap


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
    draw_lines(axes, lines, clip=True, baseline=run.baseline)
    axes.set_title(f"Loss of {run.name}")
    axes.set_ylabel("nats per token")
    step_axis(axes, [run])
    return save(figure, path)


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
        draw_lines(axes, lines, clip=True, baseline=shown)
        axes.set_title(title)
        axes.set_ylabel("nats per token")
        step_axis(axes, runs)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return save(figure, path)


def _loss_line(run: Series, key: str, label: str, colour: str, longest: int = 0) -> Line:
    """Labelled with what the table of the report shows: the last evaluation, or the mean of the last tenth.

    A run that ends well before `longest` steps says where, as its loss is not comparable with the others'.
    """
    steps, values = run.of(key)
    dots = key == "eval/loss"
    bits = run.of("eval/bits_per_byte")[1]
    beside = f" ({bits[-1]:.3f} bits/byte)" if dots and len(bits) else ""
    where = f" at {steps[-1]:,.0f}" if run.entries[-1]["step"] < 0.98 * longest else ""
    return Line(steps, values, f"{label} {values[-1] if dots else final(values):.3f}{beside}{where}", colour, dots=dots)


def draw_gap(runs: Sequence[Series], path: Path) -> Path:
    """How far each run's LM loss is from the first run's, in percent, on the steps both logged.

    Raises ValueError when no run shares a logged step with the first.
    """
    reference, *others = runs
    lines = []
    for index, run in enumerate(others, start=1):
        steps, percent = gap(run, reference)
        if len(steps):
            lines.append(Line(steps, percent, f"{run.name} {final(percent):+.2f}%", RUN_COLOURS[index]))
    if not lines:
        raise ValueError(f"no run shares a logged step with {reference.name}: there is no gap to draw")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
        axes.axhline(0.0, color=RUN_COLOURS[0], linewidth=1.6)
        draw_lines(axes, lines, clip=True, both_ends=True, window_share=20, zero=(reference.name, RUN_COLOURS[0]))
        axes.set_title(f"LM loss relative to {reference.name} (labels: mean of the last tenth of the steps)")
        axes.set_ylabel("gap in %  (above 0 is worse)")
        step_axis(axes, runs)
        return save(figure, path)


def draw_mtp(runs: Sequence[Series], path: Path) -> Path:
    """The losses of the MTP depths, one line a run and depth. Raises ValueError where none was logged."""
    lines: list[Line] = []
    for run in runs:
        for key in run.keys("loss/mtp_"):
            name = f"{run.name} " if len(runs) > 1 else ""
            lines.append(_loss_line(run, key, f"{name}MTP {key.rpartition('_')[2]}", RUN_COLOURS[len(lines) % len(RUN_COLOURS)]))
    if not lines:
        raise ValueError("no run logged loss/mtp_*: there is nothing to draw")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
        draw_lines(axes, lines, clip=True)
        axes.set_title("MTP losses (labels: mean of the last tenth of the steps)")
        axes.set_ylabel("nats per token")
        step_axis(axes, runs)
        return save(figure, path)


def draw_moe_balance(runs: Sequence[Series], path: Path) -> Path:
    """The violation of the router's balance: the largest load of an expert over the mean, less 1."""
    return _draw_metric(
        runs, path, "moe/max_violation", "Largest load of an expert, over the mean", "max / mean - 1", bottom=0.0, digits="{:.2f}"
    )


def draw_speed(runs: Sequence[Series], path: Path) -> Path:
    """Tokens per second."""
    title = "Throughput"
    return _draw_metric(runs, path, "tokens_per_second", title, "tokens per second", bottom=0.0, digits="{:,.0f}/s")


def draw_mfu(runs: Sequence[Series], path: Path) -> Path:
    """Model FLOPs utilisation, see `train.utilisation`."""
    return _draw_metric(runs, path, "mfu", "Model FLOPs utilisation", "of the hardware's peak", bottom=0.0, digits="{:.1%}")


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
            lines.append(Line(steps, values, label, RUN_COLOURS[index]))
    if not lines:
        raise ValueError(f"no run logged a usable {key}: there is nothing to draw")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
        if log:
            axes.set_yscale("log")
        draw_lines(axes, lines, window_share=window_share, bottom=bottom)
        if log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(short))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title + (" (labels: median)" if digits else ""))
        axes.set_ylabel(unit)
        if key == "tokens_per_second":
            axes.yaxis.set_major_formatter(FuncFormatter(short))
        if key == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        step_axis(axes, runs)
        return save(figure, path)
