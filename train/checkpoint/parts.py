"""Parts: views of this rank's memory that know which box of which stored tensor they are.

A checkpoint is saved by writing parts and loaded by copying into parts, so both directions share one description of
the layout:

    Part("exp_avg/layers.0.mixer.in_proj.weight", shape=(96, 64), box=Box((48, 0), (48, 64)), tensor=<view [48, 64]>)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from parallel.shards import Piece
from train.checkpoint.boxes import Box, flat_boxes
from train.checkpoint.manifest import CheckpointError


@dataclass(frozen=True)
class Part:
    """A box of the stored tensor `name` of global shape `shape`; `tensor` views the memory it lives in."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


def parts_of(
    kind: str,
    pieces: Sequence[Piece],
    local_shape: Sequence[int],
    tensor: Tensor,
    flat_range: tuple[int, int] | None = None,
) -> Iterator[Part]:
    """The parts of a local tensor whose place in the global tensors `pieces` describe; names become `kind/piece.name`.

    local_shape: shape of the local parameter the pieces refer to.
    tensor: of that shape; or, with `flat_range` = (start, stop), 1-D and contiguous: elements start ... stop - 1 of
        the flattened parameter, as the distributed optimizer keeps them.
    """
    if flat_range is None:
        held = [(Box((0,) * len(local_shape), tuple(local_shape)), tensor)]
    else:
        start, stop = flat_range
        held = [
            (box, tensor[first - start : first - start + box.elements].view(box.shape))
            for box, first in flat_boxes(local_shape, start, stop)
        ]
    for piece in pieces:
        whole, kept = _local_box(piece, local_shape)
        for box, view in held:
            common = box.intersect(whole)
            if common is None:
                continue
            inside = common.within(box).slices
            index = tuple(s if d in kept else s.start for d, s in enumerate(inside))
            corner = common.within(whole).offset
            offset = tuple(o + corner[d] for o, d in zip(piece.offset, kept, strict=True))
            shape = tuple(common.shape[d] for d in kept)
            yield Part(f"{kind}/{piece.name}", tuple(piece.shape), Box(offset, shape), view[index])


def _local_box(piece: Piece, local_shape: Sequence[int]) -> tuple[Box, tuple[int, ...]]:
    """The box of the local tensor that `piece.local` selects, and the dimensions of it that remain (an integer
    index drops one).
    """
    index = (*piece.local, *[slice(None)] * (len(local_shape) - len(piece.local)))
    offset, shape, kept = [], [], []
    for d, (i, n) in enumerate(zip(index, local_shape, strict=True)):
        if isinstance(i, slice):
            start, stop, stride = i.indices(n)
            if stride != 1:
                raise CheckpointError(f"piece {piece.name} has a slice with step {stride}; only contiguous slices are rectangles")
            kept.append(d)
        else:
            start, stop = i, i + 1
        offset.append(start)
        shape.append(stop - start)
    if len(kept) != len(piece.shape) or len(kept) != len(piece.offset):
        raise CheckpointError(
            f"piece {piece.name} selects {len(kept)} dimensions of its parameter for a global tensor of shape {tuple(piece.shape)}"
        )
    return Box(tuple(offset), tuple(shape)), tuple(kept)
