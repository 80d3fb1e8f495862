"""What a resumed run may change of its recipe."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from train.duration import Duration
from train.observe.redact import without_secrets
from train.recipe.reading import RecipeError, flatten, plain, read
from train.recipe.tree import Recipe

# Keys a resumed run may change; everything else describes the computation that is being continued.
MAY_CHANGE = (
    "run.dir",
    "run.name",
    "run.stop_after",
    "train.log_every",
    "train.eval_every",
    "train.threads",
    "checkpoint.*",
    "monitor.*",
    "cluster.*",
    "data.cache",
    "parallel.timeout_minutes",
)
DURATIONS = ("optimizer.warmup", "optimizer.decay", "checkpoint.every", "run.stop_after")  # 260 steps and 54.2% may be the same


def changed_keys(stored: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Lines `key: old -> new` of what a resume changes. Raises RecipeError for a key that must stay as the run began."""
    # A key that the stored recipe does not know has had its default; secrets were not stored.
    old, new = (dict(flatten(without_secrets(plain(which)))) for which in (read(Recipe, stored), recipe))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or (key in DURATIONS and _in_steps(before, recipe) == _in_steps(after, recipe)):
            continue
        if not any(fnmatchcase(key, allowed) for allowed in MAY_CHANGE):
            raise RecipeError(
                f"{key}={after!r} differs from {before!r}, with which the run in {recipe.run_dir} began: set it back to continue that run, "
                "or choose another run.dir for a new one"
            )
        lines.append(f"{key}: {before} -> {after}")
    return lines


def _in_steps(value: object, recipe: Recipe) -> int | None:
    return None if value is None else recipe.in_steps(Duration.read(value))
