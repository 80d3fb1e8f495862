"""Megatron's indexed dataset: PREFIX.bin holds token ids one after another, PREFIX.idx says where sequences and documents begin.

    .idx    b"MMIDIDX\\0\\0" | version uint64 = 1 | dtype code uint8 | sequences uint64 | document bounds uint64
            | length of every sequence int32 | byte offset of every sequence int64 | first sequence of every document, and the end, int64

Little endian throughout. We write one sequence per document, as Megatron's preprocessing does; documents of several sequences are read too.
"""

import os
import struct
import uuid
from pathlib import Path

import numpy as np

from data.documents import DataError
from data.stream import Stream

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, type[np.number]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")
SUFFIXES = (".bin", ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype Megatron also writes that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def prefix_of(path: str | Path) -> Path | None:
    """The prefix a source's path names, with or without .bin or .idx; None where it names something else."""
    place = Path(path).expanduser()
    if place.suffix in SUFFIXES:
        return place.with_suffix("")
    return place if any(Path(f"{place}{suffix}").is_file() for suffix in SUFFIXES) else None


class Writer:
    """Writes a pair, document by document, under temporary names; `close` puts both in place, the index last, so that an index that exists
    belongs to a whole .bin. Leaving a `with` block through an exception leaves nothing behind."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.lengths: list[int] = []
        unique = uuid.uuid4().hex[:8]
        self._partial = {suffix: Path(f"{prefix}.{unique}.partial{suffix}") for suffix in SUFFIXES}
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial[".bin"].open("wb")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, tokens: np.ndarray) -> None:
        """One document."""
        if not len(tokens):
            raise DataError(f"document {len(self.lengths)} of {self.prefix} has length zero: leave it out")
        if len(tokens) >= 1 << 31:
            raise DataError(f"document {len(self.lengths)} of {self.prefix} has {len(tokens)} tokens: split it, an index holds 2^31 - 1")
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self.lengths.append(len(tokens))

    def close(self) -> None:
        self._file.close()
        lengths = np.asarray(self.lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        offsets[1:] = np.cumsum(lengths[:-1], dtype=np.int64) * self.dtype.itemsize
        with self._partial[".idx"].open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(offsets.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        # An index left over from before must not describe the new .bin, not even for a moment.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            os.replace(self._partial[suffix], f"{self.prefix}{suffix}")

    def discard(self) -> None:
        self._file.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)


def _unordered(documents: np.ndarray, count: int) -> bool:
    """Whether bounds go back, or beyond the sequences; differences alone may overflow."""
    return bool(documents.min() < 0 or documents.max() > count or (np.diff(documents) < 0).any())


def read(prefix: Path) -> Stream:
    """Opens a pair, memory-mapped. Raises DataError when a file is missing, damaged, or the index does not match its .bin."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise DataError(f"data file {path} does not exist: an indexed dataset is a pair of .bin and .idx")
    size, available = tokens.stat().st_size, index.stat().st_size
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"data file {index} is no Megatron index (it does not begin with MMIDIDX): prepare the data again")
    _, version, code, count, bounds = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(f"data file {index} has version {version} and dtype code {code}, which are unknown: prepare the data again")
    expected = HEADER.size + 12 * count + 8 * bounds
    if available != expected:
        raise DataError(f"data file {index} has {available} bytes instead of {expected}: it is damaged, prepare the data again")
    if not count or not size:
        raise DataError(f"data file {tokens} is empty: prepare the data again")
    raw = np.memmap(index, dtype=np.uint8, mode="r")
    lengths = np.frombuffer(raw, np.int32, count, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(raw, np.int64, count, HEADER.size + 4 * count)
    documents = np.frombuffer(raw, np.int64, bounds, HEADER.size + 12 * count)
    dtype = np.dtype(DTYPES[code])
    described = int(lengths.sum()) * dtype.itemsize
    if size != described:
        raise DataError(
            f"data file {tokens} has {size} bytes, but its index {index} describes {described}: the two do not belong together, prepare the "
            "data again"
        )
    starts = np.concatenate(([0], np.cumsum(lengths)))
    if (lengths < 0).any() or not np.array_equal(offsets, starts[:-1] * dtype.itemsize):
        raise DataError(f"data file {index} has offsets that do not follow from its lengths: it is damaged, prepare the data again")
    if bounds < 2 or documents[0] != 0 or documents[-1] != count or _unordered(documents, count):
        raise DataError(f"data file {index} has document bounds that do not cover its {count} sequences: prepare the data again")
    edges = starts[documents]
    sizes = np.diff(edges)
    if (empty := np.flatnonzero(sizes == 0)).size:
        raise DataError(f"data file {index} holds a document of length zero, number {int(empty[0])}: prepare the data again without it")
    return Stream(np.memmap(tokens, dtype=dtype, mode="r"), edges[:-1], sizes)
