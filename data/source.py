"""A source: its documents tokenised, split into training and validation, on disk and memory-mapped.

Text is tokenised once, into `data.cache` under a key of everything that decides the ids: the text itself, the tokenizer and the split. An
indexed dataset (`python -m data.prepare`, or Megatron's own preprocessing) is used where it lies.

The split comes before the tokenizer, so validation text is the same bytes whatever the vocabulary, and a BPE is trained without it:

    tail        the last `validation_fraction` of the bytes of every document
    documents   whole documents, chosen by the seed and their content (documents with the same content go the same way)

An indexed dataset is split likewise, in tokens, and by documents' numbers instead of their content.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import indexed
from data.batch import Sample
from data.cache import cached
from data.config import DataConfig, SourceConfig
from data.documents import DataError, documents_of, fingerprint
from data.hashing import digest, shuffled
from data.stream import Stream
from data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 21  # text tokenised at a time

Split = Callable[[bytes], tuple[bytes, bytes]]


@dataclass(frozen=True)
class Source:
    """train: documents, each closed by the end-of-document id (an indexed dataset's as they were written); validation: documents without
    it, or None. validation_bytes: of their text, None where only ids are known. given: ids as they came, not tokenised by us."""

    path: str
    train: Stream
    validation: Stream | None
    validation_bytes: int | None
    given: bool = False

    @property
    def tokens(self) -> int:
        """Of training."""
        return len(self.train)

    def windows(self, length: int, *, reset: bool) -> int:
        """Samples of `length` tokens, each with the target behind its last."""
        return (len(self.train) - 1) // length

    def sample(self, window: int, length: int, *, reset: bool) -> Sample:
        """Window `window`. reset: documents are kept apart, and a target in another document than its token does not count."""
        self.train.check()
        ids = self.train.read(window * length, length + 1).astype(np.int64)
        documents = self.train.ordinals(window * length, length + 1) if reset else np.zeros(length + 1, dtype=np.int32)
        return Sample(ids[:-1], ids[1:], documents[1:] == documents[:-1], documents[:-1])

    def where(self, window: int, length: int) -> dict[str, Any]:
        """For a person."""
        return {"source": self.path, "window": window, "documents": list(self.train.documents(window * length, length + 1))}


class Progress:
    """A line on stderr every few seconds of tokenising."""

    def __init__(self, what: str, every: float = 3.0):
        self.what, self.every = what, every
        self.begin = self.last = time.monotonic()
        self.size = self.tokens = self.documents = 0

    def add(self, size: int, tokens: int, documents: int) -> None:
        self.size, self.tokens, self.documents = self.size + size, self.tokens + tokens, self.documents + documents
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            print(f"tokenising {self.what}: {self.summary()}", file=sys.stderr, flush=True)

    def summary(self) -> str:
        seconds = max(time.monotonic() - self.begin, 1e-9)
        return (
            f"{self.documents:,} documents, {self.size / 1e6:.1f} MB, {self.tokens:,} tokens, {self.size / 1e6 / seconds:.1f} MB/s, "
            f"{seconds:.0f} s"
        )


def tokenised(texts: Iterator[bytes], tokenizer: Tokenizer, progress: Progress) -> Iterator[np.ndarray]:
    """Ids of each text, in order, tokenised some megabytes at a time."""
    held: list[bytes] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield from _flush(held, tokenizer, progress)
            held, size = [], 0
    if held:
        yield from _flush(held, tokenizer, progress)


def _flush(held: list[bytes], tokenizer: Tokenizer, progress: Progress) -> list[np.ndarray]:
    ids = tokenizer.encode_batch(held)
    progress.add(sum(map(len, held)), sum(map(len, ids)), len(held))
    return ids


def splitter(config: DataConfig, source: SourceConfig, seed: int) -> Split:
    """What divides a document of this source into its training and its validation text."""
    fraction = config.validation_fraction
    if fraction == 0:
        return lambda text: (text, b"")
    if config.validation == "tail":
        return lambda text: _cut(text, fraction)
    digests = sorted(digest(seed, "validation", text) for text in documents_of(source.path, source.text_key))
    held = _held_documents(len(digests), fraction, source.path)
    threshold = digests[held - 1]
    return lambda text: (b"", text) if digest(seed, "validation", text) <= threshold else (text, b"")


def _cut(text: bytes, fraction: float) -> tuple[bytes, bytes]:
    cut = len(text) - int(len(text) * fraction)
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # not in the middle of a character
        cut += 1
    return text[:cut], text[cut:]


def _held_documents(count: int, fraction: float, path: str) -> int:
    if count < 2:
        raise DataError(
            f"data source {path!r} is a single document, which data.validation=documents cannot divide: use data.validation=tail"
        )
    return min(max(1, round(fraction * count)), count - 1)


def split_key(config: DataConfig, seed: int) -> tuple[object, ...]:
    """Everything besides the text that decides the split."""
    if config.validation_fraction == 0:
        return ()
    return config.validation, config.validation_fraction, seed if config.validation == "documents" else None


def open_source(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, seed: int) -> Source:
    """Opens an indexed dataset, or tokenises text into the cache, where later runs find it. Raises DataError."""
    prefix = indexed.prefix_of(source.path)
    if prefix is not None:
        return _open_indexed(prefix, source, config, tokenizer, seed)
    parts = (fingerprint(source.path), source.text_key, tokenizer.key, split_key(config, seed))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    place = cached(Path(config.cache).expanduser() / f"tokens-{key}", lambda directory: _build(directory, config, source, tokenizer, seed))
    held = indexed.read(place / "validation") if Path(place / "validation.idx").is_file() else None
    size = json.loads((place / "facts.json").read_text())["validation_bytes"]
    return Source(source.path, indexed.read(place / "train"), held, size)


def _build(directory: Path, config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, seed: int) -> None:
    split = splitter(config, source, seed)
    dtype = indexed.token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_document], dtype=dtype)
    is_held: list[bool] = []
    validation_bytes = 0

    def pieces() -> Iterator[bytes]:
        nonlocal validation_bytes
        for text in documents_of(source.path, source.text_key):
            for part, held in zip(split(text), (False, True), strict=True):
                if part:
                    is_held.append(held)
                    validation_bytes += len(part) if held else 0
                    yield part

    with indexed.Writer(directory / "train", dtype) as train, indexed.Writer(directory / "validation", dtype) as validation:
        for number, ids in enumerate(tokenised(pieces(), tokenizer, Progress(source.path))):
            if is_held[number]:
                validation.add(ids)
            else:
                train.add(np.append(ids, end))
        if not train.lengths:
            raise DataError(f"data source {source.path!r} has no training text left: lower data.validation_fraction")
    if not validation.lengths:
        for suffix in indexed.SUFFIXES:
            (directory / f"validation{suffix}").unlink()
    (directory / "facts.json").write_text(json.dumps({"validation_bytes": validation_bytes}))


def facts_path(prefix: Path) -> Path:
    """Where `python -m data.prepare` notes which tokenizer wrote a pair."""
    return Path(f"{prefix}.json")


def _open_indexed(prefix: Path, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, seed: int) -> Source:
    data = indexed.read(prefix)
    facts = facts_path(prefix)
    if facts.is_file():
        try:
            written = json.loads(facts.read_text())["tokenizer"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"data file {facts} cannot be read ({error!r}): prepare the data again, or remove it") from None
        if written != tokenizer.key:
            raise DataError(
                f"data source {source.path!r} was prepared with tokenizer {written}, but data.tokenizer is {tokenizer.key}: use the same one, "
                "or prepare the data again"
            )
    count, fraction = len(data.lengths), config.validation_fraction
    if fraction == 0:
        return Source(source.path, data, None, None, given=True)
    ends_in_id = (data.tokens[data.starts + data.lengths - 1] == tokenizer.end_of_document).astype(np.int64)
    if config.validation == "documents":
        chosen = np.zeros(count, dtype=bool)
        chosen[shuffled(digest(seed, "validation"), count)[: _held_documents(count, fraction, source.path)]] = True
        train = Stream(data.tokens, data.starts[~chosen], data.lengths[~chosen])
        held = Stream(data.tokens, data.starts[chosen], (data.lengths - ends_in_id)[chosen])
    else:
        cut = data.lengths - ((data.lengths - ends_in_id) * fraction).astype(np.int64) - ends_in_id
        # The id that closes a document lies behind its validation part, and closes its training part.
        closing = ends_in_id * (cut > 0)
        starts, lengths = (np.stack(pair, axis=1).ravel() for pair in ((data.starts, data.starts + data.lengths - 1), (cut, closing)))
        train = Stream(data.tokens, starts, lengths, np.repeat(np.arange(count), 2))
        held = Stream(data.tokens, data.starts + cut, data.lengths - ends_in_id - cut)
    kept = train.without_empty()
    if kept is None:
        raise DataError(f"data source {source.path!r} has no training text left: lower data.validation_fraction")
    return Source(source.path, kept, held.without_empty(), None, given=True)


def texts_of(sources: tuple[SourceConfig, ...], config: DataConfig, seed: int) -> Iterator[bytes]:
    """Training text of the sources, for training a tokenizer."""
    for source in sources:
        split = splitter(config, source, seed)
        for text in documents_of(source.path, source.text_key):
            kept, _ = split(text)
            if kept:
                yield kept


def texts_key(sources: tuple[SourceConfig, ...], config: DataConfig, seed: int) -> str:
    """Changes whenever `texts_of` does. Raises DataError for an indexed dataset, which has no text."""
    for source in sources:
        if indexed.prefix_of(source.path) is not None:
            raise DataError(
                f"data source {source.path!r} holds ids, so no BPE can be trained on it: use data.tokenizer.kind=file with the tokenizer it "
                "was prepared with"
            )
    return repr(([(fingerprint(source.path), source.text_key) for source in sources], split_key(config, seed)))
