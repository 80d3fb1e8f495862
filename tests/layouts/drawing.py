"""Layouts drawn at random over all axes, of which only those stay that a recipe's own checks accept."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

from tests.layouts.cases import SETTINGS, Case
from tests.train.recipes import recipe
from train.recipe.reading import RecipeError

AXES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 1, 2, 4),
    "expert": (1, 2, 4),
    "expert_tensor": (1, 1, 2, 4),
    "pipeline": (1, 2, 2, 4),
    "virtual_pipeline": (1, 1, 2, 3),
    "context": (1, 1, 2, 4, 8),
    "context_mamba": ("state", "all_to_all"),
    "distributed_optimizer": (False, True),
    "overlap_grad_reduce": (False, True),
    "overlap_param_gather": (False, True),
    "recompute": ((), (), ("moe",), ("norm", "activation", "head"), ("layer",)),
}
RANKS = (2, 4, 4, 8, 8)
LAYERS = "MEM*EME"


def drawn(seed: int, count: int) -> Iterator[Case]:
    """So many; the same layouts for the same seed, none twice."""
    random, seen = Random(seed), set[str]()
    while len(seen) < count:
        case = _drawn(random)
        if not _divides(case) or case.name in seen:
            continue
        try:
            recipe("precision=fp32", *case.overrides, world_size=case.ranks)
        except RecipeError:
            continue
        seen.add(case.name)
        yield case


def _drawn(random: Random) -> Case:
    parallel = {key: random.choice(values) for key, values in AXES.items()}
    if parallel["context"] == 1:
        parallel["context_mamba"] = "state"
    if parallel["pipeline"] == 1:
        parallel["virtual_pipeline"] = 1
    case = Case(random.choice(RANKS), parallel, random.choice(tuple(SETTINGS)), random.choice((None, 1, 1, 2, 4)))
    parts = parallel["pipeline"] * parallel["virtual_pipeline"]
    if 1 < parts <= len(LAYERS) and random.random() < 0.5:
        cuts = sorted(random.sample(range(1, len(LAYERS)), parts - 1))
        pieces = [LAYERS[a:b] for a, b in zip([0, *cuts], [*cuts, len(LAYERS)], strict=True)]
        case = replace(case, pattern=f"{'|'.join(pieces)}/*E/*E")
    return case


def _divides(case: Case) -> bool:
    """Whether the ranks may fit at all: most drawings end here, before a recipe is composed."""
    sizes = case.parallel
    dense = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    experts = sizes["expert"] * sizes["expert_tensor"] * sizes["pipeline"]
    return case.ranks % dense == 0 and case.ranks % experts == 0
