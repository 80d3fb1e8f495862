"""Which window of which source is sample i: a pure function of the seed and i.

Samples are cut into blocks of 1024. Inside block b the slots m = 0 ... 1023 are put in a seeded order, and the slot in place decides the source
by where (m + offset_b) / 1024 falls among the cumulative weights, with offset_b in [0, 1). How many slots of a block fall on a source is a
closed form, so the number of samples a source has given before sample i, its cursor, needs no walk through the samples. Over a block the
blend is exact to one sample per source; over many, the offsets even that out.

Phases follow one another; a source's cursor goes on from one to the next. A source's windows are visited in a keyed order, a new one every
epoch. Nothing depends on the length of the run, the batch size or the number of ranks, and a phase appended at the end changes nothing before.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 1024
GOLDEN = (math.sqrt(5) - 1) / 2


def digest(*parts: object) -> int:
    """64 bits that depend on every part."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def permuted(index: int, size: int, *key: object) -> int:
    """Where a keyed permutation of 0 ... size - 1 sends `index`: a Feistel network, walked until it lands inside."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(6):
            left, right = right, left ^ (digest(*key, round_, right) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class Phase:
    """weights: of every source of the run, zeros allowed; samples: how many, or None for no end."""

    weights: tuple[float, ...]
    samples: int | None


class Order:
    """sizes: windows of every source. names: of the sources, which key their epochs."""

    def __init__(self, phases: Sequence[Phase], sizes: Sequence[int], names: Sequence[str], seed: int):
        self.phases, self.sizes, self.names, self.seed = tuple(phases), tuple(sizes), tuple(names), seed
        self._edges = [np.cumsum(np.asarray(phase.weights) / sum(phase.weights)) for phase in phases]
        for edges in self._edges:
            edges[-1] = 1.0
        self._cumulative: list[np.ndarray] = [np.zeros((1, len(self.sizes)), dtype=np.int64) for _ in phases]
        self._slots = lru_cache(maxsize=64)(self._draw_slots)
        self.starts = [0]
        self.base = [np.zeros(len(self.sizes), dtype=np.int64)]
        for index, phase in enumerate(phases[:-1]):
            assert phase.samples is not None
            self.starts.append(self.starts[-1] + phase.samples)
            self.base.append(self.base[-1] + self._counts(index, phase.samples))

    def _offset(self, block: np.ndarray | int) -> np.ndarray | float:
        return (block * GOLDEN) % 1.0

    def _before_block(self, phase: int, block: int) -> np.ndarray:
        """Samples of each source in the blocks before `block` of a phase."""
        known = self._cumulative[phase]
        if block >= len(known):
            more = np.arange(len(known) - 1, max(block, 2 * len(known)))
            # Slots m with m + offset < edge * BLOCK, for every block and edge.
            below = np.ceil(self._edges[phase][None, :] * BLOCK - np.asarray(self._offset(more))[:, None]).clip(0, BLOCK)
            counts = np.diff(below, axis=1, prepend=0).astype(np.int64)
            known = np.concatenate((known, known[-1] + np.cumsum(counts, axis=0)))
            self._cumulative[phase] = known
        return known[block]

    def _draw_slots(self, phase: int, block: int) -> np.ndarray:
        """Source of every sample of a block."""
        generator = np.random.Generator(np.random.Philox(digest(self.seed, "blend", phase, block)))
        slots = generator.permutation(BLOCK)
        return np.searchsorted(self._edges[phase] * BLOCK, slots + self._offset(block), side="right")

    def _counts(self, phase: int, samples: int) -> np.ndarray:
        """Samples of each source among the first `samples` of a phase."""
        block, rest = divmod(samples, BLOCK)
        within = np.bincount(self._slots(phase, block)[:rest], minlength=len(self.sizes)) if rest else 0
        return self._before_block(phase, block) + within

    def cursor(self, index: int) -> tuple[int, int]:
        """(source, how many samples it has given before) of sample `index`."""
        phase = max(p for p, start in enumerate(self.starts) if start <= index)
        within = index - self.starts[phase]
        limit = self.phases[phase].samples
        if limit is not None and within >= limit:
            raise IndexError(
                f"sample {index} lies beyond data.phases, which end after {self.starts[phase] + limit} samples: lengthen the last phase, or "
                "set its tokens to null"
            )
        block, place = divmod(within, BLOCK)
        slots = self._slots(phase, block)
        source = int(slots[place])
        given = self.base[phase][source] + self._before_block(phase, block)[source] + int((slots[:place] == source).sum())
        return source, int(given)

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, window) of sample `index`."""
        source, given = self.cursor(index)
        epoch, place = divmod(given, self.sizes[source])
        return source, permuted(place, self.sizes[source], self.seed, self.names[source], epoch)
