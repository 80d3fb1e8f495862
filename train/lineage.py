"""branch.json: from which run, at which step, and with which changes a branch was forked (see `train.branch`)."""

import json
from dataclasses import asdict
from pathlib import Path

from train.checkpoint.reader import Checkpoint
from train.observe.base import Parent
from train.observe.redact import without_secrets
from train.recipe.reading import flatten, plain
from train.recipe.tree import Recipe
from train.run_directory import run_dir_of, stored_recipe

FILE_NAME = "branch.json"
WANDB_ID = "wandb_id"
NAMING = ("run.name", "run.dir", "run.parent", "run.stop_after", "run.allow")


def begin_branch(run_dir: Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Notes in the branch's directory where it comes from."""
    parent = run_dir_of(checkpoint)
    identity = parent / WANDB_ID
    before, after = dict(flatten(stored_recipe(checkpoint))), dict(flatten(without_secrets(plain(recipe))))
    changes = {
        key: [before.get(key), after.get(key)]
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key] and key not in NAMING
    }
    wandb_id = identity.read_text().strip() if identity.is_file() else None
    noted = Parent(str(parent), str(checkpoint.path), checkpoint.step, wandb_id, changes)
    partial = run_dir / (FILE_NAME + ".partial")
    partial.write_text(json.dumps(without_secrets(asdict(noted)), indent=2, default=str) + "\n")
    partial.replace(run_dir / FILE_NAME)


def read_parent(run_dir: Path) -> Parent | None:
    """Where a run was forked; None: it is no branch, or its note is damaged (it is no part of the run)."""
    try:
        noted = json.loads((Path(run_dir) / FILE_NAME).read_text())
        changes = {str(key): (was, now) for key, (was, now) in noted["changes"].items()}
        identity = noted["wandb_id"]
        return Parent(str(noted["run_dir"]), str(noted["checkpoint"]), int(noted["step"]), identity and str(identity), changes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
