"""The hardware profiles of recipes/cluster, and which of them a run is on."""

from typing import Any

import yaml

from parallel.cluster import ClusterConfig, matching
from train.recipe.load import RECIPES
from train.recipe.reading import read


def profiles() -> list[ClusterConfig]:
    """Every recipes/cluster/*.yaml."""
    return [read(ClusterConfig, _values(path.stem), "cluster") for path in sorted((RECIPES / "cluster").glob("*.yaml"))]


def _values(name: str) -> dict[str, Any]:
    """Of a profile, over those its `defaults` name, as Hydra composes them."""
    own = yaml.safe_load((RECIPES / "cluster" / f"{name}.yaml").read_text())
    values: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base != "_self_":
            values |= _values(base)
    return {**values, **own}


def profile(config: ClusterConfig, device: str) -> ClusterConfig | None:
    """The profile of a run on GPUs: what its recipe says or, where it names none, the one of `device`, as CUDA calls it; None: not known."""
    return config if config.name is not None else matching(device, profiles())
