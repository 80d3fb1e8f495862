"""Worlds that are only imagined: any rank's modules and groups, without the others."""

import datetime
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist

from model.count import count
from parallel import groups
from parallel.layout import Layout, ParallelConfig
from parallel.shards import pieces_of, spread_of
from train.build import build_model
from train.inspection import held as held_by
from train.inspection import main, members
from train.recipe.load import load_recipe
from train.recipe.tree import Recipe

Box = tuple[str, tuple[int, ...], tuple[int, ...]]
"""(name, offset, shape) of a part of a stored tensor."""
LAYOUTS = [
    pytest.param(
        "nemotron3_super", "MEM*E/*E", 16, ("parallel.tensor=2", "parallel.expert=4", "parallel.pipeline=2"), marks=pytest.mark.slow
    ),
    ("nemotron3_super", "MEM*E/*E", 8, ("parallel.expert=2", "parallel.expert_tensor=2", "parallel.context=2")),
    pytest.param("nemotron3_nano", "MEM*E", 16, ("parallel.tensor=2", "parallel.expert=8"), marks=pytest.mark.slow),
]


def replicas(layout: Layout, spread: str | None) -> set[int]:
    """The ranks over which gradients of such a parameter are summed, or which must hold the same."""
    if spread in ("rows", "columns"):
        return set(dist.get_process_group_ranks(layout.groups.dp_cp))
    if spread in ("expert_rows", "expert_columns"):
        return set(dist.get_process_group_ranks(layout.groups.expt_dp))
    return {rank for rank in range(layout.world_size) if rank * layout.pipeline_size // layout.world_size == layout.pipeline_rank}


def union(recipe: Recipe, ranks: int, built: Sequence[int]) -> tuple[dict[Box, set[int]], dict[Box, set[int]]]:
    """Which of the ranks that are built hold each part, and which should."""
    held: dict[Box, set[int]] = defaultdict(set)
    expected: dict[Box, set[int]] = defaultdict(set)
    for rank in built:
        with groups.imagined(recipe.parallel, ranks, rank) as layout:
            for param in (param for chunk in build_model(recipe, layout)[1] for param in chunk.parameters()):
                assert param.is_meta
                for piece in pieces_of(param):
                    box = piece.name, piece.offset, tuple(param[piece.local].shape)
                    held[box].add(rank)
                    expected[box] |= replicas(layout, spread_of(param))
    return held, expected


def check_tiling(recipe: Recipe, parts: dict[Box, set[int]]) -> None:
    """The parts of all ranks are the model: as many elements, and no two parts overlap."""
    counted = count(recipe.model)
    assert sum(math.prod(shape) for _, _, shape in parts) == counted.parameters + counted.mtp
    tensors = defaultdict(list)
    for name, offset, shape in parts:
        tensors[name].append([(start, start + size) for start, size in zip(offset, shape, strict=True)])
    for name, ranges in tensors.items():
        for i, one in enumerate(ranges):
            assert not [other for other in ranges[:i] if all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))], name


@pytest.mark.parametrize(("name", "pattern", "ranks", "overrides"), LAYOUTS, ids=str)
def test_every_element_is_held_by_the_ranks_that_sum_its_gradient(name: str, pattern: str, ranks: int, overrides: tuple[str, ...]) -> None:
    """Full widths, few layers, every rank."""
    recipe = load_recipe(name, "parallel.tensor=1", "parallel.expert=1", *overrides, f"model.pattern={pattern}", world_size=ranks)
    held, expected = union(recipe, ranks, range(ranks))
    assert held == expected
    check_tiling(recipe, held)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "ranks"), [("nemotron3_nano", 64), ("nemotron3_super", 1024), ("nemotron3_ultra", 2048)])
def test_the_published_models_are_whole_over_their_recipes_layouts(name: str, ranks: int) -> None:
    """What a rank holds depends on its places in the tensor, expert and pipeline groups alone, and the first ranks have each of them once."""
    recipe = load_recipe(name, world_size=ranks)
    assert recipe.parallel.pipeline == recipe.parallel.context == 1
    held, _ = union(recipe, ranks, range(max(recipe.parallel.tensor, recipe.parallel.expert * recipe.parallel.expert_tensor)))
    check_tiling(recipe, held)


@pytest.mark.parametrize(
    ("name", "ranks", "context"),
    [
        ("nemotron3_nano", 512, 1),
        ("nemotron3_5_lightning", 512, 2),
        ("nemotron3_super", 1024, 1),
        ("nemotron3_ultra", 2048, 1),
        ("nemotron3_super_long", 2048, 64),
    ],
)
def test_the_last_rank_of_a_shipped_recipe(name: str, ranks: int, context: int) -> None:
    """1M tokens a sequence among them: 64 ranks of a context group hold the same weights."""
    recipe = load_recipe(name, world_size=ranks)
    counted = count(recipe.model)
    with groups.imagined(recipe.parallel, ranks, ranks - 1) as layout:
        _, chunks = build_model(recipe, layout)
        assert sum(one.whole for one in held_by(chunks, layout).values()) == counted.parameters + counted.mtp
        apart = recipe.parallel.tensor
        assert dist.get_process_group_ranks(layout.groups.cp) == list(range(ranks - 1 - apart * (context - 1), ranks, apart))
        assert dist.get_process_group_ranks(layout.groups.dp_cp) == list(range(apart - 1, ranks, apart))


def test_groups_of_a_thousand_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[datetime.timedelta] = []
    new_group = dist.new_group

    def noted(*given: Any, **named: Any) -> Any:
        made.append(named["timeout"])
        return new_group(*given, **named)

    monkeypatch.setattr(dist, "new_group", noted)
    config = ParallelConfig(tensor=2, context=4, pipeline=4, expert=64, timeout_minutes=7.5)
    with groups.imagined(config, 1024, 777) as layout:
        found = {name: dist.get_process_group_ranks(getattr(layout.groups, name)) for name in ("tp", "cp", "pp", "dp", "ep", "expt_dp")}
    # 777 = 1 + 2 * (0 + 4 * (1 + 32 * 3)): tensor 1, context 0, data 1, pipeline 3, the tensor rank running fastest
    assert found["tp"] == [776, 777]
    assert found["cp"] == [777, 779, 781, 783]
    assert found["dp"] == list(range(769, 1024, 8))
    assert found["pp"] == [9, 265, 521, 777]
    assert found["ep"] == list(range(768, 832))
    assert found["expt_dp"] == [777, 841, 905, 969]
    assert (layout.tensor_rank, layout.context_rank, layout.data_rank, layout.pipeline_rank, layout.expert_rank) == (1, 0, 1, 3, 9)
    assert set(made) == {datetime.timedelta(minutes=7.5)}
    assert not dist.is_initialized()


def test_members_are_ranges() -> None:
    assert members([5]) == "5" and members([136, 137]) == "136, 137"
    assert members(range(1, 1024, 2)) == "1 to 1023 by 2"
    assert members([0, 1, 2, 3, 8, 9, 10, 11]) == "0 to 3, 8 to 11"


def test_the_command_says_what_a_rank_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-cn", "tiny", "world=8", "rank=5", "parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"]) == 0
    said = capsys.readouterr().out
    assert "tiny, rank 5 of 8" in said and "tensor 1 of 2" in said and "pipeline 1 of 2" in said
    assert main(["-cn", "tiny", "world=2", "rank=2"]) == 2
    assert "rank=2 is none of the 2 ranks" in capsys.readouterr().err
    assert main(["-cn", "tiny", "world=x"]) == 2
