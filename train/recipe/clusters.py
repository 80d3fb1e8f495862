"""The hardware profiles of recipes/cluster, and which of them a run is on."""

import yaml

from parallel.cluster import ClusterConfig, matching
from train.recipe.load import RECIPES
from train.recipe.reading import read


def profiles() -> list[ClusterConfig]:
    """Every recipes/cluster/*.yaml."""
    return [read(ClusterConfig, yaml.safe_load(path.read_text()), "cluster") for path in sorted((RECIPES / "cluster").glob("*.yaml"))]


def profile(config: ClusterConfig, device: str) -> ClusterConfig | None:
    """The profile of a run on GPUs: what its recipe says or, where it names none, the one of `device`, as CUDA calls it; None: not known."""
    return config if config.name is not None else matching(device, profiles())
