"""What of the model a rank updates under ZeRO: each parameter group is one flat tensor, of which every data-parallel rank has a part."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.deepspeed.library import DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3

Held = tuple[nn.Parameter, tuple[int, int], int]
"""A parameter, the range of its flattened elements that this rank updates, and where they begin in the rank's part of the group."""


class Parts(Protocol):
    """masters: by parameter group, fp32 [elements], the flat part this rank updates. params: by parameter group, all of it."""

    masters: list[Tensor]
    params: list[list[nn.Parameter]]

    def held(self, index: int) -> Iterator[Held]:
        """What masters[index] is made of."""
        ...

    def share_masters(self) -> None:
        """Gives DeepSpeed's copies of the weights the memory of the weights."""
        ...

    def refill_masters(self) -> None:
        """Copies the weights to masters that have memory of their own."""
        ...

    def norm(self) -> float:
        """Of the gradients there are, before clipping; nan where it is not finite. Collective."""
        ...

    def discard(self) -> None:
        """Forgets the gradients of this step, as DeepSpeed does with those that are not finite."""
        ...

    def gather(self) -> None:
        """Makes weights whole on every rank until `release`, to be read and changed, alike on all ranks. Collective."""
        ...

    def release(self) -> None:
        """Ends that: each rank keeps what it has of them."""
        ...


class SplitState:
    """ZeRO-1 and ZeRO-2: weights are whole on every rank."""

    def __init__(self, zero: DeepSpeedZeroOptimizer):
        self._zero = zero
        self.masters = zero.single_partition_of_fp32_groups
        self.params = zero.bit16_groups

    def held(self, index: int) -> Iterator[Held]:
        for param in self.params[index]:
            if (mapping := param._hp_mapping) is not None:  # type: ignore[attr-defined]
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                yield param, (start, start + count), mapping.hp_fragment_address.start

    def share_masters(self) -> None:
        zero = self._zero
        for index, parts in enumerate(zero.parallel_partitioned_bit16_groups):
            own = parts[dist.get_rank(zero.real_dp_process_group[index])]
            self.masters[index].data = own
            for param in self.params[index]:
                if (mapping := param._hp_mapping) is not None:  # type: ignore[attr-defined]  # which views what is now replaced
                    address = mapping.hp_fragment_address
                    mapping.hp_fragment = own.narrow(0, address.start, address.numel)

    def refill_masters(self) -> None:
        self._zero.refresh_fp32_params()

    def norm(self) -> float:
        return _finite(float(self._zero.scaled_global_norm()))

    def discard(self) -> None:
        zero = self._zero
        zero.zero_grad()
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            for index in kept:
                kept[index] = None

    def gather(self) -> None: ...

    def release(self) -> None: ...


class SplitWeights:
    """ZeRO-3: of each weight every rank keeps consecutive elements, the last ranks fewer or none."""

    def __init__(self, zero: DeepSpeedZeroOptimizer_Stage3):
        self._zero = zero
        self.masters = zero.fp32_partitioned_groups_flat
        self.params = zero.fp16_groups
        self._all = [param for params in self.params for param in params]
        self._whole = False
        zero._optimizer_step = self._step_of

    def _step_of(self, index: int) -> None:
        """The optimizer's step of one group: DeepSpeed takes it with all groups there, the others empty, and an optimizer that counts steps in its
        groups would count each several times."""
        optimizer = self._zero.optimizer
        groups = optimizer.param_groups
        optimizer.param_groups = [groups[index]]
        groups[index]["params"] = [self.masters[index]]
        optimizer.step()
        groups[index]["params"] = []
        optimizer.param_groups = groups

    def held(self, index: int) -> Iterator[Held]:
        for param in self.params[index]:
            part = param.partition_numel()  # type: ignore[attr-defined]
            start = dist.get_rank(param.ds_process_group) * part  # type: ignore[attr-defined]
            stop = min(start + part, param.ds_numel)  # type: ignore[attr-defined]
            if start < stop:
                yield param, (start, stop), self._zero.grad_position[self._zero.get_param_id(param)][1]

    def share_masters(self) -> None:
        for master, weights in zip(self.masters, self._zero.fp16_partitioned_groups_flat, strict=True):
            master.data = weights

    def refill_masters(self) -> None:
        self._zero.refresh_fp32_params()

    def norm(self) -> float:
        norms = [_finite(float(norm)) for norm in self._zero._get_norm_groups()]
        return math.hypot(*norms)

    def discard(self) -> None:
        zero = self._zero
        zero.parameter_offload.partition_all_parameters()
        zero.zero_grad()
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
        zero.averaged_gradients = {}

    @torch.no_grad()
    def gather(self) -> None:
        if not self._whole:
            self._zero.parameter_offload.partition_all_parameters()
            self._all[0].all_gather(self._all)  # type: ignore[attr-defined]
            self._whole = True

    @torch.no_grad()
    def release(self) -> None:
        if self._whole:
            self._all[0].partition(self._all, has_been_updated=True)  # type: ignore[attr-defined]
            self._whole = False


def _finite(norm: float) -> float:
    """DeepSpeed writes -1 for a norm that is not finite."""
    return norm if norm >= 0 else math.nan
