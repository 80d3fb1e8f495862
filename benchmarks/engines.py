"""What each engine holds and how long it takes: steps of a recipe in fp32 by Megatron and by DeepSpeed, each in processes of its own.

    python -m benchmarks.engines                                     # tiny on 2 ranks
    python -m benchmarks.engines recipe=small ranks=4 turns=3 rounds=5 to=docs/engines.json

held: bytes of the tensors of a rank, each piece of memory once: between two steps, and between two microbatches of a step, where it is most: weights,
the optimizer's state and, at the latter time, gradients. seconds: of CPU time of a rank for a step, with its threads that send and receive, the
median of `rounds`, after two that are not counted; the engines take turns, and of their `turns` it is the median again. Microbatches are
of one sequence. DeepSpeed is left out where it is not installed.
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

import torch
from torch import Tensor

from benchmarks.arguments import main
from benchmarks.timing import machine, save, table
from parallel import groups
from train.build import Run, build
from train.recipe.load import load_recipe
from train.train_step import train_step

DEEPSPEED = "parallel.engine=deepspeed"
ENGINES: dict[str, tuple[str, ...]] = {
    "Megatron": (),
    "Megatron, distributed optimizer": ("parallel.distributed_optimizer=true",),
    "DeepSpeed ZeRO-1": (DEEPSPEED,),
    "DeepSpeed ZeRO-2": (DEEPSPEED, "parallel.zero_stage=2"),
    "DeepSpeed ZeRO-2, offloaded": (DEEPSPEED, "parallel.zero_stage=2", "parallel.offload_optimizer=true"),
    "DeepSpeed ZeRO-3": (DEEPSPEED, "parallel.zero_stage=3"),
    "DeepSpeed ZeRO-3, offloaded": (DEEPSPEED, "parallel.zero_stage=3", "parallel.offload_optimizer=true"),
}


def held(run: Run) -> int:
    """Bytes of all tensors there are, each piece of memory once. Of gradients that DeepSpeed leaves there Python may not know yet: it is asked."""
    gradients = [param.grad for chunk in run.chunks for param in chunk.parameters()]
    gc.collect()
    there = [thing for thing in (*gc.get_objects(), *gradients) if issubclass(type(thing), Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there if t.layout == torch.strided}.values())


def measure(recipe: str, rounds: int, name: str, ranks: int, to: str) -> None:
    """To be called in each of `ranks` fresh processes, the first of which writes what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = ("precision=fp32", "train.micro_batch_size=1", f"run.dir={directory}", *ENGINES[name])
        run = build(load_recipe(recipe, *overrides, world_size=ranks))
        train_step(run, 0)
        between = within = held(run)

        def look(*_: object) -> None:
            nonlocal within
            within = max(within, held(run))

        hook = run.chunks[0].register_forward_pre_hook(look)
        train_step(run, 1)
        hook.remove()
        seconds = []
        for step in range(2, 2 + rounds):
            begin = time.process_time()
            train_step(run, step)
            seconds.append(time.process_time() - begin)
        if run.layout.rank == 0:
            values = {"between_bytes": between, "gradients_bytes": within, "seconds": statistics.median(seconds)}
            Path(to).write_text(json.dumps(values))
        run.engine.close()
        groups.shutdown()


def measured(recipe: str, ranks: int, rounds: int, name: str) -> dict[str, float]:
    """What `measure` wrote. Raises ValueError where it did not come to that."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "values.json")
        code = f"from benchmarks.engines import measure; measure({recipe!r}, {rounds}, {name!r}, {ranks}, {str(found)!r})"
        (script := Path(directory, "measure.py")).write_text(code)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
        done = subprocess.run(launcher, capture_output=True, text=True, check=False)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if "Error: " in line]
            raise ValueError(f"recipe={recipe} ranks={ranks} did not run: {told[0] if told else done.stderr[-200:]}")
        return dict(json.loads(found.read_text()))


def run(recipe: str, ranks: int, turns: int, rounds: int, to: str) -> None:
    installed = find_spec("deepspeed") is not None
    names = [name for name, overrides in ENGINES.items() if installed or DEEPSPEED not in overrides]
    print(
        f"A step of {recipe} in fp32 on {ranks} data-parallel ranks, {machine(torch.device('cpu'))}; medians of {turns} x {rounds} steps\n",
        flush=True,
    )
    rows = [("engine", "held between steps", "between microbatches", "CPU seconds")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            found[name].append(measured(recipe, ranks, rounds, name))
    values = {name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in found.items()}
    for name, value in values.items():
        between, within = (f"{value[key] / 2**20:,.1f} MiB" for key in ("between_bytes", "gradients_bytes"))
        rows.append((name, between, within, f"{value['seconds']:.2f}"))
    print(table(rows))
    if not installed:
        print("\nDeepSpeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'")
    save(to, {"machine": machine(torch.device("cpu")), "recipe": recipe, "ranks": ranks, "engines": values})


DEFAULTS = {"recipe": "tiny", "ranks": 2, "turns": 3, "rounds": 5, "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
