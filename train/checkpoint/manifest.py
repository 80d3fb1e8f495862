"""`manifest.json`, written last: what a checkpoint holds, which file holds it, and how to tell that all is intact.

    {"format": "nibble-checkpoint", "version": 1, "step": 100, "tokens": 1638400,
     "state": {...},                                            anything JSON: loop state, observers, W&B id
     "files": {"rank-00000-000.safetensors": {"size": 1234, "sha256": "..."}},
     "tensors": {"exp_avg/layers.0.mixer.in_proj.weight": {"dtype": "F32", "shape": [96, 64], "parts":
         [{"offset": [0, 0], "shape": [48, 64], "file": "rank-00000-000.safetensors", "key": "..."}, ...]}},
     "sha256": "..."}                                           of this document without its last entry

Dtypes are spelled as safetensors spells them. A manifest whose checksum is wrong, or whose parts do not tile every
tensor exactly, is not one: reading it raises.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.boxes import Box, tiling_error

FORMAT = "nibble-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not hold what is asked of it. The message is one sentence."""


class StorageError(CheckpointError):
    """The disk, or whatever else a checkpoint lies on, failed (it is full, read-only, out of reach): trying again later may succeed."""


@dataclass(frozen=True)
class StoredPart:
    """One box of a tensor: entry `key` of the safetensors file `file`."""

    box: Box
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class StoredFile:
    size: int
    """bytes"""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    tokens: int
    state: Mapping[str, Any]
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]

    def check(self) -> None:
        """Every tensor is tiled exactly by parts in listed files; raises CheckpointError otherwise."""
        check_tiling(self.tensors)
        for name, tensor in self.tensors.items():
            for part in tensor.parts:
                if part.file not in self.files:
                    raise CheckpointError(f"tensor {name} is said to be in {part.file}, which the manifest does not list")

    def write(self, directory: Path) -> None:
        """Durable and atomic: the name appears only after the content is on the disk."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "tokens": self.tokens,
            "state": self.state,
            "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(self.files.items())},
            "tensors": {
                name: {
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "shape": tensor.shape,
                    "parts": [{"offset": p.box.offset, "shape": p.box.shape, "file": p.file, "key": p.key} for p in tensor.parts],
                }
                for name, tensor in sorted(self.tensors.items())
            },
        }
        document["sha256"] = _checksum(document)
        unfinished = directory / f"{MANIFEST}.partial"
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(_lines(document))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, directory / MANIFEST)
        sync_directory(directory)


def check_tiling(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError for a tensor that its parts do not tile exactly."""
    for name, tensor in tensors.items():
        problem = tiling_error(tensor.shape, [part.box for part in tensor.parts])
        if problem:
            raise CheckpointError(f"tensor {name} {problem}")


def read_manifest(directory: Path) -> Manifest:
    """The checked manifest of a checkpoint directory; CheckpointError if there is none or it is damaged."""
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its {MANIFEST} cannot be read ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"its {MANIFEST} is not that of a {FORMAT}")
    if document.get("version") != VERSION:
        raise CheckpointError(f"its format version is {document.get('version')!r}, and this program reads version {VERSION}")
    if document.pop("sha256", None) != _checksum(document):
        raise CheckpointError(f"its {MANIFEST} does not match its own checksum")
    manifest = Manifest(
        step=document["step"],
        tokens=document["tokens"],
        state=document["state"],
        files={name: StoredFile(entry["size"], entry["sha256"]) for name, entry in document["files"].items()},
        tensors={
            name: StoredTensor(
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                tuple(StoredPart(Box(tuple(p["offset"]), tuple(p["shape"])), p["file"], p["key"]) for p in entry["parts"]),
            )
            for name, entry in document["tensors"].items()
        },
    )
    manifest.check()
    return manifest


def sync_directory(directory: Path) -> None:
    """Makes renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(document: Mapping[str, Any]) -> str:
    """JSON with a line for each file and tensor: legible, and quick for many thousands of them."""
    entries = []
    for key, value in document.items():
        if key in ("files", "tensors"):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            entries.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            entries.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
