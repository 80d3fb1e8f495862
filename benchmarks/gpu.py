"""Everything that only a GPU can show, on one GPU that is lent for minutes: stages under time limits, the most telling first.

    python -m benchmarks.gpu                                # all stages
    python -m benchmarks.gpu stages=[repeat,tests] minutes=4

A stage that fails or runs out of time does not keep the next from running; the table at the end, and `to` as JSON, say of each whether it passed,
failed, ran out of time or has not run. Without a CUDA device nothing runs, and that is said.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.arguments import main
from benchmarks.timing import machine, save, table

SHORT = (
    "train.steps=2 optimizer.warmup=1 optimizer.decay=1 train.log_every=1 train.eval_every=0 monitor.wandb=disabled monitor.picture=false"
)
PYTEST = "-m pytest -q -p no:cacheprovider --tb=short -x -m gpu"


@dataclass(frozen=True)
class Stage:
    """command: arguments of Python, in which {dir} is a fresh directory. shows: what is known when it has passed."""

    seconds: float
    command: str
    shows: str


def _step(precision: str, *more: str) -> str:
    return " ".join(("-m train -cn tiny", f"precision={precision} precision.compute=bf16", SHORT, *more, "run.dir={dir}/run"))


STAGES: dict[str, Stage] = {
    "bf16": Stage(60, _step("bf16"), "two steps of tiny run in bf16"),
    "nvfp4": Stage(60, _step("nvfp4"), "two steps of tiny run in NVFP4"),
    "repeat": Stage(90, f"{PYTEST} tests/train/test_gpu.py -k repeated", "a repeated step has the same bits, recomputed or not"),
    "documents": Stage(60, _step("nvfp4", "data.reset_at_document=true"), "packed documents through variable-length attention"),
    "kernels": Stage(90, f"{PYTEST} tests/precision", "Triton kernels give the reference's bits"),
    "certify": Stage(90, "-m model.precision.certify", "every backend of this GPU against recorded outputs"),
    "tests": Stage(150, f"{PYTEST} tests/train/test_gpu.py", "GPU = CPU in fp32, resume, training in bf16"),
    "activations": Stage(60, "-m benchmarks.activations tokens=2048", "bytes left behind by each kind of layer"),
    "linear": Stage(90, "-m benchmarks.linear", "time of a linear layer"),
    "step": Stage(120, "-m benchmarks.step recipe=small rounds=1 contenders=[nvfp4,bf16]", "time of a step of small"),
}


def run(stages: list[str], minutes: int, to: str) -> None:
    if unknown := [name for name in stages if name not in STAGES]:
        raise ValueError(f"stages={unknown} are unknown: use some of {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        raise ValueError(f"benchmarks.gpu needs a CUDA device, and there is none here: none of {', '.join(stages)} has run")
    print(machine(torch.device("cuda")))
    end = time.monotonic() + 60 * minutes
    results = {}
    for name in stages:
        results[name] = _run(name, min(STAGES[name].seconds, end - time.monotonic()))
    print(table([("stage", "result", "shows"), *((name, result, STAGES[name].shows) for name, result in results.items())]))
    save(to, {"machine": machine(torch.device("cuda")), "stages": results})
    if any(result != "passed" for result in results.values()):
        raise ValueError(
            f"not all stages passed: {', '.join(f'{name} {result}' for name, result in results.items() if result != 'passed')}"
        )


def _run(name: str, seconds: float) -> str:
    if seconds < 5:
        return "has not run"
    print(f"\n== {name}: at most {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-W", "ignore", *STAGES[name].command.format(dir=directory).split()]
        try:
            done = subprocess.run(command, timeout=seconds, check=False, cwd=Path(__file__).parents[1])
        except subprocess.TimeoutExpired:
            return "ran out of time"
    return "passed" if done.returncode == 0 else "failed"


DEFAULTS = {"stages": list(STAGES), "minutes": 9, "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
