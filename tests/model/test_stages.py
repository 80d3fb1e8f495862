"""Layers on pipeline stages: balanced by cost, or as `|` in the pattern says."""

import random
from itertools import combinations, pairwise

import pytest

from model.config import ModelConfig
from model.count import linear_modules, other_products
from model.pattern import parse, without_parts
from model.stages import balanced, describe, layer_costs, parts_of_stage, pipeline_parts
from parallel.layout import ParallelConfig
from tests.train.recipes import recipe

TINY = recipe().model


def bounds(config: ModelConfig, pipeline: int, virtual: int = 1) -> list[tuple[int, int]]:
    parts = pipeline_parts(config, ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual), 64)
    return [(part.layers.start, part.layers.stop) for part in parts]


def largest(costs: list[float], behind: float, parts: list[range], stages: int) -> float:
    own = [sum(costs[i] for i in part) for part in parts]
    own[-1] += behind
    return max(sum(own[stage::stages]) for stage in range(stages))


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_much_better(seed: int) -> None:
    """Against all ways to cut: the most expensive stage costs at most one layer more than in the best of them."""
    draw = random.Random(seed)
    layers, (stages, virtual) = draw.randint(6, 9), draw.choice([(2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2)])
    costs = [draw.choice([1.0, 2.0, 5.0]) for _ in range(layers)]
    behind = draw.choice([0.0, 3.0, 12.0])
    cut = balanced(costs, behind, stages, virtual)
    assert len(cut) == stages * virtual and all(cut)
    assert [i for part in cut for i in part] == list(range(layers))
    every = ([range(a, b) for a, b in pairwise([0, *ends, layers])] for ends in combinations(range(1, layers), stages * virtual - 1))
    assert largest(costs, behind, cut, stages) <= min(largest(costs, behind, parts, stages) for parts in every) + max(costs)


def test_equal_layers_are_shared_out_equally() -> None:
    assert [len(part) for part in balanced([1.0] * 12, 0.0, 4)] == [3, 3, 3, 3]
    assert [len(part) for part in balanced([1.0] * 12, 3.0, 3)] == [5, 5, 2]
    # The last part of the last stage is expensive, so the first of that stage is small: 5 + 5 on each of the others.
    assert [len(part) for part in balanced([1.0] * 24, 8.0, 2, 2)] == [8, 7, 8, 1]


def test_costs_are_the_flops_of_the_whole_model() -> None:
    layers, behind = layer_costs(TINY, 64)
    whole = sum(m.flops for m in linear_modules(TINY)) + sum(p.flops for p in other_products(TINY, 64))
    assert sum(layers) + behind == pytest.approx(whole)
    head = next(m.flops for m in linear_modules(TINY) if m.name == "lm_head")
    assert behind > head == 3 * 2 * TINY.hidden_size * TINY.vocab_size  # used by the LM loss and two MTP depths
    assert layers[0] == layers[2] and layers[1] != layers[0]


def test_bars_give_the_stages() -> None:
    given = TINY.changed(pattern="M|EM*|E|ME/*E/*E")
    assert given.layers == TINY.layers and given.parsed.mtp == TINY.parsed.mtp
    assert without_parts(given.pattern) == TINY.pattern
    assert bounds(given, 4) == bounds(given, 2, 2) == [(0, 1), (1, 4), (4, 5), (5, 7)]
    parts = pipeline_parts(given, ParallelConfig(pipeline=2, virtual_pipeline=2), 64)
    assert [(p.first, p.last) for p in parts] == [(True, False), (False, False), (False, False), (False, True)]
    assert [p.layers.start for p in parts_of_stage(parts, 2, 1)] == [1, 5]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("M||E", "without a layer"),
        ("|ME", "without a layer"),
        ("ME|/*E", "without a layer"),
        ("ME/*|E", "position 5, in an MTP depth"),
    ],
)
def test_bars_that_mean_nothing(pattern: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse(pattern)


@pytest.mark.parametrize(
    ("pattern", "parallel", "named"),
    [
        ("MEM*EME", ParallelConfig(pipeline=8), "parallel.pipeline=8 exceeds the 7 layers of model.pattern"),
        ("MEM*EME", ParallelConfig(pipeline=4, virtual_pipeline=2), "parallel.virtual_pipeline=2 = 8 exceeds the 7 layers"),
        ("MEM*|EME", ParallelConfig(), r"has 2 parts between its '\|', but parallel.pipeline=1"),
        ("MEM*|EME", ParallelConfig(pipeline=2, virtual_pipeline=2), "has 2 parts .* parallel.virtual_pipeline=2 = 4"),
    ],
)
def test_stages_that_cannot_be(pattern: str, parallel: ParallelConfig, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pipeline_parts(TINY.changed(pattern=pattern), parallel, 64)


def test_a_person_is_told() -> None:
    first, second = describe(TINY.changed(pattern="MEM|*EME/*E/*E"), ParallelConfig(pipeline=2), 64)
    assert first.startswith("pipeline stage 0: embedding, layers 0-2 MEM; ")
    assert second.startswith("pipeline stage 1: layers 3-6 *EME, head and 2 MTP depths; ")
    assert describe(TINY, ParallelConfig(), 64) == []
