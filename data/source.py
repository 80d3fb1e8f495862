"""A source: its documents tokenised, split into training and validation, on disk and memory-mapped."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import indexed
from data.config import DataConfig, SourceConfig
from data.documents import DataError, documents_of, files_of
from data.indexed import Indexed
from data.order import digest
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """train: documents, each closed by the end-of-document id; validation: documents without it, or None. validation_bytes: of their text,
    None where only ids are known."""

    path: str
    train: Indexed
    validation: Indexed | None
    validation_bytes: int | None


def split(text: bytes, name: str, config: DataConfig, seed: int) -> tuple[bytes, bytes]:
    """The training and the validation part of a document."""
    fraction = config.validation_fraction
    if config.validation == "documents":
        return (b"", text) if digest(seed, "validation", name) < fraction * 2**64 else (text, b"")
    cut = len(text) - int(len(text) * fraction)
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # not in the middle of a character
        cut += 1
    return text[:cut], text[cut:]


def _signature(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, seed: int) -> str:
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files_of(source.path)]
    chosen = seed if config.validation == "documents" else 0
    parts = [tokenizer.key, source.text_key, config.validation, config.validation_fraction, chosen, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def open_source(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, seed: int) -> Source:
    """Tokenises a source once; later runs find it in `data.cache`."""
    prefix = Path(source.path).expanduser()
    if indexed.exists(prefix) or prefix.suffix in (".bin", ".idx"):
        return _open_indexed(prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix, source, config, tokenizer)
    place = Path(config.cache).expanduser() / _signature(config, source, tokenizer, seed)
    facts = place / "facts.json"
    if not facts.exists():
        train, validation, size = [], [], 0
        for name, text in documents_of(source.path, source.text_key):
            kept, held_out = split(text, name, config, seed)
            if kept:
                train.append(np.append(tokenizer.encode(kept), np.array([tokenizer.end_of_document])))
            if held_out:
                validation.append(tokenizer.encode(held_out))
                size += len(held_out)
        if not train:
            raise DataError(
                f"data source {source.path!r} has no training text left: lower data.validation_fraction={config.validation_fraction}"
            )
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        indexed.write(place / "train", train, dtype)
        if validation:
            indexed.write(place / "validation", validation, dtype)
        partial = place / f"facts.{digest(place)}.partial"
        partial.write_text(json.dumps({"validation_bytes": size}))
        partial.replace(facts)
    held = indexed.read(place / "validation") if indexed.exists(place / "validation") else None
    return Source(source.path, indexed.read(place / "train"), held, json.loads(facts.read_text())["validation_bytes"])


def _open_indexed(prefix: Path, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer) -> Source:
    """A prepared dataset: used where it lies; its validation part is the last whole documents."""
    data = indexed.read(prefix)
    largest = int(data.tokens[: 1 << 24].max())
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"data source {source.path!r} holds id {largest}, but the tokenizer has {tokenizer.vocab_size}: it was prepared with another one"
        )
    count = len(data.lengths)
    held = int(count * config.validation_fraction)
    if held == 0:
        return Source(source.path, data, None, None)

    def part(first: int, last: int) -> Indexed:
        start, stop = int(data.starts[first]), int(data.starts[last - 1] + data.lengths[last - 1])
        return Indexed(data.tokens[start:stop], data.lengths[first:last], data.starts[first:last] - start)

    return Source(source.path, part(0, count - held), part(count - held, count), None)


def texts_of(sources: tuple[SourceConfig, ...], config: DataConfig, seed: int) -> Iterator[bytes]:
    """Training text of the sources, for training a tokenizer."""
    for source in sources:
        for name, text in documents_of(source.path, source.text_key):
            kept, _ = split(text, name, config, seed)
            if kept:
                yield kept
