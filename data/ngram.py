"""Count models as a yardstick: what guessing the next token from the last one or two achieves on the same text.

    p3(c | a b) = (n(abc) + m3 p2(c | b)) / (n(ab) + m3)
    p2(c | b)   = (n(bc) + m2 p1(c)) / (n(b) + m2)                p1: add-one

The strengths m2 and m3 are chosen on the last tenth of the *training* text by models of its first nine tenths; the validation text is only
scored, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class CountBaselines:
    """Nats per token on the validation text."""

    bigram: float
    trigram: float


class _Counts:
    def __init__(self, text: np.ndarray, vocab: int):
        text = text.astype(np.int64)
        self.vocab = vocab
        self.unigram = (np.bincount(text, minlength=vocab) + 1.0) / (len(text) + vocab)
        self.one = np.bincount(text[:-1], minlength=vocab)
        self.pairs = np.bincount(text[:-1] * vocab + text[1:], minlength=vocab * vocab)
        keys, self.triple_counts = np.unique((text[:-2] * vocab + text[1:-1]) * vocab + text[2:], return_counts=True)
        self.triples = keys

    def scores(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
        """n(bc), n(b), p1(c), n(abc), n(ab)."""
        key = (a * self.vocab + b) * self.vocab + c
        place = np.searchsorted(self.triples, key).clip(max=len(self.triples) - 1)
        triple = np.where(self.triples[place] == key, self.triple_counts[place], 0)
        return self.pairs[b * self.vocab + c], self.one[b], self.unigram[c], triple, self.pairs[a * self.vocab + b]


def _losses(scores: tuple[np.ndarray, ...], m2: float, m3: float) -> tuple[float, float]:
    bc, b, p1, abc, ab = scores
    p2 = (bc + m2 * p1) / (b + m2)
    p3 = (abc + m3 * p2) / (ab + m3)
    return float(-np.log(p2).mean()), float(-np.log(p3).mean())


def _contexts(documents: Sequence[np.ndarray], end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [np.concatenate(([end, end], document)) for document in documents]
    return tuple(np.concatenate([p[k : len(p) - 2 + k] for p in parts]) for k in range(3))  # type: ignore[return-value]


def count_baselines(text: np.ndarray, documents: Sequence[np.ndarray], vocab: int, end: int) -> CountBaselines:
    """text: training ids; documents: validation ids, each scored from an end-of-document context."""
    text = np.asarray(text, dtype=np.int64)
    cut = len(text) * 9 // 10
    held = text[cut:]
    tuning = _Counts(text[:cut], vocab).scores(held[:-2], held[1:-1], held[2:])
    m2 = min(STRENGTHS, key=lambda m: _losses(tuning, m, 1.0)[0])
    m3 = min(STRENGTHS, key=lambda m: _losses(tuning, m2, m)[1])
    bigram, trigram = _losses(_Counts(text, vocab).scores(*_contexts(documents, end)), m2, m3)
    return CountBaselines(bigram, trigram)
