"""Pairs of a word and a value, listed and then again in another order, in bytes: practice for recalling what many bytes stand for.

    meadow: 2291846. lantern: 5820137.       no one can know these values
    lantern: 5820137. meadow: 2291846.       the loss counts at the values here alone

    lantern mentioned in the pro: 5820137. meadow ment: 2291846.       `apart`: the second time

A text has an answer every thirty bytes where a needle in a haystack (`data.needle`) has one at its end, so that a model that learns from nothing
finds here in some hundred steps what it does not find there. In the question for a needle the key stands 35 bytes before its value, which is to be
learnt where it may be any number of bytes, few among them.
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
BETWEEN = " mentioned in the provided text is"
END = ". "


@dataclass(frozen=True)
class Pairs:
    """kind: of the values, number (seven digits) or uuid. length: bytes of a text, as many pairs as it holds twice. apart: a beginning of BETWEEN,
    of any length, parts word and value where they are asked."""

    kind: str
    length: int
    apart: bool = False

    @classmethod
    def of(cls, path: str) -> "Pairs":
        """From `pairs:KIND:LENGTH` or `pairs:KIND:LENGTH:apart`. Raises DataError for another spelling and for what no text can hold."""
        match = re.fullmatch(r"pairs:(number|uuid):([1-9]\d*)(:apart)?", path)
        if match is None:
            raise DataError(
                f"data source {path!r} is no practice with pairs: write number or uuid and the bytes of a text, for instance pairs:number:128 "
                "or pairs:number:128:apart"
            )
        made = cls(match[1], int(match[2]), match[3] is not None)
        if made.length < made.shortest:
            raise DataError(f"data source {path!r} cannot hold a pair twice: use at least {made.shortest} bytes")
        return made

    @cached_property
    def shortest(self) -> int:
        """Bytes of a text of the longest word, without the first, which is of no target."""
        word, value = "x" * max(map(len, novels().words)), "x" * LONGEST[self.kind]
        return len(_listed(word, value)) + len(_asked(word, BETWEEN if self.apart else "", value)) - 1

    def draw(self, key: int, length: int) -> Sample:
        """A text of `length` bytes as ids, line ends before it where the pairs do not fill it."""
        draws, words = Draws(key), novels().words
        pairs: dict[str, tuple[str, str]] = {}
        room = length + 1
        while True:
            word, value = words[draws.below(len(words))], draws.uuid() if self.kind == "uuid" else draws.number()
            between = BETWEEN[: draws.below(len(BETWEEN) + 1)] if self.apart else ""
            room -= len(_listed(word, value)) + len(_asked(word, between, value))
            if room < 0:
                break
            pairs.setdefault(word, (between, value))
        text = "".join(_listed(word, value) for word, (_, value) in pairs.items())
        counts = [np.zeros(len(text), dtype=bool)]
        for place in np.argsort(mix_range(key, len(pairs)), kind="stable"):
            word, (between, value) = list(pairs.items())[place]
            asked = _asked(word, between, value)
            start = len(asked) - len(value) - len(END)
            text += asked
            counts.append((np.arange(len(asked)) >= start) & (np.arange(len(asked)) < start + len(value)))
        ids = np.frombuffer(text.rjust(length + 1, "\n").encode("ascii"), dtype=np.uint8).astype(np.int64)
        counted = np.concatenate((np.zeros(length + 1 - len(text), dtype=bool), *counts))[1:]
        return Sample(ids[:-1].copy(), ids[1:].copy(), counted, np.zeros(length, dtype=np.int32))


def _listed(word: str, value: str) -> str:
    return _asked(word, "", value)


def _asked(word: str, between: str, value: str) -> str:
    return f"{word}{between}: {value}{END}"
