"""Joining and leaving the process groups of a layout, which are Megatron's whatever the engine: the model communicates over them too."""

import datetime
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, too

from parallel.collectives import COLLECTIVES, watch
from parallel.layout import Layout, ParallelConfig, world_size
from parallel.meeting import meet
from parallel.megatron import cpu


def initialize(config: ParallelConfig, seed: int) -> Layout:
    """Joins the process group (a group of one when no launcher started this process), builds Megatron's groups.

    May be called again after `shutdown`, with another layout. seed: for CUDA random states, see `device_seed`. Raises ValueError for an impossible
    layout, and NotMet, which names them, when ranks do not come to the start.
    """
    config.validate(world_size())
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        cpu.apply()
        device = torch.device("cpu")
    watch()
    if not dist.is_initialized():
        _join("nccl" if cuda else "gloo", device if cuda else None, datetime.timedelta(minutes=config.timeout_minutes))
    layout = divide(config, device)
    if cuda:
        model_parallel_cuda_manual_seed(seed)
        torch.cuda.manual_seed(device_seed(layout, seed))
    return layout


@contextmanager
def imagined(config: ParallelConfig, ranks: int, rank: int, device: torch.device | None = None) -> Iterator[Layout]:
    """What rank `rank` of `ranks` would be, without the others: Megatron's own groups, over a process group that sends nothing.

    device: on which models are built; None: the meta device, where nothing is allocated. Raises ValueError for a layout that cannot be.
    """
    config.validate(ranks)
    cpu.apply()
    timeout = datetime.timedelta(minutes=config.timeout_minutes)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks, timeout=timeout)
    try:
        yield divide(config, device or torch.device("meta"))
    finally:
        shutdown()


def divide(config: ParallelConfig, device: torch.device) -> Layout:
    """Builds Megatron's groups within the process group that stands. Collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.timeout_minutes,  # type: ignore[arg-type]  # it makes a timedelta of them, which takes fractions
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()

    def place(group: dist.ProcessGroup) -> tuple[int, int]:
        return dist.get_world_size(group), dist.get_rank(group)

    tensor, pipeline, data, context = place(groups.tp), place(groups.pp), place(groups.dp), place(groups.cp)
    expert, expert_tensor, expert_data = place(groups.ep), place(groups.expt_tp), place(groups.expt_dp)
    return Layout(
        config,
        dist.get_world_size(),
        dist.get_rank(),
        device,
        groups,
        *tensor,
        *pipeline,
        *data,
        *context,
        *expert,
        *expert_tensor,
        *expert_data,
    )


def device_seed(layout: Layout, seed: int) -> int:
    """Of the device's own generator, from which nothing here draws but Transformer Engine's stochastic rounding: another one on every rank, so that
    their rounding errors are independent. Ranks that compute the same (of a tensor group without sequence parallelism) round alike."""
    alike = layout.tensor_size > 1 and not layout.sequence_parallel
    stream = min(dist.get_process_group_ranks(layout.groups.tp)) if alike else layout.rank
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=7).digest(), "big")


def _join(backend: str, device: torch.device | None, timeout: datetime.timedelta) -> None:
    """The process group of all ranks; of this one alone where there are no others."""
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    store = meet(rank, size, timeout) if size > 1 else dist.HashStore()  # in memory: nothing to collide with
    dist.init_process_group(backend, store=store, rank=rank if size > 1 else 0, world_size=size, timeout=timeout, device_id=device)


def shutdown(*, leave_world: bool = True) -> None:
    """Gives Megatron's groups back and, with `leave_world`, the process group too. Safe to call twice."""
    if not dist.is_initialized():
        return
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
        # Megatron forgets its groups but leaves them open.
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        cpu.forget_groups()
    COLLECTIVES.forget()
    if leave_world:
        dist.destroy_process_group()
    # A group ends its threads with its last reference; models and their hooks hold some in cycles.
    gc.collect()
