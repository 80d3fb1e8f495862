"""From the name of a recipe, or the containers Hydra composed, to a validated `Recipe`.

    load_recipe("tiny", "train.steps=200", "precision=mxfp8")

All keys with their defaults form the base every recipe is merged over, so a key needs no `+`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from parallel.cluster import ClusterConfig
from parallel.misfit import Misfit
from train.recipe.guard import check_interpolations
from train.recipe.microbatch import automatic_sizes
from train.recipe.precision_checks import validate_precision
from train.recipe.reading import RecipeError, defaults, read
from train.recipe.remedies import ended
from train.recipe.tree import Recipe
from train.recipe.validation import validate, validate_shape

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
REQUIRED = {  # keys without a default: null in the base, so that they too can be overridden without `+`
    "train": ("global_batch_size", "sequence_length"),
    "model": ("pattern", "vocab_size", "hidden_size"),
    "optimizer": ("learning_rate",),
}
OPTIONAL_GROUPS = ("cluster", "optimizer")  # of which a recipe need not choose a file, and the command line may
MISSING = "???"


def base() -> dict[str, Any]:
    """Every key of a recipe; those a recipe must give are missing."""
    tree = defaults(Recipe)
    for group, keys in REQUIRED.items():
        for key in keys:
            tree.setdefault(group, {}).setdefault(key, MISSING)
    return tree


def store_base() -> None:
    """Makes the defaults known to Hydra, as the recipe `base`."""
    groups = [{group: None} for group in OPTIONAL_GROUPS]
    ConfigStore.instance().store(name="base", node={"defaults": ["_self_", *groups], **base()})


def plain_values(config: DictConfig) -> dict[str, Any]:
    """What Hydra composed as plain containers, without the keys nobody gave. Raises RecipeError for interpolations without end."""
    check_interpolations(config)
    try:
        return _without_missing(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    except InterpolationResolutionError as error:
        _, _, reason = str(error).splitlines()[0].rpartition("while resolving interpolation: ")
        raise RecipeError(f"{error.full_key} cannot be resolved: {reason}") from None


def _without_missing(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_missing(value) for key, value in values.items() if value != MISSING}
    return values


def read_recipe(values: Mapping[str, Any], world_size: int | None) -> Recipe:
    """A validated recipe for a run of `world_size` ranks, or of the fewest it can run on (None).

    Raises RecipeError: one sentence with key, value and remedy.
    """
    recipe = read(Recipe, values)
    if recipe.precision.compute == "auto":
        compute = "bf16" if torch.cuda.is_available() else "fp32"
        recipe = replace(recipe, precision=replace(recipe.precision, compute=compute))
    ranks = recipe.parallel.fewest_ranks() if world_size is None else world_size
    try:
        validate(recipe, ranks)
        return _with_micro_batch_size(recipe, ranks)
    except Misfit as misfit:
        raise RecipeError(ended(misfit, recipe, ranks, validate_shape, _validate_whole)) from None
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _with_micro_batch_size(recipe: Recipe, ranks: int) -> Recipe:
    """With a number where auto stood: the largest with which every module can run its formats. Raises ValueError where there is none."""
    given = recipe.train.micro_batch_size
    problem: ValueError | None = None
    for size in automatic_sizes(recipe, ranks) if given == "auto" else (given,):
        sized = replace(recipe, train=replace(recipe.train, micro_batch_size=size))
        try:
            validate_precision(sized)
            return sized
        except ValueError as error:
            problem = problem or error
    assert problem is not None  # `validate` has found that there is a size
    raise problem


def _validate_whole(recipe: Recipe, ranks: int) -> None:
    validate(recipe, ranks)
    _with_micro_batch_size(recipe, ranks)


def ranks_of_cluster(values: Mapping[str, Any]) -> int:
    """Of a run on all nodes of its `cluster`. Raises RecipeError where it does not say how many ranks that are."""
    try:
        return read(ClusterConfig, values.get("cluster", {}), "cluster").ranks
    except ValueError as error:
        raise RecipeError(str(error)) from None


def load_recipe(name: str, *overrides: str, world_size: int | None = 1) -> Recipe:
    """A shipped recipe with overrides as the command line takes them, ready to be built, counted or looked at.

        load_recipe("tiny")
        load_recipe("small", "precision=mxfp8", "train.steps=200", "run.dir=runs/first")
        load_recipe("nemotron3_super", world_size=None).model

    name: of a file in recipes/. world_size: the ranks it is to run on; None: the fewest its layout fits, for a recipe that is only looked at.
    What the recipe leaves open (`precision.compute=auto`, `train.micro_batch_size=auto`) is decided, and the whole is validated.

    Raises RecipeError, in one sentence, for values that cannot be, and Hydra's exceptions for names that do not exist.
    """
    store_base()
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    return read_recipe(plain_values(config), world_size)
