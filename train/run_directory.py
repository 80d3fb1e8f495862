"""What lies in a run's directory beside its checkpoints and metrics, and who may write there.

recipe.yaml              the recipe as it is now, without secrets
recipe.before-00000240.yaml  the one before, when a start after step 240 changed it
history.jsonl            one line for every start that changed something: when, after which step, {key: [old, new]}; and one whenever the samples
                         change that the run never reads: when, after which step, all of them as [first, behind the last]
tokenizer/               what reads this run's tokens
branch.json              of a branch: where it comes from, see `train.lineage`
finished.json            the summary of a run that has taken its last step
lock                     whose the directory is while a run writes there, see `train.lock`
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import yaml

from data.tokenizer import Tokenizer
from train.checkpoint.background import Task
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import Checkpoint, finished, open_checkpoint
from train.checkpoint.remote import Location, RemotePath, locate
from train.lock import RunLock
from train.observe.metrics import FILE_NAME, decode_lines
from train.observe.redact import redacted, without_secrets
from train.recipe.guard import read_yaml
from train.recipe.reading import RecipeError, plain
from train.recipe.resume import changed_keys, continued
from train.recipe.tree import Recipe
from train.step import BatchPlan

T = TypeVar("T")

HISTORY = "history.jsonl"
SKIPPED = "skipped_samples"
STORE_SECONDS = 30  # in which a store must take and give back a few bytes before a run starts


def run_dir_of(checkpoint: Checkpoint) -> Location:
    """The run a checkpoint belongs to: <run>/checkpoints/step-N."""
    return checkpoint.path.parent.parent


def stored_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """recipe.yaml of the run a checkpoint belongs to. Raises ValueError when it is not there."""
    path = run_dir_of(checkpoint) / "recipe.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist, so the model of {checkpoint.path} is unknown: keep checkpoints inside their run directory"
        )
    return read_yaml(path.read_bytes(), str(path))


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl, oldest first; one torn by a kill is left out."""
    entries: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        for line in (run_dir / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def copy_description(checkpoint: Checkpoint, to: Path) -> None:
    """Recipe and tokenizer of the run a checkpoint belongs to, for a checkpoint in `to` that is made from it."""
    (to / "tokenizer").mkdir(parents=True, exist_ok=True)
    _write(to / "recipe.yaml", yaml.safe_dump(stored_recipe(checkpoint), sort_keys=False))
    source = run_dir_of(checkpoint) / "tokenizer"
    for name in [file.name for file in source.glob("*")]:
        (to / "tokenizer" / name).write_bytes((source / name).read_bytes())


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run that is about to start, or to go on.

    recipe: as it is from now on (see `train.recipe.phases`). changes: {key: (old value, new value)} of what this start changes of the recipe.
    done: steps of its newest complete checkpoint, as far as file sizes tell. finished: the summary, when there is nothing left to do.
    """

    path: Path
    recipe: Recipe
    changes: Mapping[str, tuple[Any, Any]]
    done: int
    finished: Mapping[str, Any] | None

    def store_recipe(self, recipe: Recipe, step: int) -> None:
        """Writes recipe.yaml; a changed one takes the place of the old one, which is kept, and history.jsonl says what changed."""
        target = self.path / "recipe.yaml"
        if target.exists() and not self.changes:
            return
        if target.exists():
            kept = self.path / f"recipe.before-{step:08d}.yaml"
            if not kept.exists():
                _write(kept, target.read_text())
            self._append(step, "changes", self.changes)
            (self.path / "finished.json").unlink(missing_ok=True)
        _write(target, yaml.safe_dump(without_secrets(plain(recipe)), sort_keys=False))

    def store_skipped(self, skipped: Sequence[tuple[int, int]], step: int) -> None:
        """Says in history.jsonl which samples the run never reads, as (first, behind the last), where it does not say so yet."""
        ranges = [list(pair) for pair in skipped]
        said: list[list[int]] = next((entry[SKIPPED] for entry in reversed(read_history(self.path)) if SKIPPED in entry), [])
        if ranges != said:
            self._append(step, SKIPPED, ranges)

    def _append(self, step: int, key: str, value: Any) -> None:
        line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "step": step, key: value}
        with (self.path / HISTORY).open("a+b") as history:
            end = history.seek(0, os.SEEK_END)
            history.seek(max(0, end - 1))
            torn = history.read(1) not in (b"", b"\n")  # by a kill
            history.write(b"\n" * torn + json.dumps(without_secrets(line), default=str).encode() + b"\n")

    def store_tokenizer(self, tokenizer: Tokenizer) -> None:
        """What an export or a later evaluation needs to read this run's tokens."""
        directory = self.path / "tokenizer"
        if not (directory / "facts.json").exists() or not self.done:  # until then the data may be changed, on which a bpe is trained
            directory.mkdir(parents=True, exist_ok=True)
            tokenizer.save(directory)
            facts = {"end_of_document": tokenizer.end_of_document, "vocab_size": tokenizer.vocab_size}
            _write(directory / "facts.json", json.dumps(facts, indent=2) + "\n")

    def describe_in(self, storage: str | None) -> None:
        """What makes checkpoints elsewhere of use by themselves: recipe and tokenizer beside them. Raises RecipeError where they cannot be
        written."""
        home = self.path if storage is None else locate(storage)
        if home == self.path:
            return
        try:
            if isinstance(home, Path):
                (home / "tokenizer").mkdir(parents=True, exist_ok=True)
            for source in (self.path / "recipe.yaml", *(self.path / "tokenizer").glob("*")):
                (home / str(source.relative_to(self.path))).write_bytes(source.read_bytes())
        except OSError as error:
            raise RecipeError(
                f"checkpoint.storage={storage} cannot be written ({redacted(str(error))}): start the same command again"
            ) from None

    def finish(self, summary: Mapping[str, Any]) -> None:
        _write(self.path / "finished.json", json.dumps(dict(summary), indent=2) + "\n")


@contextmanager
def opened(recipe: Recipe, rank: int) -> Iterator[RunDirectory]:
    """Owns the run's directory while entered; collective. Raises RecipeError, on every rank, where it cannot be this run's."""
    path = Path(recipe.run_dir)
    lock = RunLock(path)

    def look() -> RunDirectory:
        _check_place(path)
        lock.acquire()
        home = _home(recipe)
        stored, (done, skipped) = _stored(path) or _stored(home), _steps_done(home)
        samples = BatchPlan(recipe.train.global_batch_size, 1, 0, 1).skipping(skipped).read(done)
        _refuse_moved(recipe, stored, path, done)
        changes = {} if stored is None else changed_keys(stored, recipe, done, samples)
        current = recipe if stored is None else continued(stored, recipe, done, samples)
        finished = _finished(recipe, path)
        if finished is None:
            _check_metrics(path)
        return RunDirectory(path, current, changes, done, finished)

    try:
        yield _on_first_rank(look, rank, path)
    finally:
        lock.release()


def _on_first_rank(action: Callable[[], T], rank: int, path: Path) -> T:
    """What rank 0 found, on every rank; its RecipeError, too."""
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = f"run.dir={path} cannot be used ({error}): choose another run.dir"
        except ValueError as error:
            outcome[1] = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RecipeError(outcome[1])
    return outcome[0]


def _home(recipe: Recipe) -> Location:
    """Where checkpoints lie, below `checkpoints`. Raises ValueError, in one sentence, where that is a store which cannot be used now."""
    storage = recipe.checkpoint.storage
    if storage is None:
        return Path(recipe.run_dir)
    home = locate(storage)
    if not isinstance(home, Path):
        check = Task(partial(_try, home), "store")
        why = f"no answer within {STORE_SECONDS} seconds"
        try:
            if check.wait(STORE_SECONDS):
                check.result()
                return home
        except OSError as error:
            why = str(error)
        raise RecipeError(
            f"checkpoint.storage={storage} cannot be used ({redacted(why)}): see that it exists, can be reached and may be written with the "
            "credentials of this environment"
        )
    return home


def _try(home: RemotePath) -> None:
    """What a run will want of a store, beforehand."""
    mark = home / f".written-{secrets.token_hex(4)}"
    mark.write_bytes(b"written to see whether it can be\n")
    mark.unlink()


def _refuse_moved(recipe: Recipe, stored: Mapping[str, Any] | None, path: Path, done: int) -> None:
    """A run whose checkpoints are elsewhere would begin anew."""
    before = (stored or {}).get("checkpoint", {}).get("storage")
    if done or stored is None or before == recipe.checkpoint.storage:
        return
    old = locate(before if before is not None else path) / "checkpoints"
    if finished(old):
        now = recipe.checkpoint.storage or path
        raise RecipeError(
            f"checkpoint.storage={recipe.checkpoint.storage} holds no checkpoint, but {old} does: copy it to {now}/checkpoints to go on from "
            "there, or leave checkpoint.storage as it was"
        )


def _stored(path: Location) -> dict[str, Any] | None:
    stored = path / "recipe.yaml"
    if not stored.exists():
        return None
    return read_yaml(stored.read_bytes(), str(stored))


def _steps_done(home: Location) -> tuple[int, list[list[int]]]:
    """Of the newest checkpoint, and the samples passed over until then; see `train.incidents`."""
    directory = home / "checkpoints"
    for name in finished(directory):
        with suppress(CheckpointError):
            checkpoint = Checkpoint(directory / name)
            return checkpoint.step, checkpoint.state.get("incidents", {}).get(SKIPPED, [])
    return 0, []


def _finished(recipe: Recipe, path: Path) -> dict[str, Any] | None:
    """The summary of a run that is already done."""
    marker = path / "finished.json"
    if not marker.exists():
        return None
    try:
        summary = json.loads(marker.read_text())
        return summary if summary["step"] == recipe.total_steps else None
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{marker} is damaged: remove it to go on from the last checkpoint, or choose another run.dir") from None


def _check_place(path: Path) -> None:
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "is no directory" if not nearest.is_dir() else "may not be written"
        raise RecipeError(f"run.dir={path} cannot be used, because {nearest} {why}: choose another run.dir")


def _check_metrics(path: Path) -> None:
    metrics = path / FILE_NAME
    if metrics.exists():
        try:
            decode_lines(metrics.read_bytes())
        except ValueError as error:
            raise RecipeError(f"{metrics} is damaged ({error}): restore or remove it before resuming") from None


def check_source(recipe: Recipe) -> None:
    """Raises CheckpointError, on every rank, when the checkpoint to start from is not there."""
    if recipe.checkpoint.initialize_from is not None:
        open_checkpoint(recipe.checkpoint.initialize_from)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
