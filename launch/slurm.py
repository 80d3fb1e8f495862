"""Writes the sbatch script of a run from its recipe and the cluster's profile, and submits it.

    python -m launch.slurm -cn nemotron3_super cluster=b200 cluster.nodes=8
    python -m launch.slurm -cn tiny cluster=h100 submit=false            # only writes <run>/slurm.sh
    python -m launch.slurm -cn tiny cluster=h100 --dry-run               # only prints it
    python -m launch.slurm -cn nvfp4_gap cluster=h100 -m                 # a sweep, as one job array

The recipe is validated for the layout it will have, cluster.nodes x cluster.devices_per_node ranks, before anything is written. Everything but
`submit` and `--dry-run` is passed on to `python -m train`; keys below `cluster.slurm` and `cluster.preflight` say what the script is like, see
docs/launching.md. A run that a job works on already is refused.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs import SlurmError, note, states, submit, submitted
from launch.script import LOGS, Batch, Start, render
from train.observe.redact import REMOVED, without_secrets
from train.recipe.cli import main as with_recipe
from train.recipe.sweep import Job
from train.recipe.tree import Recipe
from train.refusal import refuse

SCRIPT = "slurm.sh"


def split(arguments: Sequence[str]) -> tuple[bool, bool, list[str]]:
    """Whether to submit, whether to print only, and the arguments of `python -m train`. Raises ValueError, in one sentence."""
    given = [argument for argument in arguments if argument.startswith("submit=")]
    if given and given[-1] not in ("submit=true", "submit=false"):
        raise ValueError(f"{given[-1]} is neither submit=true nor submit=false")
    rest = [argument for argument in arguments if not argument.startswith("submit=") and argument != "--dry-run"]
    return given[-1:] != ["submit=false"], "--dry-run" in arguments, rest


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for a wrong recipe, 1 where Slurm does not take it."""
    try:
        submits, dry, rest = split(arguments)
        secret = _secret(rest)
        if secret is not None:
            raise ValueError(f"{secret}=... holds a secret, which the script would keep: put it into the environment, which jobs inherit")
    except ValueError as error:
        return refuse(str(error))
    runs: list[Start] = []
    recipes: list[Recipe] = []

    def one(recipe: Recipe) -> int:
        recipes.append(recipe)
        runs.append(Start(Path(recipe.run_dir).absolute(), tuple(rest)))
        return 0

    def each(job: Job, recipe: Recipe) -> None:
        recipes.append(recipe)
        runs.append(Start(job.run_dir.absolute(), job.arguments))

    status = with_recipe(one, "launch.slurm", rest, ranks="cluster", trains=True, each=each)
    if status or not runs:
        return status
    try:
        batch = _batch(runs, recipes, sweep=bool({"-m", "--multirun"} & set(rest)))
        text = render(batch)
        if dry:
            sys.stdout.write(text)
            return 0
        if submits:
            for run in runs:
                _refuse_second(run.directory)
        script = _write(batch, text)
        print(f"{script}: {len(runs)} run{'s' * (len(runs) > 1)} on {batch.cluster.ranks} ranks" + (" each" if batch.sweep else ""))
        return _submit(batch, script) if submits else 0
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        return refuse(str(error))


def _secret(arguments: Sequence[str]) -> str | None:
    """The key of an override that `train.observe.redact` would not let into a file."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if REMOVED in str(without_secrets({key: value})[key]) and REMOVED not in argument:
            return key
    return None


def _batch(runs: Sequence[Start], recipes: Sequence[Recipe], *, sweep: bool) -> Batch:
    cluster = recipes[0].cluster
    for recipe, run in zip(recipes, runs, strict=True):
        if recipe.cluster != cluster:
            raise ValueError(f"{run.directory} asks for another cluster than {runs[0].directory}, but one array has one: sweep other keys")
    first = runs[0].directory
    home = first.parent if sweep else first
    name = home.name if sweep else recipes[0].run.name if recipes[0].run.name != "run" else first.name
    python = cluster.slurm.python or ("python" if cluster.slurm.container else sys.executable)
    return Batch(_job_name(name), home, tuple(runs), cluster, python, Path.cwd(), sweep)


def _job_name(name: str) -> str:
    """As squeue can show it."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[:100] or "run"


def _refuse_second(directory: Path) -> None:
    """Raises ValueError where a job of this run waits or runs."""
    for entry in submitted(directory)[-1:]:
        living = [state for state in states(entry.job) if not state.is_over]
        if living:
            raise ValueError(
                f"run.dir={directory} is that of job {entry.job} already, which is {living[0].name}: end it with scancel {entry.job}, "
                "or choose another run.dir"
            )


def _write(batch: Batch, text: str) -> Path:
    """The script's path. Slurm makes no directories for its logs."""
    for directory in (batch.home, *(run.directory for run in batch.runs)):
        (directory / LOGS).mkdir(parents=True, exist_ok=True)
    path = batch.home / SCRIPT
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.chmod(0o755)
    os.replace(partial, path)
    return path


def _submit(batch: Batch, script: Path) -> int:
    """A sweep whose jobs may need several starts is a chain of arrays, each after the one before."""
    links = batch.cluster.slurm.chain if batch.sweep else 1
    job = ""
    for _ in range(links):
        job = submit(script, *([f"--dependency=afterany:{job}"] if job else []))
        for number, run in enumerate(batch.runs):
            note(run.directory, f"{job}_{number}" if batch.sweep else job, script, run.arguments)
        print(f"submitted job {job}" + (f", an array of {len(batch.runs)}" if batch.sweep else ""))
    print(f"  python -m launch.status {_shown(batch)}    python -m launch.logs {_shown(batch)} follow=true")
    return 0


def _shown(batch: Batch) -> str:
    directory = batch.runs[0].directory
    near = directory.is_relative_to(batch.submitted_from)
    return shlex.quote(str(directory.relative_to(batch.submitted_from) if near else directory))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
