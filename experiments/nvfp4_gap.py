"""What each precision group costs against fp32: the loss gap over training and at the end, with the spread over seeds.

    python -m train -cn nvfp4_gap -m                                          # the runs
    python -m experiments.nvfp4_gap runs=runs/nvfp4_gap-sweep to=docs/nvfp4_gap

Runs are compared in pairs: the same seed has the same initial weights and the same data, so a gap is that of one pair and its spread is that of
the pairs. The same against the nvfp4 group says what a technique is worth: above 0, giving it up costs loss. Writes results.json, gap.png,
final.png and a page, index.html, that holds them, and prints a table.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from train.arguments import key_values
from train.observe.metrics import read_metrics
from train.report import page
from train.report.drawing import RUN_COLOURS, STYLE, label_ends, save
from train.report.series import smooth

REFERENCE, RECIPE = "fp32", "nvfp4"
NAME = re.compile(r"precision-(?P<arm>[a-z0-9_]+)__seed-(?P<seed>\d+)$")
WINDOW = 31  # steps of the running mean
PANELS = (
    ("Formats", ("nvfp4_all", "nvfp4", "nvfp4_then_bf16", "mxfp8", "bf16")),
    (
        "Passes and techniques",
        ("nvfp4", "nvfp4_forward_only", "nvfp4_backward_only", "nvfp4_no_sr", "nvfp4_no_rht", "nvfp4_1d", "nvfp4_4over6"),
    ),
)
COLOURS = (*RUN_COLOURS, "#000000")


@dataclass(frozen=True)
class Run:
    """steps [n] and training losses [n], and the last validation loss."""

    steps: np.ndarray
    losses: np.ndarray
    validation: float


@dataclass(frozen=True)
class Gap:
    """Of one arm to another, in %: curves [seeds, n] over steps [n] of the smoothed training loss, and of the validation loss [seeds]."""

    seeds: tuple[int, ...]
    steps: np.ndarray
    curves: np.ndarray
    final: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.final.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds; NaN for one seed."""
        return float(self.final.std(ddof=1) / np.sqrt(len(self.final))) if len(self.final) > 1 else float("nan")


def read_runs(directory: Path) -> dict[str, dict[int, Run]]:
    """Finished runs of a sweep by arm and seed. Raises ValueError, in one sentence, when there is nothing to compare."""
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted(directory.glob("precision-*")):
        match = NAME.match(path.name)
        if match is None or not (path / "finished.json").exists():
            continue
        entries = [entry for entry in read_metrics(path) if "loss/lm" in entry]
        summary = json.loads((path / "finished.json").read_text())
        steps = np.array([entry["step"] for entry in entries])
        losses = np.array([entry["loss/lm"] for entry in entries], dtype=np.float64)
        runs.setdefault(match["arm"], {})[int(match["seed"])] = Run(steps, losses, float(summary["eval/loss"]))
    if REFERENCE not in runs or len(runs) < 2:
        raise ValueError(
            f"{directory} holds no finished run of {REFERENCE} and of another precision: run `python -m train -cn nvfp4_gap -m` to its end"
        )
    return runs


def gaps(runs: Mapping[str, Mapping[int, Run]], to: str = REFERENCE) -> dict[str, Gap]:
    """Every arm that shares a seed with the arm `to`, the smallest gap first."""
    reference = runs.get(to, {})
    found = {}
    for arm, by_seed in runs.items():
        seeds = tuple(sorted(by_seed.keys() & reference.keys()))
        if arm == to or not seeds:
            continue
        curves, final = [], []
        for seed in seeds:
            ours, theirs = by_seed[seed], reference[seed]
            if not np.array_equal(ours.steps, theirs.steps):
                raise ValueError(f"{arm} and {to} of seed {seed} logged different steps: run both from the same recipe")
            if ours.steps[-1] <= WINDOW // 2:
                raise ValueError(f"{arm} of seed {seed} ends after {ours.steps[-1]} steps: a running mean of {WINDOW} needs longer runs")
            curves.append(100 * (smooth(ours.losses, WINDOW) / smooth(theirs.losses, WINDOW) - 1))
            final.append(100 * (ours.validation / theirs.validation - 1))
        found[arm] = Gap(seeds, reference[seeds[0]].steps, np.array(curves), np.array(final))
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def draw_curves(found: Mapping[str, Gap], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(14, 5.2), layout="constrained", sharey=True)
        labels = []
        for axis, (title, arms) in zip(axes, PANELS, strict=True):
            labels.append(_panel(axis, {arm: found[arm] for arm in arms if arm in found}))
            axis.set_title(title)
        axes[0].set_ylabel("training loss against fp32, %")
        figure.suptitle(f"Loss gap over training: mean of seeds, band: standard error, {WINDOW}-step running mean", x=0.01, ha="left")
        for axis, ends in zip(axes, labels, strict=True):  # when all lines are drawn: both panels share one scale
            label_ends(axis, ends)
        save(figure, path)


def _panel(axis: Axes, found: Mapping[str, Gap]) -> list[tuple[float, str, str]]:
    """Where the lines end: value, label and colour."""
    axis.axhline(0, color="#555555", linewidth=1)
    ends = []
    others = iter(COLOURS[1:])
    for arm, gap in found.items():
        colour = COLOURS[0] if arm == RECIPE else next(others)
        skipped = gap.steps > WINDOW // 2  # the first losses say nothing yet
        mean = gap.curves.mean(0)[skipped]
        axis.plot(gap.steps[skipped], mean, color=colour, linewidth=2)
        if len(gap.seeds) > 1:
            error = gap.curves.std(0, ddof=1)[skipped] / np.sqrt(len(gap.seeds))
            axis.fill_between(gap.steps[skipped], mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
        ends.append((float(mean[-1]), arm, colour))
    axis.set_xlabel("step")
    axis.margins(x=0)
    return ends


def draw_final(found: Mapping[str, Gap], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 1.4 + 0.36 * len(found)), layout="constrained")
        for row, gap in enumerate(found.values()):
            axis.plot(gap.final, [row] * len(gap.final), "o", color="#56B4E9", markersize=5)
            axis.errorbar(gap.mean, row, xerr=None if np.isnan(gap.error) else gap.error, fmt="D", color="#0072B2", capsize=4, markersize=6)
        axis.axvline(0, color="#555555", linewidth=1)
        axis.set_yticks(range(len(found)), list(found))
        axis.invert_yaxis()
        axis.set_xlabel("validation loss against fp32, %  (dots: seeds; diamond: mean and standard error)")
        axis.set_title("Loss gap at the end")
        save(figure, path)


HEAD = ("precision", "seeds", "validation loss", "gap to fp32, %", "standard error", "against nvfp4, %", "standard error")


def rows(runs: Mapping[str, Mapping[int, Run]], found: Mapping[str, Gap], against: Mapping[str, Gap]) -> list[list[str]]:
    """Of the table, its columns as HEAD."""
    reference = [run.validation for run in runs[REFERENCE].values()]
    lines = [[REFERENCE, str(len(reference)), f"{np.mean(reference):.4f}", "0", "", "", ""]]
    for arm, gap in found.items():
        mean = np.mean([runs[arm][seed].validation for seed in gap.seeds])
        of = against.get(arm)
        lines.append([arm, str(len(gap.seeds)), f"{mean:.4f}", *_with_error(gap), *(_with_error(of) if of is not None else ("", ""))])
    return lines


def _with_error(gap: Gap) -> tuple[str, str]:
    return f"{gap.mean:+.2f}", "" if np.isnan(gap.error) else f"{gap.error:.2f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD), *lines))


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("runs", "to"))
        directory = Path(str(values.get("runs", "runs/nvfp4_gap-sweep")))
        runs = read_runs(directory)
        found, against = gaps(runs), gaps(runs, RECIPE)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    to = Path(str(values.get("to", directory / "report")))
    draw_curves(found, to / "gap.png")
    draw_final(found, to / "final.png")
    results = {
        arm: {
            "seeds": gap.seeds,
            "validation_loss": [runs[arm][seed].validation for seed in gap.seeds],
            "validation_gap_percent": gap.final.tolist(),
            "mean": gap.mean,
            "standard_error": None if np.isnan(gap.error) else gap.error,
            "against_nvfp4_percent": against[arm].final.tolist() if arm in against else None,
            "steps": gap.steps[::10].tolist(),
            "training_gap_percent": np.round(gap.curves[:, ::10], 4).tolist(),
        }
        for arm, gap in found.items()
    }
    (to / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = rows(runs, found, against)
    parts = [
        f"<p>Validation loss against {REFERENCE} and against {RECIPE} of the same seed; standard errors over seeds.</p>",
        page.table(HEAD, lines),
        page.picture("Gap over training", f"Running mean over {WINDOW} steps; bands: standard error over seeds.", to / "gap.png"),
        page.picture("Gap at the end", "Validation loss on the same text for all.", to / "final.png"),
    ]
    (to / "index.html").write_text(page.page("What each precision costs", parts), encoding="utf-8")
    print(markdown(lines))
    print("\n" + "\n".join(str(to / name) for name in ("results.json", "gap.png", "final.png", "index.html")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
