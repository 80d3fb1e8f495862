"""Layouts: how the ranks of a run divide tensors, experts, layers and data among themselves.

Two factorisations of the same ranks, as Megatron-core has them:

    dense modules     world = tensor x context x pipeline x data
    routed experts    world = expert_tensor x expert x pipeline x expert_data

so expert parallelism spends no ranks of its own: it borrows those the dense modules use for tensor, context and data parallelism.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel.misfit import Misfit

Recomputable = Literal["norm", "activation", "moe", "head", "mamba", "layer"]


@dataclass(frozen=True)
class ParallelConfig:
    """The recipe's `parallel` group."""

    tensor: int = 1
    """ranks that split each matrix of the dense modules among themselves"""
    sequence: bool | None = None
    """split sequences over the tensor ranks where matrices are not; null: whenever tensor > 1"""
    expert: int = 1
    """ranks that share out the routed experts"""
    expert_tensor: int = 1
    """ranks that split each expert's matrices"""
    dispatcher: Literal["alltoall", "deepep", "hybridep"] = "alltoall"
    """what sends tokens to the ranks of their experts: an all-to-all, or kernels of the optional package deep_ep, on GPUs and in bf16"""
    pipeline: int = 1
    """stages, each of some consecutive layers: as | in model.pattern says, else balanced by cost"""
    virtual_pipeline: int = 1
    """parts of the layers that each stage takes turns with (interleaved 1F1B); needs at least as many microbatches as stages"""
    context: int = 1
    """ranks that split each sequence in every module, each holding consecutive tokens"""
    context_mamba: Literal["state", "all_to_all"] = "state"
    """how Mamba layers cross the borders of split sequences: state hands states on and divides nothing further; all_to_all gathers
    sequences and divides heads"""
    distributed_optimizer: bool = False
    """split fp32 masters and the optimizer's state over the data-parallel ranks"""
    recompute: tuple[Recomputable, ...] = ()
    """kinds of pieces whose activations are computed again in the backward pass instead of kept, as in [norm, moe]; see docs/recomputation.md"""
    overlap_grad_reduce: bool = False
    """reduce gradients over the data-parallel ranks while the backward pass goes on, in buckets"""
    overlap_param_gather: bool = False
    """gather updated weights while the next forward pass begins; with distributed_optimizer and overlap_grad_reduce"""
    engine: str = "megatron"
    """what accumulates gradients and takes steps: megatron, or deepspeed, an optional package; see docs/engines.md"""
    zero_stage: int | None = None
    """of the deepspeed engine: 1 splits the optimizer's state over the data-parallel ranks, 2 gradients too, 3 weights
    too (with data parallelism alone); null: 1"""
    offload_optimizer: bool = False
    """of the deepspeed engine: keep the optimizer's state in host memory, and update weights there"""
    timeout_minutes: float = 10.0
    """a collective that takes longer ends the run"""

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence

    def data(self, world_size: int) -> int:
        """Data-parallel replicas among `world_size` ranks."""
        return world_size // (self.tensor * self.pipeline * self.context)

    @property
    def fewest_microbatches(self) -> int:
        """Of a step on each data-parallel rank: the interleaved schedule needs one for each stage."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def overlaps(self) -> dict[str, bool]:
        """Which communication goes on beside computation."""
        return {"gradient reduce": self.overlap_grad_reduce, "parameter gather": self.overlap_param_gather}

    def fewest_ranks(self) -> int:
        """The smallest world this layout fits."""
        dense = self.tensor * self.pipeline * self.context
        return math.lcm(max(dense, 1), max(self.expert_tensor * self.expert * self.pipeline, 1))

    def validate(self, world_size: int) -> None:
        """Raises ValueError, most of them `Misfit`, for a layout `world_size` ranks cannot have."""
        for key in ("tensor", "expert", "expert_tensor", "pipeline", "virtual_pipeline", "context"):
            if getattr(self, key) < 1:
                raise Misfit(f"parallel.{key}={getattr(self, key)} must be at least 1", f"parallel.{key}")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise Misfit(
                f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1",
                "parallel.virtual_pipeline",
                "parallel.pipeline",
            )
        for key in ("distributed_optimizer", "overlap_grad_reduce"):
            if self.overlap_param_gather and not getattr(self, key):
                raise Misfit(
                    f"parallel.overlap_param_gather=true needs parallel.{key}=true", f"parallel.{key}", "parallel.overlap_param_gather"
                )
        if self.dispatcher != "alltoall":
            if self.expert == 1:
                raise Misfit(
                    f"parallel.dispatcher={self.dispatcher} has nowhere to send tokens with parallel.expert=1",
                    "parallel.expert",
                    "parallel.dispatcher",
                )
            if self.expert_tensor > 1:
                raise Misfit(
                    f"parallel.dispatcher={self.dispatcher} does not know experts that parallel.expert_tensor={self.expert_tensor} ranks split",
                    "parallel.expert_tensor",
                    "parallel.dispatcher",
                )
        if self.sequence and self.tensor == 1:
            raise Misfit("parallel.sequence=true needs a tensor group to split over: parallel.tensor=1 is none", "parallel.sequence")
        if len(set(self.recompute)) < len(self.recompute):
            twice = next(kind for kind in self.recompute if self.recompute.count(kind) > 1)
            raise ValueError(f"parallel.recompute={list(self.recompute)} names {twice} twice: name each kind once")
        if "layer" in self.recompute and (within := [kind for kind in self.recompute if kind in ("activation", "moe", "mamba")]):
            raise ValueError(
                f"parallel.recompute={list(self.recompute)} names layer, which computes all of a layer again, and {within[0]}, which is part of one: "
                f"leave {within[0]} out, or layer"
            )
        if not 0 < self.timeout_minutes <= 7 * 24 * 60:
            raise ValueError(f"parallel.timeout_minutes={self.timeout_minutes} must lie above 0 and within a week: use for instance 10")
        self._divide(world_size, "tensor", "pipeline", "context")
        self._divide(world_size, "expert", "expert_tensor", "pipeline")

    def _divide(self, world_size: int, *axes: str) -> None:
        sizes = {f"parallel.{axis}": getattr(self, axis) for axis in axes if getattr(self, axis) > 1}
        ranks = math.prod(sizes.values())
        if world_size % ranks:
            product = " x ".join(f"{axis}={size}" for axis, size in sizes.items()) + (f" = {ranks}" if len(sizes) > 1 else "")
            raise Misfit(f"{product} does not divide the {world_size} rank{'s' * (world_size > 1)} of this run", *sizes, "ranks")


@dataclass(frozen=True)
class Layout:
    """What this rank is. `groups` are Megatron's process groups (tp, cp, pp, dp, dp_cp, tp_cp, ep, expt_tp, tp_ep, expt_dp, ...)."""

    config: ParallelConfig
    world_size: int
    rank: int
    device: torch.device
    groups: ProcessGroupCollection
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    data_size: int
    data_rank: int
    context_size: int
    context_rank: int
    expert_size: int
    expert_rank: int
    expert_tensor_size: int
    expert_tensor_rank: int
    expert_data_size: int
    expert_data_rank: int

    @property
    def sequence_parallel(self) -> bool:
        return self.config.sequence_parallel

    @classmethod
    def alone(cls, config: ParallelConfig | None = None) -> "Layout":
        """A layout of one rank without any process group, for building models on the meta device."""
        ones = (1, 0) * 7
        return cls(config or ParallelConfig(), 1, 0, torch.device("meta"), ProcessGroupCollection(), *ones)

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"tensor {self.tensor_size}" + (" + sequence" if self.sequence_parallel else ""), f"expert {self.expert_size}"]
        if self.expert_tensor_size > 1:
            parts.append(f"expert tensor {self.expert_tensor_size}")
        if self.context_size > 1:
            parts.append(f"context {self.context_size}")
        virtual = self.config.virtual_pipeline
        parts += [f"pipeline {self.pipeline_size}" + f" of {virtual} parts each" * (virtual > 1), f"data {self.data_size}"]
        if self.config.distributed_optimizer:
            parts.append("distributed optimizer")
        if self.config.engine == "deepspeed":
            parts.append(f"DeepSpeed ZeRO-{self.config.zero_stage or 1}" + ", optimizer on the host" * self.config.offload_optimizer)
        overlapped = [name for name, wanted in self.config.overlaps().items() if wanted]
        if overlapped:
            parts.append(f"{' and '.join(overlapped)} overlapped")
        if self.config.recompute:
            parts.append(f"computing {', '.join(self.config.recompute)} again")
        return f"{self.world_size} rank{'s' * (self.world_size > 1)} on {self.device.type}: " + " x ".join(parts)


def world_size() -> int:
    """Ranks this run was started with: WORLD_SIZE as torchrun sets it, else 1. Raises ValueError for ranks that could not find each other."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"WORLD_SIZE={size!r} is no number of ranks: use torchrun, or unset it")
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]
    if int(size) > 1 and lacking:
        raise ValueError(
            f"WORLD_SIZE={size} is set without {' and '.join(lacking)}, so every rank would be a run of its own: use torchrun, or set them too"
        )
    return int(size)
