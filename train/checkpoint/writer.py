"""Writing a checkpoint so that at any moment the newest complete one on the disk stays readable.

    step-00000100.partial/  every rank streams its boxes into safetensors files; then the manifest; all synced to disk
    step-00000100/          by one rename, which is what makes the checkpoint exist
    older steps             deleted only now

Ranks communicate descriptions, never tensors, and only in `begin` and `commit`. What lies between, `Draft.write`, is each rank's own: it may
run in a thread, on copies of the tensors, while training goes on.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.manifest import DTYPE_NAMES, CheckpointError, Manifest, StoredFile, sync_directory
from train.checkpoint.parts import Part
from train.checkpoint.plan import Plan, describe
from train.checkpoint.ranks import exchange, rank_and_size, together
from train.checkpoint.reader import Checkpoint, finished, size_problem, step_directory, step_of
from train.checkpoint.retention import Listed, Retention, superfluous

GIBIBYTE = 1 << 30
LEFTOVER = ".partial"
"""ends the name of a directory that is being written or deleted, and that nobody will finish once its writer is gone"""
CHUNK = 32 << 20
"""bytes copied to the host, hashed and written at a time"""

Files = dict[str, StoredFile]


class Abandoned(Exception):
    """Nobody waits for this checkpoint any more."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written: `begin` makes it, each rank calls `write`, then all call `commit`, or each `discard`.

    tensors: what this rank writes, views of the memory it lies in, in the order of the plan's entries; state: captured, JSON values.
    """

    directory: Path
    step: int
    tokens: int
    state: Mapping[str, Any]
    plan: Plan
    rank: int
    tensors: list[Tensor]
    _abandoned: threading.Event = field(default_factory=threading.Event)

    @property
    def final(self) -> Path:
        return step_directory(self.directory, self.step)

    @property
    def partial(self) -> Path:
        return self.final.with_name(self.final.name + LEFTOVER)

    @property
    def doing(self) -> str:
        return f"cannot write checkpoint {self.final}"

    def write(self, tensors: Sequence[Tensor] | None = None) -> Files:
        """Writes and syncs this rank's files; communicates with nobody. tensors: copies to write instead of the original ones."""
        remaining = iter(self.tensors if tensors is None else tensors)
        if self.rank == 0:
            _ = self.plan.tensors  # checked, so that `commit` need not do it while training waits
        return {
            name: write_safetensors(self.partial / name, [(entry.key, next(remaining)) for entry in entries], self._go_on)
            for name, entries in self.plan.files[self.rank].items()
        }

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned

    def commit(self, write: Callable[[], Files]) -> None:
        """Collective: once every rank's `write` (or what waits for it) has returned, the manifest is written and the checkpoint exists.

        Raises CheckpointError, on every rank, when any rank could not write; older checkpoints are then as they were.
        """
        try:
            written = together(write, self.doing)
            together(lambda: self._finish(written) if self.rank == 0 else None, self.doing)
        except BaseException:
            self.discard()
            raise

    def _finish(self, written: Sequence[Files]) -> None:
        files = {name: file for mine in written for name, file in mine.items()}
        Manifest(self.step, self.tokens, self.state, files, self.plan.tensors).write(self.partial)
        _replace(self.partial, self.final)

    def abandon(self) -> None:
        """Lets a `write` that runs in a thread end soon."""
        self._abandoned.set()

    def discard(self) -> None:
        """Removes what was written; not collective, and never fails: the next start clears away what it leaves."""
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)


def begin(
    directory: Path | str,
    step: int,
    parts: Iterable[Part],
    state: Mapping[str, Any],
    *,
    tokens: int = 0,
    shard_bytes: int = GIBIBYTE,
    before: Plan | None = None,
) -> Draft:
    """The first half of `save`, which see. before: the plan of an earlier save, used again where nothing has changed."""
    directory = Path(directory)
    rank, _ = rank_and_size()
    held = [part for part in parts if part.box.elements]
    partial = step_directory(directory, step).with_name(step_directory(directory, step).name + LEFTOVER)
    captured: list[Mapping[str, Any]] = []

    def prepare() -> bool:
        captured.append(_captured(state))
        if rank == 0:
            if not directory.is_dir():
                directory.mkdir(parents=True)
                sync_directory(directory.parent)
            _remove_leftovers(directory)
            partial.mkdir()
        descriptions.extend(describe(part) for part in held)
        return before is not None and before.shard_bytes == shard_bytes and list(before.descriptions[rank]) == descriptions

    descriptions: list[Any] = []
    try:
        same = all(together(prepare, f"cannot write checkpoint {step_directory(directory, step)}"))
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    plan = before if before is not None and same else Plan(exchange(descriptions), shard_bytes)
    entries = (entry for file in plan.files[rank].values() for entry in file)
    tensors = [held[entry.index].tensor[entry.box.within(held[entry.index].box).slices] for entry in entries]
    return Draft(directory, step, tokens, captured[0], plan, rank, tensors)


def save(
    directory: Path | str,
    step: int,
    parts: Iterable[Part],
    state: Mapping[str, Any],
    *,
    tokens: int = 0,
    retention: Retention | None = None,
    shard_bytes: int = GIBIBYTE,
) -> Path:
    """Writes the checkpoint of `step` under `directory` and returns its path; every rank of the default process
    group calls this.

    parts: what this rank holds; together the ranks' parts must cover every tensor. Replicas are written once.
    state: JSON values only (string keys); rank 0's is stored.
    tokens: trained on so far, stored beside the step.
    retention: which older checkpoints remain; None: all.
    shard_bytes: size limit of a file; a larger tensor is cut along its first dimension.
    Raises CheckpointError, on every rank, when any rank cannot write; older checkpoints are then as they were.
    """
    draft = begin(directory, step, parts, state, tokens=tokens, shard_bytes=shard_bytes)
    draft.commit(draft.write)
    together(
        lambda: delete_older(draft.directory, step, retention) if draft.rank == 0 and retention else None,
        f"cannot delete checkpoints older than {draft.final}",
    )
    return draft.final


def write_safetensors(path: Path, entries: Sequence[tuple[str, Tensor]], go_on: Callable[[], None] = lambda: None) -> StoredFile:
    """A safetensors file, streamed in chunks (the library's own writer wants every tensor contiguous and in host
    memory at once).

    The format: length of the header (8 bytes, little endian), header (JSON, padded with spaces to a multiple of 8
    bytes), then the tensors row-major, without gaps, in the order of their offsets. Synced to the disk on return.
    go_on: is called before each chunk, and may raise.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, tensor in entries:
        size = tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:
        for block in _blocks(text, entries):
            go_on()
            digest.update(block)
            view = memoryview(block)
            while len(view):
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return StoredFile(8 + len(text) + position, digest.hexdigest())


def _blocks(header: bytes, entries: Iterable[tuple[str, Tensor]]) -> Iterable[Any]:
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in entries:
        flat = tensor.detach()
        flat = flat.reshape(1) if flat.dim() == 0 else flat
        row_bytes = flat[0].numel() * flat.element_size()
        for rows in flat.split(max(1, CHUNK // row_bytes)):
            yield rows.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _replace(partial: Path, final: Path) -> None:
    """Gives the finished directory its name. A checkpoint of the same step makes room as `.old`, which readers
    accept, and goes last.
    """
    old = final.with_name(final.name + ".old")
    if final.exists() and size_problem(final):
        _discard(final)
    elif final.exists():
        if old.exists():
            _discard(old)
        final.rename(old)
    partial.rename(final)
    sync_directory(final.parent)
    if old.exists():
        _discard(old)


def delete_older(directory: Path, step: int, retention: Retention) -> None:
    """Deletes what is not to stay of the checkpoints up to and including `step`; one process at a time does it."""
    listed: list[tuple[Listed, Path]] = []
    for path in directory.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)(\.old)?", path.name):
            try:
                entry = Listed(int(match[1]), True, Checkpoint(path).milestone)
            except CheckpointError:
                entry = Listed(int(match[1]), complete=False)
            listed.append((entry, path))
    doomed = superfluous([entry for entry, _ in listed], retention, step)
    for entry, path in listed:
        if entry.step in doomed:
            _discard(path)


def delete_later(directory: Path, step: int) -> None:
    """Deletes the checkpoints of steps after `step`, the newest first; one process does it, while no save is under way."""
    for name in finished(directory):
        if step_of(name) > step:
            _discard(directory / name)


def _discard(path: Path) -> None:
    """Deletes a checkpoint. Renamed first: a deletion cut short leaves nothing that looks like one, and the next writer clears it away."""
    doomed = path.with_name(path.name + LEFTOVER)
    if doomed.exists():
        # A partial of the same step is about to get its name.
        doomed = path.with_name(path.name + ".damaged" + LEFTOVER)
        shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_leftovers(directory: Path | str) -> None:
    """Removes what a writer that was killed left behind; every rank of the default process group calls this, and no writer is at work."""
    action = (lambda: _remove_leftovers(Path(directory))) if rank_and_size()[0] == 0 else (lambda: None)
    together(action, f"cannot clear unfinished checkpoints out of {directory}")


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"step-*{LEFTOVER}"):
        shutil.rmtree(leftover)


def _captured(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy that nobody changes any more."""
    _check_json(state, "state")
    copy: Mapping[str, Any] = json.loads(json.dumps(state))
    return copy


def _check_json(value: Any, where: str) -> None:
    """Refuses what JSON would change silently (integer keys become strings) or cannot hold."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, and only string keys survive in JSON")
            _check_json(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _check_json(inner, f"{where}[{i}]")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
