"""How many of the tokens that MTP heads draft the model accepts: by domain, over training, and by how the heads are made.

    python -m experiments.acceptance                          # the runs (finished ones are skipped), then the page
    python -m experiments.acceptance train=false to=docs/acceptance

The runs are two sweeps, recipes acceptance and acceptance_heads: NVFP4 or fp32, one block for both depths or two, a loss scale of 0.3 or 0.1, and
heads that are trained on alone. Runs are compared in pairs that differ in one of these only: the same seed has the same initial weights and data.
Writes results.json, domains.png, training.png, arms.png and a page, index.html, that holds them, and prints tables.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from data.domains import DOMAINS
from train.arguments import key_values
from train.observe.metrics import read_metrics
from train.recipe.guard import read_yaml
from train.report import page
from train.report.acceptance import COLOURS
from train.report.drawing import RUN_COLOURS, STYLE, label_ends, save

SWEEPS = ("acceptance", "acceptance_heads")
DEPTHS = (1, 2)
READ = ("novels", "jargon", "code")  # of DOMAINS, what the runs train on


@dataclass(frozen=True, order=True)
class Arm:
    """What differs between runs, and what pairs of them are made of. heads: trained on alone."""

    precision: str = "nvfp4"
    shared: bool = True
    scale: float = 0.3
    heads: bool = False

    def __str__(self) -> str:
        name = f"{self.precision}, {'one block' if self.shared else 'two blocks'}, scale {self.scale:g}"
        return f"{name}, heads trained on" if self.heads else name


CHANGES: tuple[tuple[str, Mapping[str, tuple[object, object]]], ...] = (
    ("fp32 instead of NVFP4", {"precision": ("nvfp4", "fp32")}),
    ("two blocks instead of one", {"shared": (True, False)}),
    ("loss scale 0.1 instead of 0.3", {"scale": (0.3, 0.1)}),
    ("heads trained on alone", {"heads": (False, True)}),
)
"""What is compared: a sentence, and {field of an arm: (from, to)}."""


@dataclass(frozen=True)
class Run:
    """steps [n] of evaluations; shares [domains, depths, n], NaN where there is none; low, high: of the last, [domains, depths]. lengths: tokens a
    pass at the end, [domains], NaN where they were not measured."""

    steps: np.ndarray
    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lengths: np.ndarray
    validation: float

    @property
    def last(self) -> np.ndarray:
        """At the end, [domains, depths]."""
        return self.shares[..., -1]


Runs = Mapping[Arm, Mapping[int, Run]]


def read_runs(root: Path) -> dict[Arm, dict[int, Run]]:
    """Finished runs of both sweeps below a directory, by arm and seed. Raises ValueError, in one sentence, where there is none."""
    found: dict[Arm, dict[int, Run]] = {}
    for directory in sorted(path for sweep in SWEEPS for path in (root / f"{sweep}-sweep").glob("*") if (path / "finished.json").exists()):
        recipe = read_yaml((directory / "recipe.yaml").read_bytes(), str(directory))
        precision, model = recipe["precision"], recipe["model"]
        arm = Arm(str(precision["default"]), bool(model["mtp_shared"]), float(model["mtp_loss_scale"]), recipe["train"]["only"] == "mtp")
        found.setdefault(arm, {})[int(recipe["run"]["seed"])] = _read(directory)
    if not found:
        raise ValueError(f"{root} holds no finished run of {' or '.join(SWEEPS)}: run python -m experiments.acceptance without train=false")
    return dict(sorted(found.items()))


def _read(directory: Path) -> Run:
    rows = [row for row in read_metrics(directory) if any(key.startswith("accept/") for key in row)]
    if not rows:
        raise ValueError(f"{directory} has measured no acceptance: leave evaluation.evaluators as the recipe has them")

    def values(row: Mapping[str, float], end: str = "") -> list[list[float]]:
        return [[row.get(f"accept/{domain}/depth_{depth}{end}", np.nan) for depth in DEPTHS] for domain in DOMAINS]

    shares = np.array([values(row) for row in rows]).transpose(1, 2, 0)
    last = rows[-1]
    low, high = (np.array(values(last, end)) for end in ("_low", "_high"))
    lengths = np.array([last.get(f"accept/{domain}/length", np.nan) for domain in DOMAINS])
    return Run(np.array([row["step"] for row in rows]), shares, low, high, lengths, float(last["eval/loss"]))


def differences(runs: Runs, change: Mapping[str, tuple[object, object]]) -> np.ndarray:
    """What one change adds to the acceptance at the end, of every pair of runs that differ in it alone: [pairs, domains, depths]."""
    ((name, (before, after)),) = change.items()
    pairs = []
    for arm, seeds in runs.items():
        if getattr(arm, name) == after:
            of = Arm(**{**vars(arm), name: before})
            pairs += [run.last - runs[of][seed].last for seed, run in seeds.items() if seed in runs.get(of, {})]
    return np.array(pairs).reshape(-1, len(DOMAINS), len(DEPTHS))


def draw_domains(runs: Mapping[int, Run], path: Path) -> None:
    """Acceptance by domain at the end, a dot for each seed with its interval, the most accepted domain on top."""
    last = np.array([run.last for run in runs.values()])
    order = np.argsort(np.nanmean(last[:, :, 0], axis=0))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(DEPTHS), figsize=(13, 4.6), layout="constrained", sharey=True)
        for number, axis in enumerate(grid):
            for row, domain in enumerate(order):
                for offset, run in zip(np.linspace(0.22, -0.22, len(runs)), runs.values(), strict=True):
                    share = run.last[domain, number]
                    errors = [[share - run.low[domain, number]], [run.high[domain, number] - share]]
                    axis.errorbar(share, row + offset, xerr=errors, fmt="o", color=RUN_COLOURS[0], markersize=4.5, capsize=2, linewidth=1)
            axis.set_xlim(0, 1)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_title(f"Depth {DEPTHS[number]}" + (", where depth 1 is accepted" if number else ""))
        grid[0].set_yticks(range(len(order)), [DOMAINS[domain] for domain in order])
        save(figure, path)


def draw_training(runs: Mapping[int, Run], path: Path) -> None:
    """Acceptance over the steps, mean of seeds, band from the lowest to the highest."""
    steps = next(iter(runs.values())).steps
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(DEPTHS), figsize=(14, 4.8), layout="constrained", sharey=True)
        ends = []
        for number, axis in enumerate(grid):
            curves = np.array([run.shares[:, number] for run in runs.values()])
            labels = []
            for domain, (name, colour) in enumerate(zip(DOMAINS, COLOURS, strict=True)):
                mean = curves[:, domain].mean(0)
                axis.plot(steps, mean, color=colour, linewidth=2, marker="o", markersize=3.5)
                axis.fill_between(steps, curves[:, domain].min(0), curves[:, domain].max(0), color=colour, alpha=0.15, linewidth=0)
                labels.append((float(mean[-1]), f"{name} {mean[-1]:.0%}", colour))
            axis.set_title(f"Depth {DEPTHS[number]}" + (", where depth 1 is accepted" if number else ""))
            axis.set_xlabel("step")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            ends.append(labels)
        for axis, labels in zip(grid, ends, strict=True):
            label_ends(axis, labels)
        save(figure, path)


def draw_arms(found: Mapping[str, np.ndarray], path: Path) -> None:
    """What each change adds, in points: a dot for each pair, the mean and its standard error; a frame for each depth, a row for each domain."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(DEPTHS), figsize=(13, 1.2 + 0.75 * len(DOMAINS)), layout="constrained", sharey=True)
        for number, axis in enumerate(grid):
            for place, (name, pairs) in enumerate(found.items()):
                colour, offset = RUN_COLOURS[place], 0.3 - 0.2 * place
                for domain in range(len(DOMAINS)):
                    points = 100 * pairs[:, domain, number]
                    axis.plot(points, [domain + offset] * len(points), "o", color=colour, alpha=0.3, markersize=3.5)
                    error = points.std(ddof=1) / np.sqrt(len(points)) if len(points) > 1 else 0.0
                    label = f"{name} ({len(points)} pairs)" if domain == 0 else None
                    axis.errorbar(points.mean(), domain + offset, xerr=error, fmt="D", color=colour, capsize=3, markersize=5, label=label)
            axis.axvline(0, color="#555555", linewidth=1)
            axis.set_title(f"Depth {DEPTHS[number]}")
            axis.set_xlabel("change of the acceptance, points")
        grid[0].set_yticks(range(len(DOMAINS)), DOMAINS)
        grid[0].invert_yaxis()
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        save(figure, path)


def arm_rows(runs: Runs) -> list[list[str]]:
    """Validation loss and acceptance of each arm, mean of seeds and over domains."""
    rows = []
    for arm, seeds in runs.items():
        last = np.nanmean([np.nanmean(run.last, axis=0) for run in seeds.values()], axis=0)
        loss = np.mean([run.validation for run in seeds.values()])
        length = np.mean([run.lengths.mean() for run in seeds.values()])
        rows.append([str(arm), str(len(seeds)), f"{loss:.4f}", *(f"{share:.1%}" for share in last), _number(length)])
    return rows


def change_rows(found: Mapping[str, np.ndarray]) -> list[list[str]]:
    """What each change adds to the mean over the domains that were read, and over all, in points, with the standard error over pairs."""
    read = [DOMAINS.index(domain) for domain in READ]
    rows = []
    for name, pairs in found.items():
        columns = [100 * np.nanmean(of, axis=1)[:, depth] for of in (pairs[:, read], pairs) for depth in range(len(DEPTHS))]
        errors = [f" ± {each.std(ddof=1) / np.sqrt(len(each)):.1f}" if len(each) > 1 else "" for each in columns]
        rows.append([name, str(len(pairs)), *(f"{each.mean():+.1f}{error}" for each, error in zip(columns, errors, strict=True))])
    return rows


def domain_rows(runs: Mapping[int, Run]) -> list[list[str]]:
    """Acceptance by domain of one arm, mean and range of the seeds, the most accepted domain first."""
    last = np.array([run.last for run in runs.values()])
    lengths = np.mean([run.lengths for run in runs.values()], axis=0)
    order = np.argsort(-np.nanmean(last[:, :, 0], axis=0))
    rows = []
    for d in order:
        shares = [f"{each.mean():.1%} ({each.min():.1%} - {each.max():.1%})" for each in last[:, d].T]
        rows.append([DOMAINS[d], *shares, _number(lengths[d])])
    return rows


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


ARM_HEAD = ("arm", "seeds", "validation loss", "depth 1, mean of domains", "depth 2, mean of domains", "tokens a pass, mean of domains")
CHANGE_HEAD = ("change", "pairs", "depth 1, points, domains read", "depth 2", "depth 1, all domains", "depth 2")
DOMAIN_HEAD = ("domain", "depth 1", "depth 2 where depth 1 is accepted", "tokens a pass, writing itself")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def write(runs: Runs, to: Path) -> str:
    """The pictures, results.json and the page; returns the tables."""
    base = Arm() if Arm() in runs else next(iter(runs))
    found = {name: pairs for name, change in CHANGES if len(pairs := differences(runs, change))}
    pictures = [("Acceptance by domain", f"{base}, at the end: a dot for each seed, bars: 95% intervals over windows.", to / "domains.png")]
    draw_domains(runs[base], to / "domains.png")
    draw_training(runs[base], to / "training.png")
    pictures.append(("Over training", f"{base}: mean of seeds, band from the lowest to the highest.", to / "training.png"))
    if found:
        draw_arms(found, to / "arms.png")
        pictures.append(("What changes it", "Pairs differ in one thing alone; diamonds: mean and standard error.", to / "arms.png"))
    results = {
        str(arm): {
            str(seed): {
                "steps": run.steps.tolist(),
                "validation_loss": run.validation,
                "tokens_a_pass": {
                    domain: round(float(length), 4) for domain, length in zip(DOMAINS, run.lengths, strict=True) if length == length
                },
                "acceptance": {domain: np.round(run.shares[d], 4).tolist() for d, domain in enumerate(DOMAINS)},
            }
            for seed, run in seeds.items()
        }
        for arm, seeds in runs.items()
    }
    (to / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    tables = [(DOMAIN_HEAD, domain_rows(runs[base])), (CHANGE_HEAD, change_rows(found)), (ARM_HEAD, arm_rows(runs))]
    parts = [page.picture(*each) for each in pictures] + [page.table(head, rows) for head, rows in tables]
    (to / "index.html").write_text(page.page("How many drafts are accepted", parts), encoding="utf-8")
    return "\n\n".join(markdown(head, rows) for head, rows in tables if rows)


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments, 1 where a run failed."""
    try:
        values = key_values(arguments, ("train", "runs", "to", "overrides"))
        if not isinstance(values.get("train", True), bool):
            raise ValueError(f"train={values['train']} is neither true nor false")
        if values.get("train", True):
            for sweep in SWEEPS:
                command = [sys.executable, "-m", "train", "-cn", sweep, "-m", *map(str, values.get("overrides", []))]
                done = subprocess.run(command, check=False).returncode
                if done:
                    print(f"The sweep {sweep} ended with status {done}: the same command again goes on.", file=sys.stderr)
                    return 1
        root = Path(str(values.get("runs", "runs")))
        to = Path(str(values.get("to", root / "acceptance-sweep" / "report")))
        runs = read_runs(root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write(runs, to))
    print(f"\n{to / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
