"""Pairs of a word and a value, listed and then again in another order, in bytes: practice for recalling what many bytes stand for.

    meadow: 2291846. lantern: 5820137.       no one can know these values
    lantern: 5820137. meadow: 2291846.       the loss counts at the values here alone

A text has an answer every thirty bytes where a needle in a haystack (`data.needle`) has one at its end, so that a model that learns from nothing
finds here in some hundred steps what it does not find there.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.batch import Sample
from data.documents import DataError
from data.hashing import mix_range
from data.needle import LONGEST, Draws, novels

PREFIX = "pairs:"


@dataclass(frozen=True)
class Pairs:
    """kind: of the values, number (seven digits) or uuid. length: bytes of a text, as many pairs as it holds twice."""

    kind: str
    length: int

    @classmethod
    def of(cls, path: str) -> "Pairs":
        """From `pairs:KIND:LENGTH`. Raises DataError for another spelling and for what no text can hold."""
        match = re.fullmatch(r"pairs:(number|uuid):([1-9]\d*)", path)
        if match is None:
            raise DataError(
                f"data source {path!r} is no practice with pairs: write number or uuid and the bytes of a text, for instance pairs:number:128"
            )
        made = cls(match[1], int(match[2]))
        if made.length < made.shortest:
            raise DataError(f"data source {path!r} cannot hold a pair twice: use at least {PREFIX}{made.kind}:{made.shortest}")
        return made

    @cached_property
    def shortest(self) -> int:
        """Bytes of a text of the longest word, without the first, which is of no target."""
        return 2 * len(_line("x" * max(map(len, novels().words)), "x" * LONGEST[self.kind])) - 1

    def draw(self, key: int, length: int) -> Sample:
        """A text of `length` bytes as ids, line ends before it where the pairs do not fill it."""
        draws, words = Draws(key), novels().words
        pairs: dict[str, str] = {}
        room = (length + 1) // 2
        while True:
            word, value = words[draws.below(len(words))], draws.uuid() if self.kind == "uuid" else draws.number()
            if (room := room - len(_line(word, value))) < 0:
                break
            pairs.setdefault(word, value)
        again = [list(pairs.items())[place] for place in np.argsort(mix_range(key, len(pairs)), kind="stable")]
        text, counts = "".join(_line(*pair) for pair in pairs.items()), []
        counts.append(np.zeros(len(text), dtype=bool))
        for word, value in again:
            text += _line(word, value)
            counts.append(np.concatenate((np.zeros(len(word) + 2, dtype=bool), np.ones(len(value), dtype=bool), np.zeros(2, dtype=bool))))
        ids = np.frombuffer(text.rjust(length + 1, "\n").encode("ascii"), dtype=np.uint8).astype(np.int64)
        counted = np.concatenate((np.zeros(length + 1 - len(text), dtype=bool), *counts))[1:]
        return Sample(ids[:-1].copy(), ids[1:].copy(), counted, np.zeros(length, dtype=np.int32))


def _line(word: str, value: str) -> str:
    return f"{word}: {value}. "
