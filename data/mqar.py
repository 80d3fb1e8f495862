"""Multi-query associative recall: a list of keys and values, then the keys again, each to be answered with its value.

    k1 v1 k2 v2 ... kP vP | x x k2 x x x x x k1 x ...
                                ^            ^            the loss counts here alone, the targets are v2 and v1

The task of Arora, Eyuboglu et al. 2023, "Zoology: Measuring and improving recall in efficient language models" (arXiv 2312.04927), whose code
calls it multiquery_ar. Of V ids, keys are drawn from 1 ... V/2 - 1 and values from V/2 ... V - 1, neither twice in a sequence. Behind the
pairs lie (length - 2 pairs) / 2 places of two tokens; each key is asked once, at the first token of a place of its own. Place i, counted from 1,
has the weight 0.01 i^(0.01 - 1): places are drawn one after another by weight, without those already taken. All else (x) is drawn from all V ids,
so it may be a key or a value by chance; what follows a query is such a token and never the answer.

A sequence is a function of 64 bits. Places are drawn as the order of exponential variables with rates as the weights, which is that of successive
draws (Efraimidis and Spirakis 2006).
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.batch import Sample
from data.documents import DataError
from data.hashing import mix_range

PREFIX = "mqar:"
POWER = 0.01
STREAM = 1 << 48  # words of one kind of draw of a sequence


@dataclass(frozen=True)
class MQAR:
    """length: tokens of a sequence; pairs: of keys and values in it; vocab_size: V."""

    length: int
    pairs: int
    vocab_size: int

    @classmethod
    def of(cls, path: str, vocab_size: int) -> "MQAR":
        """From `mqar:LENGTHxPAIRS`. Raises DataError for another spelling and for what no sequence can hold."""
        match = re.fullmatch(r"mqar:([1-9]\d*)x([1-9]\d*)", path)
        if match is None:
            raise DataError(f"data source {path!r} is no task of recall: write its length and its pairs, for instance mqar:64x4")
        made = cls(int(match[1]), int(match[2]), vocab_size)
        if problem := made.problem():
            raise DataError(f"data source {path!r} {problem}")
        return made

    def problem(self) -> str:
        """Why there are no such sequences; empty: there are."""
        if self.length % 2 or 4 * self.pairs > self.length:
            return f"cannot hold {self.pairs} pairs and as many queries: a sequence needs an even length of at least 4 tokens a pair"
        if self.vocab_size <= self.length or self.vocab_size // 2 <= self.pairs:
            return f"needs more ids than the {self.vocab_size} there are: use a tokenizer with more than {max(self.length, 2 * self.pairs + 1)}"
        return ""

    @cached_property
    def rates(self) -> np.ndarray:
        """Of the places a query may have: float64 [(length - 2 pairs) / 2]."""
        places = np.arange(1, (self.length - 2 * self.pairs) // 2 + 1, dtype=np.float64)
        return POWER * places ** (POWER - 1)

    def draw(self, key: int, length: int) -> Sample:
        """The sequence of these 64 bits. length: its own."""
        half, context = self.vocab_size // 2, 2 * self.pairs
        tokens = _integers(key, length, self.vocab_size)
        keys = 1 + _distinct(key + STREAM, self.pairs, half - 1)
        values = half + _distinct(key + 2 * STREAM, self.pairs, self.vocab_size - half)
        uniform = ((mix_range(key + 3 * STREAM, len(self.rates)) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        queries = context + 2 * np.argsort(-np.log(uniform) / self.rates, kind="stable")[: self.pairs]
        tokens[0:context:2], tokens[1:context:2], tokens[queries] = keys, values, keys
        labels, counts = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=bool)
        labels[queries], counts[queries] = values, True
        return Sample(tokens, labels, counts, np.zeros(length, dtype=np.int32))


def _integers(key: int, count: int, below: int) -> np.ndarray:
    """Uniform in 0 ... below - 1 (to 1 in 2^40): int64 [count]."""
    return (mix_range(key, count) % np.uint64(below)).astype(np.int64)


def _distinct(key: int, count: int, below: int) -> np.ndarray:
    """The first `count` different ones of such integers, in the order in which they come."""
    tried = 2 * count
    while True:
        drawn = _integers(key, tried, below)
        firsts = np.sort(np.unique(drawn, return_index=True)[1])
        if len(firsts) >= count:
            return drawn[firsts[:count]]
        tried *= 2
