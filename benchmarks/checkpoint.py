"""How long training stands still for a checkpoint, written beside it and written at once, taking turns, on one rank and one model.

    python -m benchmarks.checkpoint                            # small, in the precision of the recipe
    python -m benchmarks.checkpoint recipe=tiny rounds=9 precision=fp32

stall: `save`, and every `poll` until the checkpoint is complete, is what training waits for; it is what `seconds/checkpoint` adds up. The first save
of each kind is not counted: it allocates the copy's memory. A step beside which a thread writes shares the machine with it; how much longer it
takes is listed by itself, because on a GPU, whose host has cores to spare, it takes no longer.
"""

import statistics
import tempfile
import time

import torch

from benchmarks.arguments import main
from benchmarks.timing import machine, save, table
from parallel import groups
from train.build import Run, build
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.retention import Retention
from train.recipe.load import RECIPES, load_recipe
from train.train_step import train_step

WAYS = {"beside the training": True, "at once": False}


class Turns:
    """A run that takes steps and saves, one way after the other. seconds: by what was measured."""

    def __init__(self, run: Run, directory: str):
        self.run, self.step = run, 0
        self.seconds: dict[str, list[float]] = {"step": [], "step while writing": [], **{way: [] for way in WAYS}}
        self.ways = {
            way: Checkpointer(f"{directory}/{asynchronous}", run.engine, run.chunks, retention=Retention(1), asynchronous=asynchronous)
            for way, asynchronous in WAYS.items()
        }

    def timed_step(self) -> float:
        begin = time.perf_counter()
        train_step(self.run, self.step)
        self.step += 1
        return time.perf_counter() - begin

    def round(self, counted: bool) -> None:
        for way, checkpointer in self.ways.items():
            quiet, writing = self.timed_step(), []
            begin = time.perf_counter()
            checkpointer.save(self.step, {})
            stall = time.perf_counter() - begin
            while checkpointer.under_way is not None:
                writing.append(self.timed_step())
                begin = time.perf_counter()
                checkpointer.poll()
                stall += time.perf_counter() - begin
            checkpointer.wait()  # old checkpoints are deleted beside the training, too
            if counted:
                self.seconds["step"].append(quiet)
                self.seconds["step while writing"] += writing[:-1]  # during the last one the thread has ended at some moment
                self.seconds["step while writing"] += writing[-1:] if len(writing) == 1 else []
                self.seconds[way].append(stall)


def run(recipe: str, precision: str, rounds: int, to: str) -> None:
    if not (RECIPES / f"{recipe}.yaml").exists():
        raise ValueError(f"recipe={recipe} is no recipe: use one of {', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}")
    with tempfile.TemporaryDirectory() as directory:
        chosen = [f"precision={precision}"] if precision else []
        made = build(load_recipe(recipe, *chosen, f"run.dir={directory}", "monitor.quantization.every=0"))
        turns = Turns(made, directory)
        for index in range(rounds + 1):
            turns.round(counted=index > 0)
        size = sum(file.stat().st_size for path in made.run_dir.glob("False/checkpoints/step-*") for file in path.glob("rank-*"))
        groups.shutdown()
    medians = {name: statistics.median(values) for name, values in turns.seconds.items() if values}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"A checkpoint of {recipe} ({size / 2**20:,.0f} MiB), {machine(device)}; medians of {rounds} alternating rounds\n")
    rows = [("", "seconds", "of a step"), ("a step, nothing being written", f"{medians['step']:.3f}", "")]
    for way in WAYS:
        rows.append((f"stall of a save {way}", f"{medians[way]:.3f}", f"{medians[way] / medians['step']:.1%}"))
    if "step while writing" in medians:
        longer = medians["step while writing"] / medians["step"] - 1
        rows.append(("a step while a thread writes", f"{medians['step while writing']:.3f}", f"{longer:+.1%}"))
    print(table(rows))
    save(to, {"machine": machine(device), "recipe": recipe, "bytes": size, "medians": medians, "seconds": turns.seconds})


DEFAULTS = {"recipe": "small", "precision": "", "rounds": 7, "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
