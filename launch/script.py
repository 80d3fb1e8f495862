"""The sbatch script of a run, or of a sweep as one job array.

Whatever comes from the command line or a recipe is quoted for the shell, so a value with spaces, quotes, `$(...)` or line breaks reaches
`python -m train` as it was written. The exception is `cluster.slurm.setup`, whose lines are shell. One srun starts one process per rank, and
they find each other by Slurm's own variables (`train/rendezvous.py`). The status a run ends with (`train/signals.py`) decides what the job does.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.cluster import ClusterConfig
from parallel.slurm import SlurmConfig
from train.refusal import REFUSED
from train.signals import STOPPED

LOGS = "logs"  # below a run directory, and below that of a sweep
RANK_LOG = "rank-%5t.log"  # Slurm puts in the rank
PREFLIGHT_LOG = "preflight.log"
FRESH_SECONDS = 3600  # a start that failed later than this does not count as another failure


@dataclass(frozen=True)
class Start:
    """One run. directory: absolute. arguments: of `python -m train`."""

    directory: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """What one script starts. name: of the job. home: whose logs the script's own output joins; the run directory, or that of the sweep. python:
    absolute. submitted_from: where relative paths begin."""

    name: str
    home: Path
    runs: tuple[Start, ...]
    cluster: ClusterConfig
    python: str
    submitted_from: Path
    sweep: bool = False


def render(batch: Batch) -> str:
    """Raises ValueError, in one sentence, for a path that Slurm cannot be told."""
    for path in (batch.home, batch.submitted_from, *(run.directory for run in batch.runs)):
        if not str(path).isprintable() or "\\" in str(path):
            raise ValueError(
                f"{str(path)!r} holds a control character or a backslash, which Slurm's scripts cannot carry: choose another path"
            )
        if batch.cluster.slurm.container and ("," in str(path) or ":" in str(path)):
            raise ValueError(f"{str(path)!r} holds a comma or a colon, and no container can mount it: choose another path")
    shell = "#!/bin/bash -l" if batch.cluster.slurm.modules else "#!/bin/bash"
    parts = [[shell, *_head(batch)], [*_options(batch)], [*_arguments(batch)], [*_prepare(batch.cluster.slurm)], [*_launch(batch)]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _head(batch: Batch) -> Iterator[str]:
    nodes, ranks = batch.cluster.nodes or 1, batch.cluster.devices_per_node
    where = f"on {nodes} node{'s' * (nodes > 1)} with {ranks} rank{'s' * (ranks != 1)} each"
    if batch.sweep:
        yield f"# A sweep of {len(batch.runs)} runs below {batch.home}, each {where}; written by python -m launch.slurm."
        yield "# Submitted again it goes on with those that are not finished."
    else:
        yield f"# The run {batch.home}, {where}; written by python -m launch.slurm."
        yield "# Submitted again it goes on from the run's newest checkpoint."


def _options(batch: Batch) -> Iterator[str]:
    """The #SBATCH lines."""
    cluster, slurm = batch.cluster, batch.cluster.slurm
    given = {
        "job-name": batch.name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": cluster.nodes or 1,
        "ntasks-per-node": cluster.devices_per_node,
        "cpus-per-task": slurm.cpus_per_rank,
        "mem": slurm.memory,
        **_devices(cluster),
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "array": _array(batch),
        "open-mode": "append",
        "chdir": batch.submitted_from,
        "output": f"{_pattern(batch.home / LOGS)}/slurm-{'%A_%a' if _array(batch) else '%j'}.log",
    }
    for option, value in given.items():
        if value is not None:
            yield f"#SBATCH --{option}={shlex.quote(str(value))}"
    yield "#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue"
    if slurm.exclusive:
        yield "#SBATCH --exclusive"
    yield from (f"#SBATCH {shlex.quote(option)}" for option in slurm.extra)


def _devices(cluster: ClusterConfig) -> dict[str, str]:
    if cluster.device is None or cluster.slurm.gpus == "none":
        return {}
    number = cluster.devices_per_node
    return {"gres": f"gpu:{number}"} if cluster.slurm.gpus == "gres" else {"gpus-per-node": str(number)}


def _array(batch: Batch) -> str | None:
    slurm = batch.cluster.slurm
    if batch.sweep:
        at_once = f"%{slurm.jobs_at_once}" if slurm.jobs_at_once else ""
        return f"0-{len(batch.runs) - 1}{at_once}"
    return f"1-{slurm.chain}%1" if slurm.chain > 1 else None


def _pattern(path: Path) -> str:
    """A path in which Slurm sees no patterns of its own."""
    return str(path).replace("%", "%%")


def _arguments(batch: Batch) -> Iterator[str]:
    """Which run this job is, in shell variables."""
    if not batch.sweep:
        yield from _one(batch.runs[0])
        return
    yield "case $SLURM_ARRAY_TASK_ID in"
    for number, run in enumerate(batch.runs):
        yield f"    {number})"
        yield from (f"        {line}" for line in _one(run))
        yield "        ;;"
    yield "esac"


def _one(run: Start) -> Iterator[str]:
    yield f"run={shlex.quote(str(run.directory))}"
    yield f"logs={shlex.quote(_pattern(run.directory / LOGS))}  # as Slurm reads it"
    yield f"arguments=({' '.join(shlex.quote(argument) for argument in run.arguments)})"


def _prepare(slurm: SlurmConfig) -> Iterator[str]:
    if slurm.modules:
        yield f"module load {' '.join(shlex.quote(module) for module in slurm.modules)}"
    yield from slurm.setup


def _launch(batch: Batch) -> Iterator[str]:
    slurm = batch.cluster.slurm
    start = ["srun", "--kill-on-bad-exit=0", "--wait=120", "--distribution=block", "--open-mode=append"]
    if slurm.cpus_per_rank:
        start.append(f"--cpus-per-task={slurm.cpus_per_rank}")
    start += [shlex.quote(option) for option in slurm.srun]
    yield "# One process per rank. When one ends, the others have two minutes to end by themselves."
    yield f"start=({' '.join([*start, *_container_options(batch)])})"
    yield f"python=({' '.join([*_container_command(batch), shlex.quote(batch.python)])})"
    yield ""
    yield f"# USR1 comes {slurm.signal_seconds} s before the time limit, and by `scancel --batch --signal=USR1 JOB`; srun hands it on to the ranks."
    yield "step= heard= signalled="
    yield """trap 'heard=1 signalled=1; [ "$step" ] && kill -USR1 "$step"' USR1"""
    yield "run_step() {"
    yield """    "${start[@]}" --output="$1" "${python[@]}" -m "$2" "${arguments[@]}" &"""
    yield "    step=$!"
    yield """    while wait "$step"; status=$?; [ "$signalled" ]; do signalled=; done  # a signal ends the waiting, not the step"""
    yield "    step="
    yield "}"
    yield ""
    if batch.cluster.preflight.enabled:
        yield "# A node that is slow or broken is found before the run is."
        yield f"""run_step "$logs/{PREFLIGHT_LOG}" launch.preflight"""
        yield f"""if [ "$status" != 0 ] && [ ! "$heard" ]; then tail -n 3 "$run/{LOGS}/{PREFLIGHT_LOG}"; exit "$status"; fi"""
        yield ""
    yield f"failures=0 status={STOPPED}"
    yield """while [ ! "$heard" ]; do"""
    yield "    began=$SECONDS"
    yield f"""    run_step "$logs/{RANK_LOG}" train"""
    yield """    case $status in"""
    yield f"""        0 | {REFUSED}){_cancel_chain(batch)} exit "$status" ;;  # finished; or the recipe is wrong, as the log of rank 0 says"""
    yield f"""        {STOPPED}) break ;;  # asked to stop, with a checkpoint"""
    yield "    esac"
    yield f"""    [ $((SECONDS - began)) -gt {FRESH_SECONDS} ] && failures=0"""
    yield "    failures=$((failures + 1))"
    yield """    echo "$(date -Is) the run ended with status $status (failure $failures): see the logs of the ranks in $run/logs" """.rstrip()
    yield f"""    [ "$failures" -gt {slurm.retries} ] && exit "$status\""""
    yield "    sleep 5"
    yield "done"
    yield ""
    yield from _go_on(slurm)


def _cancel_chain(batch: Batch) -> str:
    chained = batch.cluster.slurm.chain > 1 and not batch.sweep
    return """ scancel --state=PENDING "$SLURM_ARRAY_JOB_ID";""" if chained else ""


def _go_on(slurm: SlurmConfig) -> Iterator[str]:
    if slurm.requeue:
        yield "# There is more to do. A job that was cancelled is not RUNNING any more, and stays cancelled."
        yield """if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then scontrol requeue "$SLURM_JOB_ID"; fi"""
    else:
        yield "# There is more to do, for the next job of the chain or for this script submitted again."
    yield f"exit {STOPPED}"


def _container_options(batch: Batch) -> list[str]:
    """Of srun, by its plugin pyxis."""
    slurm = batch.cluster.slurm
    if slurm.container != "pyxis":
        return []
    assert slurm.image is not None
    mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(batch))
    options = (f"--container-image={slurm.image}", f"--container-mounts={mounts}", f"--container-workdir={batch.submitted_from}")
    return [shlex.quote(option) for option in options]


def _container_command(batch: Batch) -> list[str]:
    """What stands before python."""
    slurm = batch.cluster.slurm
    if slurm.container != "apptainer":
        return []
    assert slurm.image is not None
    devices = ["--nv"] if batch.cluster.device is not None else []
    binds = [part for mount in _mounts(batch) for part in ("--bind", mount)]
    return [shlex.quote(part) for part in ("apptainer", "exec", *devices, *binds, "--pwd", str(batch.submitted_from), slurm.image)]


def _mounts(batch: Batch) -> list[str]:
    """The directory of submission and those of the runs, unless they lie within it, before those of the profile."""
    outside = (run.directory for run in batch.runs if not run.directory.is_relative_to(batch.submitted_from))
    return list(dict.fromkeys([str(batch.submitted_from), *map(str, outside), *batch.cluster.slurm.mounts]))
