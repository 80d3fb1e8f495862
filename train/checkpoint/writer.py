"""Writing a checkpoint so that at any moment the newest complete one stays readable.

    files         every rank streams its boxes into safetensors files
    the manifest  written last, is what makes the checkpoint exist (`storage` says how, on a disk and in an object store)
    older steps   deleted only now

Ranks communicate descriptions, never tensors, and only in `begin` and `commit`. What lies between, `Draft.write`, is each rank's own: it may
run in a thread, on copies of the tensors, while training goes on.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.manifest import DTYPE_NAMES, CheckpointError, Manifest, StorageError, StoredFile, StoredTensor
from train.checkpoint.parts import Part
from train.checkpoint.plan import Plan, describe
from train.checkpoint.ranks import exchange, rank_and_size, together
from train.checkpoint.reader import Checkpoint, finished, step_name, step_of
from train.checkpoint.remote import Location, locate
from train.checkpoint.retention import Listed, Retention, superfluous
from train.checkpoint.storage import Output, Storage, open_storage

GIBIBYTE = 1 << 30
CHUNK = 32 << 20
"""bytes copied to the host, hashed and written at a time"""

Files = dict[str, StoredFile]


class Abandoned(Exception):
    """Nobody waits for this checkpoint any more."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written: `begin` makes it, each rank calls `write`, then all call `commit`, or each `discard`.

    tensors: what this rank writes, views of the memory it lies in, in the order of the plan's entries; state: captured, JSON values;
    attempt: what the storage adds to the names of this attempt's files, the same on every rank.
    """

    directory: Location
    storage: Storage
    step: int
    tokens: int
    state: Mapping[str, Any]
    plan: Plan
    rank: int
    tensors: list[Tensor]
    attempt: str
    _abandoned: threading.Event = field(default_factory=threading.Event)

    @property
    def final(self) -> Location:
        return self.directory / step_name(self.step)

    @property
    def doing(self) -> str:
        return f"cannot write checkpoint {self.final}"

    def write(self, tensors: Iterable[Tensor] | None = None) -> Files:
        """Writes and syncs this rank's files; communicates with nobody. tensors: copies to write instead of the original ones; one file's are
        asked for at a time."""
        remaining = iter(self.tensors if tensors is None else tensors)
        if self.rank == 0:
            _ = self.plan.tensors  # checked, so that `commit` need not do it while training waits
        files = {}
        for name, entries in self.plan.files[self.rank].items():
            with self.storage.create(self.step, self._named(name)) as file:
                files[self._named(name)] = write_safetensors(file, [(entry.key, next(remaining)) for entry in entries], self._go_on)
        return files

    def _named(self, file: str) -> str:
        stem, ending = file.rsplit(".", 1)
        return f"{stem}.{self.attempt}.{ending}" if self.attempt else file

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned

    def commit(self, write: Callable[[], Files]) -> None:
        """Collective: once every rank's `write` (or what waits for it) has returned, the manifest is written and the checkpoint exists.

        Raises CheckpointError, on every rank, when any rank could not write; older checkpoints are then as they were.
        """
        written = self.gather(write)
        self.conclude(lambda: self.finish(written))

    def gather(self, write: Callable[[], Files]) -> list[Files]:
        """The first half of `commit`: what every rank has written."""
        try:
            return together(write, self.doing)
        except BaseException:
            self.discard()
            raise

    def finish(self, written: Sequence[Files]) -> None:
        """Makes the checkpoint exist; rank 0 does, and nobody communicates."""
        if self.rank == 0:
            files = {name: file for mine in written for name, file in mine.items()}
            manifest = Manifest(self.step, self.tokens, self.state, files, self._tensors())
            self.storage.commit(self.step, manifest.content())

    def _tensors(self) -> Mapping[str, StoredTensor]:
        if not self.attempt:
            return self.plan.tensors
        return {
            name: replace(tensor, parts=tuple(replace(part, file=self._named(part.file)) for part in tensor.parts))
            for name, tensor in self.plan.tensors.items()
        }

    def conclude(self, finish: Callable[[], None]) -> None:
        """The second half of `commit`: `finish`, or what waits for it, has returned on every rank."""
        try:
            together(finish, self.doing)
        except BaseException:
            self.discard()
            raise

    def abandon(self) -> None:
        """Lets a `write` that runs in a thread end soon."""
        self._abandoned.set()

    def discard(self) -> None:
        """Removes what was written; not collective, and never fails: the next start clears away what it leaves."""
        if self.rank == 0:
            self.storage.discard(self.step)


def begin(
    directory: Location | str,
    step: int,
    parts: Iterable[Part],
    state: Mapping[str, Any],
    *,
    tokens: int = 0,
    shard_bytes: int = GIBIBYTE,
    before: Plan | None = None,
) -> Draft:
    """The first half of `save`, which see. before: the plan of an earlier save, used again where nothing has changed."""
    directory = locate(directory)
    storage = open_storage(directory)
    rank, _ = rank_and_size()
    held = [part for part in parts if part.box.elements]
    doing = f"cannot write checkpoint {directory / step_name(step)}"
    captured: list[Mapping[str, Any]] = []

    def prepare() -> tuple[bool, str]:
        captured.append(_captured(state))
        attempt = storage.begin(step) if rank == 0 else ""
        descriptions.extend(describe(part) for part in held)
        return before is not None and before.shard_bytes == shard_bytes and list(before.descriptions[rank]) == descriptions, attempt

    descriptions: list[Any] = []
    try:
        prepared = together(prepare, doing)
    except BaseException:
        if rank == 0:
            storage.discard(step)
        raise
    same = all(unchanged for unchanged, _ in prepared)
    plan = before if before is not None and same else Plan(exchange(descriptions), shard_bytes)
    entries = (entry for file in plan.files[rank].values() for entry in file)
    tensors = [held[entry.index].tensor[entry.box.within(held[entry.index].box).slices] for entry in entries]
    return Draft(directory, storage, step, tokens, captured[0], plan, rank, tensors, prepared[0][1])


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
    return Path(directory) / step_name(step)


def write_safetensors(file: Output, entries: Sequence[tuple[str, Tensor]], go_on: Callable[[], None] = lambda: None) -> StoredFile:
    """A safetensors file, streamed in chunks (the library's own writer wants every tensor contiguous and in host
    memory at once).

    The format: length of the header (8 bytes, little endian), header (JSON, padded with spaces to a multiple of 8
    bytes), then the tensors row-major, without gaps, in the order of their offsets.
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
    for block in _blocks(text, entries):
        go_on()
        digest.update(block)
        view = memoryview(block)
        while len(view):
            view = view[file.write(view) or 0 :]
    return StoredFile(8 + len(text) + position, digest.hexdigest())


def _blocks(header: bytes, entries: Iterable[tuple[str, Tensor]]) -> Iterable[Any]:
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in entries:
        flat = tensor.detach()
        flat = flat.reshape(1) if flat.dim() == 0 else flat
        row_bytes = flat[0].numel() * flat.element_size()
        for rows in flat.split(max(1, CHUNK // row_bytes)):
            yield rows.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def delete_older(directory: Location | str, step: int, retention: Retention) -> None:
    """Deletes what is not to stay of the checkpoints up to and including `step`; one process at a time does it.

    Raises OSError or StorageError, and deletes nothing more, where the disk or the store fails."""
    directory = locate(directory)
    listed: list[tuple[Listed, str]] = []
    for path in directory.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)(\.old)?", path.name):
            try:
                entry = Listed(int(match[1]), True, Checkpoint(path).milestone)
            except StorageError:
                raise  # it may be whole, or a milestone
            except CheckpointError:
                entry = Listed(int(match[1]), complete=False)
            listed.append((entry, path.name))
    doomed = superfluous([entry for entry, _ in listed], retention, step)
    storage = open_storage(directory)
    for entry, name in listed:
        if entry.step in doomed:
            storage.delete(name)


def delete_later(directory: Location | str, step: int) -> None:
    """Deletes the checkpoints of steps after `step`, the newest first; one process does it, while no save is under way."""
    storage = open_storage(directory)
    for name in finished(locate(directory)):
        if step_of(name) > step:
            storage.delete(name)


def tidy(directory: Location | str, step: int, retention: Retention) -> None:
    """`delete_older`; in a store also what saves that failed have left there, which on a disk the next save clears away."""
    delete_older(directory, step, retention)
    storage = open_storage(directory)
    if storage.remote:
        storage.clear()


def clear_leftovers(directory: Location | str) -> None:
    """Removes what a writer that was killed left behind; every rank of the default process group calls this, and no writer is at work."""
    action = open_storage(directory).clear if rank_and_size()[0] == 0 else (lambda: None)
    together(action, f"cannot clear unfinished checkpoints out of {directory}")


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
