"""The recipe of a branch: that of its parent, with overrides composed on top as the command line of `python -m train` takes them.

A group that is chosen (`precision=bf16`) takes the whole place of the parent's, except how activations are kept and which backend multiplies,
which stay. What decides the data of a step may not change: a branch is there to be compared with its parent at equal steps.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from parallel.layout import world_size
from train import branch_sweep
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.evaluation.base import EVALUATORS
from train.loop import run
from train.optimizer import learning_rate
from train.recipe.guard import forbid_environment
from train.recipe.load import OPTIONAL_GROUPS, RECIPES, plain_values, read_recipe, store_base
from train.recipe.reading import RecipeError, flatten, plain, read
from train.recipe.sentences import one_sentence
from train.recipe.tree import Recipe
from train.refusal import refuse
from train.run_directory import run_dir_of, stored_recipe

OWN_KEYS = ("checkpoint", "branch", "every")
GROUPS = tuple(sorted(folder.name for folder in RECIPES.iterdir() if folder.is_dir()))
KEPT = {"precision": ("compute", "backend")}  # of a group that is replaced
FIXED = ("data.*", "train.global_batch_size", "train.sequence_length", "run.seed", "precision.compute")
FREE = ("data.cache",)
LENGTH = ("train.steps", "train.tokens")
UNNAMED = (
    "run.",
    "monitor.",
    "checkpoint.",
    "parallel.",
    "cluster.",
    "train.",
    "evaluation.",
    "data.cache",
)  # say nothing of what a branch is
EXAMPLE = "python -m train.branch checkpoint=runs/x/checkpoints/step-00000240 precision=bf16"


@dataclass(frozen=True)
class Wanted:
    """A command line. checkpoint: where to fork; overrides: of the recipe; own: the other keys of the command."""

    checkpoint: str
    overrides: tuple[str, ...]
    own: Mapping[str, Any]


def branch(arguments: Sequence[str], begin: Callable[[Recipe], int] = run, ranks: int | None = None) -> int:
    """Trains the branch, or the sweep, of a command line; returns the exit status.

    begin: what is done with the branch's recipe. ranks: that it is to run on; None: those that were started, on which alone a sweep runs.
    """
    try:
        forbid_environment()
        wanted = parse(arguments)
        if "branch" in wanted.own:
            if ranks is not None:
                raise RecipeError(
                    "branch=[...] is a sweep, whose jobs run one after the other on one rank each: use python -m train.branch"
                )
            return branch_sweep.sweep(wanted.checkpoint, wanted.own, wanted.overrides)
        if "every" in wanted.own:
            raise RecipeError(f"every={wanted.own['every']} belongs to a sweep: say of what, as in branch=[bf16,fp32]")
        return begin(branch_recipe(wanted, world_size() if ranks is None else ranks))
    except (HydraException, OmegaConfBaseException) as error:
        return refuse(one_sentence(error, arguments))
    except (ValueError, OSError) as error:
        return refuse(str(error))


def parse(arguments: Sequence[str]) -> Wanted:
    """Raises RecipeError, in one sentence, for what is no command line of a branch."""
    own: dict[str, Any] = {}
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            raise RecipeError(f"{argument!r} is not understood: write key=value, as in {EXAMPLE}")
        override = _parsed(argument)
        key = override.key_or_group
        if override.is_sweep_override():
            raise RecipeError(f"{argument!r} is a sweep: give one value, or sweep over precisions with branch=[bf16,fp32]")
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            raise RecipeError(f"{argument!r} is Hydra's own: a branch takes keys of the recipe only")
        if key in OWN_KEYS:
            own[key] = override.value()
        else:
            overrides.append(argument)
    checkpoint = own.pop("checkpoint", None)
    if not isinstance(checkpoint, str):
        raise RecipeError(f"checkpoint=... is missing: {EXAMPLE}")
    return Wanted(checkpoint, tuple(overrides), own)


def branch_recipe(wanted: Wanted, ranks: int | None) -> Recipe:
    """The validated recipe of a branch on so many ranks. Raises RecipeError, and CheckpointError, in one sentence, and Hydra's exceptions."""
    checkpoint = open_checkpoint(wanted.checkpoint, verify=False)
    stored = stored_recipe(checkpoint)
    parent = _read_parent(stored, checkpoint)
    values = _composed(stored, wanted.overrides)
    values["run"]["parent"] = str(checkpoint.path)
    home = Path(str(run_dir_of(checkpoint)))
    label = f"step-{checkpoint.step}-{_label(wanted.overrides)}"
    if not values["run"].get("dir"):
        values["run"]["dir"] = f"{home}-{label}"
    if Path(values["run"]["dir"]).resolve() == home.resolve():
        raise RecipeError(f"run.dir={values['run']['dir']} is the parent's: leave it out, or choose another one for the branch")
    if not any(override.startswith("run.name=") for override in wanted.overrides):
        values["run"]["name"] = Path(values["run"]["dir"]).name
    recipe = read_recipe(_fitting(values, ranks), ranks)
    _check(parent, recipe, checkpoint)
    return recipe


def differing_rate(parent: Recipe, recipe: Recipe, first: int) -> int | None:
    """The first step (from 0, at least `first`) that both take, with different learning rates; None: there is none."""
    for step in range(first, min(parent.total_steps, recipe.last_step)):
        rates = [learning_rate(one.optimizer, step, one.total_steps, one.tokens_per_step) for one in (parent, recipe)]
        if rates[0] != rates[1]:
            return step
    return None


def _parsed(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        raise RecipeError(f"{argument!r} is not understood: write key=value, as in {EXAMPLE}") from None


def _read_parent(stored: Mapping[str, Any], checkpoint: Checkpoint) -> Recipe:
    # Evaluators that are not registered any more are not needed to go on.
    measured = {key: value for key, value in (stored.get("evaluation") or {}).items() if key in ("evaluators", *EVALUATORS)}
    try:
        return read(Recipe, {**stored, "evaluation": measured})
    except RecipeError as error:
        raise RecipeError(f"the recipe stored with {checkpoint.path} cannot be read ({error}): restore its recipe.yaml") from None


def _composed(stored: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The parent's values under the overrides."""
    base = {group: dict(value) if isinstance(value, Mapping) else value for group, value in stored.items()}
    chosen = {key for override in overrides if (key := _parsed(override).key_or_group) in GROUPS}
    for group in chosen:
        base[group] = {key: base[group][key] for key in KEPT.get(group, ()) if key in base.get(group, {})}
    base["run"] = {**base.get("run", {}), "dir": None, "stop_after": None, "allow": [], "parent": None}
    base["checkpoint"] = {**base.get("checkpoint", {}), "initialize_from": None}
    base["checkpoint"].pop("storage", None)  # the parent's own place
    given = {_parsed(override).key_or_group for override in overrides}
    for key, other in (LENGTH, LENGTH[::-1]):
        if key in given and other not in given:
            base["train"] = {**base["train"], other.split(".")[1]: None}
    store_base()
    groups = [{group: None} for group in GROUPS if group not in OPTIONAL_GROUPS]
    ConfigStore.instance().store(name="branch", node={"defaults": ["base", *groups, "_self_"], **base})
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        return plain_values(compose("branch", overrides=list(overrides)))


def _fitting(values: dict[str, Any], ranks: int | None) -> dict[str, Any]:
    """The parent's microbatches may not divide what a rank has on another number of ranks."""
    train, parallel = values["train"], read(Recipe, values).parallel
    size = train.get("micro_batch_size")
    data = parallel.data(ranks) if ranks is not None else 0
    if isinstance(size, int) and size > 0 and data > 0 and train["global_batch_size"] % (size * data):
        return {**values, "train": {**train, "micro_batch_size": "auto"}}
    return values


def _label(overrides: Sequence[str]) -> str:
    """What the overrides make of a run, fit for a directory: `bf16`, `learning_rate-0.001`, or `same`."""
    words = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if not key.startswith(UNNAMED) or key == "train.only":
            words.append(value if key in GROUPS else f"{key.rsplit('.', 1)[-1]}-{value}")
    return "__".join("".join(c if c.isalnum() or c in "._-" else "_" for c in word) for word in words) or "same"


def _check(parent: Recipe, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raises RecipeError for what would make the branch another run than its parent's continuation under a change."""
    before, after = dict(flatten(plain(parent))), dict(flatten(plain(recipe)))
    for key in sorted(before.keys() | after.keys()):
        fixed = any(fnmatchcase(key, pattern) for pattern in FIXED) and key not in FREE
        if fixed and before.get(key) != after.get(key):
            why = "how its parent keeps its weights" if key == "precision.compute" else "the data its parent reads"
            raise RecipeError(
                f"{key}={after.get(key)!r} differs from {before.get(key)!r} of the run in {run_dir_of(checkpoint)}, but a branch keeps {why}: leave "
                f"it out, or start a run of its own from these weights, with checkpoint.initialize_from={checkpoint.path}"
            )
    if recipe.last_step <= checkpoint.step:
        key = (
            "run.stop_after"
            if recipe.last_step < recipe.total_steps
            else "train.steps"
            if recipe.train.steps is not None
            else "train.tokens"
        )
        raise RecipeError(
            f"{key} ends the branch after step {recipe.last_step}, but {checkpoint.path} is at step {checkpoint.step}: train longer, or fork at an "
            "earlier checkpoint"
        )
    step = differing_rate(parent, recipe, checkpoint.step)
    if step is not None and os.environ.get("RANK", "0") == "0":
        print(
            f"Note: from step {step + 1} on the branch's learning rate is not its parent's, so their gap is not due to the other changes alone; "
            "run.stop_after=... makes a branch shorter and leaves the schedule as it was."
        )
