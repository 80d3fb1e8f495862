"""Documents one after another: what windows of tokens are cut from."""

import os

import numpy as np

from data.documents import DataError


class Stream:
    """Some documents of a flat array of ids, or parts of each, joined in order.

    tokens: ids [any], usually memory-mapped. starts, lengths: int64 [parts], where each part lies in `tokens`. owners: int64 [parts], the
    document a part belongs to; None: every part is a document.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, owners: np.ndarray | None = None):
        self.tokens, self.starts, self.lengths, self.owners = tokens, starts, lengths, owners
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self._unbroken = bool(np.array_equal(starts[1:], starts[:-1] + lengths[:-1]))

    def check(self) -> None:
        """Raises DataError where the file behind the ids has become too short for them: to read them would end the process without a word."""
        if not isinstance(self.tokens, np.memmap) or self.tokens.filename is None:
            return
        try:
            size = os.stat(self.tokens.filename).st_size
        except FileNotFoundError:
            return  # what is mapped outlives its name
        if size < self.tokens.nbytes:
            raise DataError(
                f"data file {self.tokens.filename} has {size} bytes instead of {self.tokens.nbytes}: it was cut short since the run opened it, "
                "restore it, and start the same command again"
            )

    def __len__(self) -> int:
        """Tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def part(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index]]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start` of the stream on."""
        if self._unbroken:
            first = int(self.starts[0]) + start
            return self.tokens[first : first + count]
        result = np.empty(count, dtype=self.tokens.dtype)
        place, index = 0, int(np.searchsorted(self.ends, start, side="right"))
        while place < count:
            piece = self.part(index)[start + place - int(self.ends[index] - self.lengths[index]) :][: count - place]
            result[place : place + len(piece)] = piece
            place, index = place + len(piece), index + 1
        return result

    def ordinals(self, start: int, count: int) -> np.ndarray:
        """Which document each of these positions belongs to, counted from that of the first: int32 [count]."""
        part = np.searchsorted(self.ends, np.arange(start, start + count), side="right")
        document = part if self.owners is None else np.unique(self.owners[part], return_inverse=True)[1]
        return (document - document[0]).astype(np.int32)

    def documents(self, start: int, count: int) -> tuple[int, int]:
        """The first and the last document, by number, that `count` ids from position `start` belong to."""
        parts = np.searchsorted(self.ends, [start, start + count - 1], side="right")
        first, last = parts if self.owners is None else self.owners[parts]
        return int(first), int(last)

    def without_empty(self) -> "Stream | None":
        """The stream without parts of length zero; None where nothing is left."""
        some = self.lengths > 0
        owners = None if self.owners is None else self.owners[some]
        return Stream(self.tokens, self.starts[some], self.lengths[some], owners) if some.any() else None
