"""Every collective of a run is one that NCCL has, for tensors it knows: what gloo lets pass on a CPU would fail on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from benchmarks.nccl import objection
from parallel.collectives import METHODS, SINGLE
from tests.train.recipes import recipe
from train import loop

OTHERS = ("recv_anysource", "monitored_barrier")
LAYOUTS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "tensor, expert": (
        {"all_gather_single", "reduce_scatter_single", "all_to_all_single"},
        ("parallel.tensor=2", "parallel.expert=2", "precision.amax_scope=tensor_parallel", "precision.nvfp4.weight_scaling=1d"),
    ),
    "pipeline": ({"send", "recv", "broadcast"}, ("parallel.pipeline=2",)),
    "context, expert tensor": ({"all_to_all_single"}, ("parallel.context=2", "parallel.expert_tensor=2")),
    "data": (
        {"all_gather_single_coalesced", "reduce_scatter_single_coalesced"},
        ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    ),
}
"""Of two ranks: what they call, among other collectives, and their recipe."""


def recorded(rank: int, *overrides: str) -> tuple[set[str], set[str]]:
    """Methods of process groups that a run calls, and what NCCL has against them."""
    seen: set[str] = set()
    refused: set[str] = set()
    before = {name: getattr(dist.ProcessGroup, name) for name in (*METHODS, *SINGLE, *OTHERS)}

    def recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *given: Any, **named: Any) -> Any:
            seen.add(name)
            leaves = tree_leaves((given, named))
            op = next((leaf.reduceOp for leaf in leaves if isinstance(leaf, REDUCTIONS)), None)
            reason = objection(name, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], op)
            if reason is not None:
                refused.add(reason)
            return method(group, *given, **named)

        return call

    for name, method in before.items():
        setattr(dist.ProcessGroup, name, recording(name, method))
    try:
        loop.run(recipe(*overrides, world_size=2))
    finally:
        for name, method in before.items():
            setattr(dist.ProcessGroup, name, method)
    return seen, refused


REDUCTIONS = (dist.AllreduceOptions, dist.ReduceOptions, dist.ReduceScatterOptions)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_collective_of_a_run_is_one_that_nccl_has(layout: str, ranks: Any, tmp_path: Path) -> None:
    run = (
        "train.steps=4",
        "optimizer.warmup=1",
        "optimizer.decay=1",
        "train.eval_every=2",
        "checkpoint.every=2",
        "monitor.quantization.every=2",
    )
    called, layout_of_run = LAYOUTS[layout]
    results = ranks(2)(recorded, f"run.dir={tmp_path}/run", *run, *layout_of_run, timeout=300)
    assert {"allreduce", "allgather"} | called <= results[0][0] | results[1][0]
    assert not results[0][1] | results[1][1]


def test_what_nccl_lacks() -> None:
    matrix = torch.ones(2, 2)
    assert objection("allreduce", [matrix], dist.ReduceOp.MAX) is None
    for method, tensor, op in (
        ("allreduce", matrix.short(), dist.ReduceOp.SUM),
        ("allreduce", matrix.int(), dist.ReduceOp.BXOR),
        ("allreduce", matrix.bool(), dist.ReduceOp.AVG),
        ("broadcast", torch.ones(2, 3).T, None),
        ("monitored_barrier", matrix, None),
    ):
        assert objection(method, [tensor], op) is not None
