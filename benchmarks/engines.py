"""What each engine holds and how long it takes: training steps of a recipe in fp32, by Megatron and by DeepSpeed, on data-parallel ranks.

    python -m benchmarks.engines                                     # tiny on 2 ranks
    python -m benchmarks.engines recipe=small ranks=4 rounds=5 to=docs/engines.json

held: bytes of the tensors of a rank, each piece of memory once, between two steps and when the backward passes of a step are done: weights, the
optimizer's state and, at the latter time, gradients and the buffers they are reduced in. seconds: of CPU time of a rank for a step, with its threads
that send and receive, the median of `rounds` in which the engines take turns, after a step that is not counted. DeepSpeed is left out where it is
not installed.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import main
from benchmarks.timing import machine, save, table
from parallel import groups
from train.build import Run, build
from train.recipe.load import load_recipe
from train.timing import Stopwatch
from train.train_step import train_step

DEEPSPEED = "parallel.engine=deepspeed"
ENGINES: dict[str, tuple[str, ...]] = {
    "Megatron": (),
    "Megatron, distributed optimizer": ("parallel.distributed_optimizer=true",),
    "DeepSpeed ZeRO-1": (DEEPSPEED,),
    "DeepSpeed ZeRO-2": (DEEPSPEED, "parallel.zero_stage=2"),
    "DeepSpeed ZeRO-2, offloaded": (DEEPSPEED, "parallel.zero_stage=2", "parallel.offload_optimizer=true"),
}


class Held(Stopwatch):
    """Notes the bytes held when the backward passes of a step are done."""

    def __init__(self, run: Run):
        super().__init__(run.layout.device)
        self.run, self.bytes = run, 0

    def mark(self, name: str) -> None:
        if name == "forward_backward":
            self.bytes = held(self.run)
        super().mark(name)


def held(run: Run) -> int:
    """Bytes of all tensors there are, each piece of memory once. Of gradients that DeepSpeed leaves there Python may not know yet: it is asked."""
    gradients = [param.grad for chunk in run.chunks for param in chunk.parameters()]
    gc.collect()
    there = [thing for thing in (*gc.get_objects(), *gradients) if issubclass(type(thing), Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there if t.layout == torch.strided}.values())


def measure(recipe: str, rounds: int, names: list[str], ranks: int, to: str) -> None:
    """To be called in each of `ranks` processes, the first of which writes what it measured."""
    values: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(rounds + 1):
            for name in names:
                overrides = ("precision=fp32", f"run.dir={directory}", *ENGINES[name])
                run = build(load_recipe(recipe, *overrides, world_size=ranks))
                train_step(run, 0)
                if turn:
                    begin = time.process_time()
                    train_step(run, 1)
                    seconds[name].append(time.process_time() - begin)
                else:
                    between, moment = held(run), Held(run)
                    train_step(run, 1, moment)
                    values[name] = {"between_bytes": between, "gradients_bytes": moment.bytes}
                first = run.layout.rank == 0
                run.engine.close()
                del run
                groups.shutdown(leave_world=False)
    groups.shutdown()
    if first:
        Path(to).write_text(json.dumps({name: {**values[name], "seconds": statistics.median(seconds[name])} for name in names}))


def run(recipe: str, ranks: int, rounds: int, to: str) -> None:
    installed = find_spec("deepspeed") is not None
    names = [name for name, overrides in ENGINES.items() if installed or DEEPSPEED not in overrides]
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "values.json")
        code = f"from benchmarks.engines import measure; measure({recipe!r}, {rounds}, {names!r}, {ranks}, {str(found)!r})"
        (script := Path(directory, "measure.py")).write_text(code)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
        done = subprocess.run(launcher, capture_output=True, text=True, check=False)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if "Error: " in line]
            raise ValueError(f"recipe={recipe} ranks={ranks} did not run: {told[0] if told else done.stderr[-200:]}")
        values = json.loads(found.read_text())
    print(f"A step of {recipe} in fp32 on {ranks} data-parallel ranks, {machine(torch.device('cpu'))}; medians of {rounds} rounds\n")
    rows = [("engine", "held between steps", "with gradients", "CPU seconds")]
    for name, value in values.items():
        sizes = [f"{value[key] / 2**20:,.1f} MiB" for key in ("between_bytes", "gradients_bytes")]
        rows.append((name, *sizes, f"{value['seconds']:.2f}"))
    print(table(rows))
    if not installed:
        print("\nDeepSpeed is not installed: pip install 'nibble[deepspeed]'")
    save(to, {"machine": machine(torch.device("cpu")), "recipe": recipe, "ranks": ranks, "engines": values})


DEFAULTS = {"recipe": "tiny", "ranks": 2, "rounds": 5, "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
