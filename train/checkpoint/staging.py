"""Host memory that takes a true copy of what a rank writes, so that training may go on while the copy is written.

A rank keeps memory for one copy of its share of a checkpoint from save to save; pinned where the tensors are on a GPU, which then copies at the
speed of the bus. There is never a second one: the next save waits until this one's files are on the disk.
"""

import socket
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from train.checkpoint.ranks import exchange

SHARE = 0.5  # of a host's free memory that copies may take by themselves; data loading and page cache live from the rest
ALIGNMENT = 64  # bytes
BLOCK = 1 << 30  # bytes: torch hands pinned memory out in powers of two, so that one large block could take twice its size
CGROUP = Path("/sys/fs/cgroup")


class Staging:
    """`copy` overwrites what the copy before it held."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies of these values in host memory; complete when it returns."""
        sizes: list[int] = []  # of blocks
        places = []
        for tensor in tensors:
            room = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            if not sizes or sizes[-1] + room > BLOCK:
                sizes.append(0)
            places.append((len(sizes) - 1, sizes[-1]))
            sizes[-1] += room
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if sizes != [block.numel() for block in self._blocks]:
            self._blocks = []  # the old ones are given back first
            self._blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for size in sizes]
        copies = []
        with torch.no_grad():
            for (block, offset), tensor in zip(places, tensors, strict=True):
                copy = self._blocks[block][offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies.append(copy.copy_(tensor, non_blocking=True))
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def shortage(mine: int) -> str | None:
    """Why copies of `mine` bytes, this rank's, would not leave enough memory on some host, the same on every rank; None where they would."""
    asked = exchange((socket.gethostname(), mine, free_memory()))
    for host in sorted({name for name, _, _ in asked}):
        needed = sum(size for name, size, _ in asked if name == host)
        free = min(size for name, _, size in asked if name == host)
        if needed > SHARE * free:
            return (
                f"a copy would take {needed / 2**30:.2f} GiB on host {host}, more than {SHARE:.0%} of the {free / 2**30:.2f} GiB of memory that "
                "are free there"
            )
    return None


def free_memory() -> int:
    """Bytes this process may still allocate: the machine's, or what a container or a scheduler's limit leaves of them (cgroup v2)."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            free = min(free, int(limit) - used + int(counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no such limits here
    return max(0, free)
