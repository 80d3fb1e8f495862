"""Branches at many checkpoints of a run: `python -m train.branch checkpoint=RUN branch=[bf16,fp32] every=240steps`.

One process a branch, one after the other; what is finished is not repeated.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import Checkpoint, finished
from train.duration import Duration
from train.recipe.reading import RecipeError, read
from train.recipe.tree import Recipe
from train.run_directory import stored_recipe
from train.signals import STOPPED, StopRequested


def sweep(run: str, own: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Returns the exit status: 0 when every branch finished. Raises RecipeError, in one sentence, where there is nothing to sweep over."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("branch=[...] is a sweep, whose jobs run one after the other on one rank each: start it without torchrun")
    names = own["branch"] if isinstance(own["branch"], list) else [own["branch"]]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise RecipeError(f"branch={own['branch']} names no precision: write for instance branch=[bf16,fp32]")
    if any(override.startswith(("run.dir=", "precision=")) for override in overrides):
        raise RecipeError("run.dir and precision differ from branch to branch of a sweep: leave them out")
    done, failed = 0, []
    chosen = chosen_checkpoints(Path(run), own.get("every"))
    for checkpoint in chosen:
        for name in names:
            line = [f"checkpoint={checkpoint.path}", f"precision={name}", *overrides]
            print(f"branch: {' '.join(line)}", flush=True)
            with subprocess.Popen([sys.executable, "-m", "train.branch", *line]) as job:
                try:
                    status = job.wait()
                except StopRequested:  # the sweep ends with its job, which may write a checkpoint
                    job.send_signal(signal.SIGTERM)
                    raise
            if status == STOPPED:
                return STOPPED
            done += status == 0
            failed += [] if status == 0 else [f"{checkpoint.path} precision={name}"]
    print(f"branch: {done + len(failed)} branches, {done} finished, {len(failed)} failed")
    for job_line in failed:
        print(f"  failed: {job_line}")
    return 1 if failed else 0


def chosen_checkpoints(run: Path, every: Any) -> list[Checkpoint]:
    """The checkpoints of a run at multiples of `every`, and its milestones; without it, all of them. The oldest first, without that of the last
    step, after which nothing is left to train."""
    directory = run / "checkpoints"
    found: dict[int, Checkpoint] = {}
    for name in finished(directory):
        try:
            checkpoint = Checkpoint(directory / name)
        except CheckpointError as error:
            print(f"Skipping checkpoint {directory / name}: {error}.")
            continue
        found.setdefault(checkpoint.step, checkpoint)
    if not found:
        raise RecipeError(f"checkpoint={run} is no run with checkpoints: name the directory of a run, as in checkpoint=runs/x")
    parent = read(Recipe, {**stored_recipe(next(iter(found.values()))), "evaluation": {}})
    step_every = 1
    if every is not None:
        try:
            step_every = parent.in_steps(Duration.read(every))
        except ValueError as error:
            raise RecipeError(f"every={error}") from None
        if step_every < 1:
            raise RecipeError(f"every={every} is no step: write for instance every=240steps")
    chosen = [
        checkpoint
        for step, checkpoint in sorted(found.items())
        if step < parent.total_steps and (step % step_every == 0 or checkpoint.milestone is not None)
    ]
    if not chosen:
        raise RecipeError(
            f"{run} holds checkpoints of steps {', '.join(map(str, sorted(found)))}, none of them before its last step and at a multiple "
            f"of every={every}: choose another one"
        )
    return chosen
