"""How a checkpoint comes to be where it lies, and goes again: on a disk, and in an object store.

A disk            files are written into `step-00000100.partial/` and synced; one rename makes the checkpoint exist
An object store   has no rename: objects get a name of their own at each attempt (`rank-00000-000.3f9a51c2.safetensors`), so an earlier checkpoint
                  of the same step is never written over, and the manifest, one request, sent last, makes the checkpoint exist

Readers need to know neither: a directory without a valid manifest is no checkpoint.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from train.checkpoint.manifest import MANIFEST, CheckpointError, read_manifest, sync_directory
from train.checkpoint.reader import size_problem, step_name
from train.checkpoint.remote import Location, RemotePath, locate

LEFTOVER = ".partial"
"""ends the name of a directory that is being written or deleted, and that nobody will finish once its writer is gone"""


class Output(Protocol):
    """A file that is being written."""

    def write(self, content: Any, /) -> int | None:
        """How many bytes of the buffer were taken."""


class Storage(Protocol):
    """The checkpoints of one run, as its writer sees them. Everything raises OSError where the disk or the store fails."""

    remote: bool
    """Whether every call may take as long as a network does: such calls belong into a thread."""

    def begin(self, step: int) -> str:
        """Makes room for the checkpoint of this step; by rank 0. Returns what names of this attempt's files have in common; may be empty."""

    def create(self, step: int, file: str) -> AbstractContextManager[Output]:
        """A file to write, unbuffered; it is safe when the block ends."""

    def commit(self, step: int, manifest: bytes) -> None:
        """Makes the checkpoint exist, all files being written; by rank 0."""

    def discard(self, step: int) -> None:
        """Gives up what `begin` began. Never fails; what it leaves, `clear` removes."""

    def delete(self, name: str) -> None:
        """Deletes a checkpoint; one that is cut short leaves nothing that looks like one."""

    def clear(self) -> None:
        """Removes what writers that were cut off left behind; none may be at work."""


def open_storage(directory: str | Location) -> Storage:
    """directory: a path or URL of `checkpoints`."""
    directory = locate(directory)
    return ObjectStorage(directory) if isinstance(directory, RemotePath) else DiskStorage(directory)


class DiskStorage:
    """On a file system with durable renames."""

    remote = False

    def __init__(self, directory: Path):
        self._directory = directory

    def _final(self, step: int) -> Path:
        return self._directory / step_name(step)

    def _partial(self, step: int) -> Path:
        final = self._final(step)
        return final.with_name(final.name + LEFTOVER)

    def begin(self, step: int) -> str:
        if not self._directory.is_dir():
            self._directory.mkdir(parents=True)
            sync_directory(self._directory.parent)
        self.clear()
        self._partial(step).mkdir()
        return ""

    @contextmanager
    def create(self, step: int, file: str) -> Iterator[Output]:
        with open(self._partial(step) / file, "xb", buffering=0) as out:
            yield out
            os.fsync(out.fileno())

    def commit(self, step: int, manifest: bytes) -> None:
        """Durable and atomic: each name appears only after its content is on the disk."""
        partial = self._partial(step)
        unfinished = partial / f"{MANIFEST}.partial"
        with open(unfinished, "wb") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, partial / MANIFEST)
        sync_directory(partial)
        self._replace(partial, self._final(step))

    def _replace(self, partial: Path, final: Path) -> None:
        """Gives the finished directory its name. A checkpoint of the same step makes room as `.old`, which readers
        accept, and goes last.
        """
        old = final.with_name(final.name + ".old")
        if final.exists() and size_problem(final):
            self.delete(final.name)
        elif final.exists():
            if old.exists():
                self.delete(old.name)
            final.rename(old)
        partial.rename(final)
        sync_directory(final.parent)
        if old.exists():
            self.delete(old.name)

    def discard(self, step: int) -> None:
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def delete(self, name: str) -> None:
        """Renamed first: a deletion cut short leaves nothing that looks like one, and the next writer clears it away."""
        path = self._directory / name
        doomed = path.with_name(name + LEFTOVER)
        if doomed.exists():
            # A partial of the same step is about to get its name.
            doomed = path.with_name(name + ".damaged" + LEFTOVER)
            shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)

    def clear(self) -> None:
        for leftover in self._directory.glob(f"step-*{LEFTOVER}"):
            shutil.rmtree(leftover)


class ObjectStorage:
    """In an object store, through fsspec."""

    remote = True

    def __init__(self, directory: RemotePath):
        self._directory = directory

    def _final(self, step: int) -> RemotePath:
        return self._directory / step_name(step)

    def begin(self, step: int) -> str:
        return secrets.token_hex(4)

    def create(self, step: int, file: str) -> AbstractContextManager[Output]:
        return (self._final(step) / file).create()

    def commit(self, step: int, manifest: bytes) -> None:
        (self._final(step) / MANIFEST).write_bytes(manifest)

    def discard(self, step: int) -> None:
        """Nothing over a network that may be what failed."""

    def delete(self, name: str) -> None:
        """The manifest first."""
        directory = self._directory / name
        names = directory.objects()
        for file in sorted(names, key=lambda file: file != MANIFEST):
            (directory / file).unlink()

    def clear(self) -> None:
        """Removes objects that no manifest names."""
        for directory in list(self._directory.glob("step-*")):
            if not re.fullmatch(r"step-\d+", directory.name):
                continue
            names = directory.objects().keys()
            try:
                kept = {MANIFEST, *read_manifest(directory).files} if MANIFEST in names else set()
            except CheckpointError:
                continue  # whoever looks into the damage needs what there is
            for name in names - kept:
                (directory / name).unlink()
