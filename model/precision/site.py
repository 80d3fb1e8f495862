"""Where a linear layer stands, and one call of it: what a number format has to work with.

Site       a linear module of this rank: fixed when the model is built
TokenKeys  which token each row of an operand is
Call       one microbatch through one module, kept from its forward to its backward pass
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from model.precision import philox
from model.precision.backend import Asked, Backend
from model.precision.health import Health, Seen
from model.precision.operand import Operand, Rows, for_rows


@dataclass(frozen=True)
class TokenKeys:
    """Which token each row of an operand is."""

    sample: Tensor
    """int64 [rows], the global sample."""
    position: Tensor
    """int64 [rows], the position in its sequence."""
    depth: int = 0
    """Of multi-token prediction, whose depths may share modules; 0: none."""

    def at(self, rows: Tensor) -> "TokenKeys":
        """Of these rows, int64 [any]."""
        return replace(self, sample=self.sample[rows], position=self.position[rows])


class WeightCache:
    """Quantised weights of the current optimizer step, by module, format and direction.

    Whoever changes weights calls `clear`; a weight changed in place by PyTorch operations, or replaced, is noticed without.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[int, int], Operand | None]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def find(self, key: Hashable, weight: Tensor) -> Operand | None:
        state, operand = self._kept.get(key, (None, None))
        return operand if state == (weight.data_ptr(), weight._version) else None

    def keep(self, key: Hashable, weight: Tensor, operand: Operand | None) -> None:
        self._kept[key] = ((weight.data_ptr(), weight._version), operand)

    def first(self, key: Hashable, weight: Tensor) -> bool:
        """Whether this is the first time with this key since the weight changed; for backends that keep quantised weights themselves."""
        first = self._kept.get(key, (None,))[0] != (weight.data_ptr(), weight._version)
        self.keep(key, weight, None)
        return first


@dataclass(frozen=True)
class Site:
    """A linear module as the numerics know it."""

    name: str
    """Canonical module name."""
    seed: int
    """Of the run."""
    outputs: tuple[tuple[int, int], ...] = ()
    """(first global index, count) of each run of local output features, where the output is sharded; empty: all, from 0."""
    inputs: tuple[tuple[int, int], ...] = ()
    """The same of input features."""
    amax_group: Any = None
    """Over which ranks amaxes are maximised (precision.amax_scope=tensor_parallel), or None."""
    first_expert: int | None = None
    """Global index of group 0 of a grouped layer, or None for a plain one."""
    row_amax_group: Any = None
    """The same for amaxes of single rows: the ranks of amax_group that work on the same tokens."""
    backend: Backend = field(kw_only=True)
    weights: WeightCache = field(default_factory=WeightCache)
    """Where quantised weights are kept for the rest of the step."""
    health: Health = field(default_factory=Health)
    """What measures operands, when it is active."""


@dataclass(frozen=True)
class Call:
    """One microbatch through one linear module."""

    site: Site
    formats: tuple[Asked, Asked, Asked]
    """Of fprop, dgrad and wgrad."""
    rows: Rows
    """Of x and dy: one group, or one for each expert."""
    keys: TokenKeys
    """Of those rows."""
    step: int
    """Optimizer steps done."""
    singly: bool = False
    """Forward, on a CPU: every row is multiplied as if it were alone, so that its last bit does not depend on how many there are."""

    @property
    def backend(self) -> Backend:
        return self.site.backend

    @property
    def packed(self) -> bool:
        """Whether operands are wanted packed even where they are multiplied at once."""
        return self.site.health.active or self.backend.multiplies_packed

    def stream(self, operand: str, *, of: Literal["outputs", "inputs"] = "outputs") -> philox.Stream:
        """Random bytes for each element of dy [rows, N] or, of="inputs", of x [rows, K], by where it is: the same on every layout and after a
        resume. operand: names one of several streams."""
        site, expert = self.site, None
        if site.first_expert is not None:
            experts = torch.arange(len(self.rows.sizes), device=self.keys.sample.device) + site.first_expert
            expert = for_rows(experts, self.rows)
        key = self.key(f"{operand}@{self.keys.depth}" if self.keys.depth else operand)
        runs = site.outputs if of == "outputs" else site.inputs
        return philox.Stream(key, self.keys.sample, self.keys.position, self.step, runs, expert)

    def key(self, purpose: str) -> tuple[int, int]:
        """A Philox key of this module for something drawn once, a rotation for instance: the same on every rank and in every microbatch."""
        return philox.stream_key(self.site.seed, self.site.name, purpose)

    def maximum(self, amax: Tensor) -> Tensor:
        """amax, or where `precision.amax_scope` asks for it, its maximum over the ranks with other parts of the same tensor (in place)."""
        group = self.site.row_amax_group if amax.dim() == 2 else self.site.amax_group
        if group is not None:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        return amax

    def cached(self, key: Hashable, weight: Tensor, make: Callable[[], Operand]) -> Operand:
        """What `make` gives, once for every change of the weight. key: what distinguishes it from other operands of this weight."""
        whole = (self.site.name, key)
        found = self.site.weights.find(whole, weight)
        if found is None:
            found = make()
            self.site.weights.keep(whole, weight, found)
        return found

    def measure(self, operand: str, seen: Callable[[], Seen]) -> None:
        """Tells the health of an operand, where it is wanted: `precision/<module>/<operand>/...`."""
        self.site.health.operand(self.site.name, operand, seen)
