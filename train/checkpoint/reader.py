"""Finding and reading checkpoints: any layout reads what any other wrote.

A reader asks for boxes of global tensors; each is assembled from the stored boxes that meet it, of which only the
needed slices are read.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from train.checkpoint.boxes import Box
from train.checkpoint.manifest import DTYPE_NAMES, CheckpointError, Manifest, StorageError, StoredTensor, read_manifest
from train.checkpoint.parts import Part
from train.checkpoint.ranks import exchange, rank_and_size, together
from train.checkpoint.remote import Location, locate
from train.checkpoint.tensors import most_at_once, open_tensors


class Checkpoint:
    """A checkpoint on disk whose manifest and file sizes are in order (`latest` and `open_checkpoint` also verify
    the checksums).
    """

    def __init__(self, path: Location | str):
        """path: of a directory, or a URL. Raises CheckpointError if that is not a complete checkpoint."""
        self.path = locate(path)
        self.manifest: Manifest = read_manifest(self.path)
        sizes = _sizes(self.path, self.manifest.files)
        for name, file in self.manifest.files.items():
            if name not in sizes:
                raise CheckpointError(f"its file {name} is missing")
            if sizes[name] != file.size:
                raise CheckpointError(f"its file {name} has {sizes[name]} bytes instead of {file.size}")

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def state(self) -> Mapping[str, Any]:
        """The JSON values given to `save` (tuples come back as lists)."""
        return self.manifest.state

    @property
    def milestone(self) -> str | None:
        """The name under which it stays for ever; None: it is no milestone."""
        name = self.state.get("milestone")
        return name if isinstance(name, str) else None

    def names(self, kind: str | None = None) -> list[str]:
        """Names of the stored tensors, such as `exp_avg/norm_f.weight`; with a kind (`model`, ...) those of it,
        without the kind.
        """
        if kind is None:
            return sorted(self.manifest.tensors)
        return sorted(name.removeprefix(f"{kind}/") for name in self.manifest.tensors if name.startswith(f"{kind}/"))

    def verify(self, files: Sequence[str] | None = None) -> None:
        """Reads the files (default: all) and raises CheckpointError if one is not what was written."""
        files = sorted(self.manifest.files) if files is None else files
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for name, digest in zip(files, pool.map(self._digest, files), strict=True):
                if digest != self.manifest.files[name].sha256:
                    raise CheckpointError(f"its file {name} does not match its checksum")

    def _digest(self, name: str) -> str:
        try:
            with (self.path / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise CheckpointError(f"its file {name} is missing") from None
        except OSError as error:
            raise StorageError(f"its file {name} cannot be read ({error.strerror or error})") from None

    def stored(self, name: str) -> StoredTensor:
        """Dtype, shape and parts of a tensor; CheckpointError if there is none of this name."""
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path} has no tensor {name}") from None

    def read_full(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        tensor = self.stored(name)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.parts:
            self.load_into([Part(name, tensor.shape, Box((0,) * len(tensor.shape), tensor.shape), whole)])
        return whole

    def load_into(self, parts: Iterable[Part]) -> None:
        """Fills the parts' tensors in place, on whatever device they are.

        A name that is not stored, or another global shape or dtype than the stored one, raises CheckpointError
        before anything is changed.
        """
        wanted = [part for part in parts if part.box.elements]
        for part in wanted:
            tensor = self.stored(part.name)
            if (tensor.shape, tensor.dtype) != (part.shape, part.tensor.dtype):
                raise CheckpointError(
                    f"tensor {part.name} is {tensor.dtype} {list(tensor.shape)} in checkpoint {self.path} "
                    f"but {part.tensor.dtype} {list(part.shape)} in this run"
                )
        by_file: dict[str, list[tuple[str, Box, Box, Part]]] = {}
        for part in wanted:
            for source in self.stored(part.name).parts:
                common = source.box.intersect(part.box)
                if common is not None:
                    by_file.setdefault(source.file, []).append((source.key, source.box, common, part))
        for name, copies in by_file.items():
            try:
                with open_tensors(self.path / name) as file, torch.no_grad():
                    for key, box, common, part in copies:
                        entry = file.get_slice(key)
                        if tuple(entry.get_shape()) != box.shape or entry.get_dtype() != DTYPE_NAMES[part.tensor.dtype]:
                            raise CheckpointError(f"{self.path / name} holds another tensor under {key} than its manifest says")
                        if common == box and isinstance(self.path, Path):
                            part.tensor[common.within(part.box).slices].copy_(file.get_tensor(key))
                            continue
                        limit = most_at_once(self.path, part.tensor.element_size())
                        for piece in common.split(limit or common.elements):
                            part.tensor[piece.within(part.box).slices].copy_(entry[piece.within(box).slices])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {self.path / name}: {error}") from None


def _sizes(directory: Location, names: Iterable[str]) -> dict[str, int]:
    """In bytes, of the files that are there."""
    if not isinstance(directory, Path):
        try:
            return {name: stat.st_size for name, stat in directory.objects().items()}
        except OSError as error:
            raise StorageError(f"its files cannot be listed ({error})") from None
    sizes = {}
    for name in names:
        with contextlib.suppress(OSError):
            sizes[name] = os.stat(directory / name).st_size
    return sizes


def step_of(name: str) -> int:
    """The step of a checkpoint by one of the names that `finished` gives."""
    return int(name.removeprefix("step-").removesuffix(".old"))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def size_problem(path: Location) -> str | None:
    """Why this directory is not a complete checkpoint, judged by manifest and file sizes; None if it is."""
    try:
        Checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None


def finished(directory: Location) -> list[str]:
    """Names of the checkpoints that a writer once finished, damaged since or not, the newest first.

    Of one step, the one with its final name comes before that which made room for it (`.old`). What carries any other name, above all
    `.partial`, is a leftover of a writer and no checkpoint.
    """
    found = ((re.fullmatch(r"step-(\d+)(\.old)?", path.name), path.name) for path in (directory.iterdir() if directory.is_dir() else ()))
    return [name for _, _, name in sorted(((int(match[1]), match[2] is None, name) for match, name in found if match), reverse=True)]


def latest(
    directory: Location | str, *, verify: bool = True, report: Callable[[str], None] = print, newest: int | None = None
) -> Checkpoint | None:
    """The newest valid checkpoint under `directory` (`RUN/checkpoints`), or None. newest: consider none of a later step.

    Candidates are tried from the newest step down; each that is not valid is reported, by rank 0, with the reason.
    With a process group every rank calls this; they share the verification of the files and agree on the answer.
    verify: compare checksums, which reads every file; sizes are compared always.
    Raises StorageError where an object store fails meanwhile: that says nothing about the checkpoint, and an older one would lose steps.
    """
    directory = locate(directory)
    rank, size = rank_and_size()
    names = together(lambda: finished(directory) if rank == 0 else [], f"cannot look for checkpoints in {directory}")[0]
    for name in names:
        if newest is not None and step_of(name) > newest:
            continue
        checkpoint, problem = None, None
        try:
            checkpoint = Checkpoint(directory / name)
            if verify:
                checkpoint.verify(sorted(checkpoint.manifest.files)[rank::size])
        except CheckpointError as error:
            unreachable = isinstance(error, StorageError) and not isinstance(directory, Path)
            problem = (f"{error} (rank {rank})" if size > 1 else str(error), unreachable)
        problems = [p for p in exchange(problem) if p]
        if not problems:
            return checkpoint
        if gone := next((text for text, unreachable in problems if unreachable), None):
            raise StorageError(f"cannot read checkpoint {directory / name}: {gone}: start the same command again when the store answers")
        if rank == 0:
            report(f"Skipping checkpoint {directory / name}: {problems[0][0]}.")
    return None


def open_checkpoint(path: Location | str, *, verify: bool = True, report: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint meant by a path: a step's directory, or the newest valid one of a run's directory or its
    `checkpoints`.

    Raises CheckpointError if there is none.
    """
    path = locate(path)
    if re.fullmatch(r"step-\d+(\.old)?", path.name):
        try:
            checkpoint = Checkpoint(path)
            if verify:
                checkpoint.verify()
        except CheckpointError as error:
            raise CheckpointError(f"{path} is not a valid checkpoint: {error}") from None
        return checkpoint
    inner = path / "checkpoints"
    newest = latest(inner if inner.is_dir() else path, verify=verify, report=report)
    if newest is None:
        raise CheckpointError(f"there is no valid checkpoint in {path}; give the directory of a run that saved one, or of a step")
    return newest
