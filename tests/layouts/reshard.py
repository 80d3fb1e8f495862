"""From layout to layout: a run that stops in one goes on in another, through `python -m train` and `python -m launch.local`.

Every source runs its first steps once; of its run directory each of its targets gets a copy, in which it goes on to the end. What is compared is the
whole run's metrics, and the weights at its end, with those of a run that one rank did alone.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.layouts.cases import BY_HAND, HEADS, OVERLAPPED, SHARDED, Case, case
from tests.layouts.compare import LIMIT, PARAMETERS, furthest, furthest_tensor
from tests.layouts.run import given
from tests.train.recipes import SMALL
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS, STOP = 10, 5
PATIENCE = 1500.0  # seconds a start may take
MEASURED = {"losses": "loss/", "gradient_norm": "grad_norm", "moe": "moe/"}

LAYOUTS: tuple[Case, ...] = (
    case(1),
    case(2, tensor=2),
    case(2, pipeline=2, virtual_pipeline=2),
    case(4, tensor=2, expert=2, **SHARDED),
    case(2, expert_tensor=2, **OVERLAPPED),
    case(2, pattern=BY_HAND, pipeline=2),
    case(4, expert=2, pipeline=2, **SHARDED),
    case(2, expert=2, context=2),
    case(8, tensor=2, expert=2, expert_tensor=2, pipeline=2, **SHARDED),
    case(4, tensor=2, pipeline=2, virtual_pipeline=2),
    case(4, sequences=1, expert=4, **OVERLAPPED),
    case(4, tensor=2, expert_tensor=2, context=2, **HEADS),
)
OFFSETS = (1, 5, 8)
PAIRS: tuple[tuple[Case, Case], ...] = tuple(
    sorted(
        ((source, LAYOUTS[(number + offset) % len(LAYOUTS)]) for number, source in enumerate(LAYOUTS) for offset in OFFSETS),
        key=lambda pair: max(layout.ranks for layout in pair),
    )
)
"""From each layout to three others, so that each is also reached from three others; those of fewest ranks first."""


def start(ranks: int, *overrides: str) -> str:
    """The documented command, on `tiny` with the model and batches of SMALL; what it printed. Raises RuntimeError with that where it fails."""
    launch = ("train",) if ranks == 1 else ("launch.local", f"ranks={ranks}")
    line = [sys.executable, "-W", "ignore", "-m", *launch, "-cn", "tiny", *SMALL, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    except BaseException:
        process.terminate()  # which a launcher passes on to its ranks
        process.communicate(timeout=60)
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{printed[-4000:]}")
    return printed


def trained(layout: Case, place: Path, run_dir: Path, *overrides: str) -> None:
    """The run of this directory, begun or continued in this layout."""
    start(layout.ranks, *given(place), *layout.overrides, f"train.steps={STEPS}", "optimizer.decay=0", f"run.dir={run_dir}", *overrides)


def made(place: Path, name: str, layout: Case, *overrides: str) -> Path:
    """The run directory of this start, which is done once."""
    run_dir, done = place / name, place / f"{name}.done"
    if not done.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        trained(layout, place, run_dir, *overrides)
        done.touch()
    return run_dir


def weights(run_dir: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    checkpoint = open_checkpoint(run_dir)
    return {name: checkpoint.read_full(f"model/{name}").float().numpy() for name in checkpoint.names("model")}


def goes_on(place: Path, number: int, source: Case, target: Case) -> dict[str, Any]:
    """How far the run that changes its layout is from the one that does not."""
    whole = made(place, "whole", case(1))
    begun = made(place, f"source-{LAYOUTS.index(source)}", source, f"run.stop_after={STOP}")
    run_dir = place / f"pair-{number}"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(begun, run_dir)
    before = read_metrics(run_dir)
    trained(target, place, run_dir)
    ours, theirs = read_metrics(run_dir), read_metrics(whole)
    found: dict[str, Any] = {key: furthest(ours, theirs, (prefix,)) for key, prefix in MEASURED.items()}
    found["parameters"] = furthest_tensor(weights(run_dir), weights(whole))
    problems = [f"{key} differ by {found[key]:.2g}" for key in MEASURED if not found[key] <= LIMIT]
    if not found["parameters"] <= PARAMETERS:
        problems.append(f"parameters differ by {found['parameters']:.2g}")
    if [line["step"] for line in before] != list(range(1, STOP + 1)) or [line["step"] for line in ours] != list(range(1, STEPS + 1)):
        problems.append(f"it has the steps {[line['step'] for line in before]}, then {[line['step'] for line in ours]}")
    for key in ("learning_rate", "tokens"):
        if [line[key] for line in ours] != [line[key] for line in theirs]:
            problems.append(f"{key} differs")
    if not problems:
        shutil.rmtree(run_dir)
    return {"ranks": [source.ranks, target.ranks], "from": source.name, "onto": target.name, **found, "problems": problems}


def of_pairs(place: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every pair, to be measured; runs lie in `place`."""
    for number, (source, target) in enumerate(PAIRS):
        name = f"{source.ranks}: {source.name} -> {target.ranks}: {target.name}"
        yield name, partial(goes_on, place, number, source, target)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """In Markdown: largest relative differences from the run on one rank."""
    rows = ["| from | ranks | to | ranks | losses | gradient norm | MoE | parameters |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    for line in lines:
        values = " | ".join(f"{line[key]:.1e}" for key in (*MEASURED, "parameters"))
        first, second = (line[key].replace("|", "\\|") for key in ("from", "onto"))
        rows.append(f"| {first} | {line['ranks'][0]} | {second} | {line['ranks'][1]} | {values} |")
    return "\n".join(rows)
