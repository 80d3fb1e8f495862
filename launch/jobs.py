"""The jobs of a run: what was submitted (<run>/jobs.jsonl, one line a submission), and what Slurm says of it."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE_NAME = "jobs.jsonl"
PATIENCE = 60.0  # seconds Slurm has to answer
OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")


class SlurmError(ValueError):
    """Slurm cannot be asked, or says no; the message is a sentence."""


@dataclass(frozen=True)
class Submitted:
    """A line of jobs.jsonl. job: Slurm's id; `12_3` is job 3 of an array, and `12` stands for all jobs of a chain."""

    job: str
    time: str
    script: str
    arguments: Sequence[str]


@dataclass(frozen=True)
class State:
    """What Slurm says of a job. name: RUNNING, PENDING, COMPLETED ...; fields: all it says, as `scontrol show job` names it."""

    job: str
    name: str
    fields: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        return self.name in OVER


def ask(*line: str) -> str:
    """What a command of Slurm prints. Raises SlurmError, in one sentence."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except FileNotFoundError:
        raise SlurmError(f"{line[0]} is not on the PATH: use a machine from which jobs are submitted") from None
    except OSError as error:
        raise SlurmError(f"{line[0]} cannot be run ({error}): use a machine from which jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{line[0]} gave no answer within {PATIENCE:.0f} s: look with sinfo whether Slurm is up") from None
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.strip()] or [f"status {done.returncode}"]
        raise SlurmError(f"{line[0]} says: {said[-1].removeprefix(line[0] + ': ').removeprefix('error: ').strip()}")
    return done.stdout


def submit(script: Path, *options: str) -> str:
    """The id of the job. Raises SlurmError with what sbatch says."""
    try:
        said = ask("sbatch", "--parsable", *options, str(script)).strip().splitlines()
    except SlurmError as error:
        raise SlurmError(f"{script} was written, but not submitted: {error}") from None
    identity = said[-1].split(";")[0] if said else ""
    if not identity.isdigit():
        raise SlurmError(f"sbatch gave no job id for {script}, but {' '.join(said)!r}: look with squeue whether it was submitted")
    return identity


def note(directory: Path, job: str, script: Path, arguments: Sequence[str]) -> None:
    """Appends a submission to the run's jobs.jsonl."""
    entry = Submitted(job, datetime.now(UTC).isoformat(timespec="seconds"), str(script), list(arguments))
    with (directory / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def submitted(directory: Path) -> list[Submitted]:
    """Oldest first. Raises ValueError, in one sentence, for a file that is damaged."""
    path = directory / FILE_NAME
    if not path.is_file():
        return []
    try:
        return [Submitted(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: remove it, and find the run's jobs with squeue") from None


def states(job: str) -> list[State]:
    """Of a job, or of all jobs of a chain; [] when Slurm has forgotten it, some minutes after its end. Raises SlurmError."""
    try:
        shown = ask("scontrol", "show", "job", "-o", job)
    except SlurmError as error:
        if "invalid job id" in str(error).lower():
            return []
        raise
    return [_state(line) for line in shown.splitlines() if line.startswith("JobId=")]


def current(found: Sequence[State]) -> State | None:
    """Of the jobs of a chain the one a person means: that which runs, or waits, or ended last."""
    living = [state for state in found if not state.is_over]
    running = [state for state in living if state.name not in ("PENDING", "REQUEUED")]
    return next(iter(running or living or sorted(found, key=lambda state: state.fields.get("EndTime", ""), reverse=True)), None)


def _state(line: str) -> State:
    fields = dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))
    job = fields.get("JobId", "")
    if "ArrayJobId" in fields:
        job = f"{fields['ArrayJobId']}_{fields.get('ArrayTaskId', '')}"
    return State(job, fields.get("JobState", "UNKNOWN"), fields)
