"""The validation text in fixed windows.

Documents follow one another, each behind an end-of-document id:

    end d1 d1 d1 end d2 d2 end d3 d3 d3 d3        windows of sequence_length + 1 overlap by one id

so every token of a document is predicted exactly once, its first one from the end of the document before. The end-of-document ids between
documents are context only and never count, nor does what fills up the last window and the last batch. With `data.reset_at_document` that id
belongs to the document it precedes, so the first token counts there, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from data.batch import Batch
from data.documents import DataError
from data.stream import Stream


@dataclass(frozen=True)
class Window:
    """ids: int64 [sequence + 1]; documents: int32 [sequence + 1]; counts: bool [sequence], whether the target is validation text."""

    ids: np.ndarray
    documents: np.ndarray
    counts: np.ndarray


class Validation:
    """streams: validation documents of the sources, each of one part; end: the end-of-document id; vocab_size: of the tokenizer."""

    def __init__(self, streams: Sequence[Stream], end: int, vocab_size: int, sequence_length: int):
        self.streams, self.end, self.vocab_size, self.sequence_length = tuple(streams), end, vocab_size, sequence_length
        sizes = np.concatenate([stream.lengths for stream in self.streams]) if self.streams else np.zeros(0, dtype=np.int64)
        self.tokens = int(sizes.sum())
        self._first = np.cumsum([0, *(len(stream.lengths) for stream in self.streams)])  # document number of each stream's first
        self._ends = np.cumsum(sizes + 1, dtype=np.int64)  # where documents end in the joined text, with the id before each
        self._starts = self._ends - sizes - 1
        self._total = int(self._ends[-1]) if len(sizes) else 0

    @property
    def windows(self) -> int:
        return -(-(self._total - 1) // self.sequence_length) if self._total else 0

    def document(self, number: int) -> np.ndarray:
        stream = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.streams[stream].part(number - int(self._first[stream]))

    def documents(self) -> list[np.ndarray]:
        return [self.document(number) for number in range(len(self._ends))]

    def window(self, index: int) -> Window:
        length = self.sequence_length
        first, last = index * length, min(index * length + length + 1, self._total)
        ids = np.full(length + 1, self.end, dtype=np.int64)
        documents = np.zeros(length + 1, dtype=np.int32)
        counts = np.zeros(length + 1, dtype=bool)
        place = first
        number = opening = int(np.searchsorted(self._ends, first, side="right"))
        while place < last:
            begin, stop = int(self._starts[number]) + 1, min(int(self._ends[number]), last)
            piece = slice(max(place, begin) - first, stop - first)
            ids[piece] = self.document(number)[max(place, begin) - begin : stop - begin]
            counts[piece] = True
            documents[place - first :] = number - opening
            place, number = stop, number + 1
        return Window(ids, documents, counts[1:])


class ValidationBatches(Sequence[Batch]):
    """Every window once, in batches built when they are asked for; the last one is filled up with windows in which nothing counts."""

    def __init__(self, validation: Validation, batch_size: int, reset: bool):
        self.validation, self.batch_size, self.reset = validation, batch_size, reset

    def __len__(self) -> int:
        return -(-self.validation.windows // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self._batch(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._batch(index % len(self))

    def _batch(self, index: int) -> Batch:
        numbers = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        for stream in self.validation.streams:
            stream.check()
        # A window past the end is all padding.
        windows = [self.validation.window(int(number)) for number in numbers]
        ids = np.stack([window.ids for window in windows])
        wrong = np.argwhere((ids < 0) | (ids >= self.validation.vocab_size))
        if len(wrong):
            row, place = wrong[0]
            raise DataError(
                f"the validation text of data.phases holds id {ids[row, place]} (in window {numbers[row]}), but data.tokenizer has ids 0 to "
                f"{self.validation.vocab_size - 1}: use the tokenizer its sources were prepared with"
            )
        documents = np.stack([window.documents[:-1] for window in windows])
        return Batch(
            tokens=torch.from_numpy(ids[:, :-1].copy()),
            labels=torch.from_numpy(ids[:, 1:].copy()),
            loss_mask=torch.from_numpy(np.stack([window.counts for window in windows])),
            documents=torch.from_numpy(documents if self.reset else np.zeros_like(documents)),
            reset=self.reset,
            sample=torch.from_numpy(numbers),
            step=0,
        )
