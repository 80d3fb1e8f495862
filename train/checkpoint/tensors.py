"""Tensors of one safetensors file, wherever it lies: mapped into memory from a disk, read row by row from a store."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.checkpoint.manifest import DTYPES
from train.checkpoint.remote import BLOCK, Location, RemotePath

LONGEST_HEADER = 100 << 20
"""bytes of the header of a safetensors file, the format's own limit"""


@contextmanager
def open_tensors(source: Location) -> Iterator[Any]:
    """Something with `get_slice(key)`, whose result has `get_shape()`, `get_dtype()` and an index of slices.

    Raises OSError or SafetensorError for what is no such file.
    """
    if isinstance(source, Path):
        with safe_open(source, framework="pt", device="cpu") as file:
            yield file
    else:
        yield RemoteTensors(source)


def most_at_once(source: Location, itemsize: int) -> int | None:
    """Elements to ask for at a time, lest what is read fill the memory; None: a mapped file takes none."""
    return None if isinstance(source, Path) else max(1, BLOCK // itemsize)


class RemoteTensors:
    """A safetensors file in a store, of which only the rows that are asked for are read. Used like `safetensors.safe_open`'s result."""

    def __init__(self, source: RemotePath):
        self._source = source

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the tensors begin, and what the file says of them. Raises OSError for what is no such file."""
        (length,) = struct.unpack("<Q", self._source.read_range(0, 8))
        if length > LONGEST_HEADER:
            raise OSError(f"{self._source}: its header of {length} bytes is too long")
        try:
            header = json.loads(self._source.read_range(8, 8 + length))
            return 8 + length, dict(header)
        except (ValueError, TypeError, RecursionError):
            raise OSError(f"{self._source}: its header cannot be read") from None

    def get_slice(self, key: str) -> "RemoteSlice":
        start, entries = self._header
        try:
            entry = entries[key]
            shape, dtype, (begin, end) = [int(n) for n in entry["shape"]], str(entry["dtype"]), entry["data_offsets"]
            if end - begin != torch.Size(shape).numel() * DTYPES[dtype].itemsize:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise OSError(f"{self._source}: it holds no tensor {key}, or describes it wrongly") from None
        return RemoteSlice(self._source, start + begin, shape, dtype)


@dataclass(frozen=True)
class RemoteSlice:
    """One tensor of a `RemoteTensors`; start: its first byte in the file."""

    source: RemotePath
    start: int
    shape: list[int]
    dtype: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """The rows that `index` begins with are read, and the rest of it is cut from them."""
        dtype = DTYPES[self.dtype]
        if not self.shape:
            return _tensor(self.source.read_range(self.start, self.start + dtype.itemsize), dtype).view(())
        row = torch.Size(self.shape[1:]).numel() * dtype.itemsize
        first, last, _ = index[0].indices(self.shape[0])
        rows = _tensor(self.source.read_range(self.start + first * row, self.start + last * row), dtype)
        return rows.view(last - first, *self.shape[1:])[(slice(None), *index[1:])]


def _tensor(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype)
