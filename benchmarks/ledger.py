"""What a device did: counted by kind of layer while a step runs on a pretended one.

launches      operations that run on the device; views and allocations are none. Several kernels of one operation count as one
waits         times the host waits for the device
kept          bytes that a kind's forward passes leave behind and that are gone when the backward passes are over
moved         bytes that operations read and write, each of its tensors once
gemm flops    of `mm`, the products of linear layers
seconds       a roofline: of each operation the longest of bytes moved / bandwidth, FLOPs / peak and the time of a launch
peak          the largest sum of all memory that lived at once, in blocks of 512 bytes as torch's allocator has them
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pretended_cuda import place
from parallel.cluster import ClusterConfig

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_SECONDS = 2e-6  # a kernel that does nothing, on Hopper
BLOCK = 512
FORMATS = {torch.bfloat16: "bf16", torch.float16: "bf16"}


@dataclass
class Account:
    """Of one kind of layer."""

    calls: int = 0
    launches: int = 0
    waits: int = 0
    kept: int = 0
    moved: int = 0
    gemm_flops: float = 0.0
    seconds: float = 0.0
    gemm_seconds: float = 0.0

    def __add__(self, other: "Account") -> "Account":
        return Account(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Ledger:
    """An `Observer` of the pretended device."""

    hardware: ClusterConfig
    accounts: dict[str, Account] = field(default_factory=dict)
    waited: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(reason, file:line) of every wait."""
    living: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        self._kind = "rest"
        self._depth = 0
        self._blocks: dict[int, int] = {}
        self._number = 0
        self._left: list[tuple[str, dict[int, int]]] = []
        self._of_storage: dict[int, int] = {}

    # -- what the device tells ----------------------------------------------------------------------------------------------------------------

    def launch(self, name: str, read: list[Tensor], written: list[Tensor], flops: float, dtype: torch.dtype) -> None:
        account = self._account
        moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
        seconds = max(LAUNCH_SECONDS, moved / (self.hardware.memory_bytes_per_second or float("inf")))
        if flops:
            seconds = max(seconds, flops / (self.hardware.peak(FORMATS.get(dtype, "fp32")) or float("inf")))
        account.launches += 1
        account.moved += moved
        account.seconds += seconds
        if name in ("mm", "addmm"):
            account.gemm_flops += flops
            account.gemm_seconds += seconds

    def wait(self, reason: str) -> None:
        self._account.waits += 1
        self.waited[reason, place(ROOT)] += 1

    def made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._of_storage:
            return
        self._number += 1
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._of_storage[key] = self._number
        self._blocks[self._number] = size
        self.living += size
        self.peak = max(self.peak, self.living)
        weakref.finalize(storage, self._freed, key, self._number)

    def _freed(self, key: int, number: int) -> None:
        self.living -= self._blocks.pop(number)
        if self._of_storage.get(key) == number:
            del self._of_storage[key]

    # -- kinds --------------------------------------------------------------------------------------------------------------------------------

    @property
    def _account(self) -> Account:
        return self.accounts.setdefault(self._kind, Account())

    def turn_to(self, kind: str) -> None:
        """What follows is of this kind."""
        self._kind = kind

    @contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        """A forward pass of this kind, unless it is part of another one."""
        before, self._kind = self._kind, self._kind if self._depth else kind
        first = self._number
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._account.calls += 1
                self._left.append((kind, {number: size for number, size in self._blocks.items() if number > first}))
            self._kind = before

    def labelled(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose work is put on this account, and that of its gradient."""

        def call(*given: Any, **named: Any) -> Any:
            with self.inside(kind):
                result = function(*given, **named)
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(lambda grad: self.turn_to(kind))
            return result

        return call

    def passes_over(self) -> None:
        """The backward passes are done: what a forward pass left behind and is gone now had been kept for them."""
        for kind, left in self._left:
            self.accounts[kind].kept += sum(size for number, size in left.items() if number not in self._blocks)
        self._left.clear()


def _bytes(tensor: Tensor) -> int:
    """Without what is repeated by a stride of 0."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()
