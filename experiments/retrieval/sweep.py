"""The runs of the sweep: each arm at each learning rate, then more seeds at each arm's best rate.

A run is a run of the recipe `retrieval`, by the loop that all runs have. One that has learnt nothing of recall after two fifths of it stops there.
Finished runs are lines of results.jsonl; the same command started again makes those that are missing.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time

from experiments.retrieval.arms import ARMS, Arm
from experiments.retrieval.runs import add_line, each, of_as_many_steps, read_lines
from train import loop
from train.observe.metrics import read_metrics

# In the order in which they run: from the middle outwards.
RATES = (4.7e-3, 3.2e-3, 6.8e-3, 2.2e-3, 1e-2, 1.5e-3, 1.5e-2, 1e-3)
TASKS = ("64x4", "128x8", "256x16", "512x64")
VALUES_ALONE = math.log(4096)  # nats: of a model that knows which ids are values, and nothing of the sequence
STOP = "40%"  # of its steps, for a run that knows hardly more


@dataclass(frozen=True)
class Result:
    """accuracy: of each of TASKS, 0 to 1; loss: of the last logged training step; seconds: of the CPU; stopped: before the end."""

    arm: str
    rate: float
    seed: int
    accuracy: dict[str, float]
    loss: float
    seconds: float
    stopped: bool
    steps: int

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


def arm_of(name: str) -> Arm:
    """Raises ValueError for a name that no arm has."""
    found = next((arm for arm in ARMS if arm.name == name), None)
    if found is None:
        raise ValueError(f"arms={name} is none of {', '.join(arm.name for arm in ARMS)}")
    return found


def read_results(path: Path) -> list[Result]:
    """Of finished runs; none where there is no file yet. Raises ValueError for a line that is none."""
    return read_lines(path, Result)


def best(results: Sequence[Result], arm: str) -> Result | None:
    """The run of the first seed with the best mean accuracy; the smaller loss where several have it."""
    own = [result for result in results if result.arm == arm and result.seed == 1]
    return max(own, key=lambda result: (result.mean, -result.loss), default=None)


Job = tuple[str, float, int]


def missing(results: Sequence[Result], arms: Sequence[Arm], rates: Sequence[float], seeds: int) -> Iterator[Job]:
    """Arm, rate and seed of the runs that can be made now: those of the first seed while there are some, then the others at the best rate."""
    done = {(result.arm, result.rate, result.seed) for result in results}
    first = [(arm.name, rate, 1) for rate in rates for arm in arms if (arm.name, rate, 1) not in done]
    if first:
        yield from first
        return
    for seed in range(2, seeds + 1):
        for arm in arms:
            found = best(results, arm.name)
            if found is not None and (arm.name, found.rate, seed) not in done:
                yield arm.name, found.rate, seed


def overrides(job: Job, directory: Path, more: Sequence[str]) -> list[str]:
    arm, rate, seed = job
    name = f"{arm}__rate-{rate:g}__seed-{seed}"
    return [
        f"optimizer.learning_rate={rate}",
        f"optimizer.min_learning_rate={rate / 100}",
        f"run.seed={seed}",
        f"run.dir={directory / name}",
        *more,
    ]


def train_one(job: Job, directory: Path, more: Sequence[str]) -> Result:
    """One run, from where it is to its end. Its checkpoints go with it. Raises RuntimeError where it did not end well."""
    arm, rate, seed = job
    started = process_time()
    recipe = arm_of(arm).recipe(*overrides(job, directory, [*more, f"run.stop_after={STOP}"]))
    place = Path(recipe.run_dir)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "output.txt").open("a") as output, redirect_stdout(output):
        status = loop.run(recipe)
        stopped = status == 0 and not _losses(place)[-1] < VALUES_ALONE - 0.2
        if status == 0 and not stopped:
            status = loop.run(arm_of(arm).recipe(*overrides(job, directory, more)))
    if status:
        raise RuntimeError(f"{place} ended with status {status}: {place / 'output.txt'} says why")
    entries = read_metrics(place)
    accuracy = {task: float(entries[-1][f"mqar/{task}"]) for task in TASKS}
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return Result(arm, rate, seed, accuracy, _losses(place)[-1], round(process_time() - started, 1), stopped, recipe.total_steps)


def _losses(place: Path) -> list[float]:
    return [float(entry["loss/lm"]) for entry in read_metrics(place) if "loss/lm" in entry]


def sweep(directory: Path, *, arms: Sequence[Arm], rates: Sequence[float], seeds: int, processes: int, more: Sequence[str]) -> list[Result]:
    """Makes all runs that are missing, `processes` beside each other; returns all results."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.jsonl"
    of_as_many_steps(path, read_results(path), arms[0].recipe(*more).total_steps)
    while jobs := list(missing(read_results(path), arms, rates, seeds)):
        train = partial(train_one, directory=directory, more=list(more))
        for number, result in enumerate(each(train, jobs, processes), start=1):
            add_line(path, result)
            shown = "  ".join(f"{task} {value:.3f}" for task, value in result.accuracy.items())
            name = f"{result.arm} at {result.rate:g}, seed {result.seed}"
            print(f"{number}/{len(jobs)}  {name}: {shown}  loss {result.loss:.3f}, {result.seconds:.0f} s", flush=True)
    return read_results(path)
