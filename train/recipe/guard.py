"""What a recipe may not do, whoever wrote it: run code, read the environment, or grow without bound when it is read.

Values of a recipe are data; nothing instantiates them. But Hydra itself reads a group of its own, `hydra`, from the same files, and would import and
call what `hydra.callbacks`, a launcher or a logging configuration names, before any recipe is looked at. So a command line is composed once
beforehand, and refused where that group differs from Hydra's own, apart from `hydra.sweeper.params` (a sweep that a recipe describes).
YAML aliases and interpolations repeat what they name, level by level, so a page of text can stand for terabytes; both are counted before they
are followed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from train.recipe.reading import RecipeError, flatten

LARGEST_FILE = 1 << 20  # bytes
MOST_NODES = 100_000  # of a file, its aliases followed
DEEPEST = 50
DEEPEST_INTERPOLATION = 4
MOST_INTERPOLATIONS = 64

# Hydra's own, with the options the command line sets; its plain values (where it would write, how it formats help) do no harm.
HARMLESS = (
    "run.",
    "sweep.",
    "help.",
    "hydra_help.",
    "env.",
    "mode",
    "output_subdir",
    "overrides.",
    "job.",
    "runtime.",
    "verbose",
    "sweeper.params",
)
HYDRA_OWN: dict[str, Any] = {
    "callbacks": {},
    "launcher._target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "sweeper._target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "sweeper.max_batch_size": None,
    "hydra_logging.version": 1,
    "hydra_logging.root": None,
    "hydra_logging.disable_existing_loggers": False,
    "job_logging.version": 1,
    "job_logging.root": None,
    "job_logging.disable_existing_loggers": False,
}
JOB_OWN: dict[str, Any] = {"env_set": {}, "env_copy": []}


def read_yaml(text: str | bytes, where: str) -> Any:
    """The plain containers of a YAML text; never an object. Raises RecipeError, in one sentence, for what is not YAML, too large or too deep."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return None
        _check_nodes(root, where)
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OverflowError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{where} is not YAML ({' '.join(str(error).split())[:200]}): restore it") from None
    except RecursionError:
        raise RecipeError(f"{where} nests deeper than {DEEPEST} levels: no recipe does") from None


def _check_nodes(root: yaml.Node, where: str) -> None:
    """Counts the nodes as if every alias were written out."""
    counted: dict[int, int] = {}
    open_nodes: set[int] = set()

    def count(node: yaml.Node, depth: int) -> int:
        if depth > DEEPEST:
            raise RecipeError(f"{where} nests deeper than {DEEPEST} levels: no recipe does")
        if id(node) in counted:
            return counted[id(node)]
        if id(node) in open_nodes:
            raise RecipeError(f"{where} has an alias to what it stands in: write it out")
        open_nodes.add(id(node))
        total = 1
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            total += sum(count(c, depth + 1) for c in (child if isinstance(child, tuple) else (child,)))
        if total > MOST_NODES:
            raise RecipeError(f"{where} stands for more than {MOST_NODES:,} values: no recipe needs so many")
        open_nodes.discard(id(node))
        counted[id(node)] = total
        return total

    count(root, 0)


def check_directory(directory: Path) -> None:
    """Raises RecipeError unless every YAML file below a directory of somebody's recipes can be read safely."""
    for folder, _, names in os.walk(directory):
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in (".yaml", ".yml") and path.is_file():
                size = path.stat().st_size
                if size > LARGEST_FILE:
                    raise RecipeError(f"{path} has {size:,} bytes, more than the {LARGEST_FILE:,} of the largest recipe: leave it out")
                read_yaml(path.read_bytes(), str(path))


def check_hydra(recipes: Path, extra: Path | None, name: str, overrides: Sequence[str]) -> None:
    """Composes a recipe without running anything, and raises RecipeError where it would have Hydra do more than compose it.

    extra: a second directory of recipes. overrides: all that the command gives Hydra. Hydra's
    own exceptions, for names that do not exist and the like, pass through.
    """
    first, second = (extra, recipes) if extra is not None and (extra / f"{name}.yaml").is_file() else (recipes, extra)
    search = "" if second is None else f"'file://{second}'"
    with initialize_config_dir(str(first), version_base="1.3"):
        config = compose(name, overrides=[*overrides, f"hydra.searchpath=[{search}]"], return_hydra_config=True)
    given = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(given, dict)
    job = given.get("job") or {}
    for key, own in JOB_OWN.items():
        if (job.get(key) or own) != own:
            raise RecipeError(_refusal(f"job.{key}", job[key]))
    for key, value in _leaves(given):
        if key.startswith("searchpath") or any(key == h.rstrip(".") or key.startswith(h) for h in HARMLESS):
            continue
        if key not in HYDRA_OWN or (value or HYDRA_OWN[key]) != HYDRA_OWN[key]:
            raise RecipeError(_refusal(key, value))


def _leaves(value: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """As `flatten`, and empty groups too."""
    return [*flatten(value), *((key, {}) for key, inner in value.items() if inner == {})]


def _refusal(key: str, value: Any) -> str:
    return f"hydra.{key}={value!r} would have Hydra run code or change the environment, which no recipe may: leave it out"


def check_interpolations(config: DictConfig) -> None:
    """Raises RecipeError where interpolations (`${train.steps}`) refer to each other over many levels; call it before they are resolved."""
    references: dict[str, set[str]] = {}
    total = 0
    for key, value in _texts(OmegaConf.to_container(config, resolve=False)):
        found = re.findall(r"\$\{([^}]*)", value)
        total += value.count("${")
        # By their last parts: an overestimate that needs no rules of scope.
        for part in key:
            references.setdefault(part, set()).update(re.split(r"[.:,\[\]\s]", name)[-1] for name in found)
    if total > MOST_INTERPOLATIONS:
        raise RecipeError(
            f"the recipe has {total} interpolations, as in ${{train.steps}}, more than {MOST_INTERPOLATIONS}: write values out"
        )
    referring = {name: targets & references.keys() for name, targets in references.items()}
    for _ in range(DEEPEST_INTERPOLATION):
        referring = {name: targets for name, targets in referring.items() if any(t in referring and referring[t] for t in targets)}
    if referring:
        raise RecipeError(
            f"the interpolation of {min(referring)} refers to others over more than {DEEPEST_INTERPOLATION} levels: write values out"
        )


def _texts(value: Any, key: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """(names on the way, text) of every text with an interpolation."""
    if isinstance(value, Mapping):
        return [found for name, inner in value.items() for found in _texts(inner, (*key, str(name)))]
    if isinstance(value, list):
        return [found for inner in value for found in _texts(inner, key)]
    return [(key, value)] if isinstance(value, str) and "${" in value else []


def forbid_environment() -> None:
    """Makes `${oc.env:NAME}` an error: what it reads would be stored in recipe.yaml and sent to W&B."""

    def refuse(name: str, *default: Any) -> None:
        raise RecipeError(
            f"${{oc.env:{name}}} reads the environment, which a recipe may not (it would be stored and sent with it): write the value, or let "
            "the shell put it on the command line"
        )

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
