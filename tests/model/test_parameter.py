"""A parameter knows its pieces, its ranks and its initial values; on the meta device it has no values."""

import dataclasses
from typing import Any

import torch

from model.context import ModelContext
from model.init import constant, normal
from model.parameter import sharded_parameter
from model.precision.policy import Policy, PrecisionConfig
from parallel.layout import Layout, ParallelConfig
from parallel.shards import Section, pieces_of, split_sections, spread_of, whole
from tests.model.build import CONFIG


def context(device: str = "cpu", **layout: Any) -> ModelContext:
    made = dataclasses.replace(Layout.alone(ParallelConfig(tensor=layout.get("tensor_size", 1))), **layout)
    return ModelContext(CONFIG, made, Policy(PrecisionConfig(), 3), 5, torch.bfloat16, torch.device(device))


def test_a_rank_holds_its_part_of_what_one_rank_would_hold() -> None:
    def part(rank: int, size: int) -> torch.Tensor:
        pieces = split_sections([Section("a", 4), Section("b", 8)], (3,), rank, size)
        return sharded_parameter(context(tensor_size=size, tensor_rank=rank), (12 // size, 3), pieces, normal(1.0), "rows").detach()

    alone, first, second = part(0, 1), part(0, 2), part(1, 2)
    assert alone.dtype == torch.bfloat16
    assert torch.equal(torch.cat((first[:2], second[:2], first[2:], second[2:])), alone)


def test_nothing_is_allocated_on_the_meta_device() -> None:
    param = sharded_parameter(context("meta"), (4,), [whole("a", (4,))], constant(1.0), "everywhere")
    assert param.is_meta and pieces_of(param)[0].name == "a" and spread_of(param) == "everywhere"
