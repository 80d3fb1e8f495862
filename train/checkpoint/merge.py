"""The weighted mean of several checkpoints of one model: weights and buffers, among them the routers' biases, and no optimizer state.

Where a checkpoint holds an fp32 master of a weight, the masters are averaged. Sums are taken in fp64 and rounded once, to the dtype the weight is
stored in. One file is made at a time, so memory holds no more than a file and a box of each checkpoint, however large the model is.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from train.checkpoint.boxes import Box
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.parts import Part
from train.checkpoint.plan import Plan
from train.checkpoint.reader import Checkpoint
from train.checkpoint.remote import Location
from train.checkpoint.state import MASTER, MODEL
from train.checkpoint.writer import GIBIBYTE, begin


def merge(checkpoints: Sequence[Checkpoint], weights: Sequence[float], directory: Location, *, shard_bytes: int = GIBIBYTE) -> Location:
    """Writes the mean as a checkpoint of the last one's step under `directory`; returns its path.

    weights: one for each checkpoint, positive; only their ratios count. Every rank of the default process group calls this, and the first one
    does the work. Raises CheckpointError where the checkpoints are not of one model, or hold whole numbers that differ.
    """
    last = max(checkpoints, key=lambda checkpoint: checkpoint.step)
    names = _common_names(checkpoints)
    parts = []
    for name in names:
        stored = last.stored(name)
        empty = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        parts.append(Part(name, stored.shape, Box((0,) * len(stored.shape), stored.shape), empty))
    merged = [{"checkpoint": str(c.path), "step": c.step, "weight": weight} for c, weight in zip(checkpoints, weights, strict=True)]
    draft = begin(directory, last.step, parts, {"merged_from": merged}, tokens=last.tokens, shard_bytes=shard_bytes)
    draft.commit(lambda: draft.write(_means(draft.plan, draft.rank, checkpoints, weights)))
    return draft.final


def _common_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    first = checkpoints[0]
    names = [name for name in first.names() if name.startswith(f"{MODEL}/")]
    for other in checkpoints[1:]:
        theirs = [name for name in other.names() if name.startswith(f"{MODEL}/")]
        if different := set(names) ^ set(theirs):
            raise CheckpointError(f"{first.path} and {other.path} are not of one model: only one of them holds {min(different)}")
        for name in names:
            a, b = first.stored(name), other.stored(name)
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise CheckpointError(
                    f"{first.path} and {other.path} are not of one model: {name} is {a.dtype} {list(a.shape)} in one and {b.dtype} "
                    f"{list(b.shape)} in the other"
                )
    if not names:
        raise CheckpointError(f"{first.path} holds no weights")
    return names


def _means(plan: Plan, rank: int, checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Iterator[Tensor]:
    """What this rank writes, in the order of the plan, each made when it is asked for."""
    for entries in plan.files[rank].values():
        for entry in entries:
            name, dtype, shape, _ = plan.descriptions[rank][entry.index]
            yield _mean(name, shape, dtype, entry.box, checkpoints, weights)


def _mean(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, box: Box, checkpoints: Sequence[Checkpoint], weights: Sequence[float]
) -> Tensor:
    master = f"{MASTER}/{name.removeprefix(f'{MODEL}/')}"
    source = master if all(master in checkpoint.manifest.tensors for checkpoint in checkpoints) else name
    values = (_read(checkpoint, source, box) for checkpoint in checkpoints)
    if not dtype.is_floating_point:
        first, *others = values
        if any(not torch.equal(first, other) for other in others):
            raise CheckpointError(f"{name} holds whole numbers that differ between the checkpoints, so they have no mean")
        return first
    total = torch.zeros(box.shape, dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        total.add_(value.double(), alpha=weight)
    return total.div_(sum(weights)).to(dtype)


def _read(checkpoint: Checkpoint, name: str, box: Box) -> Tensor:
    stored = checkpoint.stored(name)
    values = torch.empty(box.shape, dtype=stored.dtype)
    checkpoint.load_into([Part(name, stored.shape, box, values)])
    return values
