"""Layouts: who shares what, and which are impossible."""

import time
from typing import Any

import pytest
import torch.distributed as dist

from parallel.groups import initialize, shutdown
from parallel.layout import ParallelConfig


@pytest.mark.parametrize(
    ("config", "world", "named"),
    [
        (ParallelConfig(tensor=2), 3, "parallel.tensor=2"),
        (ParallelConfig(expert=4), 2, "parallel.expert=4"),
        (ParallelConfig(pipeline=0), 1, "parallel.pipeline=0"),
        (ParallelConfig(sequence=True), 1, "parallel.sequence=true"),
        (ParallelConfig(timeout_minutes=0), 1, "parallel.timeout_minutes=0"),
        (
            ParallelConfig(expert=3, expert_tensor=2),
            8,
            "parallel.expert=3 .* = 6 does not divide the 8 ranks of this run",
        ),
        (
            ParallelConfig(expert_tensor=4),
            6,
            "parallel.expert_tensor=4 does not divide the 6 ranks",
        ),
        (ParallelConfig(virtual_pipeline=2), 1, "parallel.virtual_pipeline=2 needs parallel.pipeline > 1"),
        (ParallelConfig(overlap_param_gather=True), 2, "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true"),
    ],
)
def test_impossible_layouts_are_refused(config: ParallelConfig, world: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config.validate(world)


def test_the_fewest_ranks() -> None:
    assert ParallelConfig(tensor=2, expert=64).fewest_ranks() == 64
    assert ParallelConfig(tensor=4, pipeline=2, expert=2).fewest_ranks() == 8


def place(rank: int, config: ParallelConfig) -> dict[str, Any]:
    layout = initialize(config, 1)
    try:
        return {
            "tensor": dist.get_process_group_ranks(layout.groups.tp),
            "expert": dist.get_process_group_ranks(layout.groups.ep),
            "data": dist.get_process_group_ranks(layout.groups.dp),
            "expert_data": dist.get_process_group_ranks(layout.groups.expt_dp),
            "stage": layout.pipeline_rank,
        }
    finally:
        shutdown(leave_world=False)


def test_experts_borrow_the_ranks_of_tensor_and_data_parallelism(ranks: Any) -> None:
    places = ranks(4)(place, ParallelConfig(tensor=2, expert=2))
    assert [p["tensor"] for p in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [p["data"] for p in places] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [p["expert"] for p in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [p["expert_data"] for p in places] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    places = ranks(4)(place, ParallelConfig(tensor=2))
    assert [p["expert_data"] for p in places] == [[0, 1, 2, 3]] * 4


def test_another_layout_may_follow_in_the_same_process(ranks: Any) -> None:
    assert [p["stage"] for p in ranks(2)(place, ParallelConfig(pipeline=2))] == [0, 1]
    assert [p["data"] for p in ranks(2)(place, ParallelConfig())] == [[0, 1], [0, 1]]


def fail(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("planted")


def answer(rank: int) -> int:
    return rank


def hang(rank: int) -> int:
    if rank == 1:
        time.sleep(30)
    return rank


@pytest.mark.slow
def test_the_pool_reports_a_failing_rank_and_recovers(ranks: Any) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed:(.|\n)*planted"):
        ranks(2)(fail)
    assert ranks(2)(answer) == [0, 1]  # started afresh
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 gave no answer within 3 s"):
        ranks(2)(hang, timeout=3)
    assert [p["data"] for p in ranks(2)(place, ParallelConfig())] == [[0, 1], [0, 1]]
