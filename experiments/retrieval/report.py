"""Tables and pictures of the sweep, from its results alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator, ScalarFormatter

from experiments.retrieval.arms import ARMS, FEED_FORWARDS, MIXERS, Arm, state_bytes
from experiments.retrieval.sweep import TASKS, Result, best
from train.report import page
from train.report.drawing import RUN_COLOURS, STYLE, save

COLOURS = dict(zip(MIXERS, RUN_COLOURS, strict=False))
NAMES = {
    **{"attention": "attention", "mamba": "Mamba-2", "5to1": "5:1", "8to1": "8:1"},
    **{"dense": "dense", "moe": "mixture of experts", "latent_moe": "LatentMoE"},
}
MARKERS = dict(zip(FEED_FORWARDS, ("o", "s", "^"), strict=True))


def at_best(results: Sequence[Result], arm: Arm) -> list[Result]:
    """The runs of all seeds at the rate that is best for the first one; none where the arm has not run."""
    found = best(results, arm.name)
    return [] if found is None else [result for result in results if result.arm == arm.name and result.rate == found.rate]


def size_rows(arms: Sequence[Arm]) -> list[list[str]]:
    rows = []
    for arm in arms:
        counted, held = arm.counted, state_bytes(arm)
        rows.append(
            [arm.mixer, arm.feed_forward, f"{counted.parameters:,}", f"{counted.active:,}", *(f"{size:,}" for size in held.values())]
        )
    return rows


def accuracy_rows(results: Sequence[Result], arms: Sequence[Arm]) -> list[list[str]]:
    """Of every arm that has run: what its best rate reaches, as the largest of all seeds and, where there are several, the smallest."""
    rows = []
    for arm in arms:
        runs = at_best(results, arm)
        if not runs:
            continue
        cells = []
        for task in TASKS:
            values = sorted(run.accuracy[task] for run in runs)
            cells.append(f"{values[-1]:.3f}" + (f" ({values[0]:.3f})" if len(values) > 1 else ""))
        rows.append([arm.mixer, arm.feed_forward, f"{runs[0].rate:g}", str(len(runs)), *cells])
    return rows


def rate_rows(results: Sequence[Result], arms: Sequence[Arm], rates: Sequence[float]) -> list[list[str]]:
    """Mean accuracy over the tasks at every rate, of the first seed."""
    rows = []
    for arm in arms:
        own = {result.rate: result for result in results if result.arm == arm.name and result.seed == 1}
        if own:
            cells = ("" if rate not in own else "stopped" if own[rate].stopped else f"{own[rate].mean:.3f}" for rate in rates)
            rows.append([arm.mixer, arm.feed_forward, *cells])
    return rows


def draw_rates(results: Sequence[Result], path: Path) -> None:
    """A row for each kind of feed-forward, a column for each task, a line for each order of mixers."""
    rates = sorted({result.rate for result in results})
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(FEED_FORWARDS), len(TASKS), figsize=(15, 9), layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        for feed_forward, row in zip(FEED_FORWARDS, grid, strict=True):
            for axis, task in zip(row, TASKS, strict=True):
                for mixer in MIXERS:
                    name = Arm(mixer, feed_forward).name
                    own = sorted((r.rate, r.accuracy[task]) for r in results if r.arm == name and r.seed == 1)
                    if own:
                        axis.plot(*zip(*own, strict=True), "-o", color=COLOURS[mixer], markersize=4.5, linewidth=2, label=NAMES[mixer])
                axis.set_xscale("log")
                axis.set_xticks(rates, [f"{1000 * rate:g}" for rate in rates], minor=False)
                axis.xaxis.set_minor_locator(NullLocator())
                axis.set_ylim(-0.03, 1.03)
                axis.set_title(f"{task}, {NAMES[feed_forward]}")
            row[0].set_ylabel("queries answered right")
        for axis in grid[-1]:
            axis.set_xlabel("learning rate, thousandths")
        labels = {label: handle for axis in grid.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), frameon=False)
        save(figure, path)


def draw_states(results: Sequence[Result], arms: Sequence[Arm], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(TASKS), figsize=(16, 4.4), layout="constrained", sharey=True)
        held = {arm.name: state_bytes(arm) for arm in arms}
        for axis, task in zip(axes, TASKS, strict=True):
            for arm in arms:
                for run in at_best(results, arm):
                    size = held[arm.name][int(task.split("x")[0])] / 1024
                    label = f"{NAMES[arm.mixer]}, {NAMES[arm.feed_forward]}" if run.seed == 1 else None
                    axis.plot(size, run.accuracy[task], MARKERS[arm.feed_forward], color=COLOURS[arm.mixer], label=label, alpha=0.8)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_xlabel("state of a sequence, KiB")
            axis.set_title(task)
            axis.set_ylim(-0.03, 1.03)
        axes[0].set_ylabel("queries answered right")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        save(figure, path)


def report(results: Sequence[Result], to: Path) -> str:
    """Writes results.json, rates.png, states.png and index.html that holds them; returns the tables as Markdown."""
    arms = [arm for arm in ARMS if at_best(results, arm)]
    rates = sorted({result.rate for result in results})
    draw_rates(results, to / "rates.png")
    draw_states(results, arms, to / "states.png")
    (to / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    tables = {
        "Sizes": (
            ("mixers", "feed-forward", "parameters", "active", *(f"state bytes at {n}" for n in (64, 128, 256, 512))),
            size_rows(arms),
        ),
        "At the best learning rate: the best seed (the worst)": (
            ("mixers", "feed-forward", "rate", "seeds", *TASKS),
            accuracy_rows(results, arms),
        ),
        "Mean of the four at every learning rate": (
            ("mixers", "feed-forward", *(f"{r:g}" for r in rates)),
            rate_rows(results, arms, rates),
        ),
    }
    parts = [page.heading(title, "") + page.table(head, rows) for title, (head, rows) in tables.items()]
    parts.append(page.picture("Learning rates", "The first seed of every arm.", to / "rates.png"))
    parts.append(page.picture("State", "Every seed at its arm's best learning rate.", to / "states.png"))
    (to / "index.html").write_text(page.page("What attention buys in recall", parts), encoding="utf-8")
    written = [f"### {title}\n\n{markdown(head, rows)}" for title, (head, rows) in tables.items()]
    return "\n\n".join([*written, "\n".join(str(to / name) for name in ("results.json", "rates.png", "states.png", "index.html"))])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
