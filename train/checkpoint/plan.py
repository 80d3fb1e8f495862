"""Who writes which boxes into which files: one plan, the same on every rank, made from descriptions and never from values.

A box held by several ranks is written by the lowest one. Should ranks hold boxes that overlap without being equal (the embedding of the first
and the last pipeline stage, sharded differently by their optimizers), the higher rank writes what is left of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from train.checkpoint.boxes import Box
from train.checkpoint.manifest import DTYPE_NAMES, CheckpointError, StoredPart, StoredTensor, check_tiling
from train.checkpoint.parts import Part

Description = tuple[str, torch.dtype, tuple[int, ...], Box]
"""of a part: name, dtype, global shape, box"""


def describe(part: Part) -> Description:
    """Raises CheckpointError for what the format cannot hold."""
    if part.tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {part.name} has dtype {part.tensor.dtype}, which the format does not store")
    if tuple(part.tensor.shape) != part.box.shape:
        raise CheckpointError(f"tensor {part.name} has a part of shape {tuple(part.tensor.shape)} in a box of shape {part.box.shape}")
    return part.name, part.tensor.dtype, part.shape, part.box


@dataclass(frozen=True)
class Entry:
    """A box that is written: entry `key` of a file; index: of the part it is cut from, among those of the rank that writes."""

    index: int
    box: Box
    key: str


@dataclass(frozen=True)
class Plan:
    """descriptions: of every rank's parts; shard_bytes: size limit of a file, a larger tensor is cut along its first dimension."""

    descriptions: Sequence[Sequence[Description]]
    shard_bytes: int

    @cached_property
    def files(self) -> list[dict[str, list[Entry]]]:
        """What each rank writes, by file."""
        return [self._files(rank, owned) for rank, owned in enumerate(owned_boxes(self.descriptions))]

    def _files(self, rank: int, owned: Sequence[tuple[int, Box]]) -> dict[str, list[Entry]]:
        shards: list[list[tuple[int, Entry]]] = []
        room = 0
        for index, whole in owned:
            name, dtype, shape, _ = self.descriptions[rank][index]
            for box in whole.split(max(1, self.shard_bytes // dtype.itemsize)):
                size = box.elements * dtype.itemsize
                if size > room or not shards:
                    shards.append([])
                    room = self.shard_bytes
                shards[-1].append((dtype.itemsize, Entry(index, box, _key(name, shape, box))))
                room -= size
        # Wider dtypes first keep every tensor aligned to its own width, as the format's own writer does.
        return {
            f"rank-{rank:05d}-{number:03d}.safetensors": [entry for _, entry in sorted(shard, key=lambda sized: -sized[0])]
            for number, shard in enumerate(shards)
        }

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What the manifest says of the tensors. Raises CheckpointError where ranks disagree, or their boxes do not tile a tensor."""
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for descriptions in self.descriptions:
            for name, dtype, shape, _ in descriptions:
                if kinds.setdefault(name, (dtype, shape)) != (dtype, shape):
                    raise CheckpointError(f"ranks disagree about tensor {name}: {kinds[name]} and {(dtype, shape)}")
        places: dict[str, list[StoredPart]] = {name: [] for name in kinds}
        for rank, files in enumerate(self.files):
            for file, entries in files.items():
                for entry in entries:
                    places[self.descriptions[rank][entry.index][0]].append(StoredPart(entry.box, file, entry.key))
        tensors = {name: StoredTensor(*kinds[name], tuple(sorted(parts, key=lambda part: part.box))) for name, parts in places.items()}
        check_tiling(tensors)
        return tensors


def owned_boxes(plan: Sequence[Sequence[Description]]) -> list[list[tuple[int, Box]]]:
    """Who writes what: for each rank a list of (index of its part, box within that part), disjoint over all ranks."""
    first: dict[tuple[str, Box], tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, descriptions in enumerate(plan):
        for index, (name, _, shape, box) in enumerate(descriptions):
            shapes[name] = shape
            first.setdefault((name, box), (rank, index))
    boxes: dict[str, list[tuple[Box, int, int]]] = {name: [] for name in shapes}
    for (name, box), (rank, index) in first.items():
        boxes[name].append((box, rank, index))
    owned: list[list[tuple[int, Box]]] = [[] for _ in plan]
    for name, holders in boxes.items():
        overlapping = sum(box.elements for box, _, _ in holders) > Box((), shapes[name]).elements
        taken: list[Box] = []
        for box, rank, index in holders:
            rest = [box]
            if overlapping:
                for other in taken:
                    rest = [r for b in rest for r in b.minus(other)]
                taken.append(box)
            owned[rank].extend((index, b) for b in rest)
    return owned


def _key(name: str, shape: tuple[int, ...], box: Box) -> str:
    if box.shape == shape:
        return name
    return f"{name}[{', '.join(f'{a}:{b}' for a, b in zip(box.offset, box.end, strict=True))}]"
