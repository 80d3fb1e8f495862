"""Which window of which source is sample i: a pure function of the seed and i.

A phase is cut into blocks of 1024 samples, and block b has slots m = 0 ... 1023. A slot belongs to the source into whose share of the line
[0, 1), by cumulative weight, the point (m + offset_b) / 1024 falls; the slots of a block are then put in an order of their own. So a block
is exact to one sample per source. The offsets run through all multiples of 1 / 16384 below 1, in steps close to the golden section, so over
16384 blocks the blend is exact to one sample in 16.8 million; and the number of samples a source has given before any block, its cursor, is
a table of one period and a multiplication.

Phases follow one another; a source's cursor goes on from one to the next. A source's windows are visited in a keyed order, a new one every
epoch. Nothing depends on the length of the run, the batch size or the number of ranks, and a phase appended at the end changes nothing before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.documents import DataError
from data.hashing import digest, permuted, shuffled

BLOCK = 1024
PERIOD = 16384  # blocks
STRIDE = 10125  # odd, and close to PERIOD times the golden section: successive offsets spread evenly
UNIT = BLOCK * PERIOD  # weights are shares of this many


@dataclass(frozen=True)
class Phase:
    """weights: of every source of the run, zeros allowed; samples: how many, or None for no end."""

    weights: tuple[float, ...]
    samples: int | None


class _Blend:
    """Slots of one phase."""

    def __init__(self, weights: Sequence[float]):
        cumulative = np.cumsum(np.asarray(weights, dtype=np.float64))
        self.edges = np.rint(cumulative / cumulative[-1] * UNIT).astype(np.int64)
        offsets = np.arange(PERIOD, dtype=np.int64) * STRIDE % PERIOD
        # Slots m with m * PERIOD + offset below an edge.
        below = (self.edges[None, :] - offsets[:, None] + PERIOD - 1) // PERIOD
        counts = np.diff(below, axis=1, prepend=0)
        self.before = np.concatenate((np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)))

    def before_block(self, block: int) -> np.ndarray:
        """Samples of each source in the blocks before `block`."""
        periods, rest = divmod(block, PERIOD)
        return periods * self.before[PERIOD] + self.before[rest]

    def source_of(self, block: int, slots: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, slots * PERIOD + block * STRIDE % PERIOD, side="right")


class Order:
    """sizes: windows of every source of the run, in the order in which phases first name them."""

    def __init__(self, phases: Sequence[Phase], sizes: Sequence[int], seed: int):
        self.phases, self.sizes, self.seed = tuple(phases), tuple(sizes), seed
        self._blends = [_Blend(phase.weights) for phase in phases]
        self._sources = lru_cache(maxsize=64)(self._draw)
        self._epoch_key = lru_cache(maxsize=1024)(self._draw_key)
        self.starts = [0]
        self._base = [np.zeros(len(self.sizes), dtype=np.int64)]
        for index, phase in enumerate(phases[:-1]):
            if phase.samples is None:
                raise DataError(f"data.phases[{index}].tokens is missing: only the last phase may go on until the end")
            self.starts.append(self.starts[-1] + phase.samples)
            self._base.append(self._base[-1] + self._counts(index, phase.samples))
        last = phases[-1].samples
        self.samples = None if last is None else self.starts[-1] + last

    def _draw(self, phase: int, block: int) -> np.ndarray:
        """Source of every sample of a block."""
        slots = shuffled(digest(self.seed, "blend", phase, block), BLOCK)
        return self._blends[phase].source_of(block, slots)

    def _draw_key(self, source: int, epoch: int) -> int:
        return digest(self.seed, "windows", source, epoch)

    def _counts(self, phase: int, samples: int) -> np.ndarray:
        """Samples of each source among the first `samples` of a phase."""
        block, rest = divmod(samples, BLOCK)
        within = np.bincount(self._sources(phase, block)[:rest], minlength=len(self.sizes))
        return self._blends[phase].before_block(block) + within

    def cursor(self, index: int) -> tuple[int, int]:
        """(source, how many samples it has given before) of sample `index`. Raises DataError beyond the last phase."""
        if index < 0:
            raise DataError(f"sample {index} does not exist: samples are counted from 0")
        if self.samples is not None and index >= self.samples:
            raise DataError(
                f"sample {index} lies beyond data.phases, which end after {self.samples} samples: lengthen the last phase, or set its tokens "
                "to null"
            )
        phase = max(p for p, start in enumerate(self.starts) if start <= index)
        block, place = divmod(index - self.starts[phase], BLOCK)
        sources = self._sources(phase, block)
        source = int(sources[place])
        before = int(self._base[phase][source]) + int(self._blends[phase].before_block(block)[source])
        return source, before + int(np.count_nonzero(sources[:place] == source))

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, window) of sample `index`."""
        source, given = self.cursor(index)
        epoch, place = divmod(given, self.sizes[source])
        return source, permuted(place, self.sizes[source], self._epoch_key(source, epoch))
