"""Count models as a yardstick: what guessing the next token from the last one or two achieves on the same text.

    p3(c | a b) = (n(abc) + m3 p2(c | b)) / (n(ab) + m3)
    p2(c | b)   = (n(bc) + m2 p1(c)) / (n(b) + m2)                p1: add-one

The strengths m2 and m3 (MacKay and Peto 1995, "A hierarchical Dirichlet language model") are chosen on the last tenth of the *training* text
by models of its first nine tenths; the validation text is only scored, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
DENSE = 1 << 25  # keys up to which a table of all of them is faster than sorting (a trigram of bytes: 17 million)


@dataclass(frozen=True)
class CountBaselines:
    """Nats per token on the validation text."""

    bigram: float
    trigram: float


class _Table:
    """How often each of `size` possible keys occurs."""

    def __init__(self, keys: np.ndarray, size: int):
        self.dense = np.bincount(keys, minlength=size) if size <= DENSE else None
        if self.dense is None:
            self.keys, self.counts = np.unique(keys, return_counts=True)

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        if self.dense is not None:
            return self.dense[keys]
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)


class _Counts:
    def __init__(self, text: np.ndarray, vocab: int):
        self.vocab = vocab
        self.unigram = (np.bincount(text, minlength=vocab) + 1.0) / (len(text) + vocab)
        # Contexts are counted where something follows them, so that conditional probabilities sum to one.
        self.one = np.bincount(text[:-1], minlength=vocab)
        pairs = text[:-1] * vocab + text[1:]
        self.pair, self.context = _Table(pairs, vocab**2), _Table(pairs[:-1], vocab**2)
        self.triple = _Table(pairs[:-1] * vocab + text[2:], vocab**3)

    def scores(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
        """n(bc), n(b), p1(c), n(abc), n(ab)."""
        ab = a * self.vocab + b
        return self.pair(b * self.vocab + c), self.one[b], self.unigram[c], self.triple(ab * self.vocab + c), self.context(ab)


def _losses(scores: tuple[np.ndarray, ...], m2: float, m3: float) -> tuple[float, float]:
    bc, b, p1, abc, ab = scores
    p2 = (bc + m2 * p1) / (b + m2)
    p3 = (abc + m3 * p2) / (ab + m3)
    return float(-np.log(p2).mean()), float(-np.log(p3).mean())


def _contexts(documents: Sequence[np.ndarray], end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [np.concatenate(([end, end], document)) for document in documents]
    return tuple(np.concatenate([p[k : len(p) - 2 + k] for p in parts]) for k in range(3))  # type: ignore[return-value]


def count_baselines(text: np.ndarray, documents: Sequence[np.ndarray], vocab: int, end: int) -> CountBaselines:
    """text: training ids; documents: validation ids, each scored from an end-of-document context. vocab: at most 2 million."""
    text = np.asarray(text, dtype=np.int64)
    cut = len(text) * 9 // 10
    held = text[cut:]
    tuning = _Counts(text[:cut], vocab).scores(held[:-2], held[1:-1], held[2:])
    m2 = min(STRENGTHS, key=lambda m: _losses(tuning, m, 1.0)[0])
    m3 = min(STRENGTHS, key=lambda m: _losses(tuning, m2, m)[1])
    bigram, trigram = _losses(_Counts(text, vocab).scores(*_contexts(documents, end)), m2, m3)
    return CountBaselines(bigram, trigram)
