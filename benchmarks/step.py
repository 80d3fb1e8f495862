"""A whole training step of a recipe in NVFP4 against the same in fp32: time, taking turns, and memory, each in a process of its own.

    python -m benchmarks.step                                 # tiny
    python -m benchmarks.step recipe=small rounds=3 contenders=[fp32,nvfp4,bf16]
    python -m benchmarks.step contenders=[fp32,nvfp4,measured]       # measured: nvfp4, and the health of every operand is measured

memory: the largest resident size after two steps (the second has optimizer states) above what the process had before the first. Compiled
kernels and what runs them are loaded before that: they take the same room whatever the model, and are listed by themselves.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import psutil
import torch

from benchmarks.arguments import main
from benchmarks.timing import machine, save, table
from model.precision.backends.cpu import compile_all
from parallel import groups
from train.build import Run, build
from train.recipe.load import RECIPES, load_recipe
from train.train_step import train_step

STEPS = 3


MEASURED = "measured"


def made(recipe: str, contender: str, directory: str) -> Run:
    precision, every = ("nvfp4", 1) if contender == MEASURED else (contender, 0)
    return build(load_recipe(recipe, f"precision={precision}", f"run.dir={directory}", f"monitor.quantization.every={every}"))


def memory(recipe: str, precision: str) -> tuple[int, int]:
    """Bytes of the step, and of the kernels; to be called in a fresh process."""
    with tempfile.TemporaryDirectory() as directory:
        run = made(recipe, precision, directory)
        bare = psutil.Process().memory_info().rss
        if run.context.backend.name == "cpu":
            compile_all()
        before = psutil.Process().memory_info().rss
        for step in range(2):
            train_step(run, step)
        groups.shutdown()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return largest - before, before - bare


def some_steps(recipe: str, precision: str) -> list[float]:
    """Seconds of STEPS steps of a new model, after one that is not counted."""
    with tempfile.TemporaryDirectory() as directory:
        run = made(recipe, precision, directory)
        seconds = []
        for step in range(STEPS + 1):
            begin = time.perf_counter()
            train_step(run, step)  # its metrics are numbers: nothing is left in flight
            seconds.append(time.perf_counter() - begin)
        groups.shutdown()
    return seconds[1:]


def run(recipe: str, contenders: list[str], rounds: int, to: str) -> None:
    recipes, groups = (sorted(path.stem for path in place.glob("*.yaml")) for place in (RECIPES, RECIPES / "precision"))
    if recipe not in recipes:
        raise ValueError(f"recipe={recipe} is no recipe: use one of {', '.join(recipes)}")
    if unknown := [name for name in contenders if name not in (*groups, MEASURED)]:
        raise ValueError(f"contenders={unknown} are no precision groups: use some of {', '.join((*groups, MEASURED))}")
    if contenders[0] != "fp32":
        contenders = ["fp32", *contenders]
    peak, kernels = {}, 0
    for precision in contenders:
        code = f"import json; from benchmarks.step import memory; print(json.dumps(memory({recipe!r}, {precision!r})))"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{recipe} in {precision} did not run: {done.stderr.strip().splitlines()[-1]}")
        peak[precision], kernels = json.loads(done.stdout.strip().splitlines()[-1])
    times: dict[str, list[float]] = {precision: [] for precision in contenders}
    for _ in range(rounds):
        for precision in contenders:
            times[precision] += some_steps(recipe, precision)
    seconds = {precision: statistics.median(values) for precision, values in times.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"A training step of {recipe}, {machine(device)}; medians of {rounds} alternating rounds of {STEPS} steps\n")
    rows = [("precision", "step", "/ fp32", "peak memory of two steps", "/ fp32")]
    for precision in contenders:
        ratio, of_memory = seconds[precision] / seconds["fp32"], peak[precision] / peak["fp32"]
        rows.append((precision, f"{seconds[precision]:.3f} s", f"{ratio:.2f}", f"{peak[precision] / 2**20:,.0f} MiB", f"{of_memory:.2f}"))
    print(table(rows))
    if kernels:
        print(f"\nNVFP4 kernels and their runtime take {kernels / 2**20:,.0f} MiB more, once a process")
    save(to, {"machine": machine(device), "recipe": recipe, "seconds": seconds, "peak_bytes": peak, "kernels_bytes": kernels})


DEFAULTS = {"recipe": "tiny", "contenders": ["fp32", "nvfp4"], "rounds": 4, "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
