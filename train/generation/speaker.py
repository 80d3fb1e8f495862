"""The model of a checkpoint, on one rank, with its tokenizer: no data are opened and no optimizer is made."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from model.hybrid import HybridModel
from parallel import groups
from train.build import build_model
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import Checkpoint
from train.checkpoint.remote import RemotePath
from train.recipe.load import read_recipe
from train.recipe.tree import Recipe
from train.run_directory import run_dir_of, stored_recipe

PRECISIONS = ("fp32", "bf16")


@dataclass
class Speaker:
    """model: in evaluation mode. step, progress: of its training."""

    model: HybridModel
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    progress: float

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocab_size


def open_speaker(checkpoint: Checkpoint, precision: str) -> Speaker:
    """With every product in `precision` (fp32 or bf16); `groups.shutdown` ends it. Raises ValueError, in one sentence, where something is missing."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is none of {', '.join(PRECISIONS)}, in which texts are made")
    recipe = read_recipe(on_one_rank(stored_recipe(checkpoint), precision), 1)
    tokenizer = run_tokenizer(recipe, run_dir_of(checkpoint) / "tokenizer")
    _, (model,) = build_model(recipe, groups.initialize(recipe.parallel, recipe.run.seed))
    load_weights(checkpoint, [model])
    model.eval()
    return Speaker(model, tokenizer, recipe, checkpoint.step, min(checkpoint.step / recipe.total_steps, 1.0))


def on_one_rank(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """A stored recipe for one rank and one precision, whatever the run had."""
    model = dict(values["model"])
    model["pattern"] = str(model["pattern"]).replace("|", "")  # pipeline stages
    return {**values, "model": model, "parallel": {}, "precision": {"compute": precision, "default": precision}}


def run_tokenizer(recipe: Recipe, directory: Path | RemotePath) -> Tokenizer:
    """The one a run has stored, in `directory`. Raises ValueError where it has none."""
    if recipe.data.tokenizer.kind == "bytes":
        return ByteTokenizer()
    try:
        config, stored = json.loads((directory / "tokenizer_config.json").read_text()), (directory / "tokenizer.json").read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no tokenizer.json, and texts need the run's: copy it there from where the run trained"
        ) from None
    with tempfile.TemporaryDirectory() as here:  # the run may lie in a store
        (Path(here) / "tokenizer.json").write_bytes(stored)
        return FileTokenizer(Path(here) / "tokenizer.json", str(config["eos_token"]))
