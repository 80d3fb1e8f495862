"""Where a run stands: its job, step, speed, last checkpoint and last alert.

    python -m launch.status runs/x            # or several: runs/x runs/y

Reads the run directory only, and asks Slurm where a job was submitted, so it can be asked at any time from any machine that sees the directory.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.jobs import SlurmError, current, states, submitted
from train.checkpoint.manifest import MANIFEST
from train.duration import Duration
from train.observe.incidents import FILE_NAME as INCIDENTS
from train.observe.lines import duration
from train.observe.metrics import FILE_NAME as METRICS
from train.observe.metrics import decode_lines
from train.refusal import refuse

TAIL = 1 << 16  # bytes of the end of a file that hold its last lines


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for what is no run."""
    if not arguments or any("=" in argument or argument.startswith("-") for argument in arguments):
        return refuse("name the directory of a run: python -m launch.status runs/x")
    for number, argument in enumerate(arguments):
        directory = Path(argument)
        if not directory.is_dir():
            return refuse(f"{directory} is no directory: name that of a run")
        if number:
            print()
        print(directory)
        try:
            for name, text in status(directory, time.time()):
                print(f"  {name:<12}{text}")
        except ValueError as error:
            return refuse(str(error))
    return 0


def status(directory: Path, now: float) -> Iterator[tuple[str, str]]:
    """What is known of a run, as (name, text). now: seconds since 1970."""
    yield "job", _job(directory)
    total = _total_steps(directory)
    last = next(iter(_last_lines(directory / METRICS)), None)
    finished = _json(directory / "finished.json")
    if finished:
        yield "finished", f"step {finished.get('step')}, validation loss {_number(finished.get('eval/loss'))}"
    if last is None:
        yield "step", "none is logged yet"
    else:
        age = now - (directory / METRICS).stat().st_mtime
        of = f" of {total:,}" if total else ""
        yield "step", f"{last['step']:,}{of}, logged {duration(max(age, 0.0))} ago"
        yield "loss", _number(last.get("loss/lm"))
        yield "speed", _speed(last, total)
    yield "checkpoint", _checkpoint(directory, now)
    alert = next(iter(_last_lines(directory / INCIDENTS)), None)
    yield "last alert", "none" if alert is None else f"step {alert['step']} ({alert['kind']}, {alert['time']}): {alert['text']}"
    if last is not None and "goodput/percent" in last:
        yield "goodput", f"{last['goodput/percent']:.1f}%"


def _job(directory: Path) -> str:
    entries = submitted(directory)
    if not entries:
        holder = _json(directory / "lock")
        return f"process {holder['process']} on host {holder['host']}" if {"process", "host"} <= holder.keys() else "none"
    job = entries[-1].job
    try:
        found = states(job)
    except SlurmError as error:
        return f"{job}, of which nothing is known: {error}"
    state = current(found)
    if state is None:
        return f"{job} is over: Slurm has forgotten it"
    said = state.fields
    parts = [f"{state.job} {state.name}"]
    if said.get("Reason", "None") != "None" and not (state.is_over and state.name == "COMPLETED"):
        parts.append(f"({said['Reason']})")
    if state.name == "RUNNING":
        parts.append(f"for {said.get('RunTime')} of {said.get('TimeLimit')} on {said.get('NodeList')}")
    if said.get("Restarts", "0") != "0":
        parts.append(f"after {said['Restarts']} restart{'s' * (said['Restarts'] != '1')}")
    return " ".join(parts)


def _speed(last: Mapping[str, Any], total: int | None) -> str:
    if "step_seconds" not in last:
        return "unknown"
    text = f"{last['step_seconds']:.3g} s a step, {last.get('tokens_per_second', 0):,.0f} tokens/s"
    left = 0 if total is None else (total - last["step"]) * last["step_seconds"]
    return f"{text}, {duration(left)} left" if left > 0 else text


def _checkpoint(directory: Path, now: float) -> str:
    """The newest that is complete."""
    complete = [
        path for path in (directory / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name) and (path / MANIFEST).exists()
    ]
    if not complete:
        return "none"
    newest = max(complete)
    return f"{newest.name}, {duration(max(now - (newest / MANIFEST).stat().st_mtime, 0.0))} old"


def _total_steps(directory: Path) -> int | None:
    path = directory / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        train = yaml.safe_load(path.read_text())["train"]
        if train.get("steps") is not None:
            return int(train["steps"])
        return Duration.read(train["tokens"]).steps(train["global_batch_size"] * train["sequence_length"], 0)
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: restore it") from None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last objects of a file of them, the newest first; [] where there is none."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        text = file.read()
    if size > TAIL:
        text = text[text.index(b"\n") + 1 :]
    try:
        return decode_lines(text)[::-1]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
