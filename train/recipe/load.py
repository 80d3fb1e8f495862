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
from omegaconf import OmegaConf

from train.recipe.reading import RecipeError, defaults, read
from train.recipe.tree import Recipe
from train.recipe.validation import validate

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
REQUIRED = {  # keys without a default: null in the base, so that they too can be overridden without `+`
    "train": ("global_batch_size", "micro_batch_size", "sequence_length"),
    "model": ("pattern", "vocab_size", "hidden_size"),
    "optimizer": ("learning_rate",),
}
OPTIONAL_GROUPS = ("cluster",)  # of which a recipe need not choose a file, and the command line may
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


def without_missing(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: without_missing(value) for key, value in values.items() if value != MISSING}
    return values


def read_recipe(values: Mapping[str, Any], world_size: int | None) -> Recipe:
    """A validated recipe for a run of `world_size` ranks, or of the fewest it can run on (None).

    Raises RecipeError: one sentence with key, value and remedy.
    """
    recipe = read(Recipe, values)
    if recipe.precision.compute == "auto":
        compute = "bf16" if torch.cuda.is_available() else "fp32"
        recipe = replace(recipe, precision=replace(recipe.precision, compute=compute))
    try:
        validate(recipe, recipe.parallel.fewest_ranks() if world_size is None else world_size)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return recipe


def load_recipe(name: str, *overrides: str, world_size: int | None = 1) -> Recipe:
    """The recipe `name` of recipes/ with overrides as the command line takes them, for `world_size` ranks (None: the fewest it can run on).

    Raises RecipeError for values that cannot be, and Hydra's exceptions for names that do not exist.
    """
    store_base()
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    return read_recipe(without_missing(OmegaConf.to_container(config)), world_size)
