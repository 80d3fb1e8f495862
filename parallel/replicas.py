"""Do all ranks that hold the same part of a tensor hold the same bits?

Losses can agree to seven digits while replicas drift apart (a gradient that skipped a group moves the loss of twenty steps by 1e-4), and a bit
that flips in one replica's memory shows in no loss at all. So this compares the tensors themselves, over whatever groups share them:
data-parallel replicas and ranks that split sequences, norms and routers replicated over the tensor group, experts, the two copies of the embedding.

    `differing_replicas`   the parameters and buffers of a model's chunks, every rank with every rank: for tests
    `compare_replicas`     what a run does now and then: parameters, buffers, masters and optimizer state, within the groups that share them

The digest is computed where the tensor lies: its bits as integers, each times an odd number that depends on its place, summed modulo 2^64 (in two
ways). The sum does not depend on its order, and one flipped bit always changes it. Cost: every byte is read once, and as eight bytes an element
passed through memory some ten times, so 10 GB of bf16 weights and fp32 state should take a GPU of 5 TB/s some 0.1 s (reckoned); only 24 bytes a
tensor are exchanged: for 5,000 tensors in a group of 64 ranks 8 MB received by each. Every 500 steps of ten seconds, that is less than 0.01 % of a
run.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine import ParameterState
from parallel.layout import Layout
from parallel.shards import pieces_of

CHUNK = 1 << 20  # elements digested at a time
ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0xC2B2AE3D27D4EB4F - (1 << 64))  # of splitmix64 and xxHash64: as good as any

Key = tuple[str, tuple[int, ...], tuple[int, ...]]
"""(name, offset, shape) of a part of a tensor."""
Digest = tuple[int, int]


def digest(tensor: Tensor) -> Digest:
    """Two 64-bit sums over the bits of `tensor`."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), CHUNK):
        values = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(values), dtype=torch.int64, device=flat.device)
        for index, odd in enumerate(ODD):
            sums[index] += (values * ((places * odd) << 1 | 1)).sum()
    first, second = sums.tolist()
    return first, second


@dataclass(frozen=True)
class Mismatch:
    """A part of `tensor` that ranks hold with different bits. ranks: all that hold it; odd: those that most others contradict, empty where there is
    no majority."""

    tensor: str
    ranks: tuple[int, ...]
    odd: tuple[int, ...]

    def sentence(self) -> str:
        """For a person."""
        held = ", ".join(map(str, self.ranks))
        if not self.odd:
            return f"{self.tensor} differs between ranks {held}, of which no majority agrees"
        return f"{self.tensor} on rank{'s' * (len(self.odd) > 1)} {', '.join(map(str, self.odd))} differs from most of ranks {held}"


def compare_replicas(chunks: Iterable[nn.Module], states: Iterable[ParameterState], layout: Layout) -> list[Mismatch]:
    """What differs, the same list on every rank; empty when all is well. Collective."""
    if layout.world_size == 1:
        return []
    mine = dict(_digests(chunks, states))
    found: dict[Key, dict[int, Digest]] = {}
    for group in (layout.groups.dp_cp, layout.groups.expt_dp, layout.groups.tp, layout.groups.pp):
        members = dist.get_process_group_ranks(group)
        if len(members) == 1:
            continue
        everyone: list[dict[int, Digest]] = [{} for _ in members]
        dist.all_gather_object(everyone, {_number(key): value for key, value in mine.items()}, group=group)
        for key, own in mine.items():
            held = {rank: other[_number(key)] for rank, other in zip(members, everyone, strict=True) if _number(key) in other}
            if any(value != own for value in held.values()):
                found.setdefault(key, {}).update(held)
    some = torch.tensor(int(bool(found)), device=layout.device)
    dist.all_reduce(some, op=dist.ReduceOp.MAX)
    if not some.item():
        return []
    reports: list[dict[Key, dict[int, Digest]]] = [{} for _ in range(layout.world_size)]
    dist.all_gather_object(reports, found)
    together: dict[Key, dict[int, Digest]] = {}
    for report in reports:
        for key, held in report.items():
            together.setdefault(key, {}).update(held)
    return [_mismatch(key, held) for key, held in sorted(together.items())]


def _mismatch(key: Key, held: dict[int, Digest]) -> Mismatch:
    ((most, votes),) = Counter(held.values()).most_common(1)
    odd = tuple(sorted(rank for rank, value in held.items() if value != most)) if 2 * votes > len(held) else ()
    return Mismatch(key[0], tuple(sorted(held)), odd)


def _number(key: Key) -> int:
    """A key as 8 bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _digests(chunks: Iterable[nn.Module], states: Iterable[ParameterState]) -> Iterator[tuple[Key, Digest]]:
    for chunk in chunks:
        for tensor in (*chunk.parameters(), *(b for b in chunk.buffers() if pieces_of(b))):
            for piece in pieces_of(tensor):
                yield (piece.name, piece.offset, tuple(tensor[piece.local].shape)), digest(tensor[piece.local])
    for state in states:
        kept = {**state.tensors, **({} if state.master is None else {"master": state.master})}
        for name, tensor in kept.items():
            if state.flat_range is not None:  # a sharded optimizer's: of a flattened parameter
                first = pieces_of(state.param)[0]
                yield (f"{name} of {first.name}", first.offset, state.flat_range), digest(tensor)
                continue
            for piece in pieces_of(state.param):
                yield (f"{name} of {piece.name}", piece.offset, tuple(tensor[piece.local].shape)), digest(tensor[piece.local])


def differing_replicas(*chunks: nn.Module) -> list[str]:
    """Names of stored tensors of which two ranks hold the same part with different bits; collective, the same list on every rank.

    Parts are compared by name, offset and shape: every parameter and persistent buffer must carry Pieces.
    """
    mine: dict[Key, Digest] = {}
    different = set()
    for key, own in _digests(chunks, ()):
        if mine.setdefault(key, own) != own:
            different.add(key[0])
    everyone: list[dict[Key, Digest]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    seen: dict[Key, Digest] = {}
    for held in everyone:
        for key, value in held.items():
            if seen.setdefault(key, value) != value:
                different.add(key[0])
    return sorted(different)
