"""Megatron's indexed dataset: PREFIX.bin holds token ids one after another, PREFIX.idx says where sequences and documents begin.

    .idx    b"MMIDIDX\\0\\0" | version uint64 = 1 | dtype code uint8 | sequences uint64 | document bounds uint64
            | length of every sequence int32 | byte offset of every sequence int64 | first sequence of every document, and the end, int64

One sequence per document here, as Megatron's preprocessing writes them. Little endian throughout.
"""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.documents import DataError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, type[np.number]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True)
class Indexed:
    """tokens: all ids, memory-mapped; lengths, starts: int64 [documents], in tokens."""

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index]]


def exists(prefix: Path) -> bool:
    return Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file()


def write(prefix: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes both files, each under a temporary name first; the index comes last, so a pair that exists is whole."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = {suffix: Path(f"{prefix}.{os.getpid()}.partial{suffix}") for suffix in (".bin", ".idx")}
    lengths = []
    with partial[".bin"].open("wb") as file:
        for tokens in documents:
            file.write(np.ascontiguousarray(tokens, dtype=dtype).tobytes())
            lengths.append(len(tokens))
    sizes = np.asarray(lengths, dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)[:-1])) * dtype.itemsize if lengths else np.zeros(0)
    with partial[".idx"].open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(lengths) + 1))
        file.write(sizes.tobytes())
        file.write(offsets.astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    for suffix in (".bin", ".idx"):
        os.replace(partial[suffix], f"{prefix}{suffix}")


def read(prefix: Path) -> Indexed:
    """Opens a pair, memory-mapped. Raises DataError when a file is missing or the index does not match its .bin."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise DataError(f"data file {path} does not exist: an indexed dataset is a pair of .bin and .idx")
    raw = index.read_bytes()
    if len(raw) < HEADER.size or raw[:9] != MAGIC:
        raise DataError(f"data file {index} is no Megatron index (it does not begin with MMIDIDX): prepare the data again")
    _, version, code, count, bounds = HEADER.unpack_from(raw)
    if version != 1 or code not in DTYPES:
        raise DataError(f"data file {index} has version {version} and dtype code {code}, which are unknown: prepare the data again")
    expected = HEADER.size + 4 * count + 8 * count + 8 * bounds
    if len(raw) != expected:
        raise DataError(f"data file {index} has {len(raw)} bytes instead of {expected}: it was cut off, prepare the data again")
    dtype = np.dtype(DTYPES[code])
    at = HEADER.size
    lengths = np.frombuffer(raw, np.int32, count, at).astype(np.int64)
    offsets = np.frombuffer(raw, np.int64, count, at + 4 * count)
    size = tokens.stat().st_size
    if size != int(lengths.sum()) * dtype.itemsize or (count and int((offsets + lengths * dtype.itemsize).max()) > size):
        raise DataError(
            f"data file {tokens} has {size} bytes, but its index {index} describes {int(lengths.sum()) * dtype.itemsize}: the two do not "
            "belong together, prepare the data again"
        )
    if size == 0:
        raise DataError(f"data file {tokens} is empty: prepare the data again")
    return Indexed(np.memmap(tokens, dtype=dtype, mode="r"), lengths, offsets // dtype.itemsize)
