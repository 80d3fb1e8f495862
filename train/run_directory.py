"""What lies in a run's directory beside its checkpoints and metrics."""

from pathlib import Path
from typing import Any

import yaml

from train.checkpoint.reader import Checkpoint


def run_dir_of(checkpoint: Checkpoint) -> Path:
    """The run a checkpoint belongs to: <run>/checkpoints/step-N."""
    return checkpoint.path.parent.parent


def stored_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """recipe.yaml of the run a checkpoint belongs to. Raises ValueError when it is not there."""
    path = run_dir_of(checkpoint) / "recipe.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist, so the model of {checkpoint.path} is unknown: keep checkpoints inside their run directory"
        )
    return yaml.safe_load(path.read_text())
