"""Sources whose sequences are computed when they are read, instead of taken from text: tasks whose targets are known.

A sample of the run holds whole sequences of a task, one after another, and window w of a source is the same wherever it is read: a function of the
seed, the source's name and w.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from data.batch import Sample
from data.documents import DataError
from data.hashing import digest
from data.mqar import MQAR
from data.mqar import PREFIX as MQAR_PREFIX
from data.needle import PREFIX as NEEDLE_PREFIX
from data.needle import Needles
from data.pairs import PREFIX as PAIRS_PREFIX
from data.pairs import Pairs
from data.tokenizer import ByteTokenizer, Tokenizer

WINDOWS = 1 << 40  # of a source before it repeats itself


class Task(Protocol):
    """length: tokens of a sequence; None where it fills the sample."""

    @property
    def length(self) -> int | None: ...

    def draw(self, key: int, length: int) -> Sample:
        """The sequence of `length` tokens that these 64 bits stand for, one document. Raises DataError where it has no room."""


def is_generated(path: str) -> bool:
    """Whether a source of this name is computed."""
    return path.startswith((MQAR_PREFIX, NEEDLE_PREFIX, PAIRS_PREFIX))


@dataclass(frozen=True)
class Generated:
    """The source `path` of a run with this seed."""

    path: str
    task: Task
    seed: int

    validation = None
    validation_bytes = None
    tokens = None  # without end
    given = True

    def windows(self, length: int, *, reset: bool) -> int:
        """Samples of `length` tokens. Raises DataError where they hold no whole sequences, or several that are not kept apart."""
        of_one = self.task.length or length
        if length % of_one:
            raise DataError(
                f"data source {self.path!r} has sequences of {of_one} tokens, of which train.sequence_length={length} is not a multiple: set it "
                f"to {max(1, length // of_one) * of_one}"
            )
        if length > of_one and not reset:
            raise DataError(
                f"data source {self.path!r} puts {length // of_one} sequences into train.sequence_length={length}, which "
                "data.reset_at_document=false would mix: set it to true"
            )
        self.task.draw(0, of_one)
        return WINDOWS

    def sample(self, window: int, length: int, *, reset: bool) -> Sample:
        """Window `window`, its sequences numbered as documents."""
        of_one = self.task.length or length
        parts = [
            replace(part, documents=part.documents + np.int32(place))
            for place in range(length // of_one)
            for part in [self.task.draw(digest(self.seed, self.path, window, place), of_one)]
        ]
        return Sample(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "labels", "counts", "documents")))

    def where(self, window: int, length: int) -> dict[str, Any]:
        """For a person."""
        return {"source": self.path, "window": window}


def open_generated(path: str, tokenizer: Tokenizer, seed: int) -> Generated:
    """Raises DataError for a name that stands for no task."""
    if path.startswith(MQAR_PREFIX):
        return Generated(path, MQAR.of(path, tokenizer.vocab_size), seed)
    if not isinstance(tokenizer, ByteTokenizer):
        raise DataError(f"{path} is a text of bytes: set data.tokenizer.kind=bytes")
    return Generated(path, Pairs.of(path) if path.startswith(PAIRS_PREFIX) else Needles.of(path), seed)
