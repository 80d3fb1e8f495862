"""Megatron is told over which ranks a parameter is spread."""

import dataclasses

import pytest
import torch
from torch import nn

from parallel.layout import Layout, ParallelConfig
from parallel.megatron.stage import mark
from parallel.shards import Spread


def marks(spread: Spread, tensor: int, expert: int) -> dict[str, object]:
    layout = dataclasses.replace(Layout.alone(ParallelConfig(tensor=tensor)), tensor_size=tensor, expert_size=expert)
    param = nn.Parameter(torch.zeros(4))
    mark(param, spread, layout)
    return {name: value for name, value in vars(param).items() if value is not False or name == "allreduce"}


@pytest.mark.parametrize(
    ("spread", "expert", "expected"),
    [
        ("rows", 1, {"tensor_model_parallel": True, "partition_dim": 0}),
        ("columns", 1, {"tensor_model_parallel": True, "partition_dim": 1}),
        ("everywhere", 1, {"sequence_parallel": True}),
        ("expert_rows", 2, {"tensor_model_parallel": True, "allreduce": False}),
        # The experts of one expert rank are whole on both tensor ranks, which hold parts of everything else.
        ("expert_columns", 1, {"tensor_model_parallel": True, "allreduce": False}),
    ],
)
def test_a_parameter_on_two_tensor_ranks(spread: Spread, expert: int, expected: dict[str, object]) -> None:
    found = marks(spread, 2, expert)
    assert found.items() >= expected.items() and ("sequence_parallel" in found) == (spread == "everywhere")


def test_experts_on_one_rank_are_reduced_like_everything_else() -> None:
    assert marks("expert_rows", 1, 1).items() >= {"allreduce": True, "tensor_model_parallel": True}.items()
