"""What lies in a run's `checkpoints`: listed, verified, pruned. Nothing outside that directory is ever touched."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.manifest import CheckpointError, StorageError
from train.checkpoint.reader import Checkpoint, finished
from train.checkpoint.remote import Location, Stat, locate
from train.checkpoint.retention import Listed, Retention, superfluous
from train.checkpoint.storage import LEFTOVER, open_storage

NAME = re.compile(r"step-(\d+)(\.old)?")


@dataclass(frozen=True)
class Entry:
    """A directory whose name is a checkpoint's. tokens: None where its manifest cannot be read; seconds_old: since it was finished; size: of its
    files, in bytes; problem: why it is not valid, None where it is; unread: it may well be, but the disk or the store failed."""

    name: str
    step: int
    tokens: int | None
    seconds_old: float
    size: int
    milestone: str | None
    problem: str | None
    unread: bool = False


def take(directory: Location, *, verify: bool = False) -> list[Entry]:
    """Every checkpoint in `directory`, the newest first. verify: compare checksums, which reads every file; sizes are compared always."""
    return [_entry(directory / name, verify) for name in finished(directory)]


def unfinished(directory: Location) -> list[str]:
    """Names of what is being written, or was left by a writer that was cut off."""
    return sorted(path.name for path in directory.glob(f"step-*{LEFTOVER}"))


def _entry(path: Location, verify: bool) -> Entry:
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    step = int(match[1])
    if isinstance(path, Path) and path.is_symlink():
        return Entry(path.name, step, None, 0.0, 0, None, f"a link to {path.readlink()}, left alone")
    files = _files(path)
    seconds_old = max(0.0, time.time() - max((file.st_mtime for file in files), default=time.time()))
    size = sum(file.st_size for file in files)
    try:
        checkpoint = Checkpoint(path)
        problem = None
        if verify:
            checkpoint.verify()
    except CheckpointError as error:
        problem = str(error)
        try:
            milestone = Checkpoint(path).milestone
        except CheckpointError:
            milestone = None
        return Entry(path.name, step, None, seconds_old, size, milestone, problem, isinstance(error, StorageError))
    return Entry(path.name, step, checkpoint.tokens, seconds_old, size, checkpoint.milestone, problem)


def _files(path: Location) -> Sequence[Stat | os.stat_result]:
    if isinstance(path, Path):
        return [file.lstat() for file in path.iterdir()] if path.is_dir() else []
    return list(path.objects().values())


@dataclass(frozen=True)
class Pruning:
    """doomed: names of what goes, the oldest first; spared: the newest valid checkpoint, where it would have gone by its age alone."""

    doomed: tuple[str, ...]
    spared: str | None
    size: int
    """bytes that become free"""


def plan_pruning(directory: Location, retention: Retention) -> Pruning:
    """What `retention` lets go, by the rule of a run's own deletions. Links stay, and so does the newest one whose checksums are right."""
    entries = [entry for entry in take(directory) if not (directory / entry.name).is_symlink()]
    if unread := next((entry for entry in entries if entry.unread), None):
        raise StorageError(f"{directory / unread.name} cannot be judged, and nothing was deleted: {unread.problem}")
    steps = superfluous([Listed(entry.step, entry.problem is None, entry.milestone) for entry in entries], retention)
    doomed = [entry for entry in reversed(entries) if entry.step in steps]
    newest = _newest_valid(directory, entries) if doomed else None
    spared = newest if any(entry.name == newest for entry in doomed) else None
    doomed = [entry for entry in doomed if entry.name != spared]
    return Pruning(tuple(entry.name for entry in doomed), spared, sum(entry.size for entry in doomed))


def _newest_valid(directory: Location, entries: Sequence[Entry]) -> str | None:
    for entry in entries:
        if entry.problem is None and _entry(directory / entry.name, verify=True).problem is None:
            return entry.name
    return None


def prune(directory: Location, pruning: Pruning) -> None:
    """Deletes what was planned."""
    storage = open_storage(directory)
    for name in pruning.doomed:
        storage.delete(name)


def checkpoints_of(run: str) -> Location:
    """Where the checkpoints of a run lie; the directory that holds them may be given as well.

    Raises ValueError, in one sentence, where there is none, or where a link would lead out of the run's directory.
    """
    path = locate(run)
    inner = path / "checkpoints"
    if inner.is_dir():
        if isinstance(inner, Path) and isinstance(path, Path) and not inner.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{inner} leads to {inner.resolve()}, outside the run's directory: name that directory if it is meant")
        return inner
    if path.is_dir() and any(NAME.fullmatch(child.name) for child in path.iterdir()):
        return path
    raise ValueError(f"{run} holds no checkpoints: name the directory of a run that saved one")
