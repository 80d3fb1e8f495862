"""Rectangular parts of tensors: what a rank holds of a global tensor, and what a file holds of it.

A box is a corner and a shape. Everything a layout does to a tensor ends in boxes: tensor and expert parallelism cut
rectangles to begin with, and the distributed optimizer's shard, a range of the flattened tensor, is a few of them.
In two dimensions:

    . . a a      [2, 11) of a 3 x 4 tensor is at most three boxes:
    b b b b      the end of the first row (a), the whole rows (b)
    c c c .      and the beginning of the last row (c); n dimensions give at most 2n - 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """The elements `offset[d] <= i[d] < offset[d] + shape[d]` of a tensor. A scalar is `Box((), ())`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes this box out of the tensor it lies in."""
        return tuple(slice(a, b) for a, b in zip(self.offset, self.end, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The elements in both, or None if there are none."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(b - a for a, b in zip(start, map(min, self.end, other.end), strict=True))
        return None if any(s <= 0 for s in shape) else Box(start, shape)

    def within(self, outer: "Box") -> "Box":
        """The same elements counted from the corner of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)

    def minus(self, other: "Box") -> list["Box"]:
        """The elements of this box that are not in `other`, as disjoint boxes."""
        common = self.intersect(other)
        if common is None:
            return [self]
        rest = []
        low, high = list(self.offset), list(self.end)
        for d in range(len(low)):
            for a, b in ((low[d], common.offset[d]), (common.end[d], high[d])):
                if a < b:
                    corner, stop = [*low[:d], a, *low[d + 1 :]], [*high[:d], b, *high[d + 1 :]]
                    rest.append(Box(tuple(corner), tuple(q - p for p, q in zip(corner, stop, strict=True))))
            low[d], high[d] = common.offset[d], common.end[d]
        return rest

    def split(self, elements: int) -> Iterator["Box"]:
        """This box cut along its first dimension into parts of at most `elements` elements; a row is never cut."""
        if self.elements <= elements or not self.shape:
            yield self
            return
        rows = max(1, elements // prod(self.shape[1:]))
        for a in range(0, self.shape[0], rows):
            height = min(rows, self.shape[0] - a)
            yield Box((self.offset[0] + a, *self.offset[1:]), (height, *self.shape[1:]))


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[Box, int]]:
    """The range [start, stop) of a flattened row-major tensor as boxes in order, each with its first flat index.

    Every box is contiguous in the flattened tensor, so `flat[first : first + box.elements].view(box.shape)` is its
    content.
    """
    if start >= stop:
        return []
    if len(shape) == 0:
        return [(Box((), ()), 0)]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows are [first, last)
    if first > last:  # the range lies within one row
        return _in_row(shape, last, start, stop)
    boxes = _in_row(shape, first - 1, start, first * row)
    if first < last:
        boxes.append((Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])), first * row))
    return boxes + _in_row(shape, last, last * row, stop)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[tuple[Box, int]]:
    base = row * prod(shape[1:])
    inner = flat_boxes(shape[1:], start - base, stop - base)
    return [(Box((row, *box.offset), (1, *box.shape)), first + base) for box, first in inner]


def tiling_error(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """None if the boxes cover a tensor of this shape exactly once, else what is wrong, as the end of a sentence.

    Sweeps the first dimension: between two neighbouring box edges the boxes present must tile the remaining dimensions.
    """
    for box in boxes:
        lies = len(box.offset) == len(box.shape) == len(shape)
        if not lies or any(a < 0 or s < 1 or a + s > n for a, s, n in zip(box.offset, box.shape, shape, strict=True)):
            return f"has a part at {box.offset} of shape {box.shape} that does not lie in its shape {tuple(shape)}"
    missing = prod(shape) - sum(box.elements for box in boxes)
    if missing > 0:
        return f"lacks {missing} of its {prod(shape)} elements"
    if missing < 0:
        return f"has {-missing} elements stored more than once"
    return None if _tiles(tuple(shape), [(box.offset, box.end) for box in boxes]) else "has parts that overlap"


def _tiles(shape: tuple[int, ...], spans: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    if sum(prod(b - a for a, b in zip(low, high, strict=True)) for low, high in spans) != prod(shape):
        return False
    if len(spans) <= 1:
        return True  # the right number of elements within bounds
    if not shape:
        return False
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for i, (low, high) in enumerate(spans):
        starts.setdefault(low[0], []).append(i)
        ends.setdefault(high[0], []).append(i)
    present: set[int] = set()
    edges = sorted(starts.keys() | ends.keys())
    for edge in edges[:-1]:
        present.difference_update(ends.get(edge, ()))
        present.update(starts.get(edge, ()))
        if not _tiles(shape[1:], [(spans[i][0][1:], spans[i][1][1:]) for i in present]):
            return False
    return True
