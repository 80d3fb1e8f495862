"""Needles in a haystack for hybrids of one attention layer to five and to eight Mamba-2 layers, and for Mamba-2 alone: runs of the recipe `needle`.

    python -m experiments.retrieval.needles                       # trains what is missing, then writes a table and a picture
    python -m experiments.retrieval.needles train=false to=docs/retrieval     # of the runs there are

runs=runs/needles: where they lie. processes=2: runs beside each other, one thread each. arms=[5to1,...], seeds=2 and steps: what is trained (of
other steps in a directory of their own).
"""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import process_time

from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from experiments.retrieval.report import COLOURS, NAMES, markdown
from experiments.retrieval.runs import add_line, each, of_as_many_steps, read_lines
from train import loop
from train.arguments import key_values
from train.observe.metrics import read_metrics
from train.recipe.load import load_recipe
from train.report.drawing import STYLE, save

ARMS = {"5to1": "MM*M-MM-", "8to1": "MM*MM-MMMM-", "mamba": "MMM-MMM-"}
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """found: of needle/<task>/<bytes> the share of texts, 0 to 1. loss: of the last logged step. seconds: of the CPU."""

    arm: str
    seed: int
    length: int
    found: dict[str, float]
    loss: float
    seconds: float
    steps: int


Job = tuple[str, int]


def train_one(job: Job, directory: Path, more: Sequence[str]) -> Result:
    """A run of an arm with a seed, from where it is to its end. Raises RuntimeError where it did not end well."""
    arm, seed = job
    started = process_time()
    place = directory / f"{arm}__seed-{seed}"
    recipe = load_recipe("needle", f"model.pattern={ARMS[arm]}", f"run.seed={seed}", f"run.dir={place}", *more)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "output.txt").open("a") as output, redirect_stdout(output):
        status = loop.run(recipe)
    if status:
        raise RuntimeError(f"{place} ended with status {status}: {place / 'output.txt'} says why")
    entries = read_metrics(place)
    found = {key.removeprefix("needle/"): float(value) for key, value in entries[-1].items() if key.startswith("needle/")}
    losses = [float(entry["loss/lm"]) for entry in entries if "loss/lm" in entry]
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return Result(arm, seed, recipe.train.sequence_length, found, losses[-1], round(process_time() - started, 1), recipe.total_steps)


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Of every task and arm: the best seed and, where there are several, the worst, at each length."""
    written = []
    for task in tasks_of(results):
        for arm in ARMS:
            own = [result.found for result in results if result.arm == arm]
            if own:
                cells = (sorted(found[f"{task}/{length}"] for found in own) for length in lengths_of(results))
                shown = [f"{values[-1]:.2f}" + (f" ({values[0]:.2f})" if len(values) > 1 else "") for values in cells]
                written.append([f"`{task}`", NAMES[arm], *shown])
    return written


def tasks_of(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(key.split("/")[0] for key in results[0].found))


def lengths_of(results: Sequence[Result]) -> list[int]:
    return sorted({int(key.split("/")[1]) for key in results[0].found})


def draw(results: Sequence[Result], path: Path) -> None:
    """A frame for each task: the share found over the length, a line for each seed."""
    lengths, trained = lengths_of(results), results[0].length
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True, sharey=True)
        for axis, task in zip(grid.flat, tasks_of(results), strict=False):
            for arm in ARMS:
                own = [result.found for result in results if result.arm == arm]
                for number, found in enumerate(own):
                    values = [found[f"{task}/{length}"] for length in lengths]
                    label = NAMES[arm] if number == 0 else None
                    axis.plot(lengths, values, "-o", color=COLOURS[arm], linewidth=2, markersize=5, alpha=0.85, label=label)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{length // trained}x" for length in lengths])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_ylim(-0.03, 1.03)
            axis.set_title(task)
        for axis in grid[-1]:
            axis.set_xlabel(f"length of the text, times {trained} bytes")
        for row in grid:
            row[0].set_ylabel("needles said without a mistake")
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), frameon=False)
        save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("runs", "to", "train", "processes", "arms", "seeds", "steps"))
        directory = Path(str(values.get("runs", "runs/needles")))
        arms = values.get("arms", list(ARMS))
        if not isinstance(arms, list) or not set(arms) <= ARMS.keys():
            raise ValueError(f"arms={arms} names others than {', '.join(ARMS)}: give a list of these, arms=[5to1]")
        try:
            seeds, processes = int(values.get("seeds", 2)), int(values.get("processes", 2))
            more = [f"train.steps={int(values['steps'])}"] if "steps" in values else []
        except (ValueError, TypeError):
            given = ", ".join(f"{key}={values[key]}" for key in ("seeds", "processes", "steps") if key in values)
            raise ValueError(f"{given}: these are whole numbers: seeds=2 processes=2 steps=2400") from None
        if min(seeds, processes, len(arms)) < 1:
            raise ValueError(f"arms={arms}, seeds={seeds} and processes={processes} leave nothing to do: give at least one of each")
        path = directory / RESULTS
        if values.get("train", True):
            directory.mkdir(parents=True, exist_ok=True)
            so_far = read_lines(path, Result)
            of_as_many_steps(path, so_far, load_recipe("needle", *more).total_steps)
            done = {(result.arm, result.seed) for result in so_far}
            jobs = [(arm, seed) for seed in range(1, seeds + 1) for arm in arms if (arm, seed) not in done]
            for result in each(partial(train_one, directory=directory, more=more), jobs, processes):
                add_line(path, result)
                print(f"{result.arm}, seed {result.seed}: loss {result.loss:.3f}, {result.seconds:.0f} s", flush=True)
        results = sorted(read_lines(path, Result), key=lambda result: (list(ARMS).index(result.arm), result.seed))
        if not results:
            raise ValueError(f"{directory} holds no results: leave train=false out, which makes them")
        to = Path(str(values.get("to", directory / "report")))
        draw(results, to / "needles.png")
        (to / "needles.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
        print("\n" + markdown(("task", "mixers", *map(str, lengths_of(results))), rows(results)) + f"\n\n{to / 'needles.png'}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
