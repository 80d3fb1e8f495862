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
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.boxes import Box, tiling_error
from train.checkpoint.remote import Location

FORMAT = "nibble-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LARGEST = 1 << 30
"""bytes of a manifest that is read; a run of a thousand ranks needs a tenth"""
MOST_DIMENSIONS = 16
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
"""of a file in a checkpoint's own directory: nothing that leads out of it"""

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
        """Every tensor is tiled exactly by parts in listed files, which have room for them; raises CheckpointError otherwise."""
        for name in self.files:
            if not FILE_NAME.fullmatch(name):
                raise CheckpointError(f"its file name {name[:80]!r} is none of a checkpoint's: it may not lead out of its directory")
        for name, tensor in self.tensors.items():
            if len(tensor.shape) > MOST_DIMENSIONS:
                raise CheckpointError(f"tensor {name[:80]!r} has {len(tensor.shape)} dimensions, more than {MOST_DIMENSIONS}")
        check_tiling(self.tensors)
        room = {name: file.size for name, file in self.files.items()}
        for name, tensor in self.tensors.items():
            for part in tensor.parts:
                if part.file not in self.files:
                    raise CheckpointError(f"tensor {name} is said to be in {part.file}, which the manifest does not list")
                room[part.file] -= part.box.elements * tensor.dtype.itemsize
        # What is read is as large as the files are: a manifest alone cannot ask for memory.
        if full := next((name for name, left in room.items() if left < 0), None):
            raise CheckpointError(f"its file {full} of {self.files[full].size} bytes is too small for the tensors it is said to hold")

    def content(self) -> bytes:
        """What the file `manifest.json` holds."""
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
        return _lines(document).encode()


def check_tiling(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError for a tensor that its parts do not tile exactly."""
    for name, tensor in tensors.items():
        problem = tiling_error(tensor.shape, [part.box for part in tensor.parts])
        if problem:
            raise CheckpointError(f"tensor {name} {problem}")


def read_manifest(directory: Location) -> Manifest:
    """The checked manifest of a checkpoint directory; CheckpointError if there is none or it is damaged."""
    path = directory / MANIFEST
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise CheckpointError(f"its {MANIFEST} has {size} bytes, more than {LARGEST}, so it is none of ours")
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST}, so it was never finished") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise StorageError(f"its {MANIFEST} cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {MANIFEST} cannot be read ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"its {MANIFEST} is not that of a {FORMAT}")
    if document.get("version") != VERSION:
        raise CheckpointError(f"its format version is {document.get('version')!r}, and this program reads version {VERSION}")
    if document.pop("sha256", None) != _checksum(document):
        raise CheckpointError(f"its {MANIFEST} does not match its own checksum")
    try:
        manifest = _manifest(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its {MANIFEST} is not made as one of ours ({type(error).__name__}: {str(error)[:80]})") from None
    manifest.check()
    return manifest


def _manifest(document: Mapping[str, Any]) -> Manifest:
    """Raises whatever a document of another shape leads to."""
    if not isinstance(document["state"], dict):
        raise TypeError("state is no object")
    return Manifest(
        step=_whole(document["step"]),
        tokens=_whole(document["tokens"]),
        state=document["state"],
        files={name: StoredFile(_whole(entry["size"]), str(entry["sha256"])) for name, entry in document["files"].items()},
        tensors={
            name: StoredTensor(
                DTYPES[entry["dtype"]],
                _wholes(entry["shape"]),
                tuple(StoredPart(Box(_wholes(p["offset"]), _wholes(p["shape"])), str(p["file"]), str(p["key"])) for p in entry["parts"]),
            )
            for name, entry in document["tensors"].items()
        },
    )


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError(f"{str(value)[:40]} is no count")
    return value


def _wholes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{str(values)[:40]} is no list")
    return tuple(map(_whole, values))


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
