"""Writing a checkpoint so that at any moment the newest complete one on the disk stays readable.

    step-00000100.partial/  every rank streams its boxes into safetensors files; then the manifest; all synced to disk
    step-00000100/          by one rename, which is what makes the checkpoint exist
    older steps             deleted only now

Ranks communicate descriptions, never tensors: a box held by several ranks is written by the lowest one. Should
ranks hold boxes that overlap without being equal (the embedding of the first and the last pipeline stage, sharded
differently by their optimizers), the higher rank writes what is left of its own.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.boxes import Box
from train.checkpoint.manifest import (
    DTYPE_NAMES,
    CheckpointError,
    Manifest,
    StoredFile,
    StoredPart,
    StoredTensor,
    sync_directory,
)
from train.checkpoint.parts import Part
from train.checkpoint.ranks import rank_and_size, together
from train.checkpoint.reader import size_problem, step_directory

GIBIBYTE = 1 << 30
LEFTOVER = ".partial"
"""ends the name of a directory that is being written or deleted, and that nobody will finish once its writer is gone"""
CHUNK = 32 << 20
"""bytes copied to the host, hashed and written at a time"""

Description = tuple[str, torch.dtype, tuple[int, ...], Box]
"""of a part: name, dtype, global shape, box"""


def save(
    directory: Path | str,
    step: int,
    parts: Iterable[Part],
    state: Mapping[str, Any],
    *,
    tokens: int = 0,
    keep: int | None = None,
    shard_bytes: int = GIBIBYTE,
) -> Path:
    """Writes the checkpoint of `step` under `directory` and returns its path; every rank of the default process
    group calls this.

    parts: what this rank holds; together the ranks' parts must cover every tensor. Replicas are written once.
    state: JSON values only (string keys); rank 0's is stored.
    tokens: trained on so far, stored beside the step.
    keep: how many checkpoints remain, this one included; None or 0 keeps all. Later steps (of an abandoned future)
        are left alone.
    shard_bytes: size limit of a file; a larger tensor is cut along its first dimension.
    Raises CheckpointError, on every rank, when any rank cannot write; older checkpoints are then as they were.
    """
    directory = Path(directory)
    final = step_directory(directory, step)
    partial = final.with_name(final.name + LEFTOVER)
    doing = f"cannot write checkpoint {final}"
    rank, _ = rank_and_size()
    held = [part for part in parts if part.box.elements]

    def prepare() -> list[Description]:
        _check_json(state, "state")
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
            _remove_leftovers(directory)
            partial.mkdir()
        return [_describe(part) for part in held]

    try:
        plan = together(prepare, doing)
        written = together(lambda: _write_mine(partial, rank, held, plan, shard_bytes), doing)
        together(lambda: _finish(partial, final, step, tokens, state, plan, written) if rank == 0 else None, doing)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    together(
        lambda: _retain(directory, step, keep) if rank == 0 and keep else None,
        f"cannot delete checkpoints older than {final}",
    )
    return final


def _describe(part: Part) -> Description:
    if part.tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {part.name} has dtype {part.tensor.dtype}, which the format does not store")
    if tuple(part.tensor.shape) != part.box.shape:
        raise CheckpointError(f"tensor {part.name} has a part of shape {tuple(part.tensor.shape)} in a box of shape {part.box.shape}")
    return part.name, part.tensor.dtype, part.shape, part.box


def owned_boxes(plan: Sequence[Sequence[Description]]) -> list[list[tuple[int, Box]]]:
    """Who writes what: for each rank a list of (index of its part, box within that part), disjoint over all ranks."""
    first: dict[tuple[str, Box], tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, descriptions in enumerate(plan):
        for index, (name, _, shape, box) in enumerate(descriptions):
            shapes[name] = shape
            first.setdefault((name, box), (rank, index))
    boxes: dict[str, list[tuple[Box, int, int]]] = {name: [] for name in shapes}
    for (name, box), (rank, index) in first.items():
        boxes[name].append((box, rank, index))
    owned: list[list[tuple[int, Box]]] = [[] for _ in plan]
    for name, holders in boxes.items():
        overlapping = sum(box.elements for box, _, _ in holders) > Box((), shapes[name]).elements
        taken: list[Box] = []
        for box, rank, index in holders:
            rest = [box]
            if overlapping:
                for other in taken:
                    rest = [r for b in rest for r in b.minus(other)]
                taken.append(box)
            owned[rank].extend((index, b) for b in rest)
    return owned


def _write_mine(
    partial: Path, rank: int, held: Sequence[Part], plan: Sequence[Sequence[Description]], shard_bytes: int
) -> tuple[dict[str, StoredFile], list[tuple[str, StoredPart]]]:
    """Writes this rank's boxes; returns its files and where each box went."""
    mine = []
    for index, box in owned_boxes(plan)[rank]:
        part = held[index]
        for b in box.split(max(1, shard_bytes // part.tensor.element_size())):
            mine.append((part, b, b.elements * part.tensor.element_size()))
    shards: list[list[tuple[Part, Box, int]]] = []
    room = 0
    for entry in mine:
        if entry[2] > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry[2]
    files, stored = {}, []
    for number, shard in enumerate(shards):
        name = f"rank-{rank:05d}-{number:03d}.safetensors"
        # Wider dtypes first keep every tensor aligned to its own width, as the format's own writer does.
        shard.sort(key=lambda entry: -entry[0].tensor.element_size())
        entries = [(_key(part, box), part.tensor[box.within(part.box).slices]) for part, box, _ in shard]
        files[name] = write_safetensors(partial / name, entries)
        stored += [(part.name, StoredPart(box, name, key)) for (part, box, _), (key, _) in zip(shard, entries, strict=True)]
    return files, stored


def _key(part: Part, box: Box) -> str:
    if box.shape == part.shape:
        return part.name
    return f"{part.name}[{', '.join(f'{a}:{b}' for a, b in zip(box.offset, box.end, strict=True))}]"


def write_safetensors(path: Path, entries: Sequence[tuple[str, Tensor]]) -> StoredFile:
    """A safetensors file, streamed in chunks (the library's own writer wants every tensor contiguous and in host
    memory at once).

    The format: length of the header (8 bytes, little endian), header (JSON, padded with spaces to a multiple of 8
    bytes), then the tensors row-major, without gaps, in the order of their offsets. Synced to the disk on return.
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


def _finish(
    partial: Path,
    final: Path,
    step: int,
    tokens: int,
    state: Mapping[str, Any],
    plan: Sequence[Sequence[Description]],
    written: Sequence[tuple[dict[str, StoredFile], list[tuple[str, StoredPart]]]],
) -> None:
    """Checks that the boxes tile every tensor, writes the manifest and gives the directory its name."""
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for descriptions in plan:
        for name, dtype, shape, _ in descriptions:
            if kinds.setdefault(name, (dtype, shape)) != (dtype, shape):
                raise CheckpointError(f"ranks disagree about tensor {name}: {kinds[name]} and {(dtype, shape)}")
    places: dict[str, list[StoredPart]] = {name: [] for name in kinds}
    for _, stored in written:
        for name, part in stored:
            places[name].append(part)
    manifest = Manifest(
        step=step,
        tokens=tokens,
        state=state,
        files={name: file for files, _ in written for name, file in files.items()},
        tensors={name: StoredTensor(*kinds[name], tuple(sorted(parts, key=lambda part: part.box))) for name, parts in places.items()},
    )
    manifest.check()
    manifest.write(partial)
    _replace(partial, final)


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


def _retain(directory: Path, step: int, keep: int) -> None:
    """Deletes what is older than the `keep` newest complete checkpoints up to and including `step`."""
    steps = [
        (int(match[1]), path)
        for path in directory.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)(\.old)?", path.name)) and int(match[1]) <= step
    ]
    complete = sorted({s for s, path in steps if size_problem(path) is None}, reverse=True)
    if len(complete) <= keep:
        return
    for s, path in steps:
        if s < complete[keep - 1]:
            _discard(path)


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
