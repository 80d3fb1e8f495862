"""Do all ranks that hold the same part of a tensor hold the same bits?

Losses can agree to seven digits while replicas drift apart (a gradient that skipped a group moves the loss of twenty steps by 1e-4). So this
compares the parameters themselves, over whatever groups share them: data-parallel replicas, norms and routers replicated over the tensor
group, experts, and the two copies of the embedding.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.shards import pieces_of


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).digest()


def differing_replicas(model: nn.Module) -> list[str]:
    """Names of stored tensors of which two ranks hold the same part with different bits; collective, the same list on every rank.

    Parts are compared by name, offset and shape: every parameter and persistent buffer must carry Pieces.
    """
    mine: dict[tuple[str, tuple[int, ...], tuple[int, ...]], bytes] = {}
    different = set()
    for tensor in (*model.parameters(), *(b for b in model.buffers() if pieces_of(b))):
        for piece in pieces_of(tensor):
            part = tensor[piece.local]
            key = (piece.name, piece.offset, tuple(part.shape))
            if mine.setdefault(key, digest := _digest(part)) != digest:
                different.add(piece.name)
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    seen: dict[tuple, bytes] = {}
    for held in everyone:
        for key, digest in held.items():
            if seen.setdefault(key, digest) != digest:
                different.add(key[0])
    return sorted(different)
